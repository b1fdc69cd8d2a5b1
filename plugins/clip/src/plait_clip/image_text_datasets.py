"""Datasets in the common columns: ``image``, ``captions``, ``file_name``, ``label``, ``is_backdoor``."""

from __future__ import annotations

import io
import itertools
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from plait_vision.columns import class_names_in, with_class_labels
from plait_vision.images import as_cell
from plait_vision.writing import write_rows

from plait_clip.image_text_rows import ImageTextRow
from plait_clip.pair_batches import caption_problem, check_captions, image_label, undecoded

NO_RULES: Mapping[str, Any] = {}
"""Of :func:`plait_vision.images.decode`: transparent and deep images are refused."""


def features(names: Sequence[str] | None = None) -> datasets.Features:
    """``image`` and ``captions``, and ``label`` where class names are given."""
    columns = {"image": datasets.Image(), "captions": datasets.Sequence(datasets.Value("string"))}
    if names is not None:
        columns["label"] = datasets.ClassLabel(names=list(names))
    return datasets.Features(columns)


def from_arrays(
    images: np.ndarray, captions: Sequence[str], labels: Sequence[int] | np.ndarray, names: Sequence[str]
) -> datasets.Dataset:
    """A dataset held in memory.

    Args:
        images: uint8 [N, H, W] (grey) or [N, H, W, 3]; kept without loss.
        captions: one for each image.
        labels: [N], counting from 0 into ``names``.
    """
    cells = [{"bytes": png_bytes(image), "path": None} for image in images]
    columns = {"image": cells, "captions": [[text] for text in captions], "label": [int(label) for label in labels]}
    return datasets.Dataset.from_dict(columns, features=features(names))


