"""Classical restorers: against SciPy and scikit-image, and on photographs with known damage."""

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from plait import Run
from plait_imaging.restorers import GreyOpening, Median, RichardsonLucy, TotalVariation, WaveletShrinkage, Wiener
from plait_imaging.sources import Photos
from plait_imaging.transforms import JPEG, GaussianBlur, GaussianNoise, MotionBlur, Rain
from scipy import ndimage
from skimage.restoration import denoise_tv_chambolle

ALL = [Median(), GreyOpening(), TotalVariation(), WaveletShrinkage(), Wiener(), RichardsonLucy()]


@pytest.fixture(scope="module")
def photos():
    return Photos(splits={"train": ("chelsea",), "test": ("coffee",)}, tile_size=96).load_data(Run())


def pixels(dataset, column="image"):
    return [np.array(picture) for picture in dataset[column][:]]


def error(dataset):
    pairs = zip(pixels(dataset), pixels(dataset, "target"), strict=True)
    return np.mean([np.square(image - target.astype(float)).mean() for image, target in pairs])


@pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)
def test_all_columns_splits_and_sizes_are_kept(photos, method):
    rainy = Rain().transform(photos, Run())
    restored = method.restore(rainy, Run())
    assert set(restored) == {"train", "test"}
    for split, data in restored.items():
        assert data["name"][:] == rainy[split]["name"][:]
        assert all(map(np.array_equal, pixels(data, "target"), pixels(rainy[split], "target")))
        assert [image.shape for image in pixels(data)] == [image.shape for image in pixels(rainy[split])]


@pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)
def test_a_constant_image_stays_and_inputs_are_not_modified(method):
    flat = np.full((40, 44, 3), 90, dtype=np.uint8)
    data = Dataset.from_dict({"image": [Image.fromarray(flat)], "name": ["flat"]})
    restored = pixels(method.restore(data, Run()))[0].astype(int)
    assert abs(restored - 90).max() <= 1
    assert np.array_equal(pixels(data)[0], flat)


def test_filters_are_those_of_scipy_and_scikit_image_channel_by_channel(photos):
    data = photos["test"]
    for ours, image in zip(pixels(Median(size=(3, 5)).restore(data, Run())), pixels(data), strict=True):
        theirs = [ndimage.median_filter(image[..., c], size=(3, 5), mode="reflect") for c in range(3)]
        assert np.array_equal(ours, np.stack(theirs, axis=-1))
    for ours, image in zip(pixels(GreyOpening(size=(3, 5)).restore(data, Run())), pixels(data), strict=True):
        theirs = [ndimage.grey_opening(image[..., c], size=(3, 5), mode="reflect") for c in range(3)]
        assert np.array_equal(ours, np.stack(theirs, axis=-1))
    for ours, image in zip(pixels(TotalVariation().restore(data, Run())), pixels(data), strict=True):
        theirs = denoise_tv_chambolle(image / 255, weight=0.15, channel_axis=-1)
        assert np.array_equal(ours, np.round(theirs.clip(0, 1) * 255))


def test_opening_never_brightens(photos):
    for restored, image in zip(
        pixels(GreyOpening().restore(photos["test"], Run())), pixels(photos["test"]), strict=True
    ):
        assert (restored <= image).all()


@pytest.mark.parametrize("method", [Median(), GreyOpening(), TotalVariation()], ids=lambda m: type(m).__name__)
def test_rain_is_reduced(photos, method):
    rainy = Rain().transform(photos["test"], Run())
    assert error(method.restore(rainy, Run())) < error(rainy)


@pytest.mark.parametrize(
    "method",
    [
        TotalVariation(weight=0.1),
        WaveletShrinkage(),
        WaveletShrinkage(rule="VisuShrink", wavelet="sym4", sigma=25 / 255, mode="hard"),
    ],
    ids=str,
)
def test_noise_is_more_than_halved(photos, method):
    noisy = GaussianNoise(sigma=25 / 255).transform(photos["test"], Run())
    assert error(method.restore(noisy, Run())) < 0.5 * error(noisy)


@pytest.mark.parametrize(
    "blur", [MotionBlur(length=9, angle=30), GaussianBlur(sigma=1.5)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("method", [Wiener, RichardsonLucy], ids=lambda m: m.__name__)
def test_a_known_blur_is_undone_to_a_good_part(photos, method, blur):
    blurred = blur.transform(photos["test"], Run())
    restored = method(blur=blur).restore(blurred, Run())
    assert error(restored) < 0.6 * error(blurred)
    wrong = method(blur=MotionBlur(length=9, angle=-60)).restore(blurred, Run())
    assert error(wrong) > error(restored)


def test_bad_fields():
    with pytest.raises(ValueError, match=r"size is .* allowed is"):
        Median(size=(0, 3))
    with pytest.raises(ValueError, match="wavelet is 'haarr'"):
        WaveletShrinkage(wavelet="haarr")
    with pytest.raises(ValueError, match="blur is JPEG, which has no kernel"):
        Wiener(blur=JPEG())
    with pytest.raises(ValueError, match="weight is 0"):
        TotalVariation(weight=0)
