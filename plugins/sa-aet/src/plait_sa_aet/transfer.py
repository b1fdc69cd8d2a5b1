"""How far adversarial pairs carry: attack success rates of image-text retrieval on any model.

The gallery is adversarial on both sides. A query counts if the model answered it before the attack, and the attack
succeeds if it does not any more (evaluation of Lu et al., ICCV 2023, which DRA and SA-AET follow).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from plait_clip.loader import image_batches, undecoded
from plait_clip.model import ImageTextModel
from plait_clip.retrieval import captions_of, ranks_by_model, text_features
from plait_clip.zero_shot import evaluating, image_features
from torch import Tensor

from plait_sa_aet.captions import clean_caption

FLOATS = "pixels"  # the column of images that were not rounded to 8 bits


@dataclass(frozen=True)
class Retrieval:
    """What a model makes of a data set.

    Attributes:
        texts: [M, D], features of the captions.
        captions: M texts. owner: int64 [M], the image of each.
        text_ranks: int64 [N], rank from 0 of every image's best caption.
        image_ranks: int64 [M], rank from 0 of every caption's image.
    """

    texts: Tensor
    captions: list[str]
    owner: Tensor
    text_ranks: Tensor
    image_ranks: Tensor


def attack_success_rate(clean_ranks: Tensor, attacked_ranks: Tensor, k: int) -> float:
    """100 · |right before, wrong now| / |right before|, rounded to 2 decimals; right means a rank below k.

    Raises:
        ValueError: nothing was right before.
    """
    right = clean_ranks < k
    if not bool(right.any()):
        raise ValueError(f"no query is answered within the first {k} before the attack; take a model that answers some")
    return round(100 * (right & (attacked_ranks >= k)).sum().item() / right.sum().item(), 2)


def retrieve(
    model: ImageTextModel,
    data: datasets.Dataset,
    folder: Path,
    *,
    clean_captions: bool = True,
    candidates: int = 128,
    batch_size: int = 256,
    precision: str = "fp32",
) -> Retrieval:
    """Rank all captions for every image and all images for every caption; fusion models rerank.

    Args:
        data: ``image``, or ``pixels`` where floats were kept, and ``captions``.
        folder: for what a fusion model keeps on disk.
        clean_captions: as the attacks clean them, so that only what they changed is measured.

    Raises:
        ValueError: a column is missing, a caption is empty, an image is damaged, or features are not finite.
    """
    undecoded(data)
    captions, owner = captions_of(data)
    if clean_captions:
        captions = [clean_caption(text) or text for text in captions]

    def batches() -> Iterator[Tensor]:
        return pixel_batches(data, model, batch_size)

    images = torch.cat(list(image_features(model, batches(), precision=precision)))
    texts = text_features(model, captions, precision=precision)
    text_ranks, image_ranks = ranks_by_model(
        model, batches, images, texts, captions, owner, folder, candidates=candidates, precision=precision
    )
    return Retrieval(texts, captions, owner, text_ranks, image_ranks)


def pixel_batches(data: datasets.Dataset, model: ImageTextModel, batch_size: int) -> Iterator[Tensor]:
    """[B, 3, S, S], floats in [0, 1] where the data have them, else uint8 at the model's size."""
    if FLOATS not in data.column_names:
        yield from image_batches(data, model.image_size, batch_size=batch_size, resize=model.image_input.resize)
        return
    floats = data.select_columns(FLOATS).with_format("torch")
    for start in range(0, len(floats), batch_size):
        yield floats[start : start + batch_size][FLOATS]


def best_captions(
    model: ImageTextModel, images: Tensor, found: Retrieval, *, candidates: int = 128, precision: str = "fp32"
) -> list[str]:
    """The first caption that the model retrieves for each of some images [B, 3, S, S]."""
    (features,) = image_features(model, [images], precision=precision)
    near = (features @ found.texts.T).topk(min(candidates, len(found.captions))).indices.tolist()
    if model.kind != "fusion":
        return [found.captions[row[0]] for row in near]
    best = []
    for image, row in zip(images, near, strict=True):
        texts = [found.captions[i] for i in row]
        pixels = image if image.is_floating_point() else image.float() / 255
        with evaluating(model, precision):
            scores = model.match(pixels.to(model.device).expand(len(texts), -1, -1, -1), texts)
        best.append(texts[int(scores.argmax())])
    return best


def check_same_rows(clean: datasets.Dataset, attacked: datasets.Dataset, name: str) -> None:
    """The attacked data are a copy of the clean ones: as many rows, with as many captions each.

    Raises:
        ValueError: they are not.
    """
    if len(clean) != len(attacked):
        raise ValueError(f"{name} has {len(attacked)} rows and reference {len(clean)}; give the data that was attacked")
    counts: list[Sequence[int]] = [
        torch.bincount(captions_of(part)[1], minlength=len(part)).tolist() for part in (clean, attacked)
    ]
    different = next((row for row, (a, b) in enumerate(zip(*counts, strict=True)) if a != b), None)
    if different is not None:
        raise ValueError(
            f"row {different} of {name} has {counts[1][different]} captions, that of reference {counts[0][different]}; "
            f"give the data that was attacked"
        )
