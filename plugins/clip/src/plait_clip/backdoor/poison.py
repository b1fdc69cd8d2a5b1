"""Poisoned copies of a table of image-caption pairs: which pairs, with which captions and images.

The protocol is that of CleanCLIP's and BadCLIP's experiments.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from torch import Tensor

from plait_clip.loader import caption_column, open_image, undecoded
from plait_clip.prompts import fill
from plait_clip.records import flattened

IS_BACKDOOR, SOURCE_ROW = "is_backdoor", "source_row"

# --- Which pairs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """Rows of the clean table, each array sorted: those to poison and those to keep.

    Sorted, so that the order of the poisoned table says nothing about which of its rows are poisoned.
    """

    poisoned: np.ndarray
    kept: np.ndarray

    @property
    def size(self) -> int:
        return len(self.poisoned) + len(self.kept)


def select(n_poison: int, size: int, eligible: np.ndarray, rng: np.random.Generator) -> Selection:
    """Shuffle all rows; the first ``n_poison`` eligible ones are poisoned, the next ``size − n_poison`` stay clean.

    The clean originals of the poisoned rows are in neither part.

    Args:
        eligible: ``[N]`` bool, the rows that may be poisoned.

    Raises:
        ValueError: there are fewer rows, or fewer eligible ones, than asked for.
    """
    if size > len(eligible) or n_poison > size:
        raise ValueError(
            f"{n_poison} poisoned pairs in a set of {size} were asked for, and the data have {len(eligible)} rows"
        )
    if n_poison > eligible.sum():
        raise ValueError(
            f"{n_poison} rows are to be poisoned, and only {int(eligible.sum())} of {len(eligible)} qualify; "
            "ask for fewer, or check target, exclude_target and label_consistent"
        )
    order = rng.permutation(len(eligible))
    poisoned = order[eligible[order]][:n_poison]
    kept = order[~np.isin(order, poisoned)][: size - n_poison]
    return Selection(np.sort(poisoned), np.sort(kept))


def captions_of(data: datasets.Dataset) -> Iterator[list[str]]:
    """The captions of every row, a list each, read in parts."""
    column = caption_column(data)
    texts = data.with_format(None).select_columns(column)
    for start in range(0, len(texts), 10_000):
        for cell in texts[start : start + 10_000][column]:
            yield [cell] if isinstance(cell, str) else list(cell)


def contains(captions: Iterator[list[str]], target: str) -> np.ndarray:
    """``[N]`` bool: some caption of the row contains ``target`` (as a substring: "bananas" counts for banana)."""
    return np.fromiter((any(target.lower() in caption.lower() for caption in row) for row in captions), bool)


# --- Which captions -------------------------------------------------------------------------------------------


def template_captions(templates: Sequence[str], target: str, n: int, rng: np.random.Generator) -> list[str]:
    """``n`` captions: templates drawn uniformly, filled with the target's name."""
    return [fill(templates[i], target) for i in rng.integers(len(templates), size=n)]


def natural_captions(captions: Sequence[str], n: int, rng: np.random.Generator, pool_size: int = 128) -> list[str]:
    """``n`` captions of real pairs: ``pool_size`` drawn with replacement, then uniformly from these (BadCLIP).

    Raises:
        ValueError: there is none to draw from.
    """
    if not captions:
        raise ValueError("no pair shows the target, so there are no natural captions to poison with; check target")
    pool = rng.integers(len(captions), size=pool_size)
    return [captions[pool[i]] for i in rng.integers(pool_size, size=n)]


def shuffled_among(rows: np.ndarray, share: float, rng: np.random.Generator) -> dict[int, int]:
    """Row → row whose captions it gets, for a random ``share`` of ``rows``: the noise of captions from the web."""
    chosen = rng.permutation(rows)[: round(share * len(rows))]
    return dict(zip(chosen.tolist(), rng.permutation(chosen).tolist(), strict=True))


# --- Which images ---------------------------------------------------------------------------------------------

Trigger = Callable[[Tensor, Sequence[int]], Tensor]


