"""Between datasets and tensors: reading, writing and matching images in bounded memory.

Every other module of the kit, and any plugin that handles images, goes through these functions:

* :func:`read_batches` – dataset column → lists of uint8 tensors ``[3, H, W]``, a batch at a time;
* :class:`ImageColumn` – the same row by row, in any order;
* :func:`read_floats` – the same as float32 in [0, 1], unrounded where column ``image_float`` is kept;
* :func:`to_float`, :func:`to_uint8` – 0–255 ↔ [0, 1], exact there and back for all 256 levels;
* :func:`write_images` – an iterator of images → a new dataset on disk, all other columns kept;
* :func:`map_images` – the two together: a function of one image over a whole dataset;
* :func:`names`, :func:`sizes`, :func:`check_same_scenes` – do these datasets show the same scenes?
* :func:`over_splits` – do something to a dataset, or to each dataset of a mapping.

A dataset of images has a column ``image`` (RGB, 8 bit) and a string column ``name`` (file stem);
pairs have ``target`` beside it. ``image_float`` (float32 ``[3, H, W]`` as nested lists, [0, 1]) is an
optional lossless copy of ``image`` before rounding. A restorer that draws several samples of an image puts them into
``image_sample_0``, ``image_sample_1``, …; whatever writes ``image`` anew drops both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Image, List, Value
from plait_vision import composed, decode, write_tables
from plait_vision import encode_png as encode_pixels
from plait_vision import size as size_of
from plait_vision.writing import BUFFER_BYTES

if TYPE_CHECKING:
    from plait import Run

FLOAT_COLUMN = "image_float"
SAMPLE_PREFIX = "image_sample_"
# What methods that work on every split, or on every client's data, take (see plait.contract).
DATA = ("dataset", "clients")
FLOAT_FEATURE = List(List(List(Value("float32"))))


def to_float(image: torch.Tensor) -> torch.Tensor:
    """uint8 0–255 → float32 in [0, 1]; floats are returned as float32 unchanged."""
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def to_uint8(image: torch.Tensor) -> torch.Tensor:
    """Float in [0, 1] → uint8, clipped and rounded to the nearest level (halves to even); uint8 unchanged.

    Raises:
        ValueError: the image holds NaN or infinity, which no level stands for, or is on the 0–255 scale.
    """
    if image.dtype == torch.uint8:
        return image
    if problem := _problem(image):
        raise ValueError(f"the image holds {problem}")
    if image.dtype in (torch.float16, torch.bfloat16):
        image = image.float()  # else the levels themselves are rounded
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


class ImageColumn:
    """The images of a column, uint8 ``[3, H, W]`` each, read from the data whenever one is asked for; sizes may differ.

    For rows in any order, and for some of many; :func:`read_batches` reads all of them in theirs.

    Raises:
        ValueError: no such column; when reading, an image that is damaged, 16-bit or transparent.
        IndexError: when reading, no such row.
    """

    def __init__(self, dataset: Dataset, column: str = "image") -> None:
        self.name, self._cells = column, _undecoded(dataset, column)

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, row: int) -> torch.Tensor:
        row = range(len(self))[row]
        (cell,) = self._cells[row][self.name].to_pylist()
        return _decode(cell, self.name, row)


def read_batches(
    dataset: Dataset, column: str = "image", batch_size: int = 16
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Yield row numbers and their images, uint8 ``[3, H, W]``; sizes may differ within a batch.

    Raises:
        ValueError: no such column, or an image that is damaged, 16-bit or transparent.
    """
    for rows, cells in _raw_batches(dataset, column, batch_size):
        yield rows, [_decode(cell, column, row) for row, cell in zip(rows, cells, strict=True)]


