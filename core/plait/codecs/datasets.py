"""Hugging Face datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
            value.save_to_disk(folder / "dataset")
        finally:
            if shown:
                datasets.enable_progress_bars()

    def load(self, folder: Path) -> Any:
        return require("datasets").load_from_disk(folder / "dataset")


def _is(value: Any, module: str, name: str) -> bool:
    return any(cls.__module__ == module and cls.__name__ == name for cls in type(value).__mro__)