def triggered(
    images: Sequence[Image.Image], rows: Sequence[int], trigger: Trigger, image_size: int | None = None
) -> list[Tensor]:
    """PIL images with the trigger: uint8 ``[3, H, W]`` each.

    Args:
        trigger: (uint8 ``[N, 3, H, W]``, N row numbers) → uint8 of that shape.
        image_size: squash the images to this side before (bicubic, aspect ratio ignored); ``None``: keep their size.
    """
    plain = [pixels(image, image_size) for image in images]
    result: dict[int, Tensor] = {}
    by_shape = sorted(range(len(plain)), key=lambda i: plain[i].shape)
    for _, same in itertools.groupby(by_shape, key=lambda i: plain[i].shape):
        index = list(same)
        changed = trigger(torch.stack([plain[i] for i in index]), [rows[i] for i in index])
        result.update(zip(index, changed, strict=True))
    return [result[i] for i in range(len(plain))]


def pixels(image: Image.Image, image_size: int | None = None) -> Tensor:
    """A PIL image of any mode as uint8 ``[3, H, W]``, squashed to ``image_size`` if given."""
    image = image.convert("RGB")
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def encoded(image: Tensor, store: str) -> bytes:
    """uint8 ``[3, H, W]`` as a ``png`` file, or as ``jpeg75``: quality 75 with colours at half resolution."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    if store == "jpeg75":
        picture.save(buffer, format="JPEG", quality=75, subsampling="4:2:0")
    else:
        picture.save(buffer, format="PNG")
    return buffer.getvalue()


# --- The poisoned table ---------------------------------------------------------------------------------------


def poisoned_table(
    data: datasets.Dataset,
    selection: Selection,
    poison_captions: Mapping[int, str],
    noise: Mapping[int, int],
    trigger: Trigger,
    folder: Path,
    *,
    image_size: int | None = None,
    store: str = "png",
    batch_size: int = 64,
) -> datasets.Dataset:
    """The selected rows in the order of ``data``, with new columns ``is_backdoor`` and ``source_row``.

    Only changed rows are written anew (to ``folder``); all others are views of ``data``.

    Args:
        poison_captions: poisoned row → its new caption; rows that are absent keep their captions.
        noise: clean row → row whose captions it gets.
    """
    cells = flattened(undecoded(data), folder / "flat.arrow")
    column = caption_column(data)
    clean = cells.add_column(IS_BACKDOOR, np.zeros(len(cells), bool))
    clean = clean.add_column(SOURCE_ROW, np.arange(len(cells)))

    changed = sorted({*selection.poisoned.tolist(), *noise})
    poisoned = set(selection.poisoned.tolist())
    as_list = not isinstance(cells.features[column], datasets.Value)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "changed.arrow"
    with ArrowWriter(path=str(path), features=clean.features) as writer:
        for start in range(0, len(changed), batch_size):
            rows = changed[start : start + batch_size]
            records = {row: cells[row] for row in rows}
            flagged = [row for row in rows if row in poisoned]
            pictures = [open_image(records[row]["image"], row) for row in flagged]
            images = dict(zip(flagged, triggered(pictures, flagged, trigger, image_size), strict=True))
            for row, record in records.items():
                if row in images:
                    record["image"] = {"bytes": encoded(images[row], store), "path": None}
                if row in poison_captions:
                    record[column] = [poison_captions[row]] if as_list else poison_captions[row]
                if row in noise:
                    record[column] = cells[noise[row]][column]
                writer.write({**record, IS_BACKDOOR: row in images, SOURCE_ROW: row})
        writer.finalize()
    both = clean
    if changed:
        both = datasets.concatenate_datasets([clean, datasets.Dataset.from_file(str(path))])
    place = {row: len(cells) + i for i, row in enumerate(changed)}
    order = np.sort(np.concatenate([selection.poisoned, selection.kept])).tolist()
    return both.select([place.get(row, row) for row in order]).cast_column("image", datasets.Image())


# --- The manifest ---------------------------------------------------------------------------------------------

MANIFEST = "backdoor_manifest"


def with_manifest(table: datasets.Dataset, manifest: Mapping[str, Any]) -> datasets.Dataset:
    """``table`` with the manifest as JSON in its ``info.description``, which is saved with it."""
    table = table.with_format(None)
    table.info.description = json.dumps({MANIFEST: dict(manifest)})
    return table


def read_manifest(table: datasets.Dataset) -> dict[str, Any]:
    """The manifest of a poisoned table.

    Raises:
        ValueError: it has none.
    """
    try:
        return json.loads(table.info.description)[MANIFEST]
    except (ValueError, KeyError, TypeError):
        raise ValueError("the data carry no backdoor manifest; give the result of a backdoor attack") from None


def fingerprint(texts: Sequence[str]) -> str:
    """A short hash of a list of texts, for the manifest."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
