"""PSNR and SSIM: hand-computed values, other implementations, and what a reader of the report sees."""

import importlib.util
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plait import Run
from plait.errors import MissingDependency
from plait_imaging import metrics
from plait_imaging.images import write_images
from plait_imaging.restorers import GreyOpening, Median
from plait_imaging.scores import PSNRSSIM, Perceptual
from plait_imaging.sources import Photos
from plait_imaging.transforms import Downsample, Rain
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr


def noisy_pair(seed=0, shape=(40, 50)):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(3, *shape, generator=generator) * 255
    return (target + 20 * torch.randn(3, *shape, generator=generator)).clamp(0, 255), target


def direct_ssim(image, target):
    """The formula of Wang et al. position by position where the window lies inside the image."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    profile = torch.exp(-(offsets**2) / (2 * 1.5**2))
    profile /= profile.sum()
    window = (profile[:, None] * profile)[None, None]
    x, y = image.double()[:, None], target.double()[:, None]
    mean_x, mean_y = F.conv2d(x, window), F.conv2d(y, window)
    var_x, var_y = F.conv2d(x * x, window) - mean_x**2, F.conv2d(y * y, window) - mean_y**2
    cov = F.conv2d(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return values.mean().item()


def test_luminance_by_hand():
    white, black = torch.full((3, 2, 2), 255.0), torch.zeros(3, 2, 2)
    assert metrics.luminance(white).unique().tolist() == pytest.approx([235])
    assert metrics.luminance(black).unique().tolist() == pytest.approx([16])
    assert metrics.psnr(metrics.luminance(black), metrics.luminance(white)) == pytest.approx(1.32192, abs=5e-6)
    red = torch.tensor([255.0, 0, 0])[:, None, None]
    assert metrics.luminance(red).item() == pytest.approx(16 + 65.481)


def test_psnr_by_hand_and_of_equal_images():
    image = torch.full((3, 4, 4), 100.0)
    assert metrics.psnr(image, image + 1) == pytest.approx(20 * math.log10(255))
    assert metrics.psnr(image, image) == math.inf


@pytest.mark.parametrize("seed", range(3))
def test_psnr_is_scikit_images_and_torchmetrics(seed):
    image, target = noisy_pair(seed)
    ours = metrics.psnr(image, target)
    assert ours == pytest.approx(
        peak_signal_noise_ratio(target.double().numpy(), image.double().numpy(), data_range=255)
    )
    assert ours == pytest.approx(float(torchmetrics_psnr(image.double(), target.double(), data_range=255.0)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), height=st.integers(11, 40), width=st.integers(11, 40))
def test_ssim_is_the_formula_over_all_windows_inside_the_image(seed, height, width):
    image, target = noisy_pair(seed, (height, width))
    assert metrics.ssim(image, target) == pytest.approx(direct_ssim(image, target), abs=1e-12)
    assert metrics.ssim(target, target) == pytest.approx(1)


def dataset_of(**columns):
    count = len(next(iter(columns.values())))
    pictures = {name: [Image.fromarray(array) for array in arrays] for name, arrays in columns.items()}
    return Dataset.from_dict({**pictures, "name": [f"n{i}" for i in range(count)]})


def flat(level, shape=(16, 18)):
    return np.full((*shape, 3), level, dtype=np.uint8)


def test_means_and_deviations_over_images():
    data = dataset_of(image=[flat(10), flat(20)], target=[flat(11), flat(30)])
    report = PSNRSSIM(panels=0).evaluate(data=data, reference=None, run=Run())
    each = [20 * math.log10(255 / difference) for difference in (1, 10)]
    assert report.value("PSNR", method="result") == pytest.approx(np.mean(each))
    assert report.value("PSNR std", method="result") == pytest.approx(np.std(each, ddof=1))
    assert report.better == {"PSNR": "higher", "SSIM": "higher"}


def test_crop_ignores_the_border():
    big, target = (
        np.pad(flat(50), ((4, 4), (4, 4), (0, 0))),
        np.pad(flat(52), ((4, 4), (4, 4), (0, 0)), constant_values=200),
    )
    data = dataset_of(image=[big], target=[target])
    report = PSNRSSIM(panels=0, crop=4).evaluate(data=data, reference=None, run=Run())
    assert report.value("PSNR", method="result") == pytest.approx(20 * math.log10(255 / 2))


def test_y_is_scored_unrounded():
    data = dataset_of(image=[flat(100)], target=[flat(101)])
    report = PSNRSSIM(panels=0, channels="y").evaluate(data=data, reference=None, run=Run())
    assert report.value("PSNR", method="result") == pytest.approx(20 * math.log10(255 / (219 / 255)))


def test_rounding_decides_which_images_are_scored():
    run, data = Run(), dataset_of(image=[flat(100)], target=[flat(101)])
    unrounded = write_images(run, data, [torch.full((3, 16, 18), 100.4 / 255)], keep_float=True)
    for rounding, difference in ((True, 1.0), (False, 0.6)):
        report = PSNRSSIM(panels=0, rounding=rounding).evaluate(data=unrounded, reference=None, run=run)
        assert report.value("PSNR", method="result") == pytest.approx(20 * math.log10(255 / difference), abs=1e-4)


def test_unrounded_images_that_nobody_kept_are_missed():
    warnings = []
    run, data = Run(on_warning=warnings.append), dataset_of(image=[flat(100)], target=[flat(101)])
    kept = write_images(run, data, [torch.full((3, 16, 18), 100.4 / 255)], keep_float=True)
    both = PSNRSSIM(panels=0, rounding=False).evaluate(data={"fused": kept, "filtered": data}, reference=None, run=run)
    assert "those of fused unrounded and clipped to [0, 1], the others 8 bit" in both.notes[0]
    assert warnings == []
    PSNRSSIM(panels=0, rounding=False).evaluate(data={"filtered": data}, reference=None, run=run)
    assert "filtered kept no unrounded images" in warnings[0]


@pytest.fixture(scope="module")
def rainy():
    photos = Photos(splits={"test": ("chelsea", "coffee")}, tile_size=64).load_data(Run())
    return Rain().transform(photos, Run())["test"]


def test_a_report_of_several_candidates(rainy):
    run = Run()
    candidates = {"median": Median().restore(rainy, run), "opening": GreyOpening().restore(rainy, run)}
    report = PSNRSSIM(panels=2).evaluate(data=candidates, reference=rainy, run=run)
    assert [row["method"] for row in report.rows] == ["input", "median", "opening"]
    assert report.value("PSNR", method="opening") > report.value("PSNR", method="input")

    psnr, ssim = run.reports
    assert [row["image"] for row in psnr.rows] == rainy["name"][:]
    mean = np.mean([row["opening"] for row in psnr.rows])
    assert mean == pytest.approx(report.value("PSNR", method="opening"))
    assert all(0 < row["median"] < 1 for row in ssim.rows)

    assert len(report.panels) == 2
    whole, crops, maps = report.panels[0].images
    assert len(whole) == len(crops) == 4
    assert len(maps) == 3
    first = next(row for row in psnr.rows if row["image"] == report.panels[0].title)
    assert f"{first['median']:.2f} dB" in whole[1].caption
    sizes = {Image.open(io.BytesIO(picture.data)).size for picture in whole}
    assert sizes == {(64, 64)}
    assert len({Image.open(io.BytesIO(picture.data)).size for picture in crops}) == 1


def test_the_error_map_is_black_where_there_is_no_error():
    wrong = flat(50, (64, 64))
    wrong[20:30, 20:30] = 200
    data = dataset_of(image=[wrong], target=[flat(50, (64, 64))])
    report = PSNRSSIM(panels=1, panel_crop=16).evaluate(data=data, reference=None, run=Run())
    picture = np.array(Image.open(io.BytesIO(report.panels[0].images[2][0].data)))
    assert (picture[20:30, 20:30] == 255).all()
    assert picture.astype(int).sum() == 255 * 3 * 100


def test_large_images_are_shown_reduced():
    data = dataset_of(image=[flat(10, (400, 900))], target=[flat(11, (400, 900))])
    report = PSNRSSIM(panels=1).evaluate(data=data, reference=None, run=Run())
    for row in report.panels[0].images:
        assert max(max(Image.open(io.BytesIO(picture.data)).size) for picture in row) <= 320


def test_reference_may_be_the_clean_images_themselves(rainy):
    clean = rainy.remove_columns("image").rename_column("target", "image")
    report = PSNRSSIM(panels=0).evaluate(data={"rainy": rainy.remove_columns("target")}, reference=clean, run=Run())
    by_target = PSNRSSIM(panels=0).evaluate(data={"rainy": rainy}, reference=None, run=Run())
    assert report.rows == by_target.rows


def test_a_small_input_is_left_out(rainy):
    run = Run()
    small = Downsample(factor=2).transform(rainy.remove_columns("target"), run)
    large = small.remove_columns("image").rename_column("target", "image")
    report = PSNRSSIM(panels=1).evaluate(data={"perfect": large}, reference=small, run=run)
    assert [row["method"] for row in report.rows] == ["perfect"]
    assert report.value("PSNR", method="perfect") == math.inf
    assert report.value("SSIM", method="perfect") == pytest.approx(1)


def test_only_the_first_images_are_listed_and_the_report_says_so():
    run, data = Run(), dataset_of(image=[flat(10)] * 5, target=[flat(11)] * 5)
    PSNRSSIM(panels=0, listed=2).evaluate(data=data, reference=None, run=run)
    assert len(run.reports[0].rows) == 2
    assert run.reports[0].notes == ("The first 2 of 5 images.",)


def test_bad_input(rainy):
    method, run = PSNRSSIM(), Run()
    with pytest.raises(ValueError, match=r"no column 'target' and no reference"):
        method.evaluate(data=rainy.remove_columns("target"), reference=None, run=run)
    with pytest.raises(ValueError, match="do not show the same images"):
        method.evaluate(data={"a": rainy.select([1, 0])}, reference=rainy, run=run)
    with pytest.raises(ValueError, match="b lacks 3 of the images of a"):
        method.evaluate(data={"a": rainy, "b": rainy.select([0])}, reference=None, run=run)
    with pytest.raises(ValueError, match="16×18 pixels in result and 20×18 in its target"):
        method.evaluate(data=dataset_of(image=[flat(1)], target=[flat(1, (20, 18))]), reference=None, run=run)
    with pytest.raises(ValueError, match="crop 4 leaves less than the 11"):
        PSNRSSIM(crop=4).evaluate(data=dataset_of(image=[flat(1)], target=[flat(2)]), reference=None, run=run)
    with pytest.raises(ValueError, match="has no images"):
        method.evaluate(data=rainy.select([]), reference=None, run=run)
    with pytest.raises(ValueError, match="b is a dict"):
        method.evaluate(data={"a": rainy, "b": {"test": rainy}}, reference=None, run=run)
    with pytest.raises(ValueError, match="channels is 'cielab'"):
        PSNRSSIM(channels="cielab")


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is not None, reason="pyiqa is installed")
def test_perceptual_says_what_to_install():
    with pytest.raises(MissingDependency, match=r'pip install "plait-imaging\[perceptual\]"'):
        Perceptual()


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="needs pyiqa")
def test_perceptual_by_pyiqa(rainy):
    with pytest.raises(ValueError, match="metrics names 'beauty'"):
        Perceptual(metrics=("beauty",))
    # gmsd has no weights to download
    report = Perceptual(metrics=("gmsd",)).evaluate(
        data={"rainy": rainy, "opening": GreyOpening().restore(rainy, Run())}, reference=None, run=Run()
    )
    assert report.better == {"gmsd": "lower"}
    assert report.value("gmsd", method="opening") < report.value("gmsd", method="rainy")
