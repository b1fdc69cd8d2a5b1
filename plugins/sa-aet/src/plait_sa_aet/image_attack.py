"""The image attack of SA-AET, DRA and SGA: sign steps whose gradient is measured inside the evolution triangle.

Jia et al., TPAMI 2025 (arXiv 2411.02669), Eq. 5 and 6. The equations' text was not available; the order of steps is
that of the released code. One function holds the three attacks:

=======  ==========================================================================================
SA-AET   ``triangle="sub"``, targets from a projection
DRA      ``triangle="full"``, ``project_candidates=False``, targets without a projection
SGA      ``triangle="none"``, targets without a projection
PGD      ``triangle="none"``, ``views=ScaledViews(())``, targets of the clean captions
=======  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait_sa_aet.projection import SemanticProjection
from plait_sa_aet.randomness import Randomness
from plait_sa_aet.source import Source, frozen
from plait_sa_aet.triangle import LAWS, TRIANGLES
from plait_sa_aet.views import ScaledViews, Views


@dataclass(frozen=True)
class ImageAttackResult:
    """What the steps arrived at.

    Attributes:
        images: v_T, float32 [B, 3, H, W].
        previous_images: v_{T−1}, float32 [B, 3, H, W].
        trace: per step, as plain numbers: ``view_losses`` [V]; ``triples``, the chosen (current, clean, previous)
            weights, [1, 3] or [B, 3], none in the first step; ``mixture_losses`` and ``candidate_losses`` [K], means
            over the batch, none where there was nothing to choose.
    """

    images: Tensor
    previous_images: Tensor
    trace: list[dict[str, Any]]


def caption_targets(
    text_features: Tensor, txt2img: Tensor | Sequence[int], num_images: int, projection: SemanticProjection | None
) -> Tensor:
    """G [B, D]: per image, the sum of its captions' projected features, ``G_i = Σ_m P g_m``.

    Args:
        text_features: g [M, D], rows of length 1.
        txt2img: [M] in [0, B), the image of each caption.
        projection: P; None for the identity.

    Raises:
        ValueError: txt2img of another length or out of range, or an image without a caption (it would get noise only).
    """
    owner = torch.as_tensor(txt2img, device=text_features.device)
    if owner.shape != text_features.shape[:1]:
        raise ValueError(f"txt2img of shape {tuple(owner.shape)} for {len(text_features)} captions")
    outside = ((owner < 0) | (owner >= num_images)).nonzero().flatten().tolist()
    if outside:
        raise ValueError(
            f"txt2img[{outside[0]}] is {int(owner[outside[0]])}; it has to be the index of one of {num_images} images"
        )
    without = (torch.bincount(owner, minlength=num_images) == 0).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"images {without} have no caption; each needs at least one")
    features = text_features if projection is None else projection.apply(text_features)
    # float64: the order of an image's captions must not show.
    targets = torch.zeros(num_images, features.shape[1], dtype=torch.float64, device=features.device)
    return targets.index_add_(0, owner, features.double()).to(text_features.dtype)


def similarity_loss(image_features: Tensor, targets: Tensor) -> Tensor:
    """L = −(1/B) Σ_i ⟨E_I(x)_i, G_i⟩ of features and targets [B, D]; the attack increases it."""
    return -(image_features * targets).sum(dim=-1).mean()


def image_attack(
    source: Source,
    images: Tensor,
    targets: Tensor,
    rng: Randomness,
    *,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    num_steps: int = 10,
    num_samples: int = 5,
    triangle: Literal["sub", "full", "uniform", "uniform_sub", "none"] = "sub",
    project_candidates: bool = True,
    selection: Literal["batch", "image"] = "batch",
    views: Views = ScaledViews(),  # noqa: B008
    random_start: bool = True,
    micro_batch: int | None = None,
) -> ImageAttackResult:
    """Move images away from their targets within an L∞ ball.

    Costs ``V·B + (T−1)(2K+V)·B`` forward and ``V·B + (T−1)(K+V)·B`` backward passes of single images, with V views;
    without mixtures (``triangle="none"``) or with one there is nothing to choose, and K counts as 0.

    Args:
        images: v, clean images [B, 3, H, W] in [0, 1].
        targets: G [B, D] of :func:`caption_targets`.
        rng: start, triples and the noise of the views.
        epsilon: radius of the ball in [0, 1].
        step_size: α > 0. num_steps: T ≥ 1. num_samples: K ≥ 1 mixtures per step.
        triangle: law of the mixtures, see :mod:`plait_sa_aet.triangle`.
        project_candidates: clip candidates to the ball before they are compared.
        selection: ``"batch"`` takes the mixture that is best on average for all images, as the released code does, so
            an image's result depends on its batch; ``"image"`` chooses for each.
        views: whose losses are summed in a step, see :mod:`plait_sa_aet.views`.
        random_start: start from a uniform point of the ball, else from v.
        micro_batch: most images in one pass through the encoder; bounds the memory, not the result.

    Raises:
        ValueError: images that are not floats in [0, 1], targets of another shape, an argument out of range.
        NotDifferentiableError: the source's features do not depend differentiably on the images.
    """
    v = checked_images(images).to(source.device)
    G = targets.to(v)
    _check(v, G, epsilon, step_size, num_steps, num_samples, triangle, selection, micro_batch)
    lower, upper = (v - epsilon).clamp(min=0), (v + epsilon).clamp(max=1)

    x, h = v, None
    if random_start:
        x = (v + rng.init(v.shape, -epsilon, epsilon).to(v)).clamp(0, 1)
    trace = []
    with frozen(source.model):
        for _ in range(num_steps):
            z, step = x, {"triples": [], "mixture_losses": [], "candidate_losses": []}
            if h is not None and triangle != "none":
                count = 1 if selection == "batch" else len(v)
                # [K, 1 or B, 3]; all K drawn before any gradient
                triples = torch.stack([rng.triple(LAWS[triangle], count) for _ in range(num_samples)]).to(v)
                a, b, c = triples[..., None, None, None].unbind(dim=2)
                mixtures = a * x + b * v + c * h
                best = torch.zeros(count, dtype=torch.long, device=v.device)
                if num_samples > 1:  # Eq. 5: where does a step from x raise the loss most?
                    losses, gradients = _losses_and_gradients(source, mixtures, G, micro_batch)
                    candidates = x + step_size * gradients.sign_()
                    if project_candidates:
                        candidates = candidates.clamp(lower, upper)
                    values = _losses(source, candidates, G, micro_batch)
                    best = (values.mean(dim=1, keepdim=True) if selection == "batch" else values).argmax(dim=0)
                    step["mixture_losses"], step["candidate_losses"] = losses.mean(dim=1), values.mean(dim=1)
                z = mixtures[best, torch.arange(len(v), device=v.device)]
                step["triples"] = triples[best, torch.arange(count, device=v.device)]
            # Eq. 6: the gradient is that at z, the step starts from x
            step["view_losses"], gradient = _summed_over_views(source, z, G, views, rng, micro_batch)
            x, h = (x + step_size * gradient.sign()).clamp(lower, upper), x
            trace.append(step)
    return ImageAttackResult(x, h, [{name: _numbers(value) for name, value in step.items()} for step in trace])


def quantize(
    images: Tensor, clean: Tensor, epsilon: float, mode: Literal["round", "floor", "none"] = "round"
) -> Tensor:
    """Images as 8-bit files hold them, still within epsilon of the clean ones.

    Args:
        images, clean: [B, 3, H, W] in [0, 1].
        mode: to the nearest level, to the one below, or leave the images as they are.

    Returns:
        float32, multiples of 1/255 nearest to the rounded images that lie in the ball; with epsilon 0 the clean
        images themselves.

    Raises:
        ValueError: unknown mode, or a ball smaller than one 8-bit level.
    """
    if mode not in ("round", "floor", "none"):
        raise ValueError(f"quantize {mode!r}; allowed are round, floor and none")
    if mode == "none":
        return images
    if epsilon == 0:
        return clean.clone()
    slack = 1e-4  # of a level: float32 cannot hold k/255
    if not 255 * epsilon > 1 - slack:
        raise ValueError(f"epsilon {epsilon:.5f} is below one 8-bit level (1/255); give more, or quantize 'none'")
    levels, center = 255 * images.double(), 255 * clean.double()
    levels = levels.round() if mode == "round" else (levels + slack).floor()
    lower = (center - 255 * epsilon - slack).ceil().clamp(min=0)
    upper = (center + 255 * epsilon + slack).floor().clamp(max=255)
    return (levels.clamp(lower, upper) / 255).float()


def checked_images(images: Tensor) -> Tensor:
    """Images as float32.

    Raises:
        ValueError: integers, not [B, 3, H, W] with B ≥ 1, NaN, or values outside [0, 1]; names the image.
    """
    if not images.is_floating_point():
        raise ValueError(f"images of type {images.dtype}; give floats in [0, 1]")
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images of shape {tuple(images.shape)}; expected [B, 3, H, W] with at least one image")
    images = images.detach().float()
    wrong = (~((images >= 0) & (images <= 1))).flatten(1).any(dim=1).nonzero().flatten().tolist()  # NaN is in no range
    if wrong:
        image = images[wrong[0]]
        found = "NaN" if image.isnan().any() else f"values from {image.min():.3g} to {image.max():.3g}"
        raise ValueError(f"image {wrong[0]} of the batch has {found}; images have to lie in [0, 1]")
    return images


def _check(
    v: Tensor,
    G: Tensor,
    epsilon: float,
    step_size: float,
    num_steps: int,
    num_samples: int,
    triangle: str,
    selection: str,
    micro_batch: int | None,
) -> None:
    if G.ndim != 2 or len(G) != len(v) or not G.isfinite().all():
        raise ValueError(f"targets of shape {tuple(G.shape)}; expected finite [{len(v)}, D]")
    if not 0 <= epsilon <= 1 or not step_size > 0:
        raise ValueError(f"epsilon {epsilon} and step_size {step_size}; they have to lie in [0, 1] and above 0")
    if num_steps < 1 or num_samples < 1 or (micro_batch is not None and micro_batch < 1):
        raise ValueError(
            f"num_steps {num_steps}, num_samples {num_samples}, micro_batch {micro_batch}; each has to be at least 1"
        )
    if triangle not in TRIANGLES or selection not in ("batch", "image"):
        raise ValueError(
            f"triangle {triangle!r}, selection {selection!r}; allowed are {', '.join(TRIANGLES)}, and batch or image"
        )


def _losses(source: Source, stacks: Tensor, targets: Tensor, micro_batch: int | None) -> Tensor:
    """[K, B] losses of K stacks of images [K, B, 3, H, W]; forward only."""
    flat, repeated = stacks.flatten(0, 1), targets.repeat(len(stacks), 1)
    size = micro_batch or len(flat)
    with torch.no_grad():
        losses = [
            -(source.image_features(part) * target).sum(dim=-1)
            for part, target in zip(flat.split(size), repeated.split(size), strict=True)
        ]
    return torch.cat(losses).view(stacks.shape[:2])


def _losses_and_gradients(
    source: Source, stacks: Tensor, targets: Tensor, micro_batch: int | None
) -> tuple[Tensor, Tensor]:
    """[K, B] losses of K stacks of images [K, B, 3, H, W], and the gradient of each image's loss."""
    flat, repeated = stacks.detach().flatten(0, 1), targets.repeat(len(stacks), 1)
    size = micro_batch or len(flat)
    losses, gradients = [], []
    for part, target in zip(flat.split(size), repeated.split(size), strict=True):
        with torch.enable_grad():
            loss = -(source.image_features(part.requires_grad_()) * target).sum(dim=-1)
            gradients += torch.autograd.grad(loss.sum(), part)
        losses.append(loss.detach())
    return torch.cat(losses).view(stacks.shape[:2]), torch.cat(gradients).view(stacks.shape)


def _summed_over_views(
    source: Source, z: Tensor, targets: Tensor, views: Views, rng: Randomness, micro_batch: int | None
) -> tuple[Tensor, Tensor]:
    """[V] losses of the views of z, and the gradient [B, 3, H, W] of their sum."""
    # In two stages, so that micro-batches bound what the encoder keeps for the backward pass.
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        seen = views(z, rng)
        seen = seen if isinstance(seen, Tensor) else torch.stack(list(seen))
    losses, gradients = _losses_and_gradients(source, seen, targets, micro_batch)
    return losses.mean(dim=1), torch.autograd.grad(seen, z, gradients)[0]


def _numbers(value: Tensor | list[float]) -> list[Any]:
    return value.tolist() if isinstance(value, Tensor) else value
