"""How flat a minimum is: the loss along the ascent direction and along random directions."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor, nn

from plait_fgsam.perturbing import differentiate, global_norm


@attrs.frozen
class SharpnessWalk:
    """Loss at distance ``radii`` [r] from the weights.

    Attributes:
        ascent: along the gradient, the direction of SAM's perturbation, [r].
        random: along directions drawn uniformly from the sphere, [directions, r].
    """

    radii: Tensor
    ascent: Tensor
    random: Tensor


def walk(
    model: nn.Module, loss: Callable[[], Tensor], radii: Tensor, num_directions: int, generator: torch.Generator
) -> SharpnessWalk:
    """Walk from the weights of ``model`` along both kinds of directions; the weights are restored, bit for bit.

    Args:
        loss: the scalar loss of ``model``, without randomness.
        radii: distances in weight space, [r].
    """
    weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    gradients = differentiate(loss(), weights)
    norm = global_norm(gradients, weights[0]).clamp_min(1e-12)
    ascent = [torch.zeros_like(p) if g is None else g / norm for p, g in zip(weights, gradients, strict=True)]
    random = [_drawn_direction(weights, generator) for _ in range(num_directions)]
    walked = torch.stack([_losses_along(weights, loss, direction, radii) for direction in (ascent, *random)])
    return SharpnessWalk(radii, walked[0], walked[1:])


def _drawn_direction(weights: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    drawn = [torch.randn(p.shape, generator=generator).to(p) for p in weights]
    norm = global_norm(drawn, weights[0])
    return [d / norm for d in drawn]


@torch.no_grad()
def _losses_along(weights: list[Tensor], loss: Callable[[], Tensor], direction: list[Tensor], radii: Tensor) -> Tensor:
    saved = [p.clone() for p in weights]
    found = []
    try:
        for radius in radii.tolist():
            torch._foreach_copy_(weights, saved)
            torch._foreach_add_(weights, direction, alpha=radius)
            found.append(loss().cpu())
    finally:
        torch._foreach_copy_(weights, saved)
    return torch.stack(found)