def read_floats(dataset: Dataset, batch_size: int = 16) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Like :func:`read_batches`, float32 in [0, 1]: column ``image_float`` where there is one, else ``image``."""
    if FLOAT_COLUMN not in dataset.column_names:
        for rows, images in read_batches(dataset, "image", batch_size):
            yield rows, [to_float(image) for image in images]
        return
    table = dataset.select_columns([FLOAT_COLUMN]).with_format("arrow")
    for start in range(0, len(dataset), batch_size):
        column = table[start : start + batch_size][FLOAT_COLUMN].combine_chunks()
        yield list(range(start, start + len(column))), [_tensor(scalar) for scalar in column]


def write_images(
    run: Run,
    source: Dataset,
    images: Iterable[torch.Tensor],
    *,
    column: str = "image",
    keep_float: bool = False,
    keep_source_as: str | None = None,
    num_samples: int = 1,
) -> Dataset:
    """Write ``images``, one per row of ``source`` and in its order, as a new dataset in ``run.folder``.

    Memory stays bounded by a few images: finished ones go to disk in shards, from which the returned
    dataset reads them again.

    Args:
        source: gives all columns but ``column``; they are copied without decoding.
        images: uint8 ``[3, H, W]``, or float in [0, 1] of that shape, which is clipped and rounded.
        column: the column to write, new or replaced.
        keep_float: also store float images unrounded and unclipped in ``image_float``.
        keep_source_as: put the image of ``source`` into this column, unless it is there already.
        num_samples: above 1, every item is ``[1 + num_samples, 3, H, W]``: the image for ``column``, and the samples
            for the columns ``image_sample_0``, …, which :class:`plait_imaging.Scenes` reads as so many models.

    Raises:
        ValueError: an image holds NaN or infinity, or is on the 0–255 scale (its name is given).
        ValueError: more or fewer images than rows.
    """
    features = Features(
        {name: kind for name, kind in source.features.items() if not (column == "image" and _is_of_image(name))}
    )
    features[column] = Image()
    samples = [f"{SAMPLE_PREFIX}{number}" for number in range(num_samples)] if num_samples > 1 else []
    features |= {name: Image() for name in samples}
    if keep_float:
        features[FLOAT_COLUMN] = FLOAT_FEATURE
    if keep_source_as and keep_source_as not in features:
        features[keep_source_as] = Image()
    kept = source.with_format("arrow")

    def tables() -> Iterator[pa.Table]:
        start = 0
        for group in _in_buffers(images, source, 1 + len(samples)):
            batch = [one[0] for one in group]
            table = kept[start : start + len(batch)]
            if len(table) < len(batch):
                raise ValueError(f"{start + len(batch)} or more images for {len(source)} rows")
            columns = {name: table[name] for name in features if name in table.column_names}
            if keep_source_as and keep_source_as not in columns:
                columns[keep_source_as] = table["image"]
            columns[column] = _encoded(batch)
            columns |= {name: _encoded([one[1 + number] for one in group]) for number, name in enumerate(samples)}
            if keep_float:
                columns[FLOAT_COLUMN] = _nested(batch)
            yield pa.table({name: columns[name] for name in features})
            start += len(batch)
        if start != len(source):
            raise ValueError(f"{start} images for {len(source)} rows")

    return write_tables(run.folder, tables(), features)


def map_images(
    run: Run,
    source: Dataset,
    function: Callable[[torch.Tensor, int], torch.Tensor],
    description: str,
    *,
    column: str = "image",
    keep_float: bool = False,
    keep_source_as: str | None = None,
) -> Dataset:
    """Write a dataset with ``function(image, row)`` in place of every image of ``column``, showing progress.

    ``function`` takes and returns what :func:`write_images` takes; it is given uint8 ``[3, H, W]``.
    """

    def results() -> Iterator[torch.Tensor]:
        rows = (pair for numbers, batch in read_batches(source, column, 4) for pair in zip(numbers, batch, strict=True))
        for row, image in run.track(rows, description, total=len(source)):
            yield function(image, row)

    return write_images(run, source, results(), column=column, keep_float=keep_float, keep_source_as=keep_source_as)


def encode_png(image: torch.Tensor) -> bytes:
    """uint8 ``[3, H, W]`` → PNG bytes."""
    return encode_pixels(image.permute(1, 2, 0).contiguous().cpu().numpy())


def names(dataset: Dataset) -> list[str]:
    """The ``name`` of every row in Unicode's composed form, or its number where the dataset has no such column."""
    if "name" in dataset.column_names:
        return [composed(str(name)) for name in dataset.with_format(None)["name"]]
    return [str(row) for row in range(len(dataset))]


def sizes(dataset: Dataset, column: str = "image") -> Iterator[tuple[int, int]]:
    """Height and width of every image, from its header alone."""
    for rows, cells in _raw_batches(dataset, column, 16):
        for row, cell in zip(rows, cells, strict=True):
            yield size_of(_cell(cell, column, row), _label(column, row))


def check_same_scenes(datasets: Mapping[str, Dataset], column: str = "image") -> None:
    """Make sure that several restorations show the same scenes in the same order and size.

    Args:
        datasets: model name → dataset; the first one is what the others are compared with.

    Raises:
        ValueError: lengths, names or sizes differ; says which image of which model.
    """
    (first, base), *others = datasets.items()
    base_names, base_sizes = names(base), list(sizes(base, column))
    for model, dataset in others:
        own = names(dataset)
        known, wanted = set(own), set(base_names)
        missing = [name for name in base_names if name not in known]
        if missing:
            raise ValueError(
                f"{model} lacks {len(missing)} of the images of {first}: {_some(missing)}; restore them too"
            )
        surplus = [name for name in own if name not in wanted]
        if surplus or len(own) != len(base_names):
            raise ValueError(
                f"{model} has {len(own)} images and {first} {len(base_names)}"
                f"{', more: ' + _some(surplus) if surplus else ''}; give both the same scenes"
            )
        for ours, theirs in zip(own, base_names, strict=True):
            if ours != theirs:
                raise ValueError(
                    f"{model} and {first} order their images differently ({ours}, {theirs}); sort both alike"
                )
        for name, size, base_size in zip(own, sizes(dataset, column), base_sizes, strict=True):
            if size != base_size:
                raise ValueError(
                    f"image {name} is {size[0]}×{size[1]} pixels in {model} and {base_size[0]}×{base_size[1]} in {first}; "
                    "every model must keep the size"
                )


