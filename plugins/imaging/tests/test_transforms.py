"""Degradations: hand-computed values, statistics, and the clean image in ``target``."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plait import Run
from plait_imaging import degradations
from plait_imaging.sources import Photos
from plait_imaging.transforms import (
    JPEG,
    Compose,
    Downsample,
    GaussianBlur,
    GaussianNoise,
    MotionBlur,
    PoissonGaussianNoise,
    Rain,
)


def dataset_of(*arrays):
    return Dataset.from_dict(
        {"image": [Image.fromarray(array) for array in arrays], "name": [f"n{i}" for i in range(len(arrays))]}
    )


def pixels(dataset, column="image"):
    return [np.array(picture) for picture in dataset[column][:]]


def flat(level, shape=(64, 64)):
    return np.full((*shape, 3), level, dtype=np.uint8)


@pytest.fixture(scope="module")
def photos():
    return Photos(splits={"train": ("chelsea",), "test": ("coffee",)}, tile_size=96).load_data(Run())


@pytest.mark.parametrize(
    "method",
    [Rain(), GaussianNoise(), PoissonGaussianNoise(), GaussianBlur(), MotionBlur(), JPEG(), Downsample(factor=4)],
    ids=lambda method: type(method).__name__,
)
def test_every_degradation_changes_the_image_and_keeps_the_clean_one(photos, method):
    result = method.transform(photos, Run())
    assert set(result) == {"train", "test"}
    for split, data in result.items():
        assert data["name"][:] == photos[split]["name"][:]
        assert data["photo"][:] == photos[split]["photo"][:]
        for clean, target, degraded in zip(pixels(photos[split]), pixels(data, "target"), pixels(data), strict=True):
            assert np.array_equal(clean, target)
            assert degraded.dtype == np.uint8
            assert degraded.shape != clean.shape or not np.array_equal(degraded, clean)


@pytest.mark.parametrize("method", [Rain(), GaussianNoise(), PoissonGaussianNoise()], ids=lambda m: type(m).__name__)
def test_what_an_image_gets_depends_on_seed_and_name_only(photos, method):
    whole = pixels(method.transform(photos["test"], Run(seed=3)))
    alone = pixels(method.transform(photos["test"].select([1]), Run(seed=3)))
    other = pixels(method.transform(photos["test"], Run(seed=4)))
    assert np.array_equal(whole[1], alone[0])
    assert not np.array_equal(whole[1], other[1])


def test_first_seed_counts_images_over_all_splits(photos):
    rainy = Rain(first_seed=5).transform(photos, Run())
    clean = pixels(photos["test"])[1] / 255
    expected = degradations.add_rain(clean, np.random.default_rng(5 + 2 + 1), 0.02, 15, 80, 0.5, 0.95)
    assert np.array_equal(pixels(rainy["test"])[1], np.round(expected.clip(0, 1) * 255))


def test_rain_of_no_strength_or_no_density_changes_nothing(photos):
    for method in (Rain(strength=0), Rain(density=0)):
        assert np.array_equal(pixels(method.transform(photos["test"], Run()))[0], pixels(photos["test"])[0])


def test_rain_stays_between_the_image_and_half_way_to_its_brightness(photos):
    for clean, rainy in zip(pixels(photos["test"]), pixels(Rain().transform(photos["test"], Run())), strict=True):
        clean, rainy = clean / 255, rainy / 255
        halfway = (clean + 0.95) / 2
        assert (rainy >= np.minimum(clean, halfway) - 1 / 255).all()
        assert (rainy <= np.maximum(clean, halfway) + 1 / 255).all()


@given(length=st.floats(1, 60), angle=st.floats(-180, 180))
@settings(max_examples=40, deadline=None)
def test_line_kernels_sum_to_one_and_are_symmetric(length, angle):
    kernel = degradations.line_kernel(length, angle)
    assert kernel.sum() == pytest.approx(1)
    assert kernel.min() >= 0
    assert np.allclose(kernel, kernel[::-1, ::-1])
    assert kernel[0].sum() == kernel[-1].sum() == kernel[:, 0].sum() == 0  # nothing is cut off


def test_line_kernel_lies_in_the_row_or_the_column():
    across = degradations.line_kernel(9, 0)
    centre = across.shape[0] // 2
    assert across[centre].sum() == pytest.approx(1)
    assert degradations.line_kernel(9, 90)[:, centre].sum() == pytest.approx(1)


@pytest.mark.parametrize("method", [GaussianBlur(sigma=2.5), MotionBlur(length=20)], ids=lambda m: type(m).__name__)
def test_blur_keeps_constants_and_spreads_a_point_into_its_kernel(method):
    assert np.array_equal(pixels(method.transform(dataset_of(flat(77)), Run()))[0], flat(77))
    point = np.zeros((51, 51, 3))
    point[25, 25] = 1
    kernel = method.kernel()
    radius = kernel.shape[0] // 2
    blurred = method.degrade(point)[25 - radius : 26 + radius, 25 - radius : 26 + radius, 0]
    assert np.allclose(blurred, kernel, atol=1e-12)


def test_gaussian_noise_has_its_standard_deviation():
    noisy = pixels(GaussianNoise(sigma=10 / 255).transform(dataset_of(flat(128, (200, 200))), Run()))[0].astype(float)
    assert noisy.mean() == pytest.approx(128, abs=0.15)
    assert noisy.std() == pytest.approx(np.sqrt(100 + 1 / 12), rel=0.02)
    assert abs(np.corrcoef(noisy[..., 0].ravel(), noisy[..., 1].ravel())[0, 1]) < 0.03


def test_poisson_gaussian_noise_grows_with_brightness():
    method = PoissonGaussianNoise(peak=100, sigma=4 / 255)
    for level in (51, 153):
        noisy = method.degrade(flat(level, (200, 200)) / 255, np.random.default_rng(0))
        assert noisy.mean() == pytest.approx(level / 255, rel=0.01)
        assert noisy.var() == pytest.approx(level / 255 / 100 + (4 / 255) ** 2, rel=0.03)


def test_downsampling_keeps_constants_and_ramps():
    image = np.linspace(0, 1, 40)[:, None, None] * np.ones((40, 24, 3))
    small = degradations.downsample(image, 4)
    assert small.shape == (10, 6, 3)
    expected = (np.arange(10) * 4 + 1.5) / 39
    assert np.allclose(small[2:-2, 3, 0], expected[2:-2])
    assert np.allclose(degradations.downsample(np.full((8, 8, 3), 0.3), 2), 0.3)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_downsampling_is_torchs_antialiased_bicubic_away_from_the_border(factor):
    image = np.random.default_rng(0).random((12 * factor, 10 * factor, 3))
    ours = degradations.downsample(image, factor)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    theirs = F.interpolate(tensor, scale_factor=1 / factor, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    # torch leaves out samples beyond the border, where the literature mirrors.
    assert np.allclose(ours[2:-2, 2:-2], theirs[2:-2, 2:-2], atol=1e-6)
    assert not np.allclose(ours[0], theirs[0], atol=1e-6)


def test_downsampling_at_the_border_mirrors():
    image = np.random.default_rng(0).random((8, 8, 3))
    mirrored = np.pad(image, ((8, 8), (8, 8), (0, 0)), mode="symmetric")
    assert np.allclose(degradations.downsample(image, 2), degradations.downsample(mirrored, 2)[4:8, 4:8])


def test_downsampling_cuts_image_and_target_to_a_multiple():
    clean = np.random.default_rng(0).integers(0, 256, (33, 42, 3), dtype=np.uint8)
    run = Run()
    result = Downsample(factor=4).transform(dataset_of(clean), run)
    assert pixels(result)[0].shape == (8, 10, 3)
    assert np.array_equal(pixels(result, "target")[0], clean[:32, :40])
    noisy = Downsample(factor=4).transform(GaussianNoise().transform(dataset_of(clean), run), run)
    assert np.array_equal(pixels(noisy, "target")[0], clean[:32, :40])
    with pytest.raises(ValueError, match="targets differ in size"):
        Downsample(factor=3).transform(noisy, run)
    with pytest.raises(ValueError, match="smaller than factor 50"):
        Downsample(factor=50).transform(dataset_of(clean), run)


def test_jpeg_is_worse_at_lower_quality_and_is_pillows(photos):
    clean = pixels(photos["test"])[0]

    def error(quality):
        return np.square(pixels(JPEG(quality=quality).transform(photos["test"], Run()))[0] - clean.astype(float)).mean()

    assert error(5) > error(30) > error(95) > 0


def test_composition_is_the_transforms_in_order_with_the_first_clean_image_as_target(photos):
    data = photos["test"]
    chain = Compose(transforms=(GaussianBlur(sigma=1), JPEG(quality=20))).transform(data, Run())
    by_hand = JPEG(quality=20).transform(GaussianBlur(sigma=1).transform(data, Run()), Run())
    assert all(map(np.array_equal, pixels(chain), pixels(by_hand)))
    assert all(map(np.array_equal, pixels(chain, "target"), pixels(data)))


def test_composition_is_seeded_and_its_parts_draw_independently():
    data = dataset_of(flat(128))
    twice = Compose(transforms=(GaussianNoise(sigma=5 / 255), GaussianNoise(sigma=5 / 255)))
    first, again, other = (pixels(twice.transform(data, Run(seed=seed)))[0].astype(float) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    # Noise drawn twice from one seed would have a deviation of 10 levels.
    assert first.std() == pytest.approx(np.sqrt(50), rel=0.05)


def test_bad_fields():
    with pytest.raises(ValueError, match="transforms is empty"):
        Compose(transforms=())
    with pytest.raises(ValueError, match=r"density is 2.*allowed is \[0, 1\]"):
        Rain(density=2)
    with pytest.raises(ValueError, match="quality is 0"):
        JPEG(quality=0)
    with pytest.raises(ValueError, match="no column 'image'"):
        Rain().transform(Dataset.from_dict({"text": ["a"]}), Run())
