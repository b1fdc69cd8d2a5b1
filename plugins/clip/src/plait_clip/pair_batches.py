"""From dataset rows to batches: decode once, tokenise each caption once, hold small sets in memory."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import datasets
import numpy as np
import torch
from PIL import Image
from plait_vision.images import decode
from torch import Tensor

from plait_clip.model import ImageInput, ImageTextModel

HELD_BYTES = 2 << 30


@attrs.frozen(kw_only=True)
class PairBatch:
    """B image-caption pairs; equal captions share one row of ``tokens``.

    Attributes:
        images: uint8 [B, 3, S, S].
        tokens: int64 [U, L], the distinct captions, cut to the longest one.
        text_index: int64 [B], the row of ``tokens`` of each pair.
        rows: int64 [B], the pairs' row numbers in the dataset.
        truncated: bool [B], whether the caption had to be cut to the model's context.
    """

    images: Tensor
    tokens: Tensor
    text_index: Tensor
    rows: Tensor
    truncated: Tensor

    def to(self, device: torch.device | str) -> PairBatch:
        return PairBatch(
            **{name: value.to(device, non_blocking=True) for name, value in attrs.asdict(self, recurse=False).items()}
        )

    @property
    def pixels(self) -> Tensor:
        """The images as float32 in [0, 1]."""
        return self.images.float() / 255


@functools.lru_cache(maxsize=64)
def plain_input(size: int, resize: str = "crop") -> ImageInput:
    """What brings images to a size as open_clip does (bicubic), where no model says how; nothing is normalised."""
    return ImageInput(size, [0.0] * 3, [1.0] * 3, resize=resize)


def pixels_from_pil(image: Image.Image, size: int, resize: str = "crop") -> np.ndarray:
    """A PIL image of any mode → uint8 [3, size, size], by :func:`plain_input`; a model has its own ``image_input``."""
    return plain_input(size, resize).from_pil(image)


def open_image(cell: Any, row: int) -> Image.Image:
    """Decode one cell of an undecoded ``image`` column to upright 8-bit RGB.

    Raises:
        ValueError: it is missing, damaged, partly transparent, or of more than 8 bits; names the row.
    """
    return decode(cell, image_label(row, cell.get("path") if isinstance(cell, Mapping) else None))


def image_label(row: int, name: object = None) -> str:
    """How messages call the image of a row."""
    return f"row {row}: the image{f' {name}' if name else ''}"


def undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """The dataset with its ``image`` column as bytes and path.

    Raises:
        ValueError: there is no image column, it holds something other than images, or there is no row.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"data is a {type(dataset).__name__}; a dataset is needed, pick a split such as 'digits.train'"
        )
    if "image" not in dataset.column_names:
        raise ValueError(f"the data has no column 'image'; its columns are {', '.join(dataset.column_names)}")
    if len(dataset) == 0:
        raise ValueError("the data has no rows")
    kind = dataset.features["image"]
    stored = isinstance(kind, dict) and set(kind) == {"bytes", "path"}
    if not stored and kind != datasets.Value("string") and not isinstance(kind, datasets.Image):
        raise ValueError(f"the column 'image' holds {kind}; images are needed, cast the column to datasets.Image()")
    return dataset.with_format(None).cast_column("image", datasets.Image(decode=False))


def image_batches(
    dataset: datasets.Dataset,
    image_input: ImageInput | int,
    *,
    batch_size: int,
    resize: str = "crop",
    threads: int = 4,
) -> Iterator[Tensor]:
    """All images in order, uint8 [B, 3, S, S] each; the next batch is decoded meanwhile.

    Args:
        image_input: a model's preprocessing, or a size S, to which images are brought by :func:`plain_input`.
        resize: of a size.

    Raises:
        ValueError: a row's image cannot be read.
    """
    cells = undecoded(dataset).select_columns("image")
    prepare = image_input if isinstance(image_input, ImageInput) else plain_input(image_input, resize)

    def decode(row: int, cell: Any) -> np.ndarray:
        return prepare.from_pil(open_image(cell, row))

    with ThreadPoolExecutor(threads) as pool:
        waiting: Any = None
        for start in range(0, len(cells), batch_size):
            rows = range(start, min(start + batch_size, len(cells)))
            ready, waiting = (
                waiting,
                [pool.submit(decode, r, c) for r, c in zip(rows, cells[rows]["image"], strict=True)],
            )
            if ready:
                yield torch.from_numpy(np.stack([future.result() for future in ready]))
        yield torch.from_numpy(np.stack([future.result() for future in waiting]))


