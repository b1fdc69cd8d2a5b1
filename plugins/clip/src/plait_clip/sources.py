"""Rows of image-text lists, tars and folders, read as a stream."""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from plait_clip import prompts

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LIST_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@attrs.frozen(kw_only=True)
class Row:
    """One image with its captions.

    Attributes:
        number: of the row in its source, from 0; named in errors.
        image: a file, or the file's bytes; None where it is missing.
        captions: texts, at least one in a sound row.
        name: of the image, as its source has it (relative, with its folders), or None.
        split: the source's own name for the part the row belongs to, or empty.
        label: class number or name, or None.
        is_backdoor: for measuring only, or None.
    """

    number: int
    image: Path | bytes | None
    captions: tuple[str, ...]
    name: str | None = None
    split: str = ""
    label: int | str | None = None
    is_backdoor: bool | None = None


@attrs.frozen(kw_only=True)
class Columns:
    """Names of the columns of a list; ``id`` and the optional ones may be absent from it."""

    image: str | None = None
    caption: str | None = None
    label: str = "label"
    is_backdoor: str = "is_backdoor"
    id: str | None = None


IMAGE_NAMES = ("image", "file_name", "filename", "filepath", "image_path", "path")
CAPTION_NAMES = ("caption", "captions", "text", "title", "raw")


def read(path: Path, columns: Columns, image_root: Path | None = None, delimiter: str | None = None) -> Iterator[Row]:
    """The rows of a list (CSV, TSV, JSON, JSON lines, Parquet), of a tar, or of a folder.

    JSON may be a list of records, Karpathy's ``{"images": [{"filename", "sentences", "split"}]}`` or COCO's
    ``{"images": [...], "annotations": [...]}``. A tar holds ``key.jpg`` and ``key.txt`` (WebDataset). A
    folder holds ``metadata.csv`` (or ``.jsonl``, ``.parquet``) or tars.

    Args:
        image_root: images of a list are relative to it; default: to the list's own folder.
        delimiter: of a CSV file; default: comma, in ``.tsv`` tab.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the format is unknown, or a column is missing; a row id occurs twice.
    """
    if not path.exists():
        raise FileNotFoundError(f"source {path}: there is no such file or folder")
    if path.is_dir():
        lists = [path / f"metadata{suffix}" for suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet")]
        found = [candidate for candidate in lists if candidate.is_file()]
        tars = sorted(path.glob("*.tar"))
        if found:
            yield from read(found[0], columns, image_root, delimiter)
        elif tars:
            number = 0
            for tar in tars:
                for row in _tar(tar, number):
                    number = row.number + 1
                    yield row
        else:
            raise ValueError(f"source {path}: the folder holds neither metadata.csv nor .tar files")
        return
    if path.suffix == ".tar":
        yield from _tar(path, 0)
        return
    if path.suffix not in LIST_SUFFIXES:
        raise ValueError(
            f"source {path}: {path.suffix or 'no suffix'} is unknown; known are {', '.join(LIST_SUFFIXES)}, .tar"
        )
    yield from _rows(_records(path, delimiter), columns, image_root or path.parent, path)


def _records(path: Path, delimiter: str | None) -> Iterator[Mapping[str, Any]]:
    if path.suffix in (".csv", ".tsv"):
        csv.field_size_limit(1 << 24)
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter or ("\t" if path.suffix == ".tsv" else ","))
            yield from reader
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        for part in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from part.to_pylist()
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                if line.strip():
                    yield _json(line, f"{path}, line {number + 1}")
    else:
        yield from _json_records(_json(path.read_text(encoding="utf-8"), str(path)), path)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
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


def _rows(records: Iterator[Mapping[str, Any]], columns: Columns, root: Path, path: Path) -> Iterator[Row]:
    image_name = caption_name = None
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
                raise ValueError(f"row {number}: id {record[columns.id]!r} occurs twice; ids must differ")
            seen.add(record[columns.id])
        flag = record.get(columns.is_backdoor)
        yield Row(
            number=number,
            image=_image(record.get(image_name), root),
            captions=_captions(record.get(caption_name)),
            name=_name(record.get(image_name)),
            split=str(record.get("split") or ""),
            label=_label(record.get(columns.label)),
            is_backdoor=None if flag in (None, "") else str(flag).lower() in ("1", "1.0", "true"),
        )


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
    return cell if isinstance(cell, bytes) else root / cell


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
    text = str(cell)
    return int(text) if text.lstrip("-").isdigit() else text


def _tar(path: Path, number: int) -> Iterator[Row]:
    """WebDataset: files of one key (the name up to its first dot) lie next to one another."""
    key: tuple[str, str] = ("", "")
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if (folder, stem) != key and parts:
                    yield _sample(key, parts, number)
                    number, parts = number + 1, {}
                key = (folder, stem)
                parts[extension.lower()] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except tarfile.TarError as error:
        raise ValueError(f"source {path}: the tar cannot be read ({error})") from error
    if parts:
        yield _sample(key, parts, number)


def _sample(key: tuple[str, str], parts: Mapping[str, bytes], number: int) -> Row:
    kind = next((extension for extension in parts if f".{extension}" in IMAGE_SUFFIXES), None)
    image = None if kind is None else parts[kind]
    name = None if kind is None else "/".join(filter(None, (key[0], f"{key[1]}.{kind}")))
    extra = _json(parts["json"].decode(), f"row {number}") if "json" in parts else {}
    caption = parts["txt"].decode("utf-8") if "txt" in parts else extra.get("caption")
    label = parts["cls"].decode().strip() if "cls" in parts else extra.get("label")
    return Row(number=number, image=image, captions=_captions(caption), name=name, label=_label(label))


def class_folders(folder: Path) -> dict[str, list[str]]:
    """Split → class folder names in alphabetical order; the split is ``""`` where classes lie in ``folder`` itself.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no sub-folder with images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder}: there is no such folder")
    classes = [child.name for child in sorted(folder.iterdir()) if child.is_dir() and _has_image(child)]
    if classes:
        return {"": classes}
    splits = {
        split.name: [child.name for child in sorted(split.iterdir()) if child.is_dir() and _has_image(child)]
        for split in sorted(folder.iterdir())
        if split.is_dir()
    }
    splits = {name: found for name, found in splits.items() if found}
    if not splits:
        raise ValueError(f"folder {folder}: it has no class folders with images ({', '.join(IMAGE_SUFFIXES)})")
    return splits


def class_rows(
    folder: Path, classes: Sequence[str], names: Sequence[str], templates: Sequence[str], present: Sequence[str]
) -> Iterator[Row]:
    """The images of the class folders, each with every template filled with its class name.

    Args:
        classes, names: all classes in the order of their labels, as folders and in words.
        present: those that have a folder here.
    """
    number = 0
    for label, (child, name) in enumerate(zip(classes, names, strict=True)):
        if child not in present:
            continue
        captions = tuple(prompts.fill(template, name) for template in templates)
        for path in sorted((folder / child).iterdir()):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                yield Row(number=number, image=path, captions=captions, name=f"{child}/{path.name}", label=label)
                number += 1


def _has_image(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