def png_bytes(pixels: np.ndarray) -> bytes:
    """uint8 [H, W] or [H, W, 3] → PNG.

    Raises:
        ValueError: another type or shape.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
        raise ValueError(
            f"pixels are {pixels.dtype} of shape {list(pixels.shape)}; give uint8 of shape [H, W] or [H, W, 3]"
        )
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def from_dataset(
    dataset: datasets.Dataset,
    *,
    image: str | None = None,
    caption: str | None = None,
    label: str = "label",
    folder: Path,
    rules: Mapping[str, Any] = NO_RULES,
    skip_bad_images: bool = False,
    threads: int = 8,
) -> tuple[datasets.Dataset, int]:
    """A Hugging Face dataset with its columns named as here, every row checked; other columns are kept.

    Args:
        image, caption: its columns; default: ``image``, and ``captions``, ``caption`` or ``text``.
        label: its column of class numbers or names, where there is one.
        folder: where images are written that are stored otherwise by ``rules``.
        rules: of :func:`plait_vision.images.decode`, for transparent and deep images.

    Returns:
        the dataset, and how many rows with bad images were left out.

    Raises:
        ValueError: a missing column, an empty caption, a bad image, no row; names the row.
    """
    image = image or "image"
    caption = caption or next(
        (name for name in ("captions", "caption", "text") if name in dataset.column_names), "captions"
    )
    for name in (image, caption):
        if name not in dataset.column_names:
            raise ValueError(f"the dataset has no column {name!r}; its columns are {', '.join(dataset.column_names)}")
    target = "caption" if isinstance(dataset.features[caption], datasets.Value) else "captions"
    renamed = [(image, "image"), (caption, target), *([(label, "label")] if label in dataset.column_names else [])]
    for old, new in renamed:
        if old != new:
            dataset = dataset.remove_columns([new]) if new in dataset.column_names else dataset
            dataset = dataset.rename_column(old, new)
    if dataset.features["image"] != datasets.Image():
        dataset = dataset.cast_column("image", datasets.Image())
    cells = undecoded(dataset).select_columns("image")
    check_captions(dataset)
    bad: list[int] = []

    def checked() -> Iterator[tuple[int, dict[str, Any]]]:
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(cells), 32 * threads):
                chunk = cells[start : start + 32 * threads]["image"]
                jobs = pool.map(lambda cell, row: _cell_of(cell, row, rules), chunk, itertools.count(start))
                for row, (cell, problem) in enumerate(jobs, start=start):
                    if cell is not None:
                        yield row, cell
                    elif skip_bad_images:
                        bad.append(row)
                    elif problem is not None:
                        raise problem

    if rules == NO_RULES:  # nothing is to be converted
        for _ in checked():
            pass
        kept = dataset.select(np.setdiff1d(np.arange(len(dataset)), bad)) if bad else dataset
    else:
        others = dataset.with_format(None).cast_column("image", datasets.Image(decode=False))
        folder.mkdir(parents=True, exist_ok=True)
        kept = write_rows(folder, ({**others[row], "image": cell} for row, cell in checked()), dataset.features)
    if len(bad) == len(dataset):
        raise ValueError(f"the dataset has no readable image among {len(dataset)} rows")
    return kept, len(bad)


def from_rows(
    rows: Iterable[ImageTextRow],
    folder: Path,
    *,
    names: Sequence[str] | None = None,
    labels: Collection[str] = (),
    rules: Mapping[str, Any] = NO_RULES,
    skip_bad_images: bool = False,
    threads: int = 8,
) -> tuple[dict[str, datasets.Dataset], int]:
    """Write rows to memory-mapped datasets in ``folder`` as they come, one for each of their splits.

    Every image is decoded once, to find the damaged ones; its file is kept as it is where it holds upright 8-bit RGB, and
    its name in the column ``file_name`` where the first row has one.

    Args:
        names: class names; labels are numbers into them or names among them. Default: the names that
            occur, or as many names as the highest number says.
        labels: of rows that are not among these, such as another split's: their classes have numbers, too; looked at when
            all rows have come.
        rules: of :func:`plait_vision.images.decode`, for transparent and deep images.
        skip_bad_images: leave out rows whose image is missing, damaged or refused.

    Returns:
        split → dataset, and how many rows were left out.

    Raises:
        ValueError: an empty caption, a bad image, a label outside ``names``, no row at all; names the row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, _Part] = {}
    skipped = 0
    with ThreadPoolExecutor(threads) as pool:
        for row, (cell, problem) in _prefetched(pool, rows, 32 * threads, rules):
            if trouble := caption_problem(row.captions):
                raise ValueError(f"row {row.number}: {trouble}")
            if problem is not None:
                if not skip_bad_images:
                    raise problem
                skipped += 1
                continue
            if row.split not in writers:
                writers[row.split] = _Part(folder / f"{uuid.uuid4().hex}.arrow", row)
            writers[row.split].write(row, cell)
    parts = {split: writer.finish() for split, writer in writers.items()}
    if not parts:
        raise ValueError(f"the source has no rows{f'; {skipped} had no readable image' if skipped else ''}")
    return _with_classes(parts, names, labels), skipped


def flattened(dataset: datasets.Dataset, path: Path) -> datasets.Dataset:
    """The rows of a selection written to ``path``; others as they are.

    Adding or joining columns would else copy the selection to a cache folder outside ours.
    """
    if dataset._indices is None:
        return dataset
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return dataset.flatten_indices(cache_file_name=str(path))
    finally:
        if shown:
            datasets.enable_progress_bars()


