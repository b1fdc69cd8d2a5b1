"""Pictures of triggers and of suspicious pairs, for reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import datasets
import numpy as np
import torch
from plait.report import Image, Panel, png
from torch import Tensor

from plait_clip.backdoor.metrics import images_of
from plait_clip.backdoor.poison import Trigger, captions_by_row
from plait_clip.model import ImageInput


def comparison(
    title: str,
    clean: Iterable[Tensor],
    changed: Iterable[Tensor],
    clean_captions: Sequence[str],
    changed_captions: Sequence[str],
) -> Panel:
    """uint8 images ``[3, H, W]`` before and after the trigger, and their difference: three rows."""
    differences = [(a.float() - b.float()).abs() / 255 for a, b in zip(clean, changed, strict=True)]
    largest = max(float(difference.max()) for difference in differences) or 1.0
    return Panel(
        title=title,
        images=[
            [Image(caption=text, data=png(a.float() / 255)) for a, text in zip(clean, clean_captions, strict=True)],
            [Image(caption=text, data=png(b.float() / 255)) for b, text in zip(changed, changed_captions, strict=True)],
            [
                Image(caption=f"difference × {1 / largest:.1f}", data=png(difference / largest))
                for difference in differences
            ],
        ],
    )


def poisoned_images(
    title: str, data: datasets.Dataset, rows: Sequence[int], trigger: Trigger, image_input: ImageInput
) -> Panel:
    """Some rows of the clean data, and what the trigger makes of them."""
    plain = torch.stack(images_of(data, rows, image_input))
    captions = [f"row {row}" for row in rows]
    return comparison(title, plain, trigger(plain, rows), captions, captions)


def contact_sheet(
    data: datasets.Dataset, scores: np.ndarray, flags: np.ndarray, count: int, columns: int = 8
) -> list[Panel]:
    """The ``count`` pairs with the highest scores; no panel where the data have no images."""
    rows = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")[:count].tolist()
    if not rows or "image" not in data.column_names:
        return []
    shown = data.select(rows)
    texts = [texts[0] for texts in captions_by_row(shown)]
    pictures = images_of(shown, range(len(rows)))
    images = [
        Image(caption=f"{'poisoned' if flags[row] else 'clean'}, row {row}: {text}", data=png(picture.float() / 255))
        for row, text, picture in zip(rows, texts, pictures, strict=True)
    ]
    grid = [images[start : start + columns] for start in range(0, len(images), columns)]
    return [Panel(title="most suspicious pairs", images=grid)]
