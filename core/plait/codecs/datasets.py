"""Hugging Face datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plait.errors import StoreError
from plait.optional import require


class DatasetCodec:
    """``datasets.Dataset``, in its own Arrow format: loaded memory-mapped, written in shards."""

    name = "dataset"

    def handles(self, value: Any) -> bool:
        return _is(value, "datasets.arrow_dataset", "Dataset")

    def save(self, value: Any, folder: Path) -> None:
        datasets = require("datasets")
        shown = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            if not value.column_names:
                raise StoreError("a dataset without columns cannot be stored; return one that has columns")
            whole = value if len(value) else _without_rows(value)
            whole.save_to_disk(folder / "dataset", num_shards=None if len(value) else 1)
        finally:
            if shown:
                datasets.enable_progress_bars()

    def load(self, folder: Path) -> Any:
        return require("datasets").load_from_disk(folder / "dataset")


def _without_rows(value: Any) -> Any:
    """The same columns in a table that has one, empty, piece; ``datasets`` cannot write a table of none."""
    datasets = require("datasets")
    return datasets.Dataset(value.features.arrow_schema.empty_table(), info=value.info)


def _is(value: Any, module: str, name: str) -> bool:
    return any(cls.__module__ == module and cls.__name__ == name for cls in type(value).__mro__)
