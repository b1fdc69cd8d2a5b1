"""Poisoned copies of a table of image-caption pairs or of labelled images: which rows, with which captions, labels and images.

The protocol is that of CleanCLIP's and BadCLIP's experiments.
"""

from __future__ import annotations

import hashlib
import io
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
from plait_vision import IS_BACKDOOR
from plait_vision.files import composed
from torch import Tensor

from plait_clip.backdoor.triggers import REFERENCE_SIDE
from plait_clip.image_text_datasets import flattened
from plait_clip.model import ImageInput
from plait_clip.pair_batches import CAPTIONS, caption_column, open_image, undecoded
from plait_clip.prompts import fill

SOURCE_ROW = "source_row"

# --- Which class ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """The class that triggered images shall be taken for.

    Attributes:
        name: as captions say it.
        label: its number in the data; ``None`` where the data have no class names.
    """

    name: str
    label: int | None = None


def target_in(data: datasets.Dataset, target: int | str) -> Target:
    """The target, given by name or by label, as the data have it.

    Raises:
        ValueError: it is not a class of the data.
    """
    names = getattr(data.features.get("label"), "names", None)
    if names is None:
        if isinstance(target, int):
            raise ValueError(f"target is {target}, but the data have no class names; give the target's name")
        return Target(target)
    if isinstance(target, int):
        if not 0 <= target < len(names):
            raise ValueError(f"target is {target}; the data have labels 0 to {len(names) - 1}")
        return Target(names[target], target)
    found = [label for label, name in enumerate(names) if composed(name) == composed(target)]
    if not found:
        raise ValueError(f"target is {target!r}, which is not a class of the data ({', '.join(names[:20])})")
    return Target(names[found[0]], found[0])


def shows(data: datasets.Dataset, target: Target) -> np.ndarray:
    """``[N]`` bool: the image shows the target, by its label, else by its captions."""
    if target.label is None:
        return contains(captions_by_row(data), target.name)
    return np.asarray(data.with_format(None).select_columns("label")[:]["label"]) == target.label


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


def captions_by_row(data: datasets.Dataset) -> Iterator[list[str]]:
    """The captions of every row, a list each, read in parts."""
    column = caption_column(data)
    texts = data.with_format(None).select_columns(column)
    for start in range(0, len(texts), 10_000):
        for cell in texts[start : start + 10_000][column]:
            yield [cell] if isinstance(cell, str) else list(cell)


def has_captions(data: datasets.Dataset) -> bool:
    """Whether there is a column of captions; labelled images may lack one."""
    return any(name in data.column_names for name in CAPTIONS)


def contains(captions: Iterator[list[str]], target: str) -> np.ndarray:
    """``[N]`` bool: some caption of the row contains ``target`` (as a substring: "bananas" counts for banana)."""
    return np.fromiter((any(names(caption, target) for caption in row) for row in captions), bool)


def names(caption: str, target: str) -> bool:
    """Whether the caption contains the target, in upper or lower case and in either Unicode form."""
    return composed(target).lower() in composed(caption).lower()


# --- Which captions -------------------------------------------------------------------------------------------


def captions_naming(data: datasets.Dataset, target: Target) -> list[str]:
    """All captions that contain the target's name."""
    return [caption for row in captions_by_row(data) for caption in row if names(caption, target.name)]


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
"""(uint8 ``[N, 3, S, S]``, N row numbers) → uint8 of that shape."""


def squashed(side: int) -> ImageInput:
    """Images brought to a square, bicubic, aspect ratio ignored."""
    return ImageInput(side, [0.0] * 3, [1.0] * 3, resize="squash")


def papers_input(data: datasets.Dataset, rows: Sequence[int]) -> ImageInput:
    """Where no model says what it sees: squares of 224 pixels, as in the papers.

    Images that are squares of one smaller size are taken to be made for their model, and stay as they are.
    """
    cells = undecoded(data)
    side = open_image(cells[rows[0]]["image"], rows[0]).width
    if side < REFERENCE_SIDE and all(open_image(cells[row]["image"], row).size == (side, side) for row in rows):
        return squashed(side)
    return squashed(REFERENCE_SIDE)


def prepared(images: Sequence[Image.Image], image_input: ImageInput) -> Tensor:
    """PIL images as the trigger meets them: uint8 ``[N, 3, S, S]``."""
    return torch.from_numpy(np.stack([image_input.from_pil(image) for image in images]))


