"""Four small real classification tasks from data that ships with scikit-learn and scikit-image.

Handwritten digits (UCI, via scikit-learn, CC BY 4.0) and six CC0 photographs of scikit-image, all as
16×16 gray images: ``digits``; ``clutter`` (inverted digits over a random photo patch); ``rotated``
(digits turned by 90° with permuted labels); ``textures`` (brick, grass, gravel; training patches from the
left 60 % of a photo, test patches from the right).
"""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import skimage
from PIL import Image
from sklearn.datasets import load_digits

TASKS = ("digits", "clutter", "rotated", "textures")
SIZE = 16
TRAIN_DIGITS = 1100
TEXTURES = ("brick", "grass", "gravel")
PHOTOS = ("camera", "coffee", "chelsea", *TEXTURES)
CLASSES = {
    **dict.fromkeys(TASKS[:3], ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")),
    "textures": TEXTURES,
}


def photo(name: str) -> np.ndarray:
    """A photograph as gray levels in [0, 1]."""
    with Image.open(Path(skimage.__file__).parent / "data" / f"{name}.png") as file:
        return np.asarray(file.convert("L"), dtype=np.float32) / 255


def four_tasks(task: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``train`` and ``test`` of a task: images uint8 (N, 16, 16) and labels int64 (N,).

    The same seed splits the digits alike in every task, so no test digit is seen in training anywhere.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; allowed is one of {', '.join(TASKS)}")
    if task == "textures":
        return {split: _textures(split, seed) for split in ("train", "test")}
    bunch = load_digits()
    order = np.random.default_rng([seed, 0]).permutation(len(bunch.target))
    parts = {"train": order[:TRAIN_DIGITS], "test": order[TRAIN_DIGITS:]}
    draw = np.random.default_rng([seed, 1 + TASKS.index(task)])
    renamed = np.random.default_rng([seed, 9]).permutation(10)
    found = {}
    for split, rows in parts.items():
        images = np.stack([_enlarged(image / 16) for image in bunch.images[rows]])
        labels = bunch.target[rows]
        if task == "clutter":
            images = ((1 - images) * 0.8 + 0.5 * _patches(PHOTOS, len(images), draw)) / 1.3
        elif task == "rotated":
            images, labels = np.rot90(images, axes=(1, 2)), renamed[labels]
        found[split] = (_bytes(images), labels.astype(np.int64))
    return found


def task_dataset(task: str, seed: int) -> datasets.DatasetDict:
    """:func:`four_tasks` as datasets with columns ``image`` and ``label``."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES[task]))})
    parts = {}
    for split, (images, labels) in four_tasks(task, seed).items():
        rows = {"image": [Image.fromarray(image).convert("RGB") for image in images], "label": labels.tolist()}
        parts[split] = datasets.Dataset.from_dict(rows, features=features)
    return datasets.DatasetDict(parts)


def _textures(split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    number = {"train": 500, "test": 200}[split]
    draw = np.random.default_rng([seed, 20 + (split == "test")])
    images = []
    for name in TEXTURES:
        picture = Image.fromarray(_bytes(photo(name)))
        half = np.asarray(picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)) / 255
        edge = int(0.6 * half.shape[1])
        images.append(_crops(half[:, :edge] if split == "train" else half[:, edge:], number, draw))
    return _bytes(np.concatenate(images)), np.repeat(np.arange(len(TEXTURES)), number).astype(np.int64)


def _patches(names: tuple[str, ...], number: int, draw: np.random.Generator) -> np.ndarray:
    pictures = [photo(name) for name in names]
    which = draw.integers(len(names), size=number)
    return np.stack([_crops(pictures[index], 1, draw)[0] for index in which])


def _crops(picture: np.ndarray, number: int, draw: np.random.Generator) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(picture, (SIZE, SIZE))
    return windows[draw.integers(windows.shape[0], size=number), draw.integers(windows.shape[1], size=number)]


def _enlarged(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image.astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def _bytes(images: np.ndarray) -> np.ndarray:
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
