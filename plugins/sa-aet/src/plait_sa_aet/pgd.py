"""The image attacks of Co-Attack (Zhang et al., MM 2022), compared with in the SA-AET paper.

Both start from one-sided uniform noise and move the image's embedding away in Kullback–Leibler divergence, the D
coordinates read as logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from plait_sa_aet.image_attack import checked_images
from plait_sa_aet.randomness import Randomness
from plait_sa_aet.source import Source, frozen

# Raw image features [b, D] and which images of the batch these are → [b] losses.
Loss = Callable[[Tensor, Tensor], Tensor]


def pgd(
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
    """As :func:`pgd`, and at the same time away from an adversarial caption.

    Ascends ``KL(softmax e(v) ‖ softmax e(x)) + text_weight · KL(softmax ê(t') ‖ softmax ê(x))``, hats for length 1.
    Co-Attack goes over (image, caption) pairs one by one and keeps the image of the last; pairs do not see each other,
    so only each image's last pair is computed.

    Args:
        adversarial_captions: M texts. txt2img: [M] in [0, B), the image of each.

    Raises:
        ValueError: as :func:`pgd`; txt2img of another length or out of range, or an image without a caption.
        NotDifferentiableError: as :func:`pgd`.
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
