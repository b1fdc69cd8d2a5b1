"""Two small data sets: scikit-learn's digits, and Fashion-MNIST with truthful captions."""

from __future__ import annotations

import gzip
import random
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from plait_clip import prompts

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FASHION_NAMES = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")

FASHION_CAPTIONS = (
    "a photo of a {b} {s} {n}",
    "a {t} {n} lying on a table",
    "this is a {b} {t} {n}",
    "a picture showing a {s} {n}",
    "a {s} {t} {n} hanging in a shop",
    "someone is selling a {b} {n}",
    "a small image of a {t} {b} {n}",
    "a {n}",
)

# What an augmentation of the captions may replace a word by.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "photo": ("image", "photograph", "pic"),
    "picture": ("image", "photo", "pic"),
    "image": ("picture", "photo"),
    "bag": ("purse", "handbag"),
    "boot": ("shoe",),
    "sneaker": ("trainer", "shoe"),
    "sandal": ("slipper", "shoe"),
    "shirt": ("blouse",),
    "tshirt": ("shirt",),
    "coat": ("jacket",),
    "dress": ("gown",),
    "pullover": ("sweater", "jumper"),
    "trouser": ("jeans",),
    "dark": ("dim",),
    "bright": ("light",),
    "narrow": ("slim",),
    "wide": ("broad",),
    "plain": ("simple",),
    "patterned": ("striped",),
    "small": ("tiny",),
    "table": ("floor", "shelf"),
    "shop": ("store",),
    "showing": ("displaying",),
    "selling": ("buying",),
    "lying": ("holding",),
    "number": ("numeral", "figure"),
    "digit": ("numeral", "figure"),
    "wrote": ("drew",),
}


def vocabulary() -> list[str]:
    """All words of the captions, prompts, class names and synonyms of both data sets."""
    texts = [*prompts.DIGITS, *prompts.FASHION, *FASHION_CAPTIONS, *DIGIT_NAMES, *FASHION_NAMES]
    texts = [
        text.replace("{}", "").replace("{b}", "").replace("{s}", "").replace("{t}", "").replace("{n}", "")
        for text in texts
    ]
    return [
        *texts,
        "dark grey bright narrow square wide plain patterned",
        *SYNONYMS,
        *(w for s in SYNONYMS.values() for w in s),
    ]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 8×8 digits as uint8 [N, 8, 8] and labels [N] (UCI Optical Recognition of Handwritten Digits)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(np.int64)


def digit_split(num_images: int, num_train: int = 1400) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the training and the test digits; always the same permutation."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0)).numpy()
    return order[:num_train], order[num_train:]


def digit_captions(labels: np.ndarray, seed: int) -> list[str]:
    """One of the eight templates for each image, drawn uniformly."""
    draw = random.Random(seed)
    return [prompts.fill(draw.choice(prompts.DIGITS), DIGIT_NAMES[label]) for label in labels]


def fashion_mnist(folder: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``train`` (60,000) and ``test`` (10,000): uint8 [N, 28, 28] and labels [N].

    Args:
        folder: holds the four idx files (``train-images-idx3-ubyte`` ..., plain or ``.gz``), itself or
            in ``FashionMNIST/raw`` as torchvision leaves them.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not what its header says.
    """
    folder = Path(folder)
    raw = folder / "FashionMNIST" / "raw"
    folder = raw if raw.is_dir() else folder
    parts = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = _read_idx(folder, f"{stem}-images-idx3-ubyte")
        labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte")
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
            raise ValueError(
                f"{folder} holds images {images.shape} and labels {labels.shape}; this is not Fashion-MNIST"
            )
        parts[split] = (images, labels.astype(np.int64))
    return parts


def _read_idx(folder: Path, name: str) -> np.ndarray:
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.is_file():
        content = plain.read_bytes()
    elif packed.is_file():
        try:
            content = gzip.decompress(packed.read_bytes())
        except (OSError, EOFError) as error:
            raise ValueError(f"{packed} is damaged: {error}") from error
    else:
        raise FileNotFoundError(f"{folder} holds neither {name} nor {name}.gz")
    num_axes = content[3] if len(content) > 4 and content[:3] == b"\x00\x00\x08" else 0
    start = 4 + 4 * num_axes
    shape = struct.unpack(f">{num_axes}I", content[4:start]) if num_axes else ()
    if not shape or len(content) - start != int(np.prod(shape)):
        raise ValueError(f"{folder / name} is not an idx file of bytes, or it is cut short")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def fashion_attributes(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Brightness, shape and texture words of images [N, 28, 28] uint8, three arrays [N] of str."""
    x = images.astype(np.float64) / 255
    mask = x > 0.1
    area = np.maximum(mask.sum(axis=(1, 2)), 1)
    brightness = (x * mask).sum(axis=(1, 2)) / area
    columns, rows = mask.any(axis=1).sum(axis=1), mask.any(axis=2).sum(axis=1)
    shape = columns / np.maximum(rows, 1)
    texture = np.abs(np.diff(x, axis=2)).sum(axis=(1, 2)) / area
    return (
        np.select([brightness <= 0.45, brightness <= 0.65], ["dark", "grey"], "bright"),
        np.select([shape <= 0.75, shape <= 1.05], ["narrow", "square"], "wide"),
        np.where(texture <= 0.2, "plain", "patterned"),
    )


def fashion_captions(images: np.ndarray, labels: Sequence[int] | np.ndarray, seed: int) -> list[str]:
    """A caption for each image that says only what is true of it; its template is drawn uniformly."""
    draw = random.Random(seed)
    return [
        draw.choice(FASHION_CAPTIONS).format(b=b, s=s, t=t, n=FASHION_NAMES[label])
        for b, s, t, label in zip(*fashion_attributes(images), labels, strict=True)
    ]