CAPTIONS = ("captions", "caption")
"""Names of the column of captions, the first that there is."""


def caption_column(dataset: datasets.Dataset) -> str:
    """``captions`` or ``caption``.

    Raises:
        ValueError: there is neither.
    """
    for name in CAPTIONS:
        if name in dataset.column_names:
            return name
    raise ValueError(
        f"the data has no column 'captions' or 'caption'; its columns are {', '.join(dataset.column_names)}"
    )


def check_captions(
    dataset: datasets.Dataset, model: ImageTextModel | None = None, warn: Callable[[str], None] | None = None
) -> None:
    """Every row has a caption, and none is empty or only blanks; every attack and defence begins with this.

    Args:
        model: whose tokens the captions become; then too long ones are reported.
        warn: called with a sentence each on captions that are cut to the model's context, and of captions without any
            letter of the English alphabet, which the templates, synonyms and augmentations are made for.

    Raises:
        ValueError: names the first bad row.
    """
    column = caption_column(dataset)
    texts = dataset.with_format(None).select_columns(column)
    cut = foreign = total = 0
    for start in range(0, len(texts), 10_000):
        captions: list[str] = []
        for row, cell in enumerate(texts[start : start + 10_000][column], start=start):
            options = cell if isinstance(cell, (list, tuple)) else [cell]
            if problem := caption_problem(options):
                raise ValueError(f"row {row}: {problem}")
            captions += options
        if warn is not None:
            total += len(captions)
            foreign += sum(_ENGLISH.search(caption) is None for caption in captions)
            cut += sum(model.truncated(captions)) if model is not None else 0
    if warn is not None and model is not None and cut:
        warn(f"{cut} of {total} captions are longer than the model's {model.context_length} tokens and are cut")
    if warn is not None and foreign:
        warn(
            f"{foreign} of {total} captions hold no letter from a to z, and templates, synonyms and augmentations are "
            "English; check the language of the captions"
        )


_ENGLISH = re.compile("[a-zA-Z]")


def first_captions(dataset: datasets.Dataset) -> list[str]:
    """The first caption of every row.

    Raises:
        ValueError: a caption is empty, or the data have no captions.
    """
    check_captions(dataset)
    column = caption_column(dataset)
    cells = dataset.with_format(None).select_columns(column)[:][column]
    return [cell if isinstance(cell, str) else cell[0] for cell in cells]


def caption_problem(captions: Sequence[Any]) -> str | None:
    """What is wrong with the captions of an image, in words, or None."""
    if not captions or any(text is None for text in captions):
        return "the caption is empty; give every image a caption"
    for text in captions:
        if not isinstance(text, str):
            return f"a caption is {text!r}; captions are text"
        if not text.strip():
            return "the caption is empty; give every image a caption"
    return None


