"""From Hugging Face datasets to the tensors of the engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image, Value, concatenate_datasets
from plait_vision.columns import with_class_labels
from plait_vision.images import decode
from torch import Tensor

INPUT_COLUMNS = ("image", "pixel_values", "features", "input_ids")
CHUNK = 1000


def split_of(data: Any, name: str) -> Dataset | None:
    """A split of a mapping of datasets, never empty; a bare dataset is its own ``train``."""
    if isinstance(data, Dataset):
        return data if name == "train" else None
    if isinstance(data, Mapping) and (isinstance(data.get(name), Dataset) or name not in data):
        split = data.get(name)
        if split is not None and not len(split):
            raise ValueError(f"split {name} of the data has no rows; give it some, or leave it out")
        return split
    raise ValueError(f"data is a {type(data).__name__}; expected a dataset, or a mapping with train and test")


def joined(clients: Any) -> Any:
    """A list of datasets, one a client, as one dataset with a column ``client``; anything else as it is."""
    if not isinstance(clients, list):
        return clients
    if not clients or not all(isinstance(client, Dataset) for client in clients):
        raise ValueError("clients is a list without datasets; give one dataset a client, or one with a column client")
    for number, client in enumerate(clients):
        if not len(client):
            raise ValueError(f"the dataset of client {number} has no rows; give every client at least one")
        if _kinds(client) != _kinds(clients[0]):
            raise ValueError(
                f"the dataset of client {number} has other columns than that of client 0: {_kinds(client)} against "
                f"{_kinds(clients[0])}; give all clients the same"
            )
    same = with_numbered_classes({str(number): client for number, client in enumerate(clients)})
    parts = [
        client.remove_columns([name for name in client.column_names if name == "client"]).add_column(
            "client", np.full(len(client), number), feature=Value("int32")
        )
        for number, client in enumerate(same.values())
    ]
    return concatenate_datasets(parts)


def train_of(data: Any) -> Dataset:
    train = split_of(data, "train")
    if train is None:
        raise ValueError(f"data has no split train; it has {', '.join(map(str, data)) or 'none'}")
    if not len(train):
        raise ValueError("data has no rows; give at least one for every client")
    return train


def with_numbered_classes(data: Any) -> Any:
    """The splits with labels that are texts, or of several ``ClassLabel``, as one ``ClassLabel``; anything else as it is.

    Classes go together by name: a number means the same in all splits.
    """
    splits = {"train": data} if isinstance(data, Dataset) else dict(data) if isinstance(data, Mapping) else {}
    labelled = {name: part for name, part in splits.items() if isinstance(part, Dataset) and "label" in part.features}
    kinds = [part.features["label"] for part in labelled.values()]
    named = [kind for kind in kinds if isinstance(kind, ClassLabel)]
    if not any(getattr(kind, "dtype", "") == "string" for kind in kinds) and all(kind == named[0] for kind in named):
        return data
    numbered = with_class_labels(labelled)
    return numbered["train"] if isinstance(data, Dataset) else splits | numbered


def labels_of(data: Dataset) -> np.ndarray:
    """``[N]`` int64, none negative."""
    _need(data, "label")
    labels: np.ndarray = data.with_format("numpy").select_columns(["label"])[:]["label"]
    if not np.issubdtype(labels.dtype, np.integer):
        held = "missing values" if None in data.with_format(None)["label"] else data.features["label"].dtype
        raise ValueError(f"column label holds {held}; classes are whole numbers from 0, one for every row")
    if len(labels) and labels.min() < 0:
        row = int(np.argmax(labels < 0))
        raise ValueError(
            f"row {row} has label {labels[row]}; classes are whole numbers from 0, leave unlabelled rows out"
        )
    return labels.astype(np.int64)


def own_class_names(data: Dataset) -> list[str] | None:
    """The names that the data has for its classes, in the order of their numbers."""
    feature = data.features.get("label")
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def class_names(data: Dataset) -> list[str]:
    return own_class_names(data) or [str(label) for label in range(int(labels_of(data).max()) + 1)]


def client_members(data: Dataset) -> tuple[Tensor, ...]:
    """Row numbers of each client in the order of the rows; clients in the order of their ids."""
    _need(data, "client")
    ids = np.asarray(data.with_format("numpy").select_columns(["client"])[:]["client"])
    return tuple(torch.from_numpy(np.flatnonzero(ids == value)) for value in np.unique(ids))


def inputs_of(data: Dataset, column: str | None) -> Tensor:
    """A column as one tensor ``[N, ...]``: uint8 ``[N, 3, H, W]`` for images, else the numbers it holds."""
    name = column or next((known for known in INPUT_COLUMNS if known in data.column_names), None)
    if name is None:
        raise ValueError(
            f"data has the columns {', '.join(data.column_names)}; name the one to train on in the field column"
        )
    _need(data, name)
    if not len(data):
        raise ValueError("data has no rows; give at least one")
    table = data.select_columns([name]).with_format(None)
    images = isinstance(table.features[name], Image)
    if images:
        table = table.cast_column(name, Image(decode=False))
    parts = []
    for begin in range(0, len(table), CHUNK):
        values = table[begin : begin + CHUNK][name]
        if images:
            values = [_pixels(value, f"{name} of row {row}") for row, value in enumerate(values, begin)]
        try:
            parts.append(np.stack([np.asarray(value) for value in values]))
        except ValueError as error:
            raise ValueError(f"column {name} holds inputs of different sizes; resize or pad them to one") from error
    if len({(part.shape[1:], part.dtype.kind) for part in parts}) != 1 or parts[0].dtype.kind not in "uif":
        raise ValueError(f"column {name} holds inputs of different sizes or no numbers; resize or pad them to one size")
    tensor = torch.from_numpy(np.concatenate(parts))
    if not tensor.is_floating_point():
        return tensor
    finite = torch.isfinite(tensor).flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"column {name} holds NaN or infinite values in row {int(finite.int().argmin())}; clean it")
    return tensor.float()


def _pixels(cell: Any, name: str) -> np.ndarray:
    return np.asarray(decode(cell, name)).transpose(2, 0, 1)


def _kinds(data: Dataset) -> str:
    kinds = {name: getattr(kind, "dtype", type(kind).__name__) for name, kind in data.features.items()}
    return ", ".join(f"{name} ({kinds[name]})" for name in sorted(kinds) if name != "client")


def _need(data: Dataset, column: str) -> None:
    if column not in data.column_names:
        hint = "; partition the data first (transform: federated-partition)" if column == "client" else ""
        raise ValueError(f"data has no column {column}; it has {', '.join(data.column_names)}{hint}")
