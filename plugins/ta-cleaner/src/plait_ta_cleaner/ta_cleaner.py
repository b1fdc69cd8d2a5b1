"""TA-Cleaner, step by step (Xun et al., arXiv 2409.17601; v3: CleanerCLIP).

CleanCLIP's fine-tuning on clean pairs; for a random subset of them, redrawn in every epoch, the image is also drawn to
a factual and pushed from a counterfactual rewriting of its caption. :func:`ta_cleaner` is the whole
method, its parts follow in their order; the sub-captions: :mod:`plait_ta_cleaner.subcaptions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import datasets
import torch
import torch.nn.functional as F
from plait_clip import Checkpoint, ImageTextModel, clip_loss
from plait_clip.backdoor import (
    Embeddings,
    FineTuning,
    Synonyms,
    ViewBatch,
    encode_views,
    fine_tune,
    seed_of,
    self_supervised_loss,
    steps_of_epoch,
    view_batches,
)
from torch import Tensor

from plait_ta_cleaner.subcaptions import Draw, Subcaption

NegativeScope = Literal["batch", "own"]
NegativeLoss = Literal["softmax", "margin"]
NUM_SHOWN = 6
OnStep = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How L_TA is made and weighted: L = λ_clip L_clip + λ_ss L_ss + λ_ta L_TA.

    Attributes:
        n_subtext: K, pairs with sub-captions in an epoch: a share up to 1, or a number of pairs.
        negatives_required: leave out pairs without a counterfactual text.
    """

    n_subtext: float = 0.25
    negatives_required: bool = True
    ta_weight: float = 1.0
    clip_weight: float = 1.0
    ss_weight: float = 1.0
    negative_scope: NegativeScope = "batch"
    negative_loss: NegativeLoss = "softmax"

    def __post_init__(self) -> None:
        if self.ta_weight == self.clip_weight == self.ss_weight == 0:
            raise ValueError("ta_weight, clip_weight and self_supervised_weight are all 0; nothing would be learned")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """CleanCLIP's views: ``text`` captions by EDA drawn ``once`` or in every ``epoch``, ``none``: the caption itself."""

    images: bool = True
    text: Literal["once", "epoch", "none"] = "once"
    synonyms: Synonyms | None = None


DEFAULTS = Alignment()


def ta_cleaner(
    model: ImageTextModel,
    pairs: datasets.Dataset,
    draw: Draw,
    training: FineTuning,
    alignment: Alignment = DEFAULTS,
    augmentation: Augmentation = Augmentation(),
    *,
    seed: int = 0,
    num_workers: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: OnStep = lambda step, values: None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> None:
    """Fine-tune ``model`` in place on clean pairs.

    Args:
        draw: makes the sub-captions of a caption, epoch and row, such as
            :meth:`plait_ta_cleaner.subcaptions.SubcaptionSource.draw`.
        num_workers: processes that decode and augment images; they change no result.
        checkpoint, on_step and further errors: as of :func:`plait_clip.train`.

    Raises:
        ValueError: there are fewer pairs than K or than a batch.
    """
    k = num_subtext_rows(alignment.n_subtext, len(pairs))
    if alignment.ta_weight > 0 and 0 < k * training.batch_size < 2 * len(pairs):
        warn(f"a batch holds less than two of the {k} pairs with sub-captions; raise n_subtext")
    chosen: dict[int, Tensor] = {}

    def batches(epoch: int, skip: int) -> Iterator[ViewBatch]:
        chosen.clear()
        chosen[epoch] = subtext_rows(len(pairs), k, seed, epoch)
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
        texts = texts_of_step(batch, chosen[batch.epoch], draw, alignment.negatives_required)
        return ta_cleaner_losses(model, batch, texts, alignment)

    steps = steps_of_epoch(pairs, training.batch_size)
    fine_tune(model, batches, losses, steps, training, seed=seed, checkpoint=checkpoint, on_step=on_step)


# --- Which rows get sub-captions in an epoch -------------------------------------------------------------------


def num_subtext_rows(n_subtext: float, num_pairs: int) -> int:
    """K for so many pairs: ``n_subtext`` is a share up to 1, or a number of pairs.

    Raises:
        ValueError: it is more than the pairs, or neither a share nor a whole number.
    """
    if n_subtext > 1 and n_subtext != int(n_subtext):
        raise ValueError(f"n_subtext is {n_subtext}; allowed is a share up to 1 or a whole number of pairs")
    count = int(n_subtext * num_pairs) if n_subtext <= 1 else int(n_subtext)
    if count > num_pairs:
        raise ValueError(f"n_subtext is {count}; allowed is up to the {num_pairs} clean pairs")
    return count


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


# --- CleanCLIP's batches ----------------------------------------------------------------------------------------------


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
    """The batches of :func:`plait_clip.backdoor.view_batches`; a view that is off repeats the original."""
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


# --- What was drawn --------------------------------------------------------------------------------------------


def subcaption_counts(
    captions: Sequence[str], draw: Draw, alignment: Alignment, num_epochs: int, seed: int
) -> tuple[dict[str, int], list[tuple[str, Subcaption]]]:
    """How the captions of the chosen rows were rewritten, all epochs of a training together.

    Returns:
        counts (``drawn``, ``rewritten``, ``positive = caption``, ``no counterfactual``), and a few captions with theirs.
    """
    counts = dict.fromkeys(["drawn", "rewritten", "positive = caption", "no counterfactual"], 0)
    shown: list[tuple[str, Subcaption]] = []
    k = num_subtext_rows(alignment.n_subtext, len(captions))
    for epoch in range(num_epochs):
        for row in subtext_rows(len(captions), k, seed, epoch).nonzero().flatten().tolist():
            texts = draw(captions[row], epoch, row)
            skipped = alignment.negatives_required and not texts.negatives
            kind = "no counterfactual" if skipped else "positive = caption" if texts.identity else "rewritten"
            counts[kind] += 1
            counts["drawn"] += 1
            if len(shown) < NUM_SHOWN:
                shown.append((captions[row], texts))
    return counts, shown
