"""The digit scenes: what the captions say is what the pixels show."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plait import Run
from plait_clip import toy_data
from plait_sa_aet import scenes
from plait_sa_aet.captions import clean_caption
from plait_sa_aet.plugin.scenes import DigitScenes
from plait_sa_aet.stop_words import STOP_WORDS
from plait_sa_aet.word_candidates import Synonyms

NAMES = toy_data.DIGIT_NAMES


@pytest.fixture(scope="module")
def bed():
    """Few scenes in full colours on a level ground, which makes it easy to see what was painted."""
    return DigitScenes(num_train=40, num_test=30, grey=(0.1, 0.1), opacity=1.0).load_data(Run(seed=3))


def pixels(data):
    return torch.from_numpy(np.stack([np.asarray(image) for image in data["image"]])).float() / 255


def test_sizes_and_columns(bed):
    assert {split: len(part) for split, part in bed.items()} == {"train": 40, "test": 30}
    for part in bed.values():
        assert {image.size for image in part["image"]} == {(24, 24)}
        assert {image.mode for image in part["image"]} == {"RGB"}
        assert all(len(captions) == 5 for captions in part["captions"])
        assert part.features["label"].names == list(NAMES)
        assert [NAMES[label] for label in part["label"]] == part["left"][:]
    assert DigitScenes().num_train == 4000
    assert DigitScenes().num_test == 150


def test_training_and_test_digits_are_a_partition():
    train, test = scenes.digit_pools()
    assert [len(part[0]) for part in (train, test)] == [1300, 497]
    both = np.concatenate([train[0], test[0]])
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in toy_data.digits()[0])


def test_the_seed_decides():
    small = DigitScenes(num_train=6, num_test=6)
    one, same, other = (small.load_data(Run(seed=seed)) for seed in (0, 0, 1))
    for split in ("train", "test"):
        assert torch.equal(pixels(one[split]), pixels(same[split]))
        assert one[split]["captions"][:] == same[split]["captions"][:]
        assert not torch.equal(pixels(one[split]), pixels(other[split]))
    assert one["train"]["captions"][:] != one["test"]["captions"][:]


def test_backgrounds_lie_in_the_range_and_are_noisy():
    rows = scenes.scenes(scenes.digit_pools()[0], 200, torch.Generator().manual_seed(0))
    # The digits leave rows free above or below them; the median is the ground.
    ground = pixels(rows).flatten(1, 2).median(dim=1).values
    assert 0.08 < ground.min() < 0.16
    assert 0.39 < ground.max() < 0.55
    level = scenes.scenes(scenes.digit_pools()[0], 50, torch.Generator().manual_seed(0), grey=(0.3, 0.3))
    noise = [half[0] - 0.3 for half in pixels(level) if (half[0] - 0.3).abs().max() < 0.2]  # first rows without a digit
    assert float(torch.stack(noise).std()) == pytest.approx(0.04, rel=0.15)


def test_faint_paint_moves_the_ground_part_of_the_way():
    full, half = (
        scenes.scenes(scenes.digit_pools()[0], 20, torch.Generator().manual_seed(0), grey=(0.3, 0.3), opacity=opacity)
        for opacity in (1.0, 0.5)
    )
    none = scenes.scenes(scenes.digit_pools()[0], 20, torch.Generator().manual_seed(0), grey=(0.3, 0.3), opacity=1e-9)
    middle = (pixels(full) + pixels(none)) / 2
    assert torch.allclose(pixels(half), middle, atol=1.01 / 255)
    assert full["captions"] == half["captions"]


def test_captions_tell_colours_digits_and_sides(bed):
    for row in bed["test"]:
        left, right = f"{row['left_colour']} {row['left']}", f"{row['right_colour']} {row['right']}"
        assert row["captions"][0] == f"a {left} to the left of a {right}"
        assert row["captions"][1] == f"the {left} stands near the {right}"
        assert row["captions"][3] == f"a {right} is placed on the right of the {left}"
        assert all(left in text and right in text for text in row["captions"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_pixels_show_what_the_captions_tell(bed, split):
    digits, labels = scenes.digit_pools()[split == "test"]
    strangers = scenes.digit_pools()[split == "train"][0]
    colours = torch.tensor(list(scenes.COLOURS.values()))
    for row, scene in zip(bed[split], pixels(bed[split]), strict=True):
        for side, half in (("left", scene[:, :12]), ("right", scene[:, 12:])):
            flat = half.reshape(-1, 3)
            brightest = flat[flat.amax(dim=1).argmax()]
            nearest = (colours - brightest).norm(dim=1).argmin()
            assert list(scenes.COLOURS)[nearest] == row[f"{side}_colour"]
            # How much of the colour lies on the ground; then the digit that looks like it, at any height.
            ink = colours[nearest] - 0.1
            alpha = ((half - 0.1) @ ink) / (ink @ ink)
            own, place = _nearest(alpha, digits)
            assert NAMES[labels[place]] == row[side]
            assert own < _nearest(alpha, strangers)[0]


def _nearest(alpha, digits):
    painted = torch.from_numpy(digits).float()[:, None] / 255
    painted = F.interpolate(painted, size=(12, 12), mode="bilinear", align_corners=False).flatten(1)
    windows = torch.stack([alpha[top : top + 12].flatten() for top in range(13)])
    outside = alpha.square().sum() - windows.square().sum(dim=1)
    residual = torch.cdist(windows, painted).square() + outside[:, None]
    return residual.min(), int(residual.min(dim=0).values.argmin())


def test_swaps_leave_colours_and_digits_alone(bed):
    words = Synonyms(scenes.SWAPS)
    told = {*scenes.COLOURS, *NAMES}
    assert not told & {word for word, others in scenes.SWAPS.items() for word in (word, *others)}
    for text in {text for texts in bed["train"]["captions"] for text in texts}:
        assert clean_caption(text) == text
        split = text.split()
        swaps = [
            [new for new, _ in words.propose(split, i, 10) if new not in STOP_WORDS]
            for i, word in enumerate(split)
            if word not in STOP_WORDS
        ]
        assert any(swaps)


def test_the_ground_is_given_from_dark_to_light():
    with pytest.raises(ValueError, match="lower level first"):
        DigitScenes(grey=(0.5, 0.2))
    with pytest.raises(ValueError, match="num_train"):
        DigitScenes(num_train=0)
