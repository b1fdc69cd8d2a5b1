"""Small inputs on which ``plait check`` tries the methods."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from plait.testing import Example


def labelled_images() -> Example:
    """Four PNG files in two class folders."""
    folder = Path(tempfile.mkdtemp(prefix="plait-example-"))
    generator = np.random.default_rng(0)
    for name in ("cat/a", "cat/b", "dog/a", "dog/b"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return Example(arguments={}, fields={"source": str(folder)}, device=False)


def select() -> Example:
    return _on_rows({"where": {"label": ["cat", "dog"]}, "draw": 3}, random=True)


def concat() -> Example:
    data = _rows()
    return Example(
        arguments={"data": {"a": data, "b": data.select([1, 0])}},
        fields={"origin": "source"},
        progress=False,
        device=False,
        empty={"data": {}},
        wrong={"data": {"a": data, "b": data.remove_columns("label")}},
    )


def relabel() -> Example:
    return _on_rows({"classes": {"cat": "pet", "dog": "pet"}})


def caption() -> Example:
    return _on_rows({"shift": 1})


def resize() -> Example:
    return _on_rows({"size": 4}, progress=True)


def _rows() -> datasets.Dataset:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (8, 6, 3), dtype=np.uint8)) for _ in range(6)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "tree"])}
    )
    return datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 2, 0, 1, 2]}, features=features)


def _on_rows(fields: dict[str, Any], **facts: Any) -> Example:
    data = _rows()
    return Example(
        arguments={"data": data},
        fields=fields,
        device=False,
        empty={"data": data.select([])},
        wrong={"data": [1, 2, 3]},
        **{"progress": False, **facts},
    )
