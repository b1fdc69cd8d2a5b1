"""Digits as a dataset, and datasets with other images."""

from __future__ import annotations

from typing import Any

from plait.optional import require


def digits(rows: int = 7) -> Any:
    """A dataset of scikit-learn's digits: ``image`` (RGB, 8×8), ``name``, ``label``."""
    datasets, numpy, picture = require("datasets"), require("numpy"), require("PIL.Image")
    bunch = require("sklearn.datasets").load_digits()
    pixels = (bunch.images[:rows] * 255 / 16).round().astype(numpy.uint8)
    features = datasets.Features(
        image=datasets.Image(),
        name=datasets.Value("string"),
        label=datasets.ClassLabel(names=[str(d) for d in range(10)]),
    )
    content = {
        "image": [picture.fromarray(numpy.stack([p] * 3, axis=-1)) for p in pixels],
        "name": [f"digit{i}" for i in range(len(pixels))],
        "label": [int(label) for label in bunch.target[:rows]],
    }
    return datasets.Dataset.from_dict(content, features=features)


def with_images(data: Any, images: Any, keep_as: str = "") -> Any:
    """A copy of a small dataset with other images.

    Args:
        images: float tensors ``[N, 3, H, W]`` in [0, 1]; they are clipped and rounded to 8 bits.
        keep_as: a column that keeps the images of ``data``.
    """
    datasets, picture = require("datasets"), require("PIL.Image")
    levels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    features = {**data.features, "image": datasets.Image(), **({keep_as: datasets.Image()} if keep_as else {})}
    columns = {name: list(data[name]) for name in data.column_names}
    columns = {
        **columns,
        "image": [picture.fromarray(level) for level in levels],
        **({keep_as: columns["image"]} if keep_as else {}),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
