"""Columns of a dataset as the trainer's images, decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from plait_imaging import ImageColumn, names, sizes, to_float
from torch import Tensor

DOMAIN = "weather"


class Images:
    """Rows of column ``image``; of ``target`` too where ``paired``."""

    def __init__(self, dataset: Dataset, paired: bool) -> None:
        self.dataset, self.paired = dataset, paired
        columns = dataset.column_names
        self._columns = {name: ImageColumn(dataset, name) for name in ("image", "target") if name in columns}
        self.has_truth = "target" in columns
        self.domains = [str(one) for one in dataset[DOMAIN][:]] if DOMAIN in columns else [""] * len(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        image = self._read(row, "image")
        return (image, self._read(row, "target")) if self.paired else image

    def truth(self, row: int) -> Tensor | None:
        """The clean image, where the data has it."""
        return self._read(row, "target") if self.has_truth else None

    def _read(self, row: int, column: str) -> Tensor:
        return to_float(self._columns[column][row])


def images_of(data: Any, crop_size: int, needs_unlabelled: bool) -> tuple[Images, Images | None]:
    """Labelled and unlabelled images.

    Args:
        data: ``{labelled: …, unlabelled: …}``, or labelled images alone.
        crop_size: the least side.

    Raises:
        ValueError: a part is missing, empty or of another kind; pairs differ in size; an image is too small.
    """
    parts = data if isinstance(data, Mapping) else {"labelled": data}
    if unknown := [name for name in parts if name not in ("labelled", "unlabelled")]:
        raise ValueError(f"data names {unknown[0]!r}; write data: {{labelled: STEP, unlabelled: STEP}}")
    if "labelled" not in parts:
        raise ValueError("data has no labelled images; write data: {labelled: STEP, unlabelled: STEP}")
    if needs_unlabelled and "unlabelled" not in parts:
        raise ValueError("data has no unlabelled images; add unlabelled: STEP, or set training: supervised")
    for name, dataset in parts.items():
        _check(name, dataset, crop_size, paired=name == "labelled")
    unlabelled = Images(parts["unlabelled"], paired=False) if needs_unlabelled else None
    return Images(parts["labelled"], paired=True), unlabelled


def _check(name: str, dataset: Any, crop_size: int, paired: bool) -> None:
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}; expected a dataset of images (name a split as step.split)"
        )
    for column in ("image", *(("target",) if paired else ())):
        if column not in dataset.column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(dataset.column_names) or 'none'}")
    if not len(dataset):
        raise ValueError(f"{name} has no images; give at least one")
    shapes = list(sizes(dataset))
    for label, (height, width) in zip(names(dataset), shapes, strict=True):
        if min(height, width) < crop_size:
            raise ValueError(f"image {label} of {name} is {height}×{width} pixels and crop_size {crop_size}; lower it")
    if paired:
        for label, size, other in zip(names(dataset), shapes, sizes(dataset, "target"), strict=True):
            if size != other:
                raise ValueError(
                    f"image {label} of {name} is {size[0]}×{size[1]} pixels and its target {other[0]}×{other[1]}; "
                    "both have to be of one size"
                )
