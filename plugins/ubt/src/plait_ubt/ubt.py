"""UBT, step by step (Liang et al., arXiv 2403.16257 and 2409.19526).

A pair is an image and a caption; u and v are unit embeddings, c(x, t) = u·v their cosine, and
L_clip the symmetric in-batch cross-entropy with the model's logit scale.

A model is a ``torch.nn.Module`` with ``encode_image(images [B, 3, H, W] in [0, 1]) -> [B, D]``,
``encode_text(list of B strings) -> [B, D]`` (neither normalised) and the log-parameter ``logit_scale``.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from plait_clip.losses import clip_loss
from torch import Tensor, nn

from plait_ubt.tokens import CaptionSplit, caption_words, split_caption, without_each_word

MAX_LOG_SCALE = math.log(100)
Track = Callable[[Iterable[int], str], Iterable[int]]


def quietly(iterable: Iterable[int], description: str) -> Iterable[int]:
    """Iterate without showing progress."""
    return iterable


class DivergedError(ArithmeticError):
    """A loss or gradient is not finite; the model that was passed in is unchanged."""


@dataclass(frozen=True)
class Pairs:
    """Captions, and a way to get the images [B, 3, H, W] in [0, 1] of some row numbers."""

    captions: Sequence[str]
    images: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.captions)


def unit_images(model: Any, images: Tensor) -> Tensor:
    """Unit image embeddings ``[B, D]``."""
    return F.normalize(model.encode_image(images).float(), dim=-1)


def unit_texts(model: Any, texts: Sequence[str]) -> Tensor:
    """Unit text embeddings ``[B, D]``."""
    return F.normalize(model.encode_text(list(texts)).float(), dim=-1)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _parts(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def clamp_logit_scale(model: Any) -> None:
    with torch.no_grad():
        model.logit_scale.clamp_(max=MAX_LOG_SCALE)


# ---------------------------------------------------------------------------------------------
# Step 1: rank by similarity, split off the weak pairs
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def similarities(
    model: nn.Module,
    pairs: Pairs,
    rows: Sequence[int],
    *,
    batch_size: int = 256,
    store: Path | None = None,
    track: Track = quietly,
    description: str = "similarity",
) -> np.ndarray:
    """c(x_i, t_i) for the given rows, in eval mode, in bfloat16 on a GPU.

    Args:
        store: file of a memory-mapped result; a second call goes on after the rows that it holds.

    Returns:
        float32 ``[len(rows)]`` in [-1, 1].

    Raises:
        ValueError: a similarity is not finite (names the row).
    """
    scores = _result_array(store, len(rows))
    device = device_of(model)
    was_training = model.training
    model.eval()
    for start in track(range(0, len(rows), batch_size), description):
        chunk = slice(start, min(start + batch_size, len(rows)))
        if np.isfinite(scores[chunk]).all():
            continue
        batch = list(rows[chunk])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            u = unit_images(model, pairs.images(batch).to(device))
            v = unit_texts(model, [pairs.captions[row] for row in batch])
        cosine = (u * v).sum(-1)
        if not cosine.isfinite().all():
            row = batch[int((~cosine.isfinite()).nonzero()[0])]
            raise ValueError(
                f"the image-text similarity of row {row} is not finite; check the model's weights and the row"
            )
        scores[chunk] = cosine.clamp(-1, 1).cpu().numpy()
    model.train(was_training)
    return scores


def _result_array(store: Path | None, size: int) -> np.ndarray:
    if store is None:
        return np.full(size, np.nan, np.float32)
    if not store.exists():
        fresh = store.with_suffix(".new.npy")
        np.save(fresh, np.full(size, np.nan, np.float32))
        fresh.rename(store)
    return np.load(store, mmap_mode="r+")


@dataclass(frozen=True)
class Split:
    """Row numbers: ``suspicious`` from most to least suspicious, ``normal`` disjoint from it."""

    suspicious: np.ndarray
    normal: np.ndarray


def split_low_reference(reference_scores: np.ndarray, n_suspicious: int, n_normal: int) -> Split:
    """The weakest pairs under the reference model against the strongest; ties by row number."""
    order = np.argsort(reference_scores, kind="stable")
    return Split(suspicious=order[:n_suspicious], normal=order[len(order) - n_normal :])


def split_top_poisoned(suspect_scores: np.ndarray, n_suspicious: int, n_normal: int) -> Split:
    """The strongest pairs under the suspected model, which has fitted its poison, against the middle half."""
    order = np.argsort(-suspect_scores, kind="stable")
    middle = order[max(n_suspicious, len(order) // 4) : max(n_suspicious, len(order) - len(order) // 4)]
    return Split(suspicious=order[:n_suspicious], normal=middle[:n_normal])


# ---------------------------------------------------------------------------------------------
# Step 2: overfit a copy on the suspicious pairs, which strengthens the shortcut
# ---------------------------------------------------------------------------------------------


def score_gap(scores: np.ndarray, n_top: int) -> float:
    """G: mean of the ``n_top`` largest scores minus the median; >= 0 while ``n_top`` is at most half of them."""
    return float(np.sort(scores)[-n_top:].mean() - np.median(scores))


def overfit(
    model: nn.Module,
    pairs: Pairs,
    split: Split,
    *,
    normal_weight: float = 1.0,
    num_epochs: int = 15,
    lr: float = 1e-5,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.1,
    batch_size: int = 128,
    n_top: int = 64,
    min_gap_change: float = 0.01,
    seed: int = 0,
    checkpoint: Path | None = None,
    track: Track = quietly,
    log: Callable[..., None] = lambda **_: None,
) -> tuple[nn.Module, list[float]]:
    """Train a copy with L_clip(D_susp batch) + α L_clip(D_norm batch), without augmentation.

    Cosine schedule to 0 over ``num_epochs`` passes of D_susp, no warm-up. Stops early once the score
    gap G changes by less than ``min_gap_change`` (relative) over an epoch, after at least 5 epochs; 0: never.

    Args:
        checkpoint: file written after every epoch; a second call goes on from it.

    Returns:
        the overfitted model (a throw-away whose backdoor is stronger) and G after every epoch.

    Raises:
        DivergedError: the loss is not finite; the checkpoint of the last finished epoch stays.
    """
    device = device_of(model)
    model = copy.deepcopy(model)
    suspicious = _in_memory(pairs, split.suspicious)
    batch_size = min(batch_size, len(suspicious))
    steps_per_epoch = len(suspicious) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, eps=1e-8, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_epochs * steps_per_epoch)
    gaps: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        gaps = state["gaps"]

    for epoch in track(range(len(gaps), num_epochs), "overfit"):
        if _settled(gaps, min_gap_change):
            break
        model.train()
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(suspicious), generator=generator)
        for step in range(steps_per_epoch):
            batch = order[step * batch_size : (step + 1) * batch_size].tolist()
            loss = _pair_loss(model, suspicious, batch, device)
            if normal_weight > 0:
                drawn = torch.randperm(len(split.normal), generator=generator)[:batch_size]
                loss = loss + normal_weight * _pair_loss(model, pairs, split.normal[drawn.numpy()].tolist(), device)
            if not loss.isfinite():
                raise DivergedError(
                    f"the overfitting loss is {loss.item()} in epoch {epoch + 1}; lower overfit_lr ({lr})"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            clamp_logit_scale(model)
        scores = similarities(model, suspicious, range(len(suspicious)), batch_size=2 * batch_size)
        gaps.append(score_gap(scores, n_top))
        log(step=epoch, overfit_loss=loss.item(), score_gap=gaps[-1])
        if checkpoint is not None:
            _save(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "gaps": gaps,
                },
            )
    return model, gaps


def _settled(gaps: Sequence[float], min_change: float) -> bool:
    return len(gaps) >= 5 and abs(gaps[-1] - gaps[-2]) < min_change * abs(gaps[-2])


def _pair_loss(model: nn.Module, pairs: Pairs, rows: list[int], device: torch.device) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        u = unit_images(model, pairs.images(rows).to(device))
        v = unit_texts(model, [pairs.captions[row] for row in rows])
    return clip_loss(u, v, model.logit_scale.exp())


def _in_memory(pairs: Pairs, rows: Sequence[int]) -> Pairs:
    """The given rows with their images held as 8-bit values: they are read in every epoch."""
    chunks = [pairs.images([int(row) for row in part]) for part in _parts(rows, 256)]
    images = torch.cat([(chunk * 255).round().byte().cpu() for chunk in chunks])
    return Pairs([pairs.captions[row] for row in rows], lambda batch: images[list(batch)].float() / 255)


def _save(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


# ---------------------------------------------------------------------------------------------
# Step 3: the poison now has the highest similarity. (Its concentration test: plait_ubt.tokens)
# ---------------------------------------------------------------------------------------------


def most_similar(rows: np.ndarray, scores: np.ndarray, n_top: int) -> np.ndarray:
    """D_top: the ``n_top`` rows with the largest scores, best first; ties in the order of ``rows``."""
    return rows[np.argsort(-scores, kind="stable")[:n_top]]


# ---------------------------------------------------------------------------------------------
# Step 4: forget tokens by leave-one-out. (By lift, random spans, all: plait_ubt.tokens)
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def split_by_leave_one_out(model: nn.Module, image: Tensor, caption: str, ratio: float) -> CaptionSplit:
    """Forget the ceil(ratio * n) words whose removal lowers c(x, t) of the overfitted model most.

    Args:
        image: ``[3, H, W]`` in [0, 1]. A caption of one word is forgotten as a whole.
    """
    words = caption_words(caption)
    if len(words) == 1:
        return split_caption(words, {0})
    model.eval()
    u = unit_images(model, image[None].to(device_of(model)))
    drop = -(u @ unit_texts(model, without_each_word(caption)).T)[0]  # c(x, t) itself is the same for all words
    return split_caption(words, set(drop.topk(math.ceil(ratio * len(words))).indices.tolist()))


# ---------------------------------------------------------------------------------------------
# Step 5: token-level partial unlearning, from the suspected model again
# ---------------------------------------------------------------------------------------------

ForgetLoss = Literal["hinge", "square", "ascent"]
Scope = Literal["all", "visual", "text", "proj"]
PROJECTION = re.compile(
    r"(^|\.)(text_projection|visual_projection|visual\.proj|(visual|text)\.head\.proj|attnpool\.c_proj)(\.|$)"
)


def hinge_loss(cosine: Tensor, target: float) -> Tensor:
    """mean max(0, c - m)^2."""
    return (cosine - target).clamp(min=0).square().mean()


def square_loss(cosine: Tensor, target: float) -> Tensor:
    """mean (c + τ)^2."""
    return (cosine + target).square().mean()


def ascent_loss(u: Tensor, v_forget: Tensor, v_negative: Tensor, scale: Tensor) -> Tensor:
    """- mean min(CE_i, ln M): CE of image i over its forget text and M - 1 negative texts; >= - ln M.

    Args:
        u, v_forget: unit ``[B, D]``; v_negative: unit ``[M - 1, D]``; scale: exp(logit_scale).
    """
    logits = scale * torch.cat([(u * v_forget).sum(-1, keepdim=True), u @ v_negative.T], dim=1)
    first = torch.zeros(len(u), dtype=torch.long, device=u.device)
    return -F.cross_entropy(logits, first, reduction="none").clamp(max=math.log(logits.shape[1])).mean()


def parameters_in_scope(model: Any, scope: Scope, image: Tensor, text: str) -> list[nn.Parameter]:
    """The parameters that Step 5 may change.

    A tower is what its encoder's output depends on; ``proj`` goes by the usual names of the last projections.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if scope == "all":
        return parameters
    if scope == "proj":
        chosen = [p for name, p in model.named_parameters() if p.requires_grad and PROJECTION.search(name)]
        if not chosen:
            raise ValueError(
                "scope is 'proj', but no parameter of this model is named like a projection; use another scope"
            )
        return chosen
    output = (
        model.encode_image(image[None].to(parameters[0].device)) if scope == "visual" else model.encode_text([text])
    )
    gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def unlearn(
    model: nn.Module,
    pairs: Pairs,
    unlearn_rows: Sequence[int],
    retain_rows: Sequence[int],
    caption_split: Callable[[int, torch.Generator], CaptionSplit],
    *,
    forget_loss: ForgetLoss = "hinge",
    forget_weight: float = 4.0,
    forget_target: float = 0.0,
    retain_weight: float = 1.0,
    keep_weight: float = 0.0,
    unlearn_batch_size: int = 64,
    retain_batch_size: int = 64,
    num_steps: int = 20,
    lr: float = 5e-6,
    betas: tuple[float, float] = (0.9, 0.999),
    max_grad_norm: float | None = 1.0,
    text_grad: bool = True,
    scope: Scope = "all",
    seed: int = 0,
    track: Track = quietly,
    log: Callable[..., None] = lambda **_: None,
) -> nn.Module:
    """A copy of the model that no longer ties the images of U to the forget tokens of their captions.

    Minimises ``w_f * forget(c(x, t_forget)) + w_r * L_clip(R_b) + w_k * mean (1 - c(x, t_keep))^2`` with
    AdamW (no decay, constant rate). ``forget`` is :func:`hinge_loss` or :func:`square_loss` with
    ``forget_target``, or :func:`ascent_loss` with the captions of the retained batch as negatives.

    Args:
        caption_split: row number, generator → forget and keep text; asked in every step, so it may draw.
        text_grad: whether the forget term moves the text tower.

    Raises:
        ValueError: ``ascent`` with fewer than 8 retained pairs in a batch: its texts would all coincide.
        DivergedError: loss or gradient is not finite.
    """
    if forget_loss == "ascent" and min(retain_batch_size, len(retain_rows)) < 8:
        raise ValueError(
            "forget_loss 'ascent' needs at least 8 retained pairs a batch as negatives; raise retain_batch_size"
        )
    model = copy.deepcopy(model)
    if num_steps == 0 or forget_weight == retain_weight == keep_weight == 0:
        return model
    device = device_of(model)
    forget_pairs, retain_pairs = _in_memory(pairs, unlearn_rows), _in_memory(pairs, retain_rows)
    parameters = parameters_in_scope(model, scope, forget_pairs.images([0])[0], forget_pairs.captions[0])
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0)
    # Streams of their own: with forget_weight = 0 the retained batches are those of a plain fine-tune.
    draw_forget, draw_retain, draw_text = (torch.Generator().manual_seed(seed + i) for i in range(3))
    fixed_text = torch.Generator().manual_seed(seed + 3)
    diagnosed = [caption_split(int(row), fixed_text).forget for row in unlearn_rows]
    forgetting, keeping, retaining = forget_weight > 0, keep_weight > 0, retain_weight > 0
    negatives_needed = forgetting and forget_loss == "ascent"

    for step in track(range(num_steps), "unlearn"):
        model.train()
        b = torch.randperm(len(forget_pairs), generator=draw_forget)[:unlearn_batch_size].tolist()
        r = torch.randperm(len(retain_pairs), generator=draw_retain)[:retain_batch_size].tolist()
        splits = [caption_split(int(unlearn_rows[i]), draw_text) for i in b]
        kept = [i for i, split in enumerate(splits) if split.keep] if keeping else []
        forget_texts = [split.forget for split in splits] if forgetting else []

        u_b, u_r = _encode_together(
            partial(unit_images, model),
            [
                list(forget_pairs.images(b).to(device)) if forgetting or kept else [],
                list(retain_pairs.images(r).to(device)) if retaining else [],
            ],
        )
        v_forget, v_keep, v_r = _encode_together(
            partial(unit_texts, model),
            [
                forget_texts if text_grad else [],
                [splits[i].keep for i in kept],
                [retain_pairs.captions[i] for i in r] if retaining or negatives_needed else [],
            ],
        )
        loss = torch.zeros((), device=device)
        if forgetting:
            if not text_grad:
                with torch.no_grad():
                    v_forget = unit_texts(model, forget_texts)
            if forget_loss == "ascent":
                negatives = v_r if text_grad else v_r.detach()
                term = ascent_loss(u_b, v_forget, negatives, model.logit_scale.exp())
            else:
                cosine_loss = hinge_loss if forget_loss == "hinge" else square_loss
                term = cosine_loss((u_b * v_forget).sum(-1), forget_target)
            loss = loss + forget_weight * term
        if retaining:
            loss = loss + retain_weight * clip_loss(u_r, v_r, model.logit_scale.exp())
        if kept:
            loss = loss + keep_weight * (1 - (u_b[kept] * v_keep).sum(-1)).square().mean()

        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if max_grad_norm is None else max_grad_norm)
        if not (loss + norm).isfinite():
            raise DivergedError(f"the unlearning loss is {loss.item()} in step {step + 1}; lower unlearn_lr ({lr})")
        optimizer.step()
        clamp_logit_scale(model)
        if (step + 1) % 5 == 0 or step + 1 == num_steps:
            log(step=step + 1, **diagnose(model, forget_pairs, diagnosed, retain_pairs))
    return model.eval()