class PairLoader:
    """The image-caption pairs of a dataset, at a model's image size and in its tokens.

    Sets of up to ``held_bytes`` of pixels are decoded and tokenised once; larger ones are decoded by
    ``workers`` processes as they are needed, in bounded memory.

    Args:
        dataset: columns ``image`` and ``captions`` (or ``caption``).
        model: gives image size and tokens.
        share_texts: put equal captions of a batch into one row of tokens.

    Raises:
        ValueError: an image cannot be read, a caption is empty, a column is missing.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        model: ImageTextModel,
        *,
        held_bytes: int = HELD_BYTES,
        workers: int = 0,
        share_texts: bool = True,
    ) -> None:
        self._cells = undecoded(dataset)
        self._name = str(dataset._fingerprint)
        check_captions(dataset)
        self._column = caption_column(dataset)
        self._image_input, self._size = model.image_input, model.image_size
        self._tokenize, self._trim, self._truncated = model.tokenize, model.trim, model.truncated
        self._share = share_texts
        self._workers = workers
        self._held: Tensor | None = None
        if len(dataset) * 3 * self._size**2 <= held_bytes:
            self._hold(dataset)

    def __len__(self) -> int:
        return len(self._cells)

    @property
    def name(self) -> str:
        """Differs for different data."""
        return self._name

    def _hold(self, dataset: datasets.Dataset) -> None:
        images = image_batches(dataset, self._image_input, batch_size=1024)
        self._held = torch.empty(len(dataset), 3, self._size, self._size, dtype=torch.uint8)
        for start, batch in zip(range(0, len(dataset), 1024), images, strict=True):
            self._held[start : start + len(batch)] = batch
        captions = _as_lists(self._cells.select_columns(self._column)[:][self._column])
        ids = {text: i for i, text in enumerate(dict.fromkeys(text for texts in captions for text in texts))}
        texts = list(ids)
        parts = [texts[start : start + 4096] for start in range(0, len(texts), 4096)]
        self._held_tokens = torch.cat([self._tokenize(part) for part in parts]).to(torch.int32)
        self._held_cut = torch.tensor([cut for part in parts for cut in self._truncated(part)])
        self._held_texts = [[ids[text] for text in options] for options in captions]

    def read(self, rows: Sequence[int], picks: Sequence[float]) -> PairBatch:
        """The pairs of these rows; ``picks`` in [0, 1) chooses among the captions of each row."""
        index = torch.as_tensor(rows, dtype=torch.long)
        if self._held is not None:
            held = [self._held_texts[row] for row in rows]
            ids = torch.tensor([texts[int(pick * len(texts))] for texts, pick in zip(held, picks, strict=True)])
            images, cut = self._held[index], self._held_cut[ids]
            unique, text_index = self._distinct(ids)
            tokens = self._held_tokens[unique].long()
        else:
            cells = self._cells[list(rows)]
            decoded = [
                self._image_input.from_pil(open_image(cell, row))
                for row, cell in zip(rows, cells["image"], strict=True)
            ]
            images = torch.from_numpy(np.stack(decoded))
            options = _as_lists(cells[self._column])
            chosen = [texts[int(pick * len(texts))] for texts, pick in zip(options, picks, strict=True)]
            place = {text: i for i, text in enumerate(dict.fromkeys(chosen))}
            ids = torch.tensor([place[text] for text in chosen])
            known = list(place)
            cut = torch.tensor(self._truncated(known))[ids]
            unique, text_index = self._distinct(ids)
            tokens = self._tokenize(known)[unique]
        return PairBatch(images=images, tokens=self._trim(tokens), text_index=text_index, rows=index, truncated=cut)

    def _distinct(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        if not self._share:
            return ids, torch.arange(len(ids))
        place: dict[int, int] = {}
        index = [place.setdefault(number, len(place)) for number in ids.tolist()]
        return torch.tensor(list(place)), torch.tensor(index)

    def batches(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        drop_last: bool = True,
        skip: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[PairBatch]:
        """One epoch in an order drawn from ``generator``, with a caption drawn for every row.

        Args:
            skip: leave out the first batches (to resume after an interruption).
            part: (k, n) gives slice k of n of every batch (to share an epoch among n processes).
        """
        order = torch.randperm(len(self), generator=generator)
        picks = torch.rand(len(self), generator=generator, dtype=torch.float64)
        stop = len(order) - len(order) % batch_size if drop_last else len(order)
        plan = _Plan(self.read, order[:stop], picks, batch_size, skip, part)
        if self._held is not None or self._workers == 0:
            return (self.read(*plan.rows(number)) for number in range(len(plan)))
        return _in_processes(plan, self._workers)


@attrs.frozen
class _Plan(torch.utils.data.Dataset):
    """The batches of an epoch, read by number."""

    read: Callable[..., PairBatch]
    order: Tensor
    picks: Tensor
    batch_size: int
    skip: int
    part: tuple[int, int]

    def __len__(self) -> int:
        return max(0, -(-len(self.order) // self.batch_size) - self.skip)

    def rows(self, number: int) -> tuple[list[int], list[float]]:
        start = (number + self.skip) * self.batch_size
        k, n = self.part
        rows = self.order[start : start + self.batch_size][k::n]
        return rows.tolist(), self.picks[rows].tolist()

    def __getitem__(self, number: int) -> tuple[PairBatch | None, str]:
        try:
            return self.read(*self.rows(number)), ""
        except ValueError as error:  # its sentence, without a worker's traceback
            return None, str(error)


def _in_processes(plan: _Plan, workers: int) -> Iterator[PairBatch]:
    # A generator of its own: the loader would draw its workers' seed from the global one.
    loader = torch.utils.data.DataLoader(plan, batch_size=None, num_workers=workers, generator=torch.Generator())
    for batch, problem in loader:
        if batch is None:
            raise ValueError(problem)
        yield batch


def _as_lists(cells: Sequence[Any]) -> list[list[str]]:
    return [[cell] if isinstance(cell, str) else list(cell) for cell in cells]
