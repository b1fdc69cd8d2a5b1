"""UBT, step by step (Liang et al., arXiv 2403.16257 and 2409.19526).

:func:`ubt` is the whole method, :func:`find_suspicious` its Steps 0 to 4; the steps follow in their order. A pair is an
image and a caption; u and v are unit embeddings, c(x, t) = u·v their cosine, and L_clip the symmetric in-batch
cross-entropy with the model's logit scale. What a model is: :mod:`plait_ubt.embeddings`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from plait_clip import Checkpoint, clip_loss, evaluating
from torch import Tensor, nn

from plait_ubt.embeddings import (
    CaptionedImages,
    clamp_logit_scale,
    device_of,
    encode_together,
    pair_loss,
    unit_images,
    unit_pairs,
    unit_texts,
)
from plait_ubt.evidence import Evidence, Split, SplitOfRow
from plait_ubt.options import MIN_NEGATIVES, UbtOptions
from plait_ubt.scope import diagnose, parameters_in_scope
from plait_ubt.tokens import (
    CaptionSplit,
    caption_words,
    concentration,
    has_letters,
    plural_folding,
    select_forget_words,
    split_at_random_span,
    split_at_words,
    split_caption,
    whole_caption,
    without_each_word,
    word_lifts,
)

Track = Callable[[Iterable[int], str], Iterable[int]]
DEFAULTS = UbtOptions()


def quietly(iterable: Iterable[int], description: str) -> Iterable[int]:
    """Iterate without showing progress."""
    return iterable


def ignore(*_: Any, **__: Any) -> None:
    """Log or warn to nobody."""


def seed_zero(name: str) -> int:
    """The same seed for all draws."""
    return 0


def ubt(
    model: nn.Module,
    pairs: CaptionedImages,
    reference: nn.Module | None = None,
    options: UbtOptions = DEFAULTS,
    *,
    seed_for: Callable[[str], int] = seed_zero,
    log: Callable[..., None] = ignore,
    track: Track = quietly,
    **inspection: Any,
) -> tuple[nn.Module, Evidence]:
    """Unlearn a backdoor: a cleaned copy of the model, or an unchanged one where no shortcut is seen, and the evidence.

    Args:
        seed_for: seed of the draw of a name (``overfit``, ``oracle``, ``retain``, ``unlearn``).
        log: called with ``step`` and the values of curves. track: iterates and shows progress.
        inspection: further arguments of :func:`find_suspicious`.

    Raises:
        FloatingPointError: a loss or gradient is not finite; the model that was given is unchanged.
        ValueError: as :func:`find_suspicious` and :func:`unlearn`.
    """
    evidence = find_suspicious(model, pairs, reference, options, seed_for=seed_for, log=log, track=track, **inspection)
    if not evidence.coherent:
        return copy.deepcopy(model).eval(), evidence
    normal = evidence.split.normal
    drawn = torch.randperm(len(normal), generator=torch.Generator().manual_seed(seed_for("retain")))
    cleaned = unlearn(
        model,
        pairs,
        evidence.unlearn_rows.tolist(),
        normal[np.sort(drawn[: options.n_retain].numpy())].tolist(),
        evidence.caption_split,
        options,
        seed=seed_for("unlearn"),
        track=track,
        log=log,
    )
    return cleaned, evidence


def find_suspicious(
    model: nn.Module,
    pairs: CaptionedImages,
    reference: nn.Module | None = None,
    options: UbtOptions = DEFAULTS,
    *,
    reference_pairs: CaptionedImages | None = None,
    poisoned_rows: np.ndarray | None = None,
    seed_for: Callable[[str], int] = seed_zero,
    rank_checkpoint: Checkpoint | None = None,
    overfit_checkpoint: Checkpoint | None = None,
    track: Track = quietly,
    log: Callable[..., None] = ignore,
    warn: Callable[[str], None] = ignore,
) -> Evidence:
    """Steps 0 to 4: rank, overfit, rank again, find the forget words. No weight of a model that is given changes.

    Args:
        pairs: what the model was trained on.
        reference: a clean model; needed for ``rank_mode`` ``low_reference``.
        reference_pairs: the same pairs as the reference takes them, where its images are of another size.
        poisoned_rows: the truth, for ``detection`` ``oracle``.
        rank_checkpoint, overfit_checkpoint: let Steps 1 and 2 go on after an interruption.

    Raises:
        ValueError: too few pairs; no reference; a similarity is not finite; no pair to unlearn holds a forget word.
        FloatingPointError: overfitting diverges.
    """
    n_suspicious, n_normal = options.sizes(len(pairs))
    lettered = sum(map(has_letters, pairs.captions))
    if lettered < len(pairs) / 2:
        warn(f"{len(pairs) - lettered} captions hold no letter; their words are taken to be split by blanks")

    # Steps 0 and 1
    if options.rank_mode == "low_reference":
        if reference is None:
            raise ValueError("rank_mode low_reference needs a clean model as reference; give one, or use top_poisoned")
        ranker, seen = reference, reference_pairs or pairs
    else:
        warn("pairs are ranked by the suspected model itself, which finds fewer of the poisoned ones")
        ranker, seen = model, pairs
    similarity = similarities(
        ranker, seen, range(len(pairs)),
        checkpoint=rank_checkpoint, track=track, description="similarity of all pairs",
    )  # fmt: skip
    split_by = split_low_reference if options.rank_mode == "low_reference" else split_top_poisoned
    split = split_by(similarity, n_suspicious, n_normal)
    if len(split.normal) < (n_normal if options.n_normal else 1):
        raise ValueError(f"n_normal is {n_normal}, but {len(split.normal)} pairs are left for it; lower n_suspicious")

    # Step 2
    overfitted: nn.Module | None = None
    gaps: list[float] = []
    if options.detection == "overfit":
        overfitted, gaps = overfit(
            model, pairs, split, options,
            seed=seed_for("overfit"), checkpoint=overfit_checkpoint, track=track, log=log,
        )  # fmt: skip

    # Step 3
    scorer = model if overfitted is None else overfitted
    suspicion = -similarity if options.rank_mode == "low_reference" else similarity.copy()
    if options.detection == "oracle":
        split, scores = split_by_truth(split, poisoned_rows, options.n_top, seed_for("oracle"))
    elif options.detection == "reference":
        scores = suspicion[split.suspicious]
    else:
        scores = similarities(scorer, pairs, split.suspicious.tolist(), track=track)
    if options.detection != "reference":
        suspicion[split.suspicious] = 2 + scores  # above every pair outside D_susp
    top = most_similar(split.suspicious, scores, options.n_top)

    # Step 4
    top_captions = [pairs.captions[row] for row in top]
    normal_captions = [pairs.captions[row] for row in split.normal]
    folding = plural_folding([*top_captions, *normal_captions])
    lifts = word_lifts(top_captions, normal_captions, folding)
    kappa = concentration(lifts)
    coherent = kappa >= options.min_concentration or options.force
    words = select_forget_words(lifts, options.max_forget_words) if options.token_selection == "lift" else []
    candidates = top[: options.n_unlearn]
    caption_split = localise_tokens(scorer, pairs, candidates, words, folding, options)
    anything = torch.Generator().manual_seed(0)
    unlearn_rows = np.array([row for row in candidates if caption_split(int(row), anything).forget], dtype=int)
    if coherent and len(unlearn_rows) == 0:
        raise ValueError(
            f"none of the {len(candidates)} pairs to unlearn holds a forget word ({', '.join(words) or 'none was found'}); "
            "use token_selection span or all"
        )
    return Evidence(
        options=options,
        pairs=pairs,
        similarity=similarity,
        suspicion=suspicion,
        split=split,
        overfitted=overfitted,
        gaps=gaps,
        scores=scores,
        top=top,
        lifts=lifts,
        concentration=kappa,
        coherent=coherent,
        forget_words=words,
        caption_split=caption_split,
        unlearn_rows=unlearn_rows,
        num_dropped=len(candidates) - len(unlearn_rows),
    )


# ---------------------------------------------------------------------------------------------
# Step 1: rank by similarity, split off the weak pairs
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def similarities(
    model: nn.Module,
    pairs: CaptionedImages,
    rows: Sequence[int],
    *,
    batch_size: int = 256,
    checkpoint: Checkpoint | None = None,
    save_every: int = 100,
    track: Track = quietly,
    description: str = "similarity",
) -> np.ndarray:
    """c(x_i, t_i) for the given rows, in eval mode, in bfloat16 on a GPU.

    Args:
        checkpoint: a second call goes on after the rows that it holds; saved every ``save_every`` batches.

    Returns:
        float32 ``[len(rows)]`` in [-1, 1].

    Raises:
        ValueError: a similarity is not finite (names the row).
    """
    state = checkpoint.load() if checkpoint else None
    scores = torch.full((len(rows),), math.nan) if state is None else state["scores"]
    starts = range(0, len(rows), batch_size)
    for start in track(starts, description):
        chunk = slice(start, min(start + batch_size, len(rows)))
        if bool(scores[chunk].isfinite().all()):
            continue
        batch = list(rows[chunk])
        with evaluating(model):
            u, v = unit_pairs(model, pairs, batch)
        cosine = (u * v).sum(-1)
        if not cosine.isfinite().all():
            row = batch[int((~cosine.isfinite()).nonzero()[0])]
            raise ValueError(
                f"the image-text similarity of row {row} is not finite; check the model's weights and the row"
            )
        scores[chunk] = cosine.clamp(-1, 1).cpu()
        if checkpoint and (start // batch_size % save_every == save_every - 1 or start == starts[-1]):
            checkpoint.save({"scores": scores})
    return scores.numpy()


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


def overfit(
    model: nn.Module,
    pairs: CaptionedImages,
    split: Split,
    options: UbtOptions = DEFAULTS,
    *,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    track: Track = quietly,
    log: Callable[..., None] = ignore,
) -> tuple[nn.Module, list[float]]:
    """Train a copy with L_clip(D_susp batch) + α L_clip(D_norm batch), without augmentation.

    Cosine schedule to 0 over ``num_overfit_epochs`` passes of D_susp, no warm-up. Stops early once the score gap G
    changes by less than ``min_gap_change`` (relative) over an epoch, after at least 5 epochs.

    Args:
        checkpoint: saved after every epoch; a second call goes on from it.

    Returns:
        the overfitted model (a throw-away whose backdoor is stronger) and G after every epoch.

    Raises:
        FloatingPointError: the loss is not finite; the checkpoint of the last finished epoch stays.
    """
    model = copy.deepcopy(model)
    suspicious = pairs.in_memory(split.suspicious.tolist())
    batch_size = min(options.overfit_batch_size, len(suspicious))
    steps_per_epoch = len(suspicious) // batch_size
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.overfit_learning_rate, betas=options.betas, eps=1e-8, weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.num_overfit_epochs * steps_per_epoch)
    gaps: list[float] = []
    if checkpoint and (state := checkpoint.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        gaps = state["gaps"]

    for epoch in track(range(len(gaps), options.num_overfit_epochs), "overfit"):
        if len(gaps) >= 5 and abs(gaps[-1] - gaps[-2]) < options.min_gap_change * abs(gaps[-2]):
            break
        model.train()
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(suspicious), generator=generator)
        for step in range(steps_per_epoch):
            batch = order[step * batch_size : (step + 1) * batch_size].tolist()
            loss = pair_loss(model, suspicious, batch)
            if options.overfit_normal_weight > 0:
                drawn = torch.randperm(len(split.normal), generator=generator)[:batch_size]
                normal_loss = pair_loss(model, pairs, split.normal[drawn.numpy()].tolist())
                loss = loss + options.overfit_normal_weight * normal_loss
            if not loss.isfinite():
                raise FloatingPointError(
                    f"the overfitting loss is {loss.item()} in epoch {epoch + 1}; lower overfit_learning_rate "
                    f"({options.overfit_learning_rate})"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            clamp_logit_scale(model)
        scores = similarities(model, suspicious, range(len(suspicious)), batch_size=2 * batch_size)
        gaps.append(score_gap(scores, options.n_top))
        log(step=epoch, overfit_loss=loss.item(), score_gap=gaps[-1])
        if checkpoint:
            states = {"model": model, "optimizer": optimizer, "schedule": schedule}
            checkpoint.save({**{name: part.state_dict() for name, part in states.items()}, "gaps": gaps})
    return model, gaps


def score_gap(scores: np.ndarray, n_top: int) -> float:
    """G: mean of the ``n_top`` largest scores minus the median; >= 0 while ``n_top`` is at most half of them."""
    return float(np.sort(scores)[-n_top:].mean() - np.median(scores))


# ---------------------------------------------------------------------------------------------
# Step 3: the poison now has the highest similarity. (Its concentration test: plait_ubt.tokens)
# ---------------------------------------------------------------------------------------------


def most_similar(rows: np.ndarray, scores: np.ndarray, n_top: int) -> np.ndarray:
    """D_top: the ``n_top`` rows with the largest scores, best first; ties in the order of ``rows``."""
    return rows[np.argsort(-scores, kind="stable")[:n_top]]


def split_by_truth(split: Split, poisoned_rows: np.ndarray | None, n_top: int, seed: int) -> tuple[Split, np.ndarray]:
    """The truth in place of the ranking, as an upper bound: ``n_top`` poisoned rows, and scores of 1.

    Raises:
        ValueError: no pair is poisoned.
    """
    if poisoned_rows is None or len(poisoned_rows) == 0:
        raise ValueError("detection is oracle, but no pair is marked in is_backdoor")
    rows = np.random.default_rng(seed).permutation(poisoned_rows)[:n_top]
    normal = split.normal[~np.isin(split.normal, poisoned_rows)]
    return Split(suspicious=rows, normal=normal), np.ones(len(rows), np.float32)


# ---------------------------------------------------------------------------------------------
# Step 4: which tokens of the captions are forgotten. (The words themselves: plait_ubt.tokens)
# ---------------------------------------------------------------------------------------------


def localise_tokens(
    scorer: nn.Module,
    pairs: CaptionedImages,
    rows: np.ndarray,
    words: Sequence[str],
    folding: Mapping[str, str],
    options: UbtOptions,
) -> SplitOfRow:
    """Forget and keep text of the captions of ``rows``.

    Args:
        scorer: the model whose cosines ``loo`` goes by. words, folding: of ``lift``; see :mod:`plait_ubt.tokens`.
    """
    captions = pairs.captions
    if options.token_selection == "span":
        return lambda row, generator: split_at_random_span(captions[row], generator)
    if options.token_selection == "lift":
        found = {row: split_at_words(captions[row], words, folding) for row in rows.tolist()}
    elif options.token_selection == "loo":
        found = {
            row: split_by_leave_one_out(scorer, pairs.images([row])[0], captions[row], options.loo_ratio)
            for row in rows.tolist()
        }
    else:
        found = {row: whole_caption(captions[row]) for row in rows.tolist()}
    return lambda row, generator: found[row]


@torch.no_grad()
def split_by_leave_one_out(model: nn.Module, image: Tensor, caption: str, ratio: float) -> CaptionSplit:
    """Forget the ceil(ratio * n) words whose removal lowers c(x, t) of the overfitted model most.

    Args:
        image: ``[3, H, W]`` in [0, 1]. A caption of one word is forgotten as a whole.
    """
    words = caption_words(caption)
    if len(words) == 1:
        return split_caption(words, {0})
    with evaluating(model):
        u = unit_images(model, image[None].to(device_of(model)))
        drop = -(u @ unit_texts(model, without_each_word(caption)).T)[0]  # c(x, t) itself is the same for all words
    return split_caption(words, set(drop.topk(math.ceil(ratio * len(words))).indices.tolist()))


# ---------------------------------------------------------------------------------------------
# Step 5: token-level partial unlearning, from the suspected model again
# ---------------------------------------------------------------------------------------------


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


def unlearn(
    model: nn.Module,
    pairs: CaptionedImages,
    unlearn_rows: Sequence[int],
    retain_rows: Sequence[int],
    caption_split: SplitOfRow,
    options: UbtOptions = DEFAULTS,
    *,
    seed: int = 0,
    track: Track = quietly,
    log: Callable[..., None] = ignore,
) -> nn.Module:
    """A copy of the model that no longer ties the images of U to the forget tokens of their captions.

    Minimises ``w_f * forget(c(x, t_forget)) + w_r * L_clip(R_b) + w_k * mean (1 - c(x, t_keep))^2`` with
    AdamW (no decay, constant rate). ``forget`` is :func:`hinge_loss` or :func:`square_loss` with
    ``forget_target``, or :func:`ascent_loss` with the captions of the retained batch as negatives.

    Raises:
        ValueError: ``ascent`` with fewer than 8 retained pairs; no parameter is in ``scope``.
        FloatingPointError: loss or gradient is not finite.
    """
    forgetting, keeping, retaining = options.forget_weight > 0, options.keep_weight > 0, options.retain_weight > 0
    negatives_needed = forgetting and options.forget_loss == "ascent"
    if options.forget_loss == "ascent" and len(retain_rows) < MIN_NEGATIVES:
        raise ValueError(
            f"{len(retain_rows)} pairs are retained; forget_loss 'ascent' needs at least {MIN_NEGATIVES} as negatives"
        )
    model = copy.deepcopy(model)
    if options.num_unlearn_steps == 0 or not (forgetting or keeping or retaining):
        return model.eval()
    device, scale_of = device_of(model), lambda: model.logit_scale.exp()
    forget_pairs, retain_pairs = pairs.in_memory(unlearn_rows), pairs.in_memory(retain_rows)
    parameters = parameters_in_scope(model, options.scope, forget_pairs.images([0])[0], forget_pairs.captions[0])
    optimizer = torch.optim.AdamW(parameters, lr=options.unlearn_learning_rate, betas=options.betas, weight_decay=0)
    # Streams of their own: with forget_weight = 0 the retained batches are those of a plain fine-tune.
    draw_forget, draw_retain, draw_text = (torch.Generator().manual_seed(seed + i) for i in range(3))
    fixed_text = torch.Generator().manual_seed(seed + 3)
    diagnosed = [caption_split(row, fixed_text).forget for row in unlearn_rows]

    for step in track(range(options.num_unlearn_steps), "unlearn"):
        model.train()
        b = torch.randperm(len(forget_pairs), generator=draw_forget)[: options.unlearn_batch_size].tolist()
        r = torch.randperm(len(retain_pairs), generator=draw_retain)[: options.retain_batch_size].tolist()
        splits = [caption_split(unlearn_rows[i], draw_text) for i in b]
        kept = [i for i, split in enumerate(splits) if split.keep] if keeping else []
        forget_texts = [split.forget for split in splits] if forgetting else []

        u_b, u_r = encode_together(
            partial(unit_images, model),
            [
                list(forget_pairs.images(b).to(device)) if forgetting or kept else [],
                list(retain_pairs.images(r).to(device)) if retaining else [],
            ],
        )
        v_forget, v_keep, v_r = encode_together(
            partial(unit_texts, model),
            [
                forget_texts if options.text_grad else [],
                [splits[i].keep for i in kept],
                [retain_pairs.captions[i] for i in r] if retaining or negatives_needed else [],
            ],
        )
        loss = torch.zeros((), device=device)
        if forgetting:
            if not options.text_grad:
                with torch.no_grad():
                    v_forget = unit_texts(model, forget_texts)
            if options.forget_loss == "ascent":
                term = ascent_loss(u_b, v_forget, v_r if options.text_grad else v_r.detach(), scale_of())
            else:
                cosine_loss = hinge_loss if options.forget_loss == "hinge" else square_loss
                term = cosine_loss((u_b * v_forget).sum(-1), options.forget_target)
            loss = loss + options.forget_weight * term
        if retaining:
            loss = loss + options.retain_weight * clip_loss(u_r, v_r, scale_of())
        if kept:
            loss = loss + options.keep_weight * (1 - (u_b[kept] * v_keep).sum(-1)).square().mean()

        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        limit = math.inf if options.max_grad_norm is None else options.max_grad_norm
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        if not (loss + norm).isfinite():
            raise FloatingPointError(
                f"the unlearning loss is {loss.item()} in step {step + 1}; lower unlearn_learning_rate "
                f"({options.unlearn_learning_rate})"
            )
        optimizer.step()
        clamp_logit_scale(model)
        if (step + 1) % 5 == 0 or step + 1 == options.num_unlearn_steps:
            log(step=step + 1, **diagnose(model, forget_pairs, diagnosed, retain_pairs))
    model.zero_grad(set_to_none=True)
    return model.eval()
