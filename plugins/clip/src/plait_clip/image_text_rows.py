"""Rows of image-text lists, tars and folders, read as a stream."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import attrs
from plait_vision.files import Files, Sample, tar_samples, tar_shards
from plait_vision.tables import read_table

from plait_clip import prompts

LIST_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@attrs.frozen(kw_only=True)
class ImageTextRow:
    """One image with its captions.

    Attributes:
        number: of the row in its source, from 0; named in errors.
        image: a file, its bytes, or a function that reads them; None where it is missing.
        captions: texts, at least one in a sound row.
        name: of the image, as its source has it (relative, with its folders), or None.
        split: the source's own name for the part the row belongs to, or empty.
        label: class number or name, or None.
        is_backdoor: for measuring only, or None.
    """

    number: int
    image: Path | bytes | Callable[[], bytes] | None
    captions: tuple[str, ...]
    name: str | None = None
    split: str = ""
    label: int | str | None = None
    is_backdoor: bool | None = None


@attrs.frozen(kw_only=True)
class ListColumns:
    """Names of the columns of a list; ``id`` and the optional ones may be absent from it."""

    image: str | None = None
    caption: str | None = None
    label: str = "label"
    is_backdoor: str = "is_backdoor"
    id: str | None = None


@attrs.frozen(kw_only=True)
class TableFormat:
    """How a CSV or TSV list is written; see :func:`plait_vision.tables.read_table`."""

    delimiter: str | None = None
    encoding: str | None = None
    quotes: bool = True


IMAGE_NAMES = ("image", "file_name", "filename", "filepath", "image_path", "path")
CAPTION_NAMES = ("caption", "captions", "text", "title", "raw")


def read(
    path: Path, columns: ListColumns, image_root: Path | None = None, table: TableFormat | None = None
) -> Iterator[ImageTextRow]:
    """The rows of a list (CSV, TSV, JSON, JSON lines, Parquet), of a tar, or of a folder.

    JSON may be a list of records, Karpathy's ``{"images": [{"filename", "sentences", "split"}]}`` or COCO's
    ``{"images": [...], "annotations": [...]}``. A tar holds ``key.jpg`` and ``key.txt`` (WebDataset), and ``key.cls``
    where images have classes. A folder holds ``metadata.csv`` (or ``.jsonl``, ``.parquet``) or tars, itself or in one
    folder for each split.

    Args:
        image_root: images of a list are relative to it; default: to the list's own folder.
        table: how a CSV or TSV list is written; default: as it shows itself.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the format is unknown, text of another encoding, or a column is missing; a row id has a duplicate.
    """
    if not path.exists():
        raise FileNotFoundError(f"source {path}: there is no such file or folder")
    table = table or TableFormat()
    if path.is_dir():
        yield from _folder(path, columns, image_root, table)
    elif path.suffix == ".tar":
        yield from _tars([path], 0, "")
    elif path.suffix.lower() in LIST_SUFFIXES:
        yield from _rows(_records(path, table), columns, image_root or path.parent, path)
    else:
        raise ValueError(
            f"source {path}: {path.suffix or 'no suffix'} is unknown; known are {', '.join(LIST_SUFFIXES)}, .tar"
        )


def read_names(
    path: Path, columns: ListColumns, image_root: Path | None = None, table: TableFormat | None = None
) -> Iterator[Path]:
    """The image files that the rows of a list name; of anything else nothing.

    Args: as of :func:`read`.
    """
    if path.suffix.lower() not in LIST_SUFFIXES or not path.is_file():
        return
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet
        import pyarrow.types

        kinds = pyarrow.parquet.read_schema(path)
        images = columns.image or next((name for name in IMAGE_NAMES if name in kinds.names), "")
        if images not in kinds.names or not pyarrow.types.is_string(kinds.field(images).type):
            return  # the images are in the list itself
    for row in read(path, columns, image_root, table):
        if isinstance(row.image, Path):
            yield row.image


def of_split(rows: Iterable[ImageTextRow], split: str, seen: set[str], labels: set[str]) -> Iterator[ImageTextRow]:
    """The rows of a split; the names of all splits that occur are added to ``seen``, the labels of the others to ``labels``."""
    for row in rows:
        seen.add(row.split)
        if row.split == split:
            yield row
        elif isinstance(row.label, str) or (row.label is not None and row.label >= 0):
            labels.add(str(row.label))


def _folder(path: Path, columns: ListColumns, image_root: Path | None, table: TableFormat) -> Iterator[ImageTextRow]:
    lists = {"": own} if (own := _metadata(path)) else {}
    if not lists:
        parts = [child for child in sorted(path.iterdir()) if child.is_dir()]
        lists = {child.name: inner for child in parts if (inner := _metadata(child))}
    number = 0
    for split, found in lists.items():
        rows = _rows(_records(found, table), columns, image_root or found.parent, found)
        for row in rows:
            row = attrs.evolve(row, number=number, split=row.split or split)
            number += 1
            yield row
    shards = {} if lists else tar_shards(path)
    for split, tars in shards.items():
        for row in _tars(tars, number, split):
            number = row.number + 1
            yield row
    if not lists and not shards:
        raise ValueError(
            f"source {path}: the folder holds neither metadata.csv nor .tar files, itself or in a folder for each split"
        )


def _metadata(folder: Path) -> Path | None:
    names = [f"metadata{suffix}" for suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _records(path: Path, table: TableFormat) -> Iterator[Mapping[str, Any]]:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        for _, record in read_table(path, delimiter=table.delimiter, encoding=table.encoding, quotes=table.quotes):
            yield record
    elif suffix == ".parquet":
        import pyarrow.parquet

        for part in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from part.to_pylist()
    elif suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    record = _json(line.removeprefix(b"\xef\xbb\xbf"), f"{path}, line {number}")
                    if not isinstance(record, Mapping):
                        raise ValueError(f"source {path}, line {number}: this is not a JSON object")
                    yield record
    else:
        content = _json(path.read_bytes(), str(path))
        try:
            yield from _json_records(content, path)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"source {path}: this is not COCO's or Karpathy's layout: {error} is missing") from error


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)  # UTF-8, or UTF-16 and UTF-32 as they show themselves
    except UnicodeDecodeError as error:
        raise ValueError(
            f"source {where}: byte 0x{content[error.start]:02x} is not {error.encoding}; save the file as UTF-8"
        ) from error
    except ValueError as error:
        raise ValueError(f"source {where}: this is not JSON ({error})") from error


def _json_records(content: Any, path: Path) -> Iterator[Mapping[str, Any]]:
    if isinstance(content, Mapping) and {"images", "annotations"} <= set(content):  # COCO
        captions: dict[Any, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        for image in content["images"]:
            yield {"image": image["file_name"], "caption": captions.get(image["id"], [])}
    elif isinstance(content, Mapping) and "images" in content:  # Karpathy
        for image in content["images"]:
            name = Path(image.get("filepath", "")) / image["filename"]
            sentences = [sentence["raw"] for sentence in image["sentences"]]
            yield {"image": str(name), "caption": sentences, "split": image.get("split", "")}
    elif isinstance(content, list) and all(isinstance(record, Mapping) for record in content):
        yield from content
    else:
        raise ValueError(f"source {path}: expected a list of records, or COCO's or Karpathy's images")


def _rows(records: Iterator[Mapping[str, Any]], columns: ListColumns, root: Path, path: Path) -> Iterator[ImageTextRow]:
    image_name = caption_name = ""
    seen: set[Any] = set()
    for number, record in enumerate(records):
        if number == 0:
            image_name = _column(record, columns.image, IMAGE_NAMES, "image", path)
            caption_name = _column(record, columns.caption, CAPTION_NAMES, "caption", path)
            if columns.id is not None and columns.id not in record:
                raise ValueError(
                    f"source {path}: there is no column {columns.id!r}; it has {', '.join(map(str, record))}"
                )
        if columns.id is not None:
            if record[columns.id] in seen:
                raise ValueError(f"row {number}: duplicate id {record[columns.id]!r}; ids must differ")
            seen.add(record[columns.id])
        flag = record.get(columns.is_backdoor)
        yield ImageTextRow(
            number=number,
            image=_image(record.get(image_name), root),
            captions=_captions(record.get(caption_name)),
            name=_name(record.get(image_name)),
            split=str(record.get("split") or ""),
            label=_label(record.get(columns.label)),
            is_backdoor=_flag(flag, columns.is_backdoor, number),
        )


def _flag(cell: Any, column: str, number: int) -> bool | None:
    if cell is None or cell == "":
        return None
    text = str(cell).strip().lower()
    if text not in _FLAGS:
        raise ValueError(f"row {number}: {column} is {cell!r}; expected one of {', '.join(_FLAGS)}")
    return _FLAGS[text]


_FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def _column(record: Mapping[str, Any], wanted: str | None, known: Sequence[str], what: str, path: Path) -> str:
    found = [name for name in ([wanted] if wanted else known) if name in record]
    if not found:
        have = ", ".join(str(name) for name in record) or "none"
        asked = repr(wanted) if wanted else f"for the {what} ({', '.join(known)})"
        raise ValueError(f"source {path}: there is no column {asked}; its columns are {have}")
    return found[0]


def _image(cell: Any, root: Path) -> Path | bytes | None:
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if not cell:
        return None
    return cell if isinstance(cell, bytes) else _existing(root / cell)


def _existing(path: Path) -> Path:
    """The file of this name in whichever Unicode form the file system has it: ``é`` is one letter or two."""
    if not path.exists():
        for form in ("NFC", "NFD"):
            other = Path(unicodedata.normalize(form, str(path)))
            if other.exists():
                return other
    return path


def _name(cell: Any) -> str | None:
    """The image's name; of an absolute path its last part."""
    path = cell.get("path") if isinstance(cell, Mapping) else cell
    if not isinstance(path, str) or not path:
        return None
    return Path(path).name if Path(path).is_absolute() else path


