"""Toy data: scenes of two coloured digits with five captions each, from scikit-learn's packaged digits.

What the transfer of attacks is measured on without any download. A scene says which digit in which colour stands on
which side, so its captions can be retrieved; the words of a caption that carry none of that may be swapped
(:data:`SWAPS`), since swapping a colour or a digit would break retrieval without any attack on the model.
"""

from __future__ import annotations

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from plait_clip import png_bytes, toy_data

SIDE = 24
HALF = SIDE // 2
COLOURS = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.85, 0.2),
    "blue": (0.2, 0.35, 1.0),
    "yellow": (0.95, 0.9, 0.15),
    "purple": (0.7, 0.2, 0.9),
    "white": (1.0, 1.0, 1.0),
}
# a: left digit in its colour, b: right digit in its colour
CAPTIONS = (
    "a {a} to the left of a {b}",
    "the {a} stands near the {b}",
    "a picture with a {a} beside a {b}",
    "a {b} is placed on the right of the {a}",
    "small image showing a {a} next to a {b}",
)
SWAPS: dict[str, tuple[str, ...]] = {
    "left": ("right", "front", "top"),
    "right": ("left", "front", "top"),
    "stands": ("sits", "lies", "placed"),
    "picture": ("image", "photo", "drawing"),
    "placed": ("stands", "sits", "lies"),
    "small": ("big", "dark", "bright"),
    "image": ("picture", "photo", "drawing"),
    "showing": ("hiding", "holding"),
    "next": ("close",),
}


def digit_pools(num_train: int = 1300) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The digits for training scenes and those for test scenes: uint8 [N, 8, 8] and labels [N] each."""
    images, labels = toy_data.digits()
    train, test = toy_data.digit_split(len(images), num_train)
    return (images[train], labels[train]), (images[test], labels[test])


def scenes(
    digits: tuple[np.ndarray, np.ndarray],
    count: int,
    generator: torch.Generator,
    *,
    grey: tuple[float, float] = (0.1, 0.45),
    opacity: float = 0.5,
) -> datasets.Dataset:
    """Scenes with their captions, held in memory.

    Args:
        digits: uint8 [N, 8, 8] and labels [N] that are drawn from.
        grey: range of the background's level, in [0, 1].
        opacity: of the digits' paint, in [0, 1]; the fainter they are, the more a given budget can do.

    Returns:
        ``image`` (24 × 24), five ``captions``, ``left``, ``right``, ``left_colour``, ``right_colour``, and ``label``, the
        class of the left digit.
    """
    pictures, labels = digits
    draw = {"generator": generator}
    background = torch.rand(count, 1, 1, 1, **draw) * (grey[1] - grey[0]) + grey[0]
    images = (background + 0.04 * torch.randn(count, 3, SIDE, SIDE, **draw)).clamp(0, 1)
    names, values = list(COLOURS), torch.tensor(list(COLOURS.values()))
    about: dict[str, list[str]] = {}
    for side, left in (("left", 0), ("right", HALF)):
        chosen = torch.randint(len(pictures), (count,), **draw)
        colours = torch.randint(len(names), (count,), **draw)
        top = torch.randint(SIDE - HALF + 1, (count,), **draw)
        alpha = torch.from_numpy(pictures[chosen.numpy()]).float()[:, None] / 255
        alpha = F.interpolate(alpha, size=(HALF, HALF), mode="bilinear", align_corners=False)
        # Row r of the half shows row r - top of the digit, where it has one.
        rows = torch.arange(SIDE)[None, :] - top[:, None]
        inside = ((rows >= 0) & (rows < HALF))[:, None, :, None]
        index = rows.clamp(0, HALF - 1)[:, None, :, None].expand(-1, 1, -1, HALF)
        mask = opacity * alpha.gather(2, index) * inside
        half = images[..., left : left + HALF]
        images[..., left : left + HALF] = half + mask * (values[colours][:, :, None, None] - half)
        about[side] = [toy_data.DIGIT_NAMES[labels[i]] for i in chosen.tolist()]
        about[f"{side}_colour"] = [names[i] for i in colours.tolist()]
    things = [
        (f"{about['left_colour'][i]} {about['left'][i]}", f"{about['right_colour'][i]} {about['right'][i]}")
        for i in range(count)
    ]
    captions = [[text.format(a=a, b=b) for text in CAPTIONS] for a, b in things]
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    cells = [{"bytes": png_bytes(image), "path": f"scene-{i:05d}.png"} for i, image in enumerate(pixels)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.Sequence(datasets.Value("string")),
            **{name: datasets.Value("string") for name in about},
            "label": datasets.ClassLabel(names=list(toy_data.DIGIT_NAMES)),
        }
    )
    columns = {"image": cells, "captions": captions, **about, "label": about["left"]}
    return datasets.Dataset.from_dict(columns, features=features)


def vocabulary() -> list[str]:
    """All words of the captions and of the swaps, and "unk", so that a word masked by [UNK] leaves its place taken."""
    templates = [text.replace("{a}", "").replace("{b}", "") for text in CAPTIONS]
    swaps = [*SWAPS, *(word for others in SWAPS.values() for word in others)]
    return [*templates, *COLOURS, *toy_data.DIGIT_NAMES, *swaps, "unk"]
