"""TA-Cleaner, step by step (Xun et al., arXiv 2409.17601; v3: CleanerCLIP).

CleanCLIP's fine-tuning on clean pairs; for a random subset of them, redrawn in every epoch, the image is also drawn to
a factual and pushed from a counterfactual rewriting of its caption. The sub-captions: :mod:`.subcaptions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import datasets
import torch
import torch.nn.functional as F
from plait_clip.backdoor.clean_clip import (
    Embeddings,
    FineTuning,
    ViewBatch,
    encode_views,
    fine_tune,
    seed_of,
    steps_of_epoch,
    view_batches,
)
from plait_clip.backdoor.eda import Synonyms
from plait_clip.backdoor.losses import self_supervised_loss
from plait_clip.losses import clip_loss
from plait_clip.model import ImageTextModel
from torch import Tensor

from plait_ta_cleaner.subcaptions import Subcaption

Draw = Callable[[str, int, int], Subcaption]
"""(caption, epoch, row) → its sub-captions in that epoch."""
NegativeScope = Literal["batch", "own"]

# --- Which rows get sub-captions in an epoch -------------------------------------------------------------------


def subtext_rows(num_rows: int, n_subtext: int, seed: int, epoch: int) -> Tensor:
    """S_e: ``n_subtext`` rows drawn without replacement, independently of other epochs; bool [num_rows]."""
    generator = torch.Generator().manual_seed(seed_of("subtext", seed, epoch))
    chosen = torch.zeros(num_rows, dtype=torch.bool)
    chosen[torch.randperm(num_rows, generator=generator)[:n_subtext]] = True
    return chosen


# --- The alignment loss ----------------------------------------------------------------------------------------


def image_to_text_loss(
    images: Tensor,
    positives: Tensor,
    negatives: Tensor,
    owners: Tensor,
    scale: Tensor | float,
    negative_scope: NegativeScope = "batch",
) -> Tensor:
    """L_i2t: cross-entropy of each image over the positives of all rows and the negative texts.

    Args:
        images, positives: unit [q, D], matching row by row.
        negatives: unit [T, D]; owners: int64 [T], the row each was made from.
        scale: factor of the cosines.
        negative_scope: an image sees the negatives of the whole ``batch`` or only its ``own``.
    """
    against = scale * images @ negatives.T
    if negative_scope == "own":
        others = owners[None, :] != torch.arange(len(images), device=owners.device)[:, None]
        against = against.masked_fill(others, float("-inf"))
    logits = torch.cat([scale * images @ positives.T, against], dim=1)
    return F.cross_entropy(logits, torch.arange(len(images), device=images.device))


def text_to_image_loss(images: Tensor, positives: Tensor, scale: Tensor | float) -> Tensor:
    """L_t2i: cross-entropy of each positive text over the images; negatives have no image and stay out."""
    return F.cross_entropy(scale * positives @ images.T, torch.arange(len(images), device=images.device))


def margin_loss(
    images: Tensor, positives: Tensor, negatives: Tensor, owners: Tensor, negative_scope: NegativeScope = "batch"
) -> Tensor:
    """mean max(0, u·n − u·p + 0.1) over the images and the negatives that each sees; 0 without negatives."""
    excess = (images @ negatives.T - (images * positives).sum(1, keepdim=True) + 0.1).clamp(min=0)
    if negative_scope == "own":
        excess = excess[owners, torch.arange(len(owners), device=owners.device)]
    return excess.mean() if excess.numel() else excess.sum()


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How L_TA is made and weighted; names as in the defaults of the method."""

    ta_weight: float = 1.0
    clip_weight: float = 1.0
    ss_weight: float = 1.0
    negative_scope: NegativeScope = "batch"
    negative_loss: Literal["softmax", "margin"] = "softmax"