def _captions(cell: Any) -> tuple[Any, ...]:
    if cell is None:
        return ()
    return tuple(cell) if isinstance(cell, (list, tuple)) else (cell,)


def _label(cell: Any) -> int | str | None:
    if cell is None or cell == "":
        return None
    text = str(cell).strip()
    return int(text) if re.fullmatch("-?[0-9]+", text) else text


def _tars(tars: Sequence[Path], number: int, split: str) -> Iterator[ImageTextRow]:
    """The samples of WebDataset tars, numbered from ``number``."""
    for sample in (sample for tar in tars for sample in tar_samples(tar)):
        yield _sample(sample, number, split)
        number += 1


def _sample(sample: Sample, number: int, split: str) -> ImageTextRow:
    name, image = sample.image or (None, None)
    extra = _json(sample.parts["json"], f"{sample.where}.json") if "json" in sample.parts else {}
    extra = extra if isinstance(extra, Mapping) else {}
    caption = sample.text("txt") if "txt" in sample.parts else extra.get("caption")
    label = sample.text("cls") if "cls" in sample.parts else extra.get("label")
    return ImageTextRow(
        number=number, image=image, captions=_captions(caption), name=name, split=split, label=_label(label)
    )


def class_rows(
    files: Files, folders: Mapping[str, Sequence[str]], names: Mapping[str, str], templates: Sequence[str]
) -> Iterator[ImageTextRow]:
    """The images of the class folders of a split, each with every template filled with its class name.

    Args:
        folders: class folder → its images.
        names: all class folders in the order of their labels → the class in words.
    """
    number = 0
    for label, (child, name) in enumerate(names.items()):
        captions = tuple(prompts.fill(template, name) for template in templates)
        for path in folders.get(child, ()):
            short = f"{child}/{PurePosixPath(path).name}"
            yield ImageTextRow(
                number=number, image=functools.partial(files.read, path), captions=captions, name=short, label=label
            )
            number += 1
