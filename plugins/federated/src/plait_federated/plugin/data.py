"""Sources and partitions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import attrs
import datasets
import numpy as np
from datasets import Array3D, ClassLabel, Dataset, Features, Image, Value
from plait import PlaitError, Report, hookimpl
from plait.fields import doc, in_range
from plait.report import Image as Picture
from plait.report import Panel, png
from plait_vision.files import Files, class_folders
from plait_vision.images import as_cell
from plait_vision.writing import write_rows

from plait_federated import partition
from plait_federated.figures import partition_figure
from plait_federated.plugin.tables import (
    class_names,
    labels_of,
    split_of,
    train_of,
    user_errors,
    with_numbered_classes,
)

__plait_api__ = "0.1"


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

    @hookimpl
    def load_data(self, run) -> dict[str, Dataset]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.target))
        features = Features({"pixel_values": Array3D((1, 8, 8), "float32"), "label": ClassLabel(num_classes=10)})

        def rows(indices: np.ndarray) -> Dataset:
            images = (digits.images[indices, None] / 16).astype(np.float32)
            return Dataset.from_dict({"pixel_values": images, "label": digits.target[indices]}, features=features)

        return {"train": rows(order[360:]), "test": rows(order[:360])}


@attrs.frozen(kw_only=True)
class ImageClasses:
    """Images in class folders: a folder, zip or tar with ``train/<class>/…`` and ``test/<class>/…``."""

    path: Path = attrs.field(converter=Path, metadata=doc("folder, zip or tar"))
    max_per_class: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("take the first so many images of each class; null takes all")
    )

    @hookimpl
    def load_data(self, run) -> dict[str, Dataset]:
        with Files(self.path) as files:
            found = class_folders(files)
            if "train" not in found:
                splits = ", ".join(filter(None, found)) or "none"
                raise PlaitError(f"{str(self.path)!r} has no images under train/<class>/; its splits are {splits}")
            others = sorted(set(found) - {"train", "test"})
            if others:
                run.warn(f"{self.path} has more than train and test; not read: {', '.join(others)}")
            splits = {split: found[split] for split in ("train", "test") if split in found}
            names = sorted({label for members in splits.values() for label in members})
            features = Features({"image": Image(), "label": ClassLabel(names=names)})
            return {
                split: write_rows(run.folder, self._rows(files, splits[split], names), features) for split in splits
            }

    def _rows(self, files: Files, members: dict[str, list[str]], names: list[str]) -> Iterator[dict[str, Any]]:
        for label, images in members.items():
            for image in images[: self.max_per_class]:
                cell, _ = as_cell(files.read(image), files.label(image))
                yield {"image": cell, "label": names.index(label)}


@attrs.frozen(kw_only=True)
class Partition:
    """Give every sample a client: the training split with a column ``client``, other splits as they are."""

    num_clients: int = attrs.field(default=100, validator=in_range(2), metadata=doc("number of clients"))
    scheme: Literal["iid", "stratified", "dirichlet", "pathological", "path"] = attrs.field(
        default="dirichlet",
        metadata=doc("iid; stratified (equal classes); dirichlet; pathological or path (few classes a client)"),
    )
    coefficient: float = attrs.field(
        default=0.3,
        validator=in_range(0, low_open=True),
        metadata=doc("alpha of dirichlet, small is uneven; number of classes a client of pathological"),
    )
    sampling: Literal["sampled", "disjoint"] = attrs.field(
        default="sampled",
        metadata=doc(
            "sampled: equal sizes, a sample may be used twice (the official program); disjoint: a true partition, sizes differ"
        ),
    )
    drop_remainder: bool = attrs.field(
        default=False, metadata=doc("drop what does not divide evenly; otherwise client 0 gets it (iid and sampled)")
    )
    exact_rng: bool = attrs.field(
        default=False, metadata=doc("keep the official program's rounding, which sends rare draws to class 0 (sampled)")
    )

    def __attrs_post_init__(self) -> None:
        if self.scheme in ("pathological", "path") and self.coefficient != int(self.coefficient):
            raise PlaitError(f"coefficient is {self.coefficient}; scheme {self.scheme} needs a whole number of classes")

    @hookimpl
    def transform(self, data, run) -> dict[str, Dataset]:
        data = with_numbered_classes(data)
        train = train_of(data)
        if "client" in train.column_names:
            raise PlaitError("data has a column client, so it is partitioned already; drop the column, or this step")
        labels, names = labels_of(train), class_names(train)
        if run.seed >= 2**32:
            raise PlaitError(f"seed is {run.seed}; a partition needs one below 2**32")
        absent = len(names) - 1 - labels.max()
        if absent and self.scheme not in ("iid", "stratified"):
            raise PlaitError(
                f"class {len(names) - 1} ({names[-1]}) has no sample; scheme {self.scheme} draws all classes: leave it out"
            )
        with user_errors():
            shards = self._shards(labels, run.seed)
        order = np.concatenate(shards)
        clients = np.repeat(np.arange(len(shards)), [len(shard) for shard in shards])
        with without_progress_bars():
            chosen = train.select(order).flatten_indices(cache_file_name=str(run.folder / "train.arrow"))
        chosen = chosen.add_column("client", clients, feature=Value("int32"))
        occurring = [names[label] for label in np.unique(labels)]
        figure = partition_figure(partition.label_histogram(labels, shards), occurring)
        picture = Picture(caption=self._caption(), data=png(figure))
        run.add(Report(panels=[Panel(title="Samples of each class by client", images=[[picture]])]))
        test = split_of(data, "test")
        return {"train": chosen} | ({} if test is None else {"test": test})

    def _shards(self, labels: np.ndarray, seed: int) -> partition.Shards:
        n, coefficient = self.num_clients, self.coefficient
        sampled = {"drop_remainder": self.drop_remainder, "exact_rng": self.exact_rng}
        if self.scheme == "iid":
            return partition.iid(labels, n, seed, drop_remainder=self.drop_remainder)
        if self.scheme == "stratified":
            return partition.stratified(labels, n, seed)
        if self.scheme == "dirichlet":
            if self.sampling == "sampled":
                return partition.sampled_dirichlet(labels, n, coefficient, seed, **sampled)
            return partition.disjoint_dirichlet(labels, n, coefficient, seed)
        if self.sampling == "sampled":
            return partition.sampled_pathological(labels, n, int(coefficient), seed, **sampled)
        return partition.disjoint_pathological(labels, n, int(coefficient), seed)

    def _caption(self) -> str:
        if self.scheme in ("iid", "stratified"):
            return f"{self.num_clients} clients, {self.scheme}"
        return f"{self.num_clients} clients, {self.scheme} {self.coefficient:g}, {self.sampling}"
