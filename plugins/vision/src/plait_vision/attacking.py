"""What every attack on the images of a dataset does around its algorithm: batches, checkpoints, 8 bits, the other columns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from torch import Tensor

from plait_vision.images import encode_png
from plait_vision.labelled import ImageRows
from plait_vision.writing import write_rows

AttackBatch = Callable[[Sequence[int], Tensor], Tensor]


def with_attacked_images(
    data: Dataset, attack: AttackBatch, *, method: Any, run: Any, inputs: Any, batch_size: int, split: str = ""
) -> Dataset:
    """``data`` with its images replaced, 8-bit PNG; a run that was killed goes on behind its last batch.

    Args:
        attack: rows and their images, uint8 ``[n, 3, H, W]`` on the CPU, all of one size → the changed ones, likewise.
        method, inputs: what the state of a killed run belongs to, see :meth:`plait.Run.loop`.

    Raises:
        ValueError: an image cannot be read.
    """
    images = ImageRows(data)
    total = -(-len(images) // batch_size)
    unchanged = 0
    with run.loop(method, f"attacking {split}".strip(), inputs=inputs) as loop:
        starts = range(0, len(images), batch_size)
        for number, start in enumerate(loop.track(starts, total=total)):
            file = loop.folder / f"{number:06d}.npz"
            if file.is_file():
                continue
            rows = range(start, min(start + batch_size, len(images)))
            _write(file, _attacked(images, rows, attack))

        raw = data.with_format(None)
        for column, feature in data.features.items():
            raw = raw.cast_column(column, Image(decode=False)) if isinstance(feature, Image) else raw

        def rows_of_result() -> Iterator[dict[str, Any]]:
            nonlocal unchanged
            for number, start in enumerate(starts):
                before = images.read(range(start, min(start + batch_size, len(images))))
                with np.load(loop.folder / f"{number:06d}.npz") as after:
                    for offset, clean in enumerate(before):
                        changed = after[str(offset)]
                        unchanged += bool((changed == clean).all())
                        cell = {"bytes": encode_png(changed.transpose(1, 2, 0)), "path": None}
                        yield {**raw[start + offset], "image": cell}

        result = write_rows(run.folder, rows_of_result(), data.features)
    if unchanged:
        run.warn(
            f"{unchanged} of {len(images)} images{f' of {split}' if split else ''} are as they were: the attack found no change, "
            "or 8 bits cannot hold it"
        )
    return result


def over_splits(data: Any, function: Callable[[Dataset, str], Dataset]) -> Any:
    """A function of a dataset (and the name of its split) on each split of a source, or on one dataset."""
    if isinstance(data, Mapping) and data:
        return {split: function(part, split) for split, part in data.items()}
    return function(data, "")


def _attacked(images: ImageRows, rows: range, attack: AttackBatch) -> dict[str, np.ndarray]:
    changed: dict[str, np.ndarray] = {}
    (groups,) = images.by_size(len(rows), rows)
    for numbers, levels in groups:
        found = attack(numbers, levels)
        if found.dtype != torch.uint8 or found.shape != levels.shape:
            raise ValueError(f"the attack gives images of shape {tuple(found.shape)} for {tuple(levels.shape)}")
        for row, image in zip(numbers, found.cpu().numpy(), strict=True):
            changed[str(row - rows.start)] = image
    return changed


def _write(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("wb") as stream:
        np.savez(stream, **dict[str, Any](arrays))
    os.replace(unfinished, file)
