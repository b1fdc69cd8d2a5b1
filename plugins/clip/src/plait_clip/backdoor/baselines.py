"""Baseline defences: fine-tuning, anti-backdoor learning, dropping the top, square unlearning, perturb and recover.

Each trains the model that it is given in place. None looks at which pairs are poisoned; square unlearning is given the flags.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plait_clip.backdoor.clean_clip import FineTuning, ViewBatch, fine_tune, seed_of, steps_of_epoch, view_batches
from plait_clip.backdoor.losses import embedding_shift, square_unlearn_loss
from plait_clip.losses import clip_loss
from plait_clip.model import ImageTextModel
from plait_clip.pair_batches import PairBatch, PairLoader
from plait_clip.training import Checkpoint, contrastive_loss
from plait_clip.zero_shot import evaluating

OnStep = Callable[[int, dict[str, float]], None]


def silent(step: int, values: dict[str, float]) -> None:
    """Log nothing."""


def epoch_batches(pairs: PairLoader, batch_size: int, seed: int, epoch: int, skip: int = 0) -> Iterator[PairBatch]:
    """One epoch over all pairs, an incomplete last batch dropped; a function of (seed, epoch)."""
    return pairs.batches(batch_size, torch.Generator().manual_seed(seed_of("order", seed, epoch)), skip=skip)


def pair_similarities(
    model: ImageTextModel, pairs: PairLoader, *, batch_size: int = 512, precision: str = "fp32"
) -> np.ndarray:
    """``[N]`` cosine of every image and its (first) caption, in eval mode without augmentation.

    Raises:
        ValueError: a similarity is not finite; names the row.
    """
    found = []
    for start in range(0, len(pairs), batch_size):
        rows = range(start, min(start + batch_size, len(pairs)))
        batch = pairs.read(rows, [0.0] * len(rows)).to(model.device)
        with evaluating(model, precision):
            images, texts = embed(model, batch)
        found.append((images * texts).sum(dim=1).cpu())
    similarities = torch.cat(found).numpy()
    if not np.isfinite(similarities).all():
        raise ValueError(f"the similarity of pair {int(np.flatnonzero(~np.isfinite(similarities))[0])} is not finite")
    return similarities


def embed(model: ImageTextModel, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Unit-norm embeddings ``[B, D]`` of the images and of the captions of a batch."""
    images = F.normalize(model.encode_image(batch.pixels).float(), dim=-1)
    texts = F.normalize(model.encode_tokens(batch.tokens).float(), dim=-1)
    return images, texts[batch.text_index]


def top_share(scores: np.ndarray, share: float) -> np.ndarray:
    """The positions of the largest ``share`` of the scores (at least one), sorted; ties go to the first."""
    return np.sort(np.argsort(-scores, kind="stable")[: max(1, round(share * len(scores)))])


# --- Fine-tuning ----------------------------------------------------------------------------------------------


def plain_fine_tuning(
    model: ImageTextModel,
    pairs: PairLoader,
    options: FineTuning,
    *,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: OnStep = silent,
) -> None:
    """L_clip on clean pairs."""

    def batches(epoch: int, skip: int) -> Iterator[PairBatch]:
        return epoch_batches(pairs, options.batch_size, seed, epoch, skip)

    steps = steps_of_epoch(pairs, options.batch_size)
    fine_tune(model, batches, contrastive_loss, steps, options, seed=seed, checkpoint=checkpoint, on_step=on_step)


# --- Anti-backdoor learning (Li et al., NeurIPS 2021), for pairs ----------------------------------------------


