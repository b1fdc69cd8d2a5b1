"""Restorations of the same images by several models, side by side: what every ensemble takes.

``candidates`` maps model → dataset with a column ``image``, all of the same scenes. ``reference`` maps the same models,
in the same order, to other scenes whose truth is known, and ``target`` to that truth; without ``target``, the first
model's column ``target`` is taken. Either may also be one dataset with columns ``image_<model>`` and ``target``.
A model that drew several samples of each image (columns ``image_sample_0``, …) counts as so many models, ``model 0``, …
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from datasets import Dataset
from torch import Tensor

from plait_imaging.images import FLOAT_COLUMN, SAMPLE_PREFIX, check_same_scenes, names, read_batches, sizes

_PREFIX = "image_"


@attrs.frozen
class Scenes:
    """M restorations of the same images, and their truth where it is known, read side by side.

    Iterating gives one tuple per scene: M images uint8 ``[3, H, W]`` and, if ``has_target``, the truth behind them.
    """

    models: tuple[str, ...]
    columns: tuple[tuple[Dataset, str], ...] = attrs.field(repr=False)
    has_target: bool

    @classmethod
    def of_candidates(cls, candidates: Any) -> Scenes:
        """The scenes to fuse.

        Raises:
            ValueError: fewer than two models, or their scenes differ.
        """
        columns = _columns(candidates, "candidates")
        columns.pop("target", None)
        if len(columns) < 2:
            raise ValueError(
                f"candidates has {len(columns)} model ({', '.join(columns)}); an ensemble needs at least 2"
            )
        return cls(tuple(columns), tuple(columns.values()), has_target=False)

    @classmethod
    def of_reference(cls, reference: Any, models: tuple[str, ...] | None = None) -> Scenes:
        """The scenes to learn from.

        Args:
            models: the candidates' models, which the reference must have in the same order; ``None``: any.

        Raises:
            ValueError: no reference, other models, no target, or the scenes differ.
        """
        if reference is None:
            raise ValueError("reference is missing; give the same models' images of scenes whose target is known")
        columns = _columns(reference, "reference")
        if "target" not in columns:
            first, _ = next(iter(columns.values()))
            if "target" not in first.column_names:
                raise ValueError("reference has no target; add target: STEP, the true images of the reference scenes")
            columns["target"] = (first, "target")
        own = tuple(model for model in columns if model != "target")
        if models is not None and own != models:
            raise ValueError(
                f"reference has the models {', '.join(own)} and candidates {', '.join(models)}; "
                "give both the same models in the same order"
            )
        return cls(own, tuple(columns[name] for name in (*own, "target")), has_target=True)

    @property
    def source(self) -> Dataset:
        """The columns that describe the scenes: name, target and the like."""
        dataset, _ = self.columns[0]
        return dataset.select_columns([name for name in dataset.column_names if not name.startswith(_PREFIX)])

    @property
    def num_samples(self) -> list[int]:
        """Number of colour samples of each scene."""
        return [3 * height * width for height, width in sizes(*self.columns[0])]

    def __len__(self) -> int:
        return len(self.columns[0][0])

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        labels = names(self.columns[0][0])
        streams = [_one_by_one(dataset, column) for dataset, column in self.columns]
        for label, images in zip(labels, zip(*streams, strict=True), strict=True):
            for name, image in zip((*self.models, "target"), images, strict=False):
                if image.shape != images[0].shape:
                    size, first = ("×".join(map(str, t.shape[1:])) for t in (image, images[0]))
                    raise ValueError(
                        f"image {label} is {size} pixels in {name} and {first} in {self.models[0]}; give all one size"
                    )
            yield images


def _columns(data: Any, argument: str) -> dict[str, tuple[Dataset, str]]:
    """Model (or ``target``) → the dataset and column with its images."""
    if isinstance(data, Dataset):
        found = {
            name.removeprefix(_PREFIX): (data, name)
            for name in data.column_names
            if name.startswith(_PREFIX) and name != FLOAT_COLUMN
        }
        if "target" in data.column_names:
            found["target"] = (data, "target")
    elif isinstance(data, Mapping) and all(isinstance(dataset, Dataset) for dataset in data.values()):
        found = {}
        for model, dataset in data.items():
            samples = [name for name in dataset.column_names if name.startswith(SAMPLE_PREFIX)]
            if model == "target" or not samples:
                found[model] = (dataset, "image")
                continue
            found |= {f"{model} {name.removeprefix(SAMPLE_PREFIX)}": (dataset, name) for name in samples}
    else:
        raise ValueError(
            f"{argument} is not a mapping of models to datasets; write {argument}: {{model: step, other_model: other_step}}"
        )
    if not found.keys() - {"target"}:
        raise ValueError(
            f"{argument} names no model; write {argument}: {{model: step}}, or give a dataset with columns image_<model>"
        )
    for model, (dataset, _) in found.items():
        if not len(dataset):
            raise ValueError(f"{model} of {argument} has no images; give at least one scene")
    if isinstance(data, Mapping):
        check_same_scenes(data)
    return found


def _one_by_one(dataset: Dataset, column: str) -> Iterator[Tensor]:
    for _, images in read_batches(dataset, column, batch_size=1):
        yield from images
