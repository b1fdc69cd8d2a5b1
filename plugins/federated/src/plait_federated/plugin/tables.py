"""From Hugging Face datasets to the tensors of the engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value, concatenate_datasets
from plait import PlaitError
from torch import Tensor

from plait_federated.evaluation import DivergenceError
from plait_federated.peers import PeerError

INPUT_COLUMNS = ("image", "pixel_values", "features", "input_ids")
CHUNK = 1000


@contextmanager
def user_errors() -> Iterator[None]:
    """What the algorithm modules refuse is the user's to mend."""
    try:
        yield
    except (ValueError, PeerError, DivergenceError) as error:
        raise PlaitError(str(error)) from error


def split_of(data: Any, name: str) -> Dataset | None:
    """A split of a mapping of datasets; a bare dataset is its own ``train``."""
    if isinstance(data, Dataset):
        return data if name == "train" else None
    if isinstance(data, Mapping) and (isinstance(data.get(name), Dataset) or name not in data):
        return data.get(name)
    raise PlaitError(f"data is a {type(data).__name__}; expected is a dataset, or a mapping with train and test")


def joined(clients: Any) -> Any:
    """A list of datasets, one a client, as one dataset with a column ``client``; anything else as it is."""
    if not isinstance(clients, list):
        return clients
    if not clients or not all(isinstance(client, Dataset) for client in clients):
        raise PlaitError("clients is a list without datasets; give one dataset a client, or one with a column client")
    parts = [
        client.remove_columns([name for name in client.column_names if name == "client"]).add_column(
            "client", np.full(len(client), number), feature=Value("int32")
        )
        for number, client in enumerate(clients)
    ]
    return concatenate_datasets(parts)


def train_of(data: Any) -> Dataset:
    train = split_of(data, "train")
    if train is None:
        raise PlaitError(f"data has no split train; it has {', '.join(map(str, data)) or 'none'}")
    if not len(train):
        raise PlaitError("data has no rows; give at least one for every client")
    return train


def labels_of(data: Dataset) -> np.ndarray:
    """``[N]`` int64."""
    _need(data, "label")
    labels = data.with_format("numpy").select_columns(["label"])[:]["label"]
    if not np.issubdtype(labels.dtype, np.integer):
        raise PlaitError(f"column label holds {labels.dtype}; classes are whole numbers from 0")
    return labels.astype(np.int64)


def class_names(data: Dataset) -> list[str]:
    feature = data.features.get("label")
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    return [str(label) for label in range(int(labels_of(data).max()) + 1)]


def client_members(data: Dataset) -> tuple[Tensor, ...]:
    """Row numbers of each client in the order of the rows; clients in the order of their ids."""
    _need(data, "client")
    ids = np.asarray(data.with_format("numpy").select_columns(["client"])[:]["client"])
    return tuple(torch.from_numpy(np.flatnonzero(ids == value)) for value in np.unique(ids))


def inputs_of(data: Dataset, column: str | None) -> Tensor:
    """A column as one tensor ``[N, ...]``: uint8 ``[N, 3, H, W]`` for images, else the numbers it holds."""
    name = column or next((known for known in INPUT_COLUMNS if known in data.column_names), None)
    if name is None:
        raise PlaitError(
            f"data has the columns {', '.join(data.column_names)}; name the one to train on in the field column"
        )
    _need(data, name)
    table = data.select_columns([name])
    parts = []
    for begin in range(0, len(table), CHUNK):
        values = table[begin : begin + CHUNK][name]
        try:
            parts.append(
                np.stack([_pixels(value) if hasattr(value, "convert") else np.asarray(value) for value in values])
            )
        except ValueError as error:
            raise PlaitError(f"column {name} holds inputs of different sizes; resize or pad them to one") from error
    if len({(part.shape[1:], part.dtype.kind) for part in parts}) != 1 or parts[0].dtype.kind not in "uif":
        raise PlaitError(f"column {name} holds inputs of different sizes or no numbers; resize or pad them to one size")
    tensor = torch.from_numpy(np.concatenate(parts))
    return tensor.float() if tensor.is_floating_point() else tensor


def _pixels(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _need(data: Dataset, column: str) -> None:
    if column not in data.column_names:
        hint = "; partition the data first (transform: federated-partition)" if column == "client" else ""
        raise PlaitError(f"data has no column {column}; it has {', '.join(data.column_names)}{hint}")