def alignment_losses(
    images: Tensor,
    positives: Tensor,
    negatives: Tensor,
    owners: Tensor,
    scale: Tensor | float,
    options: Alignment,
) -> dict[str, Tensor]:
    """The terms of L_TA = ½ (``i2t`` + ``t2i``) + ``margin``; arguments as of :func:`image_to_text_loss`."""
    softmax = options.negative_loss == "softmax"
    in_denominator = (negatives, owners) if softmax else (negatives[:0], owners[:0])
    terms = {
        "i2t": image_to_text_loss(images, positives, *in_denominator, scale, options.negative_scope),
        "t2i": text_to_image_loss(images, positives, scale),
    }
    if not softmax:
        terms["margin"] = margin_loss(images, positives, negatives, owners, options.negative_scope)
    return terms


# --- One step --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTexts:
    """The sub-captions of a batch.

    Attributes:
        rows: places in the batch of the rows that have some, in the order of ``positives``.
        owners: for every negative the number of its row in ``rows``.
    """

    rows: list[int]
    positives: list[str]
    negatives: list[str]
    owners: list[int]


def texts_of_step(batch: ViewBatch, chosen: Tensor, draw: Draw, negatives_required: bool) -> StepTexts:
    """Sub-captions for the rows of the batch that are ``chosen`` in this epoch and can be rewritten."""
    rows: list[int] = []
    drawn: list[Subcaption] = []
    for place, (row, caption) in enumerate(zip(batch.rows.tolist(), batch.captions, strict=True)):
        if chosen[row]:
            texts = draw(caption, batch.epoch, row)
            if texts.negatives or not negatives_required:
                rows.append(place)
                drawn.append(texts)
    return StepTexts(
        rows=rows,
        positives=[texts.positive for texts in drawn],
        negatives=[negative for texts in drawn for negative in texts.negatives],
        owners=[i for i, texts in enumerate(drawn) for _ in texts.negatives],
    )


def ta_cleaner_losses(
    model: ImageTextModel, batch: ViewBatch, texts: StepTexts, options: Alignment
) -> dict[str, Tensor]:
    """``loss`` = λ_clip L_clip + λ_ss L_ss + λ_ta L_TA of a batch, and its terms; L_TA only for two rows or more."""
    q = len(texts.rows)
    aligned = q >= 2 and options.ta_weight > 0
    e: Embeddings = encode_views(model, batch, [*texts.positives, *texts.negatives] if aligned else [])
    terms = {
        "clip": clip_loss(e.images, e.texts, e.scale),
        "self_supervised": self_supervised_loss(e.images, e.augmented_images, e.texts, e.augmented_texts, e.scale),
    }
    loss = options.clip_weight * terms["clip"] + options.ss_weight * terms["self_supervised"]
    if aligned:
        images = e.images[texts.rows]
        positives, negatives = e.extra_texts[:q], e.extra_texts[q:]
        owners = torch.tensor(texts.owners, dtype=torch.long, device=images.device)
        alignment = alignment_losses(images, positives, negatives, owners, e.scale, options)
        margin = alignment.get("margin", 0.0)
        loss = loss + options.ta_weight * ((alignment["i2t"] + alignment["t2i"]) / 2 + margin)
        terms |= alignment
        with torch.no_grad():
            terms["positive_cosine"] = (images * positives).sum(-1).mean()
            if len(owners):
                terms["negative_cosine"] = (images[owners] * negatives).sum(-1).mean()
    return {"loss": loss, **terms}


# --- The training ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """CleanCLIP's views: ``text`` captions by EDA drawn ``once`` or in every ``epoch``, ``none``: the caption itself."""

    images: bool = True
    text: Literal["once", "epoch", "none"] = "once"
    synonyms: Synonyms | None = None


def augmented_batches(
    pairs: datasets.Dataset,
    model: ImageTextModel,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    num_workers: int = 0,
    skip: int = 0,
) -> Iterator[ViewBatch]:
    """The batches of :func:`plait_clip.backdoor.clean_clip.view_batches`; a view that is off repeats the original."""
    batches = view_batches(
        pairs,
        model,
        batch_size=batch_size,
        seed=seed,
        epoch=epoch,
        augment_images=augmentation.images,
        synonyms=None if augmentation.text == "none" else augmentation.synonyms,
        resample_captions=augmentation.text == "epoch",
        num_workers=num_workers,
        skip=skip,
    )
    for batch in batches:
        yield replace(
            batch,
            augmented_images=batch.images if batch.augmented_images is None else batch.augmented_images,
            augmented_captions=batch.captions if batch.augmented_captions is None else batch.augmented_captions,
        )


