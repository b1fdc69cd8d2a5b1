"""Adversarial pairs as they come: shards on disk, behind the last of which a killed run goes on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from plait_clip import caption_column, flattened, png_bytes, undecoded
from safetensors.torch import save_file
from torch import Tensor

from plait_sa_aet.sa_aet import SemanticProjection


class Shards:
    """Numbered arrow files of the changed columns, each with a record of how it was made.

    Args:
        folder: a loop's, which survives a kill.
        features: of the changed columns.
    """

    def __init__(self, folder: Path, features: datasets.Features) -> None:
        self.folder, self.features = folder, features
        folder.mkdir(parents=True, exist_ok=True)

    def record(self, index: int) -> dict[str, Any] | None:
        """What :meth:`write` noted down of a shard, or None where it was not finished."""
        path = self._path(index, "json")
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, index: int, rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
        """Write a shard; the record comes last and says that the shard is whole."""
        unfinished = self._path(index, "unfinished")
        with ArrowWriter(path=str(unfinished), features=self.features) as writer:
            for row in rows:
                writer.write(dict(row))
            writer.finalize()
        os.replace(unfinished, self._path(index, "arrow"))
        note = self._path(index, "json.unfinished")
        note.write_text(json.dumps(record), encoding="utf-8")
        os.replace(note, self._path(index, "json"))

    def records(self, count: int) -> Iterator[dict[str, Any]]:
        for index in range(count):
            yield json.loads(self._path(index, "json").read_text(encoding="utf-8"))

    def dataset(self, count: int) -> datasets.Dataset:
        """All shards as one memory-mapped dataset."""
        return datasets.concatenate_datasets([self.rows(index) for index in range(count)])

    def rows(self, index: int) -> datasets.Dataset:
        """One shard."""
        return datasets.Dataset.from_file(str(self._path(index, "arrow")))

    def _path(self, index: int, suffix: str) -> Path:
        return self.folder / f"shard-{index:06d}.{suffix}"


def changed_features(data: datasets.Dataset, side: int, floats: bool) -> datasets.Features:
    """The columns that an attack writes: image, captions, and ``pixels`` where the exact floats are kept."""
    column = caption_column(data)
    columns = {"image": datasets.Image(decode=False), column: data.features[column]}
    if floats:
        columns["pixels"] = datasets.Array3D(shape=(3, side, side), dtype="float32")
    return datasets.Features(columns)


def rows_of(
    data: datasets.Dataset,
    images: Tensor,
    captions: Sequence[str],
    txt2img: Tensor,
    names: Sequence[str],
    floats: Tensor | None,
) -> list[dict[str, Any]]:
    """Images [B, 3, H, W] in [0, 1] and their M captions as rows like those of ``data``; rounded to 8 bits.

    Args:
        floats: the images before any rounding, for the column ``pixels``.
    """
    column = caption_column(data)
    lists: list[list[str]] = [[] for _ in names]
    for text, image in zip(captions, txt2img.tolist(), strict=True):
        lists[image].append(text)
    single = isinstance(data.features[column], datasets.Value)
    levels = np.round(images.cpu().numpy() * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": png_bytes(level), "path": name}, column: texts[0] if single else texts}
        for level, texts, name in zip(levels, lists, names, strict=True)
    ]
    if floats is not None:
        for row, pixels in zip(rows, floats.cpu().numpy(), strict=True):
            row["pixels"] = pixels
    return rows


def with_other_columns(data: datasets.Dataset, changed: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """``data`` with its changed columns replaced; the others stay views of what they were.

    A column ``pixels`` of an earlier attack goes: it would no longer show the image.
    """
    data = undecoded(data)
    data = data.remove_columns([name for name in ("pixels",) if name in data.column_names])
    rest = data.remove_columns([name for name in data.column_names if name in changed.column_names])
    if rest.column_names:
        rest = flattened(rest, folder / "rest.arrow")
        changed = datasets.concatenate_datasets([changed, rest], axis=1)
    order = [*data.column_names, *(name for name in changed.column_names if name not in data.column_names)]
    return changed.select_columns(order).cast_column("image", datasets.Image())


def image_names(data: datasets.Dataset, start: int) -> list[str]:
    """The relative names of images, ``.png`` at the end: from the column ``file_name``, or of the images' own paths.

    Args:
        start: number of the first row; the row number is the name of an image without one.
    """
    found = [cell["path"] for cell in undecoded(data).select_columns("image")[:]["image"]]
    if "file_name" in data.column_names:
        found = [own or path for own, path in zip(data["file_name"][:], found, strict=True)]
    names = []
    for row, name in enumerate(found, start=start):
        path = Path(name) if isinstance(name, str) and Path(name).name else Path(f"{row:08d}")
        inside = not path.is_absolute() and ".." not in path.parts
        names.append((path if inside else Path(path.name)).with_suffix(".png").as_posix())
    return names


def export(
    folder: Path, shards: Shards, count: int, projection: SemanticProjection | None, made_of: Mapping[str, str]
) -> None:
    """The pairs as files for other programs: PNG images under their own names, and JSON lines beside them.

    Where two images have one name, the later one's gets its row number.

    Args:
        made_of: digests of what the projection was made of, for its file's metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    column = next(name for name in ("captions", "caption") if name in shards.features)
    if projection is not None:
        save_file(projection.state_dict(), str(folder / "projection.safetensors"), metadata=dict(made_of))
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context((folder / f"{name}.jsonl").open("w", encoding="utf-8"))
            for name in ("captions", "changes", "trace")
        }
        written: set[str] = set()
        for index, record in enumerate(shards.records(count)):
            for row in shards.rows(index):
                name = row["image"]["path"]
                if name in written:
                    name = str(Path(name).with_suffix("")) + f"-{len(written):08d}.png"
                written.add(name)
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(row["image"]["bytes"])
                _write_line(files["captions"], {"image": name, "caption": row[column]})
            for name in ("changes", "trace"):
                for line in record[name]:
                    _write_line(files[name], line)


def _write_line(file: IO[str], content: Mapping[str, Any]) -> None:
    file.write(json.dumps(content) + "\n")
