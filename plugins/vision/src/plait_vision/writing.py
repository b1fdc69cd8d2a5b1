"""Datasets written to disk as they are made, in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, concatenate_datasets
from datasets.arrow_writer import ArrowWriter

SHARD_BYTES = 256 << 20
BUFFER_BYTES = 16 << 20


def write_tables(folder: Path, tables: Iterable[pa.Table], features: Features) -> Dataset:
    """Arrow tables → a dataset that reads them, memory-mapped, from shards of about 256 MB in a new folder in ``folder``."""
    folder = Path(tempfile.mkdtemp(prefix="images-", dir=folder))
    shards: list[Path] = []
    writer: ArrowWriter | None = None
    written = 0
    try:
        for table in tables:
            if writer is None:
                shards.append(folder / f"{len(shards):05d}.arrow")
                writer, written = ArrowWriter(path=str(shards[-1]), features=features), 0
            writer.write_table(table)
            written += table.nbytes
            if written >= SHARD_BYTES:
                writer.finalize()
                writer = None
    finally:
        if writer is not None:
            writer.finalize()
    if not shards:
        return Dataset.from_dict({name: [] for name in features}, features=features)
    return concatenate_datasets([Dataset.from_file(str(shard)) for shard in shards])


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]], features: Features) -> Dataset:
    """Rows (column → value, images as cells ``{"bytes", "path"}``) → a dataset, as :func:`write_tables` writes it."""

    def tables() -> Iterator[pa.Table]:
        buffer: list[Mapping[str, Any]] = []
        held = 0
        for row in rows:
            buffer.append(row)
            held += sum(len(cell["bytes"]) for cell in row.values() if isinstance(cell, Mapping))
            if held > BUFFER_BYTES or len(buffer) >= 1024:
                yield pa.Table.from_pylist(buffer, schema=features.arrow_schema)
                buffer, held = [], 0
        if buffer:
            yield pa.Table.from_pylist(buffer, schema=features.arrow_schema)

    return write_tables(folder, tables(), features)