class _Part:
    """One split, written as it comes. Labels stay text until all are known."""

    def __init__(self, path: Path, first: ImageTextRow) -> None:
        self.path = path
        columns: dict[str, Any] = dict(features())
        self.labelled, self.flagged = first.label is not None, first.is_backdoor is not None
        self.named = first.name is not None
        if self.named:
            columns["file_name"] = datasets.Value("string")
        if self.labelled:
            columns["label"] = datasets.Value("string")
        if self.flagged:
            columns["is_backdoor"] = datasets.Value("bool")
        self.writer = ArrowWriter(path=str(path), features=datasets.Features(columns), writer_batch_size=256)

    def write(self, row: ImageTextRow, cell: Mapping[str, Any]) -> None:
        record: dict[str, Any] = {"image": {**cell, "path": row.name}, "captions": list(row.captions)}
        if self.named:  # with its folders: datasets keeps only the last part of a path when it saves images
            record["file_name"] = row.name
        if (row.label is not None) != self.labelled or (row.is_backdoor is not None) != self.flagged:
            raise ValueError(
                f"row {row.number}: the label or is_backdoor is missing here or in the first row; give all or none"
            )
        if self.labelled:
            record["label"] = str(row.label)
        if self.flagged:
            record["is_backdoor"] = row.is_backdoor
        self.writer.write(record)

    def finish(self) -> datasets.Dataset:
        self.writer.finalize()
        return datasets.Dataset.from_file(str(self.path))


def _prefetched(
    pool: ThreadPoolExecutor, rows: Iterable[ImageTextRow], ahead: int, rules: Mapping[str, Any]
) -> Iterator[tuple[ImageTextRow, Any]]:
    """Rows with their images read and checked, in order, up to ``ahead`` of them at a time."""
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, ahead)):
        yield from zip(chunk, pool.map(lambda row: _read_image(row, rules), chunk), strict=True)


def _read_image(row: ImageTextRow, rules: Mapping[str, Any]) -> tuple[dict[str, Any], None] | tuple[None, ValueError]:
    name = row.image if isinstance(row.image, Path) else row.name
    try:
        content = row.image() if callable(row.image) else row.image
    except ValueError as error:
        return None, error
    return _cell_of(content, row.number, rules, name)


def _cell_of(
    source: Any, row: int, rules: Mapping[str, Any], name: object = None
) -> tuple[dict[str, Any], None] | tuple[None, ValueError]:
    """A checked cell of an image column, or what is wrong with it."""
    name = name or (source.get("path") if isinstance(source, Mapping) else None)
    try:
        return as_cell(source, image_label(row, name), **rules)[0], None
    except ValueError as error:
        return None, error


def _with_classes(
    parts: dict[str, datasets.Dataset], names: Sequence[str] | None, others: Collection[str]
) -> dict[str, datasets.Dataset]:
    """The text labels as ``ClassLabel``, with the same names in all parts; numbers are those of the classes."""
    labelled = {split: part for split, part in parts.items() if "label" in part.column_names}
    if not labelled:
        return parts
    occurring = set(others).union(*(part.unique("label") for part in labelled.values()))
    if all(label.isdigit() for label in occurring):
        labelled = {split: _with_numbers(part) for split, part in labelled.items()}
        names = names or [str(number) for number in range(max(map(int, occurring)) + 1)]
    return {**parts, **with_class_labels(labelled, names=names or sorted(occurring))}


def _with_numbers(part: datasets.Dataset) -> datasets.Dataset:
    numbers = [int(text) for text in part.select_columns("label")[:]["label"]]
    return part.remove_columns("label").add_column("label", numbers)


def with_label_names(
    parts: dict[str, datasets.Dataset],
    names: Sequence[str] | None,
    every: Mapping[str, datasets.Dataset],
    column: str,
) -> dict[str, datasets.Dataset]:
    """Datasets whose labels are texts, of several ``ClassLabel``, or to which names are given, as one ``ClassLabel``.

    Args:
        every: all splits of the source, so that a label means the same in each; their labels are in ``column``.
    """
    labelled = {split: part for split, part in parts.items() if "label" in part.column_names}
    sources = {split: part for split, part in every.items() if column in part.column_names}
    kinds = [part.features[column] for part in sources.values()]
    texts = any(getattr(kind, "dtype", "") in ("string", "large_string") for kind in kinds)
    named = [kind for kind in kinds if isinstance(kind, datasets.ClassLabel)]
    if not labelled or not (texts or names or any(kind != named[0] for kind in named)):
        return parts
    return {**parts, **with_class_labels(labelled, names=names or class_names_in(sources, column))}
