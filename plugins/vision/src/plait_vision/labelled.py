"""Rows of a dataset as batches of image tensors with their classes, decoded as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import torch
from plait.errors import nearest
from torch import Tensor

from plait_vision.classifiers import Preparation
from plait_vision.columns import flags_of, with_class_labels
from plait_vision.images import decode
from plait_vision.kinds import IS_BACKDOOR

HELD_BYTES = 512 << 20
_THREADS = 4


class ImageRows:
    """The ``image`` column of a dataset. Decoded images are held until they fill ``HELD_BYTES``, later ones read again.

    Raises:
        ValueError: it is not a dataset, has no row, or no column with images; when reading, an image is not plain 8 bits
            (see :func:`plait_vision.decode`).
    """

    def __init__(self, data: Any, column: str = "image") -> None:
        if isinstance(data, Mapping):
            raise ValueError(f"the data has the splits {', '.join(map(str, data)) or 'none'}; pick one")
        if not isinstance(data, datasets.Dataset):
            raise ValueError(f"the data is of type {type(data).__name__}; expected a dataset")
        if column not in data.column_names:
            have = data.column_names
            raise ValueError(f"the data has no column {column!r}{nearest(column, have)} but {', '.join(have)}")
        if not isinstance(data.features[column], datasets.Image):
            raise ValueError(f"column {column!r} holds {data.features[column]}, not images")
        if len(data) == 0:
            raise ValueError("the data has no rows; give at least one")
        self._cells = data.with_format(None).select_columns(column).cast_column(column, datasets.Image(decode=False))
        self.column = column
        self._held: dict[int, np.ndarray] = {}
        self._room = HELD_BYTES

    def __len__(self) -> int:
        return len(self._cells)

    def read(self, rows: Sequence[int]) -> list[np.ndarray]:
        """The images, uint8 [3, H, W] each."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._held]
        found = dict(zip(missing, self._decoded(missing), strict=True))
        images = [found[row] if row in found else self._held[row] for row in rows]
        for row, image in found.items():
            if image.nbytes <= self._room:
                self._held[row] = image
                self._room -= image.nbytes
        return images

    def _decoded(self, rows: Sequence[int]) -> list[np.ndarray]:
        def pixels(row: int, cell: Any) -> np.ndarray:
            picture = decode(cell, f"row {row}: the image")
            return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))

        cells = self._cells[list(rows)][self.column] if rows else []
        if len(rows) < 2:
            return [pixels(row, cell) for row, cell in zip(rows, cells, strict=True)]
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(pixels, rows, cells))

    def by_size(self, batch_size: int, rows: Sequence[int] | None = None) -> Iterator[list[tuple[list[int], Tensor]]]:
        """Batch after batch in order; each as groups (rows, images ``[n, 3, H, W]``, uint8) of one size."""
        order = list(range(len(self)) if rows is None else rows)
        for start in range(0, len(order), batch_size):
            taken = order[start : start + batch_size]
            groups: dict[tuple[int, ...], tuple[list[int], list[np.ndarray]]] = {}
            for row, image in zip(taken, self.read(taken), strict=True):
                numbers, images = groups.setdefault(image.shape, ([], []))
                numbers.append(row)
                images.append(image)
            yield [(numbers, torch.from_numpy(np.stack(images))) for numbers, images in groups.values()]

    def stacked(self, rows: Sequence[int], preparation: Preparation | None = None) -> Tensor:
        """The images as one tensor ``[n, 3, H, W]`` in [0, 1]; of several sizes, brought to that of the model.

        Raises:
            ValueError: they differ in size, and the model has none.
        """
        images = self.read(rows)
        sizes = {image.shape for image in images}
        if len(sizes) == 1:
            return as_pixels(torch.from_numpy(np.stack(images)))
        if preparation is None or preparation.size is None:
            found = ", ".join(f"{height} × {width}" for _, height, width in sorted(sizes)[:4])
            raise ValueError(f"the images differ in size ({found}); bring them to one with transform: resize")
        return torch.cat([preparation.to_size(as_pixels(torch.from_numpy(image)[None])) for image in images])


def as_pixels(levels: Tensor) -> Tensor:
    """uint8 → float32 in [0, 1]."""
    return levels.float() / 255


def labels_of(data: Any, column: str = "label") -> tuple[Tensor, tuple[str, ...] | None]:
    """The classes, int64 ``[N]``, and their names where the data tells them.

    Raises:
        ValueError: no such column, or a row without a class.
    """
    labelled = with_class_labels({"": data}, column)[""]
    numbers = torch.tensor(labelled.with_format(None).select_columns(column)[:][column], dtype=torch.long)
    named = isinstance(data.features[column], datasets.ClassLabel) or has_texts(data, column)
    return numbers, tuple(labelled.features[column].names) if named else None


def has_texts(data: Any, column: str = "label") -> bool:
    """Whether the classes are texts, whose numbers in :func:`labels_of` are those of the texts that occur."""
    return getattr(data.features.get(column), "dtype", "") in ("string", "large_string")


def class_names_of(data: Any) -> tuple[str, ...] | None:
    """The names of the data's classes; ``None`` where it tells none."""
    return labels_of(data)[1] if "label" in getattr(data, "column_names", ()) else None


def in_order_of(labels: Tensor, names: Sequence[str] | None, model_names: Sequence[str] | None) -> Tensor:
    """Labels by the numbers that a model has for the classes of the same names.

    Raises:
        ValueError: a class that occurs is none of the model's.
    """
    if names is None or model_names is None or tuple(names) == tuple(model_names):
        return labels
    place = {name: number for number, name in enumerate(model_names)}
    unknown = [names[number] for number in labels.unique().tolist() if names[number] not in place]
    if unknown:
        raise ValueError(
            f"class {unknown[0]!r} of the data is none of the model's{nearest(unknown[0], list(place))}: "
            f"{', '.join(list(place)[:20])}; transform: relabel renames classes"
        )
    return torch.tensor([place.get(name, -1) for name in names])[labels]


def check_labels(labels: Tensor, outputs: int) -> None:
    """Whether a model of so many outputs can name all classes.

    Raises:
        ValueError: it cannot.
    """
    if int(labels.max()) >= outputs:
        raise ValueError(
            f"label {int(labels.max())} occurs, and the model tells {outputs} classes apart; load one for this data"
        )


def class_number(name: str | int, names: Sequence[str] | None, count: int, field: str = "target") -> int:
    """The number of a class that is given by its name or number.

    Raises:
        ValueError: there is no such class.
    """
    if isinstance(name, str) and names is not None and name in names:
        return list(names).index(name)
    if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < count:
        return name
    known = f"{', '.join(list(names)[:20])} and their numbers" if names else f"0 to {count - 1}"
    raise ValueError(f"{field} is {name!r}{nearest(str(name), list(names or ()))}; the classes are {known}")


def success_rate(predicted: Tensor, labels: Tensor, target: int, data: datasets.Dataset) -> float | None:
    """ASR: the share of the images of other classes that are called ``target``; ``None`` where there is none.

    Poisoned rows of ``data`` (``is_backdoor``) have the target's label, and show another class.

    Args:
        predicted, labels: class numbers ``[N]``.
    """
    others = labels != target
    if IS_BACKDOOR in data.column_names:
        others |= torch.from_numpy(flags_of(data))
    return float((predicted[others] == target).double().mean()) if bool(others.any()) else None