def anti_backdoor_learning(
    model: ImageTextModel,
    pairs: PairLoader,
    isolated: np.ndarray,
    num_isolated: int,
    options: FineTuning,
    *,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: OnStep = silent,
) -> None:
    """Minimise L_clip(rest) − L_clip(isolated).

    Isolated pairs are contrasted with the rest of their batch too: their captions are often the same text, and among
    equal texts the loss is ln B whatever the images are, so that ascending it would change nothing.

    Args:
        isolated: rows of the pairs to unlearn, such as the ``top_share`` of :func:`pair_similarities`.
        num_isolated: how many of the ``options.batch_size`` pairs of a batch are isolated ones.
    """
    if not 1 <= num_isolated < options.batch_size - 1:
        raise ValueError(
            f"{num_isolated} isolated pairs in a batch of {options.batch_size}: allowed are 1 to batch_size − 2"
        )
    rest = np.setdiff1d(np.arange(len(pairs)), isolated)
    num_rest = options.batch_size - num_isolated
    steps = steps_of_epoch(rest, num_rest)

    def batches(epoch: int, skip: int) -> Iterator[PairBatch]:
        rng = np.random.default_rng(seed_of("order", seed, epoch))
        kept = rng.permutation(rest)
        # As many passes over the isolated rows as the epoch needs.
        drawn = np.concatenate([rng.permutation(isolated) for _ in range(-(-steps * num_isolated // len(isolated)))])
        picks = rng.random((steps, options.batch_size))
        for step in range(skip, steps):
            first = drawn[step * num_isolated : (step + 1) * num_isolated]
            rows = np.concatenate([first, kept[step * num_rest : (step + 1) * num_rest]])
            yield pairs.read(rows.tolist(), picks[step].tolist())

    def loss_fn(model: ImageTextModel, batch: PairBatch) -> dict[str, Tensor]:
        images, texts = embed(model, batch)
        scale = model.logit_scale.float().exp()
        retained = clip_loss(images[num_isolated:], texts[num_isolated:], scale)
        logits = scale * images @ texts.T
        own = torch.arange(num_isolated, device=logits.device)
        unlearned = (F.cross_entropy(logits[:num_isolated], own) + F.cross_entropy(logits.T[:num_isolated], own)) / 2
        return {"loss": retained - unlearned, "rest": retained, "isolated": unlearned}

    fine_tune(model, batches, loss_fn, steps, options, seed=seed, checkpoint=checkpoint, on_step=on_step)


# --- Dropping the top (CleanCLIP's `progressive`) -------------------------------------------------------------


def drop_top(
    model: ImageTextModel,
    pairs: PairLoader,
    removal_epochs: Sequence[int],
    share: float,
    options: FineTuning,
    *,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: OnStep = silent,
) -> np.ndarray:
    """Train on, and before some epochs remove the pairs that the model finds most similar.

    Args:
        removal_epochs: epochs, counted from 0, before which the largest ``share`` of what is left is removed.

    Returns:
        The rows that were removed, in the order of removal.
    """
    when = sorted({epoch for epoch in removal_epochs if epoch < options.num_epochs})
    left = len(pairs)
    for _ in when:
        left -= max(1, round(share * left))
    # Every epoch has as many steps as the last, smallest one, so that the schedule is known beforehand.
    steps = steps_of_epoch(range(left), options.batch_size)
    removed: dict[int, np.ndarray] = {}

    def batches(epoch: int, skip: int) -> Iterator[PairBatch]:
        kept = np.arange(len(pairs))
        for at in when:
            if at <= epoch:
                if at not in removed:
                    similarities = pair_similarities(model, pairs, precision=options.precision)
                    removed[at] = kept[top_share(similarities[kept], share)]
                kept = np.setdiff1d(kept, removed[at])
        rng = np.random.default_rng(seed_of("order", seed, epoch))
        order, picks = rng.permutation(kept), rng.random(len(kept))
        for step in range(skip, steps):
            part = slice(step * options.batch_size, (step + 1) * options.batch_size)
            yield pairs.read(order[part].tolist(), picks[part].tolist())

    kept_state = _WithRemovals(checkpoint, removed) if checkpoint is not None else None
    fine_tune(model, batches, contrastive_loss, steps, options, seed=seed, checkpoint=kept_state, on_step=on_step)
    return np.concatenate([removed[at] for at in when]) if when else np.empty(0, int)


@dataclass(frozen=True)
class _WithRemovals:
    """A checkpoint that keeps the removed rows beside the state of the training."""

    checkpoint: Checkpoint
    removed: dict[int, np.ndarray]

    def load(self) -> Any:
        state = self.checkpoint.load()
        if state is None:
            return None
        self.removed.update({at: rows.numpy() for at, rows in state["removed"].items()})
        return state["training"]

    def save(self, state: Any) -> None:
        removed = {at: torch.from_numpy(rows) for at, rows in self.removed.items()}
        self.checkpoint.save({"training": state, "removed": removed})


# --- Square unlearning (CleanCLIP's `unlearn`) ----------------------------------------------------------------


def square_unlearning(
    model: ImageTextModel,
    pairs: PairLoader,
    flags: np.ndarray,
    weight: float,
    target: float,
    options: FineTuning,
    *,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: OnStep = silent,
) -> None:
    """L_clip on the unflagged pairs of a batch + weight · mean (c + target)² on the flagged ones.

    Args:
        flags: ``[N]`` bool, the pairs to unlearn.
    """
    flagged = torch.from_numpy(flags)

    def batches(epoch: int, skip: int) -> Iterator[PairBatch]:
        return epoch_batches(pairs, options.batch_size, seed, epoch, skip)

    def loss_fn(model: ImageTextModel, batch: PairBatch) -> dict[str, Tensor]:
        images, texts = embed(model, batch)
        bad = flagged[batch.rows.cpu()].to(images.device)
        # The mean over no pair is no number; an empty part contributes nothing.
        zero = (images.sum() + texts.sum()) * 0
        kept = clip_loss(images[~bad], texts[~bad], model.logit_scale.float().exp()) if not bad.all() else zero
        forgotten = square_unlearn_loss(images[bad], texts[bad], target) if bad.any() else zero
        return {"loss": kept + weight * forgotten, "clip": kept, "unlearn": forgotten}

    steps = steps_of_epoch(pairs, options.batch_size)
    fine_tune(model, batches, loss_fn, steps, options, seed=seed, checkpoint=checkpoint, on_step=on_step)


# --- Perturb and recover (PAR) --------------------------------------------------------------------------------


def perturb_and_recover(
    model: ImageTextModel,
    pairs: datasets.Dataset,
    limit: float,
    options: FineTuning,
    *,
    num_workers: int = 0,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: OnStep = silent,
) -> None:
    """L_clip on AutoAugmented clean pairs − ½(d_I + d_T): away from the given model, up to a squared distance ``limit``."""
    before = copy.deepcopy(model).requires_grad_(False).eval()

    def batches(epoch: int, skip: int) -> Iterator[ViewBatch]:
        return view_batches(
            pairs,
            model,
            batch_size=options.batch_size,
            seed=seed,
            epoch=epoch,
            augment_images=True,
            num_workers=num_workers,
            skip=skip,
        )

    def loss_fn(model: ImageTextModel, batch: ViewBatch) -> dict[str, Tensor]:
        if batch.augmented_images is None:
            raise ValueError("the batch has no augmented images; load it with augment_images")
        pixels = batch.augmented_images.float() / 255
        images = F.normalize(model.encode_image(pixels).float(), dim=-1)
        texts = F.normalize(model.encode_text(batch.captions).float(), dim=-1)
        with torch.no_grad():
            images_before = F.normalize(before.encode_image(pixels).float(), dim=-1)
            texts_before = F.normalize(before.encode_text(batch.captions).float(), dim=-1)
        recover = clip_loss(images, texts, model.logit_scale.detach().float().exp())
        image_shift = embedding_shift(images, images_before, limit)
        text_shift = embedding_shift(texts, texts_before, limit)
        loss = recover - (image_shift + text_shift) / 2
        return {"loss": loss, "clip": recover, "image shift": image_shift, "text shift": text_shift}

    steps = steps_of_epoch(pairs, options.batch_size)
    fine_tune(model, batches, loss_fn, steps, options, seed=seed, checkpoint=checkpoint, on_step=on_step)
