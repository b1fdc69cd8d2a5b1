"""Small inputs on which ``plait check`` tries the methods of this package."""

from __future__ import annotations

import csv
import functools
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plait.testing import Example

from plait_clip import toy_data
from plait_clip.toy_models import digit_pairs, tiny_model, toy_embeddings


@functools.cache
def _folder() -> Path:
    """Pictures in class folders, a list of them, and Fashion-MNIST's files with few images."""
    folder = Path(tempfile.mkdtemp(prefix="plait-clip-example-"))
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for i, row in enumerate(digit_pairs(6)):
            path = folder / "classes" / toy_data.DIGIT_NAMES[row["label"]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
            table.writerow([path.relative_to(folder), row["captions"][0]])
    draw = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        images = draw.integers(0, 256, (20, 28, 28)).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(20, dtype=np.uint8) % 10)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{stem}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return folder


def open_clip() -> Example:
    return Example(arguments={"data": digit_pairs()}, random=True, progress=False, device=True, outputs=toy_embeddings)


def transformers_clip() -> Example:
    folder = _folder() / "model"
    if not folder.is_dir():
        tiny_model().save_pretrained(folder)
    return Example(arguments={}, fields={"source": str(folder)}, progress=False, outputs=toy_embeddings)


def clip_contrastive() -> Example:
    data = digit_pairs()
    return Example(
        arguments={"model": tiny_model(), "data": data},
        fields={"num_epochs": 2, "batch_size": 20, "checkpoint_minutes": 0.0},
        random=True,
        outputs=toy_embeddings,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image"), "model": torch.nn.Linear(2, 2)},
    )


def _evaluation(column: str, **fields: Any) -> Example:
    data = digit_pairs()
    return Example(
        arguments={"model": tiny_model(), "data": data},
        fields=fields,
        progress=False,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns(column), "model": torch.nn.Linear(2, 2)},
    )


def zero_shot() -> Example:
    return _evaluation("label", templates="digits")


def retrieval() -> Example:
    return _evaluation("captions")


def _classifier(**fields: Any) -> Example:
    data = digit_pairs()
    splits = {"train": data.select(range(40)), "test": data.select(range(40, 60))}
    return Example(
        arguments={"model": tiny_model(), "data": splits},
        fields=fields,
        progress=False,
        empty={"data": {"train": data.select([]), "test": data}},
        wrong={"data": data, "model": torch.nn.Linear(2, 2)},
    )


def linear_probe() -> Example:
    return _classifier(num_epochs=2)


def supervised_fine_tune() -> Example:
    return _classifier(num_epochs=2, batch_size=20, warmup_steps=1)


def image_text() -> Example:
    return Example(arguments={}, fields={"source": str(_folder() / "metadata.csv")}, device=False)


def class_folder() -> Example:
    return Example(arguments={}, fields={"folder": str(_folder() / "classes")}, device=False)


def fashion_mnist() -> Example:
    fields = {"folder": str(_folder()), "splits": {"clean": "train[0:20]", "test": "test"}}
    return Example(arguments={}, fields=fields, progress=False, device=False, random=True)