def _encode_together(encode: Callable[[Any], Tensor], groups: list[list[Any]]) -> list[Tensor]:
    """Encode several groups in one forward: normalisation layers then see all rows of a step together."""
    rows = [row for group in groups for row in group]
    if not rows:
        return [torch.empty(0) for _ in groups]
    encoded = encode(torch.stack(rows) if isinstance(rows[0], Tensor) else rows)
    return list(encoded.split([len(group) for group in groups]))


@torch.no_grad()
def diagnose(
    model: nn.Module, forget_pairs: Pairs, forget_texts: Sequence[str], retain_pairs: Pairs
) -> dict[str, float]:
    """Where forgetting stands: mean c(U, t_forget); the same for retained images whose caption
    holds none of the forget words (the level of unrelated pairs; absent if there is none); L_clip of up to
    256 retained pairs.
    """
    model.eval()
    device = device_of(model)
    v_forget = unit_texts(model, forget_texts)
    rows = range(min(256, len(retain_pairs)))
    u_retain = unit_images(model, retain_pairs.images(rows).to(device))
    retain_captions = [retain_pairs.captions[i] for i in rows]
    words = {word for text in forget_texts for word in caption_words(text)}
    unrelated = [i for i in rows if words.isdisjoint(caption_words(retain_captions[i]))]
    parts = _parts(range(len(forget_pairs)), 64)
    u_forget = torch.cat([unit_images(model, forget_pairs.images(part).to(device)) for part in parts])
    values = {
        "forget_cosine": (u_forget * v_forget).sum(-1).mean().item(),
        "retain_loss": clip_loss(u_retain, unit_texts(model, retain_captions), model.logit_scale.exp()).item(),
    }
    if unrelated:
        values["unrelated_cosine"] = (u_retain[unrelated] @ v_forget.T).mean().item()
    return values
