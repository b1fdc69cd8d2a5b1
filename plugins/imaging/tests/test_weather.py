"""Synthetic weather: fixed points, ranges, seeds, depth, and the transforms around it."""

import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plait import Run
from plait_imaging import weather
from plait_imaging.scores import PSNRSSIM
from plait_imaging.sources import Photos
from plait_imaging.transforms import Haze, HeavyRain, Raindrops, RandomCrops, Snow, Weathers

KINDS = sorted(weather.WEATHERS)


def photograph(seed=0, side=40):
    rough = np.random.default_rng(seed).random((side // 4, side // 4, 3))
    return rough.repeat(4, axis=0).repeat(4, axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_severity_is_no_weather(kind):
    image = photograph()
    assert np.allclose(weather.WEATHERS[kind](image, np.random.default_rng(0), 0.0), image)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), severity=st.floats(0.1, 2), kind=st.sampled_from(KINDS))
def test_weather_stays_in_range_and_is_seeded(seed, severity, kind):
    image = photograph(seed)
    one, other = (weather.WEATHERS[kind](image, np.random.default_rng(seed), severity) for _ in range(2))
    assert np.array_equal(one, other)
    assert one.shape == image.shape
    assert 0 <= one.min() <= one.max() <= 1
    assert not np.array_equal(one, image)


def test_haze_by_hand():
    image, far = photograph(), np.ones((40, 40))
    thick = weather.add_haze(image, np.random.default_rng(0), 1e3, depth=far, air_light=(0.8, 0.8))
    assert np.allclose(thick, [0.8, 0.8, 0.824])
    near = weather.add_haze(image, np.random.default_rng(0), 1.0, depth=0 * far)
    assert np.allclose(near, image)
    air = np.broadcast_to([0.8, 0.8, 0.824], image.shape)
    assert np.allclose(weather.add_haze(air, np.random.default_rng(3), 1.0, depth=far, air_light=(0.8, 0.8)), air)
    generator = np.random.default_rng(5)
    beta = 1.2 * np.random.default_rng(5).uniform(0.7, 1.3)
    found = weather.add_haze(image, generator, 1.0, depth=0.5 * far, air_light=(0.9, 0.9))
    expected = image * np.exp(-beta / 2) + np.array([0.9, 0.9, 0.927]) * (1 - np.exp(-beta / 2))
    assert np.allclose(found, expected)


def test_there_is_always_a_drop_and_rain_falls_at_its_angle():
    image = photograph(side=64)
    for seed in range(10):
        assert not np.allclose(weather.add_raindrops(image, np.random.default_rng(seed), 1e-6), image, atol=1e-3)
    black = np.zeros((64, 64, 3))
    upright = weather.add_heavy_rain(
        black, np.random.default_rng(0), 1.0, depth=np.zeros((64, 64)), angle=(0.0, 0.0)
    ).mean(axis=2)
    along, across = (np.abs(np.diff(upright, axis=axis)).mean() for axis in (0, 1))
    assert along < 0.6 * across
    assert upright.max() > 0.2


def test_severe_weather_hides_more():
    image = photograph(side=64)
    for kind in ("haze", "rain", "snow"):
        errors = []
        for severity in (0.5, 1.5):
            draws = [weather.WEATHERS[kind](image, np.random.default_rng(seed), severity) for seed in range(4)]
            errors.append(np.mean([np.square(draw - image).mean() for draw in draws]))
        assert errors[0] < errors[1], kind


@pytest.fixture(scope="module")
def tiles():
    return Photos(splits={"train": ("chelsea",), "test": ("coffee",)}, tile_size=48).load_data(Run())


@pytest.mark.parametrize(
    "method", [Haze(), HeavyRain(), Snow(), Raindrops(), Weathers()], ids=lambda m: type(m).__name__
)
def test_transforms_keep_the_clean_image_and_depend_on_names_only(tiles, method):
    whole = method.transform(tiles, Run())
    assert np.array_equal(np.array(whole["test"][1]["target"]), np.array(tiles["test"][1]["image"]))
    assert not np.array_equal(np.array(whole["test"][1]["image"]), np.array(tiles["test"][1]["image"]))
    if not isinstance(method, Weathers):
        part = method.transform({"test": tiles["test"].select([1])}, Run())
        assert np.array_equal(np.array(part["test"][0]["image"]), np.array(whole["test"][1]["image"]))


def test_several_weathers_in_turn(tiles):
    data = Weathers(weathers=("snow", "haze")).transform(tiles, Run())["test"]
    assert data["weather"][:] == ["snow", "haze"]
    with pytest.raises(ValueError, match="weathers is empty"):
        Weathers(weathers=())
    report = PSNRSSIM(by="weather", panels=0).evaluate(data, None, Run())
    assert [row["weather"] for row in report.rows] == ["all", "snow", "haze"]
    both = [row["PSNR"] for row in report.rows[1:]]
    assert report.rows[0]["PSNR"] == pytest.approx(sum(both) / 2)
    with pytest.raises(ValueError, match="by is 'season'"):
        PSNRSSIM(by="season").evaluate(data, None, Run())


def test_algorithms_alone_import_little():
    heavy = {"datasets", "pandas", "pyarrow", "scipy.ndimage", "scipy.signal", "skimage.restoration", "torch"}
    modules = "plait_imaging.degradations, plait_imaging.filters, plait_imaging.weather"
    program = f"import sys, {modules}\nprint({heavy!r} & set(sys.modules) or 'none')"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "none"


def test_depth_from_a_column(tiles):
    near, far = Image.new("L", (48, 48), 0), Image.new("L", (48, 48), 255)
    data = Dataset.from_dict({**tiles["test"][:], "far": [near, far]})
    hazy = Haze(depth="far").transform(data, Run())
    assert np.array_equal(np.array(hazy[0]["image"]), np.array(data[0]["image"]))
    assert not np.array_equal(np.array(hazy[1]["image"]), np.array(data[1]["image"]))
    wrong = Dataset.from_dict({**tiles["test"][:], "far": [near.resize((8, 8))] * 2})
    with pytest.raises(ValueError, match="8×8 pixels and its image 48×48"):
        Haze(depth="far").transform(wrong, Run())
    with pytest.raises(ValueError, match=r"severity is \[2.0, 1.0\]|severity is \[2, 1\]"):
        Haze(severity=(2, 1))


def test_crops_of_images_and_their_targets():
    rows = np.arange(30 * 40, dtype=np.uint8).reshape(30, 40)
    image = Image.fromarray(np.stack([rows] * 3, axis=-1))
    data = Dataset.from_dict({"image": [image], "target": [image], "name": ["a"], "weather": ["rain"]})
    crops = RandomCrops(size=8, crops_per_image=5).transform(data, Run())
    assert crops["name"][:] == [f"a_{number}" for number in range(5)]
    assert crops["weather"][:] == ["rain"] * 5
    for crop in crops:
        cut = np.array(crop["image"])
        assert cut.shape == (8, 8, 3)
        assert np.array_equal(cut, np.array(crop["target"]))
        assert (np.diff(cut[0, :, 0].astype(int)) % 256 == 1).all()
    other = RandomCrops(size=8, crops_per_image=5).transform(data, Run(seed=1))
    assert any(
        not np.array_equal(np.array(a["image"]), np.array(b["image"])) for a, b in zip(crops, other, strict=True)
    )
    with pytest.raises(ValueError, match="image a is 30×40 pixels; lower size, which is 64"):
        RandomCrops(size=64).transform(data, Run())


def test_whole_photographs():
    data = Photos(splits={"test": ("motorcycle",)}, layout="whole").load_data(Run())["test"]
    assert data["name"][:] == ["motorcycle"]
    assert data[0]["image"].size == (741, 500)