def over_splits(data: Any, function: Callable[[Dataset, str], Dataset]) -> Any:
    """``function(dataset, "")``, or a dict of ``function(dataset, split)`` where ``data`` is a mapping.

    Raises:
        ValueError: something in ``data`` is not a dataset with images in column ``image``.
    """
    if isinstance(data, Mapping):
        if not data:
            raise ValueError("data has no splits; give at least one dataset with an image column")
        return {split: function(_checked(dataset, f"data.{split}"), split) for split, dataset in data.items()}
    return function(_checked(data, "data"), "")


def _checked(dataset: Any, label: str) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{label} is a {type(dataset).__name__}; expected a dataset with an image column")
    _has_column(dataset, "image", label)
    if len(dataset) == 0:
        raise ValueError(f"{label} has no images; give at least one")
    return dataset


def _has_column(dataset: Dataset, column: str, label: str = "the dataset") -> None:
    if column not in dataset.column_names:
        raise ValueError(f"{label} has no column {column!r}; it has {', '.join(dataset.column_names) or 'none'}")


def _undecoded(dataset: Dataset, column: str) -> Dataset:
    _has_column(dataset, column)
    return dataset.select_columns([column]).with_format("arrow")


def _raw_batches(dataset: Dataset, column: str, batch_size: int) -> Iterator[tuple[list[int], list[Any]]]:
    undecoded = _undecoded(dataset, column)
    for start in range(0, len(dataset), batch_size):
        cells = undecoded[start : start + batch_size][column].to_pylist()
        yield list(range(start, start + len(cells))), cells


def _cell(cell: Any, column: str, row: int) -> Any:
    if cell is not None and not (isinstance(cell, dict) and {"bytes", "path"} <= set(cell)):
        raise ValueError(f"{_label(column, row)} is not an image; give a column of images")
    return cell


def _label(column: str, row: int) -> str:
    return f"column {column!r}, row {row}"


def _decode(cell: Any, column: str, row: int) -> torch.Tensor:
    picture = decode(_cell(cell, column, row), _label(column, row))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _is_of_image(column: str) -> bool:
    """Whether a column says more about column ``image``, and is wrong once that is another."""
    return column == FLOAT_COLUMN or column.startswith(SAMPLE_PREFIX)


def _in_buffers(images: Iterable[torch.Tensor], source: Dataset, count: int) -> Iterator[list[torch.Tensor]]:
    """Lists of ``[count, 3, H, W]``, one a row, that hold at most about 16 MB; checks each image."""
    buffer: list[torch.Tensor] = []
    held = 0
    for row, image in enumerate(images):
        image = image[None] if count == 1 else image
        if image.ndim != 4 or image.shape[:2] != (count, 3):
            expected, found = (3, "H", "W"), tuple(image.shape[1:] if count == 1 else image.shape)
            shape = ", ".join(map(str, expected if count == 1 else (count, *expected)))
            raise ValueError(f"row {row} is of shape {found}; expected [{shape}]")
        if image.dtype != torch.uint8 and (problem := next(filter(None, map(_problem, image)), None)):
            raise ValueError(f"image {names(source)[row]} came out with {problem}; nothing was written")
        buffer.append(image.detach().cpu())
        held += image.numel() * image.element_size()
        if held >= BUFFER_BYTES:
            yield buffer
            buffer, held = [], 0
    if buffer:
        yield buffer


def _problem(image: torch.Tensor) -> str | None:
    """What bars a float image from being written, in words."""
    low, high = (float(value) for value in image.aminmax()) if image.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        return "NaN or infinity"
    if high > 1 and image.mean(dtype=torch.float32) > 2:  # overshoots do not double the brightness
        return f"values from {low:.4g} to {high:.4g} where [0, 1] is expected, as on the 0–255 scale"
    return None


def _encoded(batch: list[torch.Tensor]) -> pa.Array:
    cells = [{"bytes": encode_png(to_uint8(image)), "path": None} for image in batch]
    return pa.array(cells, type=Image().pa_type)


def _nested(batch: list[torch.Tensor]) -> pa.Array:
    """Float images → nested lists ``[3][H][W]``, without a Python object per number."""
    flat = np.concatenate([to_float(image).contiguous().numpy().ravel() for image in batch])
    row_lengths = np.concatenate([np.full(3 * image.shape[1], image.shape[2]) for image in batch])
    channel_lengths = np.concatenate([np.full(3, image.shape[1]) for image in batch])
    array = pa.array(flat)
    for lengths in (row_lengths, channel_lengths, np.full(len(batch), 3)):
        array = pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), array)
    return array


def _tensor(cell: pa.ListScalar) -> torch.Tensor:
    channels = cell.values
    rows = channels.flatten()
    flat = rows.flatten().to_numpy()
    return torch.from_numpy(flat.copy()).reshape(len(channels), len(rows) // len(channels), -1)


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (" …" if len(items) > 3 else "")