def ta_cleaner(
    model: ImageTextModel,
    pairs: datasets.Dataset,
    draw: Draw,
    n_subtext: int,
    negatives_required: bool,
    augmentation: Augmentation,
    alignment: Alignment,
    training: FineTuning,
    *,
    seed: int = 0,
    num_workers: int = 0,
    checkpoint: Path | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
) -> None:
    """Fine-tune ``model`` in place on clean pairs.

    Args:
        draw: makes the sub-captions of a caption, row and epoch.
        n_subtext: K, rows with sub-captions in an epoch.
        negatives_required: leave out rows without a counterfactual text.
        checkpoint, on_step and errors: as of :func:`plait_clip.training.train`.
    """
    chosen: dict[int, Tensor] = {}

    def batches(epoch: int, skip: int) -> Iterator[ViewBatch]:
        chosen.clear()
        chosen[epoch] = subtext_rows(len(pairs), n_subtext, seed, epoch)
        return augmented_batches(
            pairs,
            model,
            augmentation,
            batch_size=training.batch_size,
            seed=seed,
            epoch=epoch,
            num_workers=num_workers,
            skip=skip,
        )

    def losses(model: ImageTextModel, batch: ViewBatch) -> dict[str, Tensor]:
        texts = texts_of_step(batch, chosen[batch.epoch], draw, negatives_required)
        return ta_cleaner_losses(model, batch, texts, alignment)

    steps = steps_of_epoch(pairs, training.batch_size)
    fine_tune(model, batches, losses, steps, training, seed=seed, checkpoint=checkpoint, on_step=on_step)


# --- An ablation: the negatives without CleanCLIP --------------------------------------------------------------


def hard_negative_loss(model: ImageTextModel, batch: ViewBatch, negatives: Sequence[str]) -> Tensor:
    """L_clip with counterfactual texts as further columns of its image → text half."""
    images = F.normalize(model.encode_image(batch.images.float() / 255).float(), dim=-1)
    texts = F.normalize(model.encode_text([*batch.captions, *negatives]).float(), dim=-1)
    captions, others = texts[: len(images)], texts[len(images) :]
    scale = model.logit_scale.float().exp()
    owners = torch.zeros(len(others), dtype=torch.long, device=images.device)
    i2t = image_to_text_loss(images, captions, others, owners, scale)
    return (i2t + text_to_image_loss(images, captions, scale)) / 2


def fine_tune_with_hard_negatives(
    model: ImageTextModel,
    pairs: datasets.Dataset,
    draw: Draw,
    n_subtext: int,
    training: FineTuning,
    *,
    seed: int = 0,
    num_workers: int = 0,
    checkpoint: Path | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
) -> None:
    """Plain contrastive fine-tuning in place, with :func:`hard_negative_loss`; arguments as of :func:`ta_cleaner`."""
    chosen: dict[int, Tensor] = {}

    def batches(epoch: int, skip: int) -> Iterator[ViewBatch]:
        chosen.clear()
        chosen[epoch] = subtext_rows(len(pairs), n_subtext, seed, epoch)
        settings = {"batch_size": training.batch_size, "seed": seed, "epoch": epoch}
        return view_batches(pairs, model, **settings, num_workers=num_workers, skip=skip)

    def loss(model: ImageTextModel, batch: ViewBatch) -> Tensor:
        texts = texts_of_step(batch, chosen[batch.epoch], draw, negatives_required=True)
        return hard_negative_loss(model, batch, texts.negatives)

    steps = steps_of_epoch(pairs, training.batch_size)
    fine_tune(model, batches, loss, steps, training, seed=seed, checkpoint=checkpoint, on_step=on_step)
