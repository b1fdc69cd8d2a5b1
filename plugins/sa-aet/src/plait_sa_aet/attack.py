"""SA-AET and the attacks it is compared with, each as the order of its steps on one batch.

Jia et al., "Semantic-Aligned Adversarial Evolution Triangle for High-Transferability Vision-Language Attack",
TPAMI 47(10), 2025 (arXiv 2411.02669), which extends Gao et al., "Boosting Transferability in Vision-Language Attacks
via Diversification along the Intersection Region of Adversarial Trajectory", ECCV 2024 (arXiv 2403.12445): DRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plait_sa_aet import pgd
from plait_sa_aet.image_attack import caption_targets, image_attack
from plait_sa_aet.projection import SemanticProjection
from plait_sa_aet.source import Source
from plait_sa_aet.text_attack import WordAttackResult, WordChange, bert_attack, word_attack
from plait_sa_aet.word_candidates import WordCandidates


@dataclass(frozen=True)
class Batch:
    """B images with M captions.

    Attributes:
        images: float32 [B, 3, H, W] in [0, 1], at the source model's size.
        captions: M cleaned texts.
        txt2img: int64 [M] in [0, B), the image of each caption; every image owns at least one.
    """

    images: Tensor
    captions: Sequence[str]
    txt2img: Tensor


@dataclass(frozen=True)
class Words:
    """How captions are attacked: where candidates come from, and the options of :func:`word_attack`."""

    candidates: WordCandidates
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Adversarial:
    """What an attack made of a batch.

    Attributes:
        images: float32 [B, 3, H, W] in [0, 1], within epsilon of the clean ones, not rounded.
        captions: M texts.
        changes: the words that differ. unattackable: captions without any word to attack.
        trace: of every image step: losses of the views, chosen triple, losses of the candidates.
    """

    images: Tensor
    captions: list[str]
    changes: Sequence[WordChange] = ()
    unattackable: Sequence[int] = ()
    num_rejected: int = 0
    previous_images: Tensor | None = None
    trace: Sequence[Mapping[str, Any]] = ()


def sa_aet(
    source: Source,
    batch: Batch,
    rng: Any,
    *,
    projection: SemanticProjection | None,
    words: Words | None,
    ratios: Sequence[float] = (0.6, 0.2, 0.2),
    project_words: bool = False,
    image_options: Mapping[str, Any] | None = None,
) -> Adversarial:
    """Words, images, words again (SA-AET, Fig. 2).

    DRA is this without a projection and with ``image_options={"triangle": "full", "project_candidates": False}``;
    SGA (Lu et al., ICCV 2023) is it without a projection, with ``{"triangle": "none"}`` and ratios (0, 1, 0).

    Args:
        projection: of the captions' features in the image loss (Eq. 16, 17); None: features as they are.
        words: None leaves the captions as they are.
        ratios: weights of the clean, the final and the previous image in the last choice of words (Eq. 7).
        project_words: also project the references of the words.
        image_options: of :func:`~plait_sa_aet.image_attack.image_attack`.
    """
    project = projection.apply if projection is not None and project_words else None
    with torch.no_grad():
        clean = source.image_features(batch.images)
    away = list(batch.captions)
    if words is not None:
        away = _swapped(source, batch, words, [clean], [1.0], project).captions
    targets = caption_targets(source.text_features(away), batch.txt2img, len(batch.images), projection)
    found = image_attack(source, batch.images, targets, rng, **(image_options or {}))
    evolved = {"images": found.images, "previous_images": found.previous_images, "trace": found.trace}
    if words is None:
        return Adversarial(captions=list(batch.captions), **evolved)
    with torch.no_grad():
        references = [clean, source.image_features(found.images), source.image_features(found.previous_images)]
    # From the clean captions again: what the first round wrote only guided the images.
    return _with_words(_swapped(source, batch, words, references, ratios, project), **evolved)


def pgd_cos(source: Source, batch: Batch, rng: Any, *, image_options: Mapping[str, Any] | None = None) -> Adversarial:
    """Sign steps away from the clean captions, without triangle and rescaled views: the control of SA-AET."""
    return sa_aet(
        source,
        batch,
        rng,
        projection=None,
        words=None,
        image_options={**(image_options or {}), "triangle": "none", "views": _one_view},
    )


def pgd_kl(source: Source, batch: Batch, rng: Any, **options: Any) -> Adversarial:
    """PGD on the images alone, away from their own clean embedding (Co-Attack's image attack, Zhang et al., 2022)."""
    return Adversarial(images=pgd.pgd(source, batch.images, rng, **options), captions=list(batch.captions))


def bert(source: Source, batch: Batch, *, words: Words) -> Adversarial:
    """BERT-Attack on the captions alone (Li et al., EMNLP 2020)."""
    return _with_words(
        bert_attack(source, batch.captions, words.candidates, **words.options), images=batch.images.clone()
    )


def sep_attack(source: Source, batch: Batch, rng: Any, *, words: Words | None, **options: Any) -> Adversarial:
    """PGD on the images and BERT-Attack on the captions, neither knowing of the other."""
    images = pgd_kl(source, batch, rng, **options)
    if words is None:
        return images
    found = bert_attack(source, batch.captions, words.candidates, **words.options)
    return _with_words(found, images=images.images)


def co_attack(source: Source, batch: Batch, rng: Any, *, words: Words | None, **options: Any) -> Adversarial:
    """Captions by BERT-Attack, then images away from themselves and from those captions (Zhang et al., MM 2022)."""
    found = None if words is None else bert_attack(source, batch.captions, words.candidates, **words.options)
    captions = list(batch.captions) if found is None else found.captions
    images = pgd.co_attack_images(source, batch.images, captions, batch.txt2img, rng, **options)
    return Adversarial(images=images, captions=captions) if found is None else _with_words(found, images=images)


def _one_view(images: Tensor, rng: Any) -> list[Tensor]:
    return [images]


def _swapped(
    source: Source, batch: Batch, words: Words, features: Sequence[Tensor], weights: Sequence[float], project: Any
) -> WordAttackResult:
    owners = [reference[batch.txt2img.to(reference.device)] for reference in features]
    return word_attack(
        source, batch.captions, words.candidates, owners, list(weights), project=project, **words.options
    )


def _with_words(found: WordAttackResult, **parts: Any) -> Adversarial:
    return Adversarial(
        captions=list(found.captions),
        changes=found.changes,
        unattackable=found.unattackable,
        num_rejected=found.num_rejected_multiword,
        **parts,
    )
