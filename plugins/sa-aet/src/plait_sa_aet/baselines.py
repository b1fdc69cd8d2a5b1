"""The attacks that SA-AET is compared with, each on one batch.

===============  =====================================================================================================
:func:`dra`      SA-AET's predecessor: mixtures from the whole triangle, candidates not clipped, no projection
:func:`sga`      gradients over rescaled copies, no mixtures, no projection
:func:`pgd_cos`  as SGA with the images alone and no copies: the control of SA-AET
:func:`pgd`, :func:`bert_attack`, :func:`sep_attack`, :func:`co_attack`
                 Co-Attack and its parts: images, captions, both separately, both together
===============  =====================================================================================================

The image attacks of Co-Attack start from one-sided uniform noise and move the image's embedding away in
Kullback–Leibler divergence, the D coordinates read as logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plait_sa_aet.images import checked_images
from plait_sa_aet.randomness import Randomness
from plait_sa_aet.sa_aet import Adversarial, Batch, Words, sa_aet
from plait_sa_aet.source import Source, frozen
from plait_sa_aet.text_attack import WordAttackResult, bert_words

# Raw image features [b, D] and which images of the batch these are → [b] losses.
Loss = Callable[[Tensor, Tensor], Tensor]


def dra(source: Source, batch: Batch, rng: Randomness, *, words: Words | None, **options: Any) -> Adversarial:
    """Diversification along the intersection region of the adversarial trajectory (Gao et al., ECCV 2024).

    Args:
        options: of :func:`~plait_sa_aet.sa_aet.sa_aet`, whose triangle, clipping and projection differ here.
    """
    own = {"corpus": None, "triangle": "full", "project_candidates": False}
    return sa_aet(source, batch, rng, words=words, **(own | options))


def sga(source: Source, batch: Batch, rng: Randomness, *, words: Words | None, **options: Any) -> Adversarial:
    """Set-level guidance (Lu et al., ICCV 2023): the last choice of words sees the final images alone.

    Args:
        options: of :func:`~plait_sa_aet.sa_aet.evolve_images`.
    """
    return sa_aet(source, batch, rng, corpus=None, words=words, ratios=(0.0, 1.0, 0.0), **options, triangle="none")


def pgd_cos(source: Source, batch: Batch, rng: Randomness, **options: Any) -> Adversarial:
    """Sign steps away from the clean captions, without triangle and rescaled views: the control of SA-AET.

    Args:
        options: of :func:`~plait_sa_aet.sa_aet.evolve_images`.
    """
    return sa_aet(source, batch, rng, corpus=None, words=None, **options, triangle="none", views=_one_view)


def pgd(source: Source, batch: Batch, rng: Randomness, **options: Any) -> Adversarial:
    """PGD on the images alone (Madry et al., ICLR 2018; as in Co-Attack); options of :func:`pgd_images`."""
    return Adversarial(images=pgd_images(source, batch.images, rng, **options), captions=list(batch.captions))


def bert_attack(source: Source, batch: Batch, rng: Randomness | None = None, *, words: Words) -> Adversarial:
    """BERT-Attack on the captions alone (Li et al., EMNLP 2020); it draws nothing."""
    return Adversarial.with_words(_bert(source, batch, words), images=batch.images.clone())


def sep_attack(source: Source, batch: Batch, rng: Randomness, *, words: Words | None, **options: Any) -> Adversarial:
    """PGD on the images and BERT-Attack on the captions, neither knowing of the other."""
    images = pgd(source, batch, rng, **options)
    return images if words is None else Adversarial.with_words(_bert(source, batch, words), images=images.images)


def co_attack(source: Source, batch: Batch, rng: Randomness, *, words: Words | None, **options: Any) -> Adversarial:
    """Captions by BERT-Attack, then images away from themselves and from those captions (Zhang et al., MM 2022)."""
    found = None if words is None else _bert(source, batch, words)
    captions = list(batch.captions) if found is None else found.captions
    images = co_attack_images(source, batch.images, captions, batch.txt2img, rng, **options)
    return (
        Adversarial(images=images, captions=captions) if found is None else Adversarial.with_words(found, images=images)
    )


def _bert(source: Source, batch: Batch, words: Words) -> WordAttackResult:
    return bert_words(source, batch.captions, words.candidates, **words.options)


def _one_view(images: Tensor, rng: Randomness) -> list[Tensor]:
    return [images]


def pgd_images(
    source: Source,
    images: Tensor,
    rng: Randomness,
    *,
    epsilon: float = 8 / 255,
    num_steps: int = 10,
    micro_batch: int | None = None,
) -> Tensor:
    """Away from the clean embedding: ascend KL(softmax e(v) ‖ softmax e(x)), e being un-normalised.

    Steps have size 1.25 ε / T.

    Args:
        images: v [B, 3, H, W] in [0, 1].
        epsilon: L∞ radius in [0, 1]. num_steps: T ≥ 1.
        micro_batch: most images in one pass through the encoder.

    Returns:
        float32 [B, 3, H, W].

    Raises:
        ValueError: images that are not floats in [0, 1], or an argument out of range.
        NotDifferentiableError: the source's features do not depend differentiably on the images.
    """
    v = checked_images(images).to(source.device)
    with frozen(source.model):
        clean = _clean_features(source, v, micro_batch)
        return _ascend(source, v, rng, lambda e, rows: kl(clean[rows], e), epsilon, num_steps, micro_batch)


def co_attack_images(
    source: Source,
    images: Tensor,
    adversarial_captions: Sequence[str],
    txt2img: Tensor | Sequence[int],
    rng: Randomness,
    *,
    epsilon: float = 8 / 255,
    num_steps: int = 10,
    text_weight: float = 3.0,
    micro_batch: int | None = None,
) -> Tensor:
    """As :func:`pgd_images`, and at the same time away from an adversarial caption.

    Ascends ``KL(softmax e(v) ‖ softmax e(x)) + text_weight · KL(softmax ê(t') ‖ softmax ê(x))``, hats for length 1.
    Co-Attack goes over (image, caption) pairs one by one and keeps the image of the last; pairs do not see each other,
    so only each image's last pair is computed.

    Args:
        adversarial_captions: M texts. txt2img: [M] in [0, B), the image of each.

    Raises:
        ValueError: as :func:`pgd_images`; txt2img of another length or out of range, or an image without a caption.
        NotDifferentiableError: as :func:`pgd_images`.
    """
    v = checked_images(images).to(source.device)
    owners = torch.as_tensor(txt2img).tolist()
    if len(owners) != len(adversarial_captions):
        raise ValueError(f"txt2img names {len(owners)} images for {len(adversarial_captions)} captions")
    last = dict(zip(owners, adversarial_captions, strict=True))
    if set(last) != set(range(len(v))):
        raise ValueError(f"txt2img names the images {sorted(last)}; it has to name each of 0 to {len(v) - 1}")
    with frozen(source.model):
        clean = _clean_features(source, v, micro_batch)
        captions = source.text_features([last[i] for i in range(len(v))])

        def loss(e: Tensor, rows: Tensor) -> Tensor:
            return kl(clean[rows], e) + text_weight * kl(captions[rows], F.normalize(e, dim=-1))

        return _ascend(source, v, rng, loss, epsilon, num_steps, micro_batch)


def kl(reference: Tensor, features: Tensor) -> Tensor:
    """KL(softmax reference ‖ softmax features) of rows [B, D] → [B], in nats."""
    return F.kl_div(features.log_softmax(dim=-1), reference.log_softmax(dim=-1), reduction="none", log_target=True).sum(
        dim=-1
    )


def _clean_features(source: Source, v: Tensor, micro_batch: int | None) -> Tensor:
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch {micro_batch}; it has to be at least 1")
    with torch.no_grad():
        return torch.cat([source.raw_image_features(part) for part in v.split(micro_batch or len(v))])


def _ascend(
    source: Source,
    v: Tensor,
    rng: Randomness,
    loss: Loss,
    epsilon: float,
    num_steps: int,
    micro_batch: int | None,
) -> Tensor:
    if not 0 <= epsilon <= 1 or num_steps < 1:
        raise ValueError(f"epsilon {epsilon} and num_steps {num_steps}; they have to lie in [0, 1] and be at least 1")
    step_size = 1.25 * epsilon / num_steps
    lower, upper = (v - epsilon).clamp(min=0), (v + epsilon).clamp(max=1)
    x = (v + rng.init(v.shape, 0, epsilon).to(v)).clamp(0, 1)
    for _ in range(num_steps):
        gradients = []
        for rows in torch.arange(len(v), device=v.device).split(micro_batch or len(v)):
            part = x[rows].requires_grad_()
            with torch.enable_grad():
                total = loss(source.raw_image_features(part), rows).sum()
            gradients += torch.autograd.grad(total, part)
        x = (x + step_size * torch.cat(gradients).sign()).clamp(lower, upper)
    return x
