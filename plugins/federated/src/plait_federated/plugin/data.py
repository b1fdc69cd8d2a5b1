"""Sources and partitions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import attrs
import datasets
import numpy as np
from datasets import Array3D, ClassLabel, Dataset, Features, Image, Value
from plait import Report, hookimpl
from plait.fields import field, in_range
from plait.report import Image as Picture
from plait.report import Panel, png
from plait_vision import encode_png

from plait_federated.client_data import class_names, labels_of, train_of, with_numbered_classes
from plait_federated.partition import Sampling, Scheme, divide, label_histogram


@contextmanager
def without_progress_bars() -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@attrs.frozen(kw_only=True)
class Digits8x8:
    """1797 handwritten digits of 8×8 pixels from scikit-learn, 360 of them for the test."""

    gives = "dataset"
    splits = ("train", "test")

    as_numbers: bool = field(
        False, "a column pixel_values, [1, 8, 8] in [0, 1], in place of image, for networks with one channel"
    )

    @property
    def columns_made(self) -> tuple[str, ...]:
        return ("pixel_values" if self.as_numbers else "image", "label")

    @hookimpl
    def load_data(self, run: Any) -> dict[str, Dataset]:
        from sklearn.datasets import load_digits  # takes a second

        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.target))
        numbers = Array3D((1, 8, 8), "float32")
        kind = {"pixel_values": numbers} if self.as_numbers else {"image": Image()}
        features = Features({**kind, "label": ClassLabel(num_classes=10)})

        def rows(indices: np.ndarray) -> Dataset:
            levels = digits.images[indices]
            cells = (levels[:, None] / 16).astype(np.float32) if self.as_numbers else [_picture(one) for one in levels]
            return Dataset.from_dict({**dict.fromkeys(kind, cells), "label": digits.target[indices]}, features=features)

        return {"train": rows(order[360:]), "test": rows(order[:360])}


def _picture(levels: np.ndarray) -> dict[str, Any]:
    """Levels from 0 to 16, [8, 8] → the cell of a grey RGB image."""
    grey = (levels * (255 / 16)).round().astype(np.uint8)
    return {"bytes": encode_png(np.stack([grey] * 3, axis=-1)), "path": None}


@attrs.frozen(kw_only=True)
class Partition:
    """Give every sample a client: the training split with a column ``client``, other splits as they are."""

    renamed_fields: ClassVar[Mapping[str, str]] = {"exact_rng": "as_released"}
    takes = {"data": "dataset"}
    gives = "clients"
    columns_needed = ("label",)

    num_clients: int = field(100, "number of clients", in_range(2))
    scheme: Scheme = field(
        "dirichlet", "iid; stratified (equal classes); dirichlet; pathological or path (few classes a client)"
    )
    coefficient: float = field(
        0.3,
        "alpha of dirichlet, small is uneven; number of classes a client of pathological",
        in_range(0, low_open=True),
    )
    sampling: Sampling = field(
        "sampled",
        "sampled: equal sizes, a sample may be used twice (the official program); disjoint: a true partition, sizes differ",
    )
    drop_remainder: bool = field(
        False, "drop what does not divide evenly; otherwise client 0 gets it (iid and sampled)"
    )
    as_released: bool = field(
        False, "keep the official program's rounding, which sends rare draws to class 0 (sampled)"
    )

    def __attrs_post_init__(self) -> None:
        if self.scheme in ("pathological", "path") and self.coefficient != int(self.coefficient):
            raise ValueError(f"coefficient is {self.coefficient}; scheme {self.scheme} needs a whole number of classes")

    @hookimpl
    def transform(self, data: Any, run: Any) -> dict[str, Dataset]:
        from plait_federated.figures import partition_figure  # matplotlib

        data = with_numbered_classes(data)
        train = train_of(data)
        if "client" in train.column_names:
            raise ValueError("data has a column client, so it is partitioned already; drop the column, or this step")
        labels, names = labels_of(train), class_names(train)
        if run.seed >= 2**32:
            raise ValueError(f"seed is {run.seed}; a partition needs one below 2**32")
        absent = len(names) - 1 - labels.max()
        if absent and self.scheme not in ("iid", "stratified"):
            raise ValueError(
                f"class {len(names) - 1} ({names[-1]}) has no sample; scheme {self.scheme} draws all classes: leave its "
                "name out, by transform: relabel with unused: drop"
            )
        shards = divide(labels, seed=run.seed, **attrs.asdict(self))
        order = np.concatenate(shards)
        clients = np.repeat(np.arange(len(shards)), [len(shard) for shard in shards])
        with without_progress_bars():
            chosen = train.select(order).flatten_indices(cache_file_name=str(run.folder / "train.arrow"))
        chosen = chosen.add_column("client", clients, feature=Value("int32"))
        occurring = [names[label] for label in np.unique(labels)]
        figure = partition_figure(label_histogram(labels, shards), occurring)
        picture = Picture(caption=self._caption(), data=png(figure))
        run.add(Report(panels=[Panel(title="Samples of each class by client", images=[[picture]])]))
        return (dict(data) if isinstance(data, Mapping) else {}) | {"train": chosen}

    def _caption(self) -> str:
        if self.scheme in ("iid", "stratified"):
            return f"{self.num_clients} clients, {self.scheme}"
        return f"{self.num_clients} clients, {self.scheme} {self.coefficient:g}, {self.sampling}"
