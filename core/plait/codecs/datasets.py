"""Hugging Face datasets."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plait.errors import StoreError
from plait.optional import require

FACTS = "dataset.json"
ALONE = 2**16  # bytes of a column that gets a file of its own; below, a file costs more than it saves
PIECE = 16 * 2**20  # bytes, about, that are in memory at once
# In a piece; powers of two, so that the pieces of several columns end together.
MOST_ROWS = 2**10
MOST_NUMBERS = 2**14  # rows that all have the same size
SAMPLE = 16  # rows that tell how many bytes a row has


class DatasetCodec:
    """``datasets.Dataset``, as Arrow files that are loaded memory-mapped.

    Every larger column is a file of its own, whose bytes depend on the column's content alone: where a step passes a
    column on, the store holds it once.
    """

    name = "dataset"

    def handles(self, value: Any) -> bool:
        return _is(value, "datasets.arrow_dataset", "Dataset")

    def save(self, value: Any, folder: Path) -> None:
        if not value.column_names:
            raise StoreError("a dataset without columns cannot be stored; return one that has columns")
        if value.list_indexes():
            raise StoreError("the search indexes of a dataset cannot be stored; return it without them (drop_index)")
        facts = {
            "fingerprint": value._fingerprint,
            "format": _format(value),
            "split": None if value.split is None else str(value.split),
            "files": [],
        }
        whole = value.with_format("arrow")
        for names, rows in _files(whole):
            file = f"{len(facts['files']):04d}.arrow"
            facts["files"].append(file)
            _write(whole.select_columns(names), rows, {"path": str(folder / file)})
        value.info.write_to_directory(folder)
        (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")

    def load(self, folder: Path) -> Any:
        datasets = require("datasets")
        if not (folder / FACTS).exists():  # stored by plait before there was a file for each column
            return datasets.load_from_disk(folder / "dataset")
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        table = require("datasets.table")
        columns = [table.MemoryMappedTable.from_file(str(folder / file)) for file in facts["files"]]
        whole = datasets.Dataset(
            table.concat_tables(columns, axis=1),
            info=datasets.DatasetInfo.from_directory(str(folder)),
            split=None if facts["split"] is None else datasets.NamedSplit(facts["split"]),
            fingerprint=facts["fingerprint"],
        )
        return whole.with_format(**facts["format"])


def _format(value: Any) -> dict[str, Any]:
    """How the dataset shows its rows."""
    shown: dict[str, Any] = value.format
    if shown["columns"] == value.column_names:
        shown["columns"] = None  # and whatever is added later
    try:
        json.dumps(shown)
    except TypeError as error:
        raise StoreError(
            f"a dataset with a transform or with settings of its format that are not JSON-like cannot be stored ({error});"
            " return it with_format(None)"
        ) from error
    return shown


def _files(value: Any) -> Iterator[tuple[list[str], int]]:
    """The columns of each file, and how many rows are written at once; small columns side by side share a file."""
    sizes = _bytes_of_row(value)
    for is_small, names in itertools.groupby(sizes, lambda name: sizes[name] * len(value) < ALONE):
        if is_small:
            yield list(names), MOST_ROWS
        else:
            for name in names:
                is_number = require("pyarrow").types.is_primitive(value.features.arrow_schema.field(name).type)
                fitting = max(1, int(PIECE / sizes[name]))
                yield [name], min(MOST_NUMBERS if is_number else MOST_ROWS, 1 << (fitting.bit_length() - 1))


def _bytes_of_row(value: Any) -> dict[str, float]:
    """By column, as it is written (with the files that it names), on average over rows here and there."""
    count = min(SAMPLE, len(value))
    if not count:
        return dict.fromkeys(value.column_names, 0.0)
    written = io.BytesIO()
    _write(value.select([i * len(value) // count for i in range(count)]), count, {"stream": written})
    sample = require("pyarrow").ipc.open_stream(written.getvalue()).read_all()
    return {name: sample.column(name).nbytes / count for name in value.column_names}


def _write(value: Any, rows: int, to: dict[str, Any]) -> None:
    """Write a dataset in format ``arrow`` as a stream of Arrow pieces of so many rows."""
    writer = require("datasets.arrow_writer").ArrowWriter(features=value.features, embed_local_files=True, **to)
    with writer:
        for table in value.iter(rows):
            writer.write_table(table, rows)
        writer.finalize(close_stream=False)


def _is(value: Any, module: str, name: str) -> bool:
    return any(cls.__module__ == module and cls.__name__ == name for cls in type(value).__mro__)