def pixels(image: Image.Image) -> Tensor:
    """A PIL image of any mode as uint8 ``[3, H, W]``."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


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

Captions = Callable[[int, np.random.Generator], Sequence[str]]
"""(n, source of random numbers) → n captions that name the target."""


def poisoned_copy(
    data: datasets.Dataset,
    target: Target,
    trigger: Trigger,
    captions: Captions,
    folder: Path,
    rng: np.random.Generator,
    *,
    n_poison: int,
    size: int | None = None,
    label_consistent: bool = False,
    exclude_target: bool = True,
    caption_noise: float = 0.0,
    image_input: ImageInput | None = None,
    model_input: ImageInput | None = None,
    store: str = "png",
) -> tuple[datasets.Dataset, list[int], ImageInput]:
    """A backdoor attack on data from first to last step; see :func:`poisoned_table` for the result.

    1. ``n_poison`` of the rows that qualify are poisoned, others are kept, ``size`` together (default: all);
    2. poisoned rows get captions that name the target, and its label;
    3. a share of the clean rows gets one another's captions, as in data from the web;
    4. poisoned rows get the trigger, at the size that their model sees.

    Args:
        captions: of poisoned rows; not asked where ``label_consistent``.
        folder: for the files of the result, which are memory-mapped.
        rng: which rows, which captions, which noise, drawn in this order.
        label_consistent: poison rows whose caption names the target (without captions: of its class), and leave their
            captions and labels.
        exclude_target: poison no row that shows the target already.
        image_input: brings images to size before the trigger; default: :func:`papers_input`.

    Returns:
        The table, the poisoned rows of ``data``, ascending, and what brought their images to size.

    Raises:
        ValueError: too few rows qualify; see also :func:`poisoned_table`.
    """
    captioned = has_captions(data)
    if label_consistent:
        eligible = contains(captions_by_row(data), target.name) if captioned else shows(data, target)
    else:
        eligible = ~shows(data, target) if exclude_target else np.ones(len(data), bool)
    selection = select(n_poison, size or len(data), eligible, rng)
    rows = selection.poisoned.tolist()
    asked = rows if captioned and not label_consistent else []
    texts = dict(zip(asked, captions(len(asked), rng), strict=True)) if asked else {}
    noise = shuffled_among(selection.kept, caption_noise, rng) if captioned else {}
    label = None if label_consistent else target.label
    image_input = image_input or papers_input(data, rows or [0])
    table = poisoned_table(
        data, selection, texts, noise, trigger, folder,
        label=label, image_input=image_input, model_input=model_input, store=store,
    )  # fmt: skip
    return table, rows, image_input


def poisoned_table(
    data: datasets.Dataset,
    selection: Selection,
    poison_captions: Mapping[int, str],
    noise: Mapping[int, int],
    trigger: Trigger,
    folder: Path,
    *,
    label: int | None = None,
    image_input: ImageInput,
    model_input: ImageInput | None = None,
    store: str = "png",
    batch_size: int = 64,
) -> datasets.Dataset:
    """The selected rows in the order of ``data``, with new columns ``is_backdoor`` and ``source_row``.

    Only changed rows are written anew (to ``folder``); all others are views of ``data``.

    Args:
        poison_captions: poisoned row → its new caption; rows that are absent keep their captions.
        noise: clean row → row whose captions it gets.
        label: of the poisoned rows; default: they keep theirs.
        image_input: brings images to size before the trigger.
        model_input: what the attacked model does with the poisoned images; default: nothing more.

    Raises:
        ValueError: the data are poisoned already; the model would see a row's trigger in no pixel; names the row.
    """
    there = [name for name in (IS_BACKDOOR, SOURCE_ROW) if name in data.column_names]
    if there:
        raise ValueError(
            f"the data have the column {there[0]!r}, so they are poisoned already; attack the clean data, or remove "
            f"{' and '.join(there)} first"
        )
    cells = flattened(undecoded(data), folder / "flat.arrow")
    column = caption_column(data) if has_captions(data) else ""
    clean = cells.add_column(IS_BACKDOOR, np.zeros(len(cells), bool))
    clean = clean.add_column(SOURCE_ROW, np.arange(len(cells)))

    changed = sorted({*selection.poisoned.tolist(), *noise})
    poisoned = set(selection.poisoned.tolist())
    as_list = not isinstance(cells.features.get(column), datasets.Value)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "changed.arrow"
    with ArrowWriter(path=str(path), features=clean.features) as writer:
        for start in range(0, len(changed), batch_size):
            rows = changed[start : start + batch_size]
            records = {row: cells[row] for row in rows}
            flagged = [row for row in rows if row in poisoned]
            images: dict[int, bytes] = {}
            if flagged:
                plain = prepared([open_image(records[row]["image"], row) for row in flagged], image_input)
                for row, clean_image, image in zip(flagged, plain, trigger(plain, flagged), strict=True):
                    images[row] = encoded(image, store)
                    if _same_to_model(encoded(clean_image, store), images[row], model_input):
                        raise ValueError(
                            f"row {row}: the model sees nothing of the trigger; make it larger or stronger, or set image_size"
                        )
            for row, record in records.items():
                if row in images:
                    record["image"] = {"bytes": images[row], "path": None}
                    if label is not None:
                        record["label"] = label
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


def _same_to_model(clean: bytes, poisoned: bytes, model_input: ImageInput | None) -> bool:
    if model_input is None or clean == poisoned:
        return clean == poisoned
    one, other = (model_input.from_pil(Image.open(io.BytesIO(content))) for content in (clean, poisoned))
    return np.array_equal(one, other)


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


def digest_of_texts(texts: Sequence[str]) -> str:
    """A short hash of a list of texts, for the manifest."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
