"""Small inputs to try the evaluations of features on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from plait.demo.models import images_of, make_classifier
from plait.demo.pictures import digits
from plait.testing import Example
from torch import Tensor

from plait_diffusion import spair
from plait_diffusion.feature_sets import FeatureSet, Origin

ORIGIN = Origin(model="toy")


def _digit_features(count: int = 40, first: int = 0) -> FeatureSet:
    data = digits(first + count).select(range(first, first + count))
    images = images_of(data)
    return FeatureSet.of_tensors(data, {"pixels": images, "mean": images.mean((2, 3))}, ORIGIN)


def probe() -> Example:
    features = _digit_features(60)
    without_labels = FeatureSet.of_tensors(features.rows.remove_columns("label"), features.read(), ORIGIN)
    return Example(
        arguments={"data": {"a": features, "b": features.only("mean")}, "reference": None},
        fields={"num_labels": 20, "repeats": 3},
        random=True,
        device=False,
        empty={"data": features.select([])},
        wrong={"data": without_labels},
    )


def two_squares(count: int, generator: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """Images [N, 3, 16, 16] with a bright and a dark square on grey, and where these are: 0 neither, 1 and 2."""
    images, masks = np.full((count, 3, 16, 16), 0.5, np.float32), np.zeros((count, 16, 16), np.uint8)
    for number in range(count):
        for label, left in ((1, 0), (2, 8)):
            x, y = left + generator.integers(0, 3), generator.integers(0, 11)
            masks[number, y : y + 5, x : x + 5] = label
            images[number, :, y : y + 5, x : x + 5] = 1.0 if label == 1 else 0.0
    images += generator.normal(0, 0.05, images.shape).astype(np.float32)
    return torch.from_numpy(images), masks


def square_features(count: int = 6, seed: int = 0) -> FeatureSet:
    """Their pixels as features, with column ``mask``."""
    images, masks = two_squares(count, np.random.default_rng(seed))
    rows = datasets.Dataset.from_dict(
        {"name": [str(i) for i in range(count)], "mask": [Image.fromarray(mask) for mask in masks]},
        features=datasets.Features({"name": datasets.Value("string"), "mask": datasets.Image()}),
    )
    return FeatureSet.of_tensors(rows, {"pixels": images, "half": images[:, :, ::2, ::2].contiguous()}, ORIGIN)


def segmentation() -> Example:
    features = square_features()
    without_masks = FeatureSet.of_tensors(features.rows.remove_columns("mask"), features.read(), ORIGIN)
    return Example(
        arguments={"data": features, "reference": None},
        fields={"num_train": 3, "repeats": 1, "side": 8, "num_models": 2, "num_epochs": 1, "num_panels": 1},
        empty={"data": features.select([])},
        wrong={"data": without_masks},
    )


def write_spair(folder: Path, images: int = 4, side: int = 32, splits: Sequence[str] = ("trn", "val", "test")) -> Path:
    """SPair-71k's layout with coloured noise, each image the first one moved by 0, 2, 4, … pixels to the right."""
    base = np.random.default_rng(0).integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)
    place = folder / "JPEGImages" / "cat"
    place.mkdir(parents=True)
    for number in range(images):
        Image.fromarray(base[:, 2 * number : 2 * number + side]).save(
            place / f"{number}.jpg", quality=100, subsampling=0
        )
    for split in splits:
        (folder / "PairAnnotation" / split).mkdir(parents=True)
        (folder / "Layout" / "large").mkdir(parents=True, exist_ok=True)
        names = []
        for source in range(images - 1):
            name = f"{source:06d}-{source}-{source + 1}:cat"
            points = [[12, 10], [20, 16]]
            facts = {
                "category": "cat", "src_imname": f"{source}.jpg", "trg_imname": f"{source + 1}.jpg",
                "src_imsize": [side, side, 3], "trg_imsize": [side, side, 3],
                "src_bndbox": [4, 4, 28, 28], "trg_bndbox": [4, 4, 28, 28],
                "src_kps": points, "trg_kps": [[x - 2, y] for x, y in points],
            }  # fmt: skip
            (folder / "PairAnnotation" / split / f"{name}.json").write_text(json.dumps(facts))
            names.append(name)
        (folder / "Layout" / "large" / f"{split}.txt").write_text("\n".join(names))
    return folder


def spair_data() -> Example:
    folder = write_spair(Path(tempfile.mkdtemp(prefix="plait-")) / "SPair-71k")
    return Example(arguments={}, fields={"folder": str(folder)}, device=False)


def correspondence() -> Example:
    folder = write_spair(Path(tempfile.mkdtemp(prefix="plait-")) / "SPair-71k")
    rows = datasets.Dataset.from_list(list(spair.read_images(folder, [f"cat/{i}" for i in range(4)]))).cast_column(
        "image", datasets.Image()
    )
    pairs = datasets.Dataset.from_list(spair.read_pairs(folder, "test"), features=spair.PAIR_FEATURES)
    features = FeatureSet.of_tensors(rows, {"pixels": images_of(rows)}, ORIGIN)
    return Example(
        arguments={"data": features, "reference": {"train": pairs, "test": pairs}},
        fields={
            "aggregation": "trained", "grid": 32, "match_side": 32, "num_epochs": 1, "pairs_per_epoch": 3,
            "num_panels": 1, "out_channels": 8,
        },
        empty={"data": features.select([])},
        wrong={"reference": {"train": pairs, "test": pairs.remove_columns("target_points")}},
    )  # fmt: skip


def vision() -> Example:
    data: Any = digits()
    return Example(
        arguments={"model": make_classifier(0), "data": data},
        fields={"image_size": 8, "dtype": "float32"},
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image")},
    )
