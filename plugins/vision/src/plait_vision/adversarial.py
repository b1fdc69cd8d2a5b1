"""Attacks on logits: FGSM (Goodfellow et al., ICLR 2015) and PGD (Madry et al., ICLR 2018), and budgets that hold in 8 bits.

Images are ``[N, 3, H, W]`` in [0, 1]; a classifier gives logits ``[N, C]``. Nothing here knows plait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait_vision.kinds import Loss, Norm


def fgsm(classifier: nn.Module, images: Tensor, classes: Tensor, epsilon: float, *, targeted: bool = False) -> Tensor:
    """x + ε·sign(∇ L(x, y)), or x − ε·sign(∇ L(x, target)) (eq. 1 of §4; Kurakin et al., 2017, for targets).

    Returns:
        Images of the same shape, in [0, 1], not rounded.

    Raises:
        ValueError: the logits have no gradient with respect to the images.
    """
    direction = loss_gradient(classifier, images, classes, "cross-entropy", targeted).sign()
    return (images + epsilon * direction).clamp(0, 1)


def pgd(
    classifier: nn.Module,
    images: Tensor,
    classes: Tensor,
    epsilon: float,
    *,
    norm: Norm = "linf",
    step_size: float,
    num_steps: int,
    noise: Tensor | None = None,
    loss: Loss = "cross-entropy",
    targeted: bool = False,
) -> Tensor:
    """x ← Π(x + α·sign(∇ L)), the projection onto the budget and onto [0, 1]; in L2 the gradient has length 1 (§2.1).

    Args:
        classes: int64 [N]: the right ones, which the attack leads away from, or those it leads to.
        noise: where to start, from the images; ``None``: at them.

    Returns:
        Images of the same shape, in [0, 1], not rounded.

    Raises:
        ValueError: the logits have no gradient with respect to the images.
    """
    changed = images if noise is None else (images + noise).clamp(0, 1)
    for _ in range(num_steps):
        gradient = loss_gradient(classifier, changed, classes, loss, targeted)
        if norm == "linf":
            moved = changed + step_size * gradient.sign() - images
            moved = moved.clamp(-epsilon, epsilon)
        else:
            moved = changed + step_size * gradient / lengths(gradient).clamp_min(1e-12) - images
            moved = moved * (epsilon / lengths(moved).clamp_min(1e-12)).clamp_max(1)
        changed = (images + moved).clamp(0, 1)
    return changed


def start_noise(images: Tensor, rows: Sequence[int], epsilon: float, norm: Norm, seed: int) -> Tensor:
    """A uniform draw from the budget for each row, whatever the batch it is in."""
    draws = []
    for row in rows:
        generator = torch.Generator().manual_seed((seed + 1_000_003 * row) % 2**63)
        if norm == "linf":
            draws.append(torch.rand(images.shape[1:], generator=generator) * 2 - 1)
        else:
            direction = torch.randn(images.shape[1:], generator=generator)
            radius = torch.rand((), generator=generator) ** (1 / direction.numel())
            draws.append(radius * direction / direction.norm())
    return epsilon * torch.stack(draws).to(images)


def lengths(change: Tensor) -> Tensor:
    """L2 norm of each image's change, ``[N, 1, 1, 1]``, in [0, 1] units."""
    return change.flatten(1).norm(dim=1)[:, None, None, None]


def to_eight_bits(changed: Tensor, levels: Tensor, epsilon: float | None, norm: Norm = "linf") -> Tensor:
    """Round to 8 bits so that the budget still holds.

    In L∞ the nearest level inside the budget is taken. In L2 the nearest levels are; where they leave the budget, those
    that rounding moved away from the image furthest go one level back, and no more of them than is needed.

    Args:
        changed: images in [0, 1].
        levels: the images before, uint8.
        epsilon: in [0, 1] units; ``None``: no budget.

    Returns:
        uint8, of the shape of ``levels``.
    """
    exact = changed.double() * 255 - levels.double()
    moved = exact.round()
    if epsilon is not None and norm == "linf":
        reach = int(epsilon * 255 + 1e-6)
        moved = moved.clamp(-reach, reach)
    elif epsilon is not None:
        exact = exact * (epsilon * 255 / lengths(exact).clamp_min(1e-12)).clamp_max(1)
        moved = _into_ball(exact.flatten(1), exact.flatten(1).round(), epsilon * 255).view_as(moved)
    return (levels.double() + moved).clamp(0, 255).to(torch.uint8)


def _into_ball(exact: Tensor, moved: Tensor, radius: float) -> Tensor:
    excess = moved.square().sum(1, keepdim=True) - radius**2
    overshoot = torch.where(moved == 0, -torch.inf, moved.abs() - exact.abs())
    order = overshoot.argsort(dim=1, descending=True, stable=True)
    gain = (2 * moved.abs() - 1).clamp_min(0).gather(1, order)  # of the squared length, by one level less
    back = (gain.cumsum(1) - gain < excess) & (gain > 0)
    return moved - moved.sign() * torch.zeros_like(moved).scatter(1, order, back.to(moved.dtype))


def loss_gradient(
    classifier: Callable[[Tensor], Tensor],
    images: Tensor,
    classes: Tensor,
    loss: Loss = "cross-entropy",
    targeted: bool = False,
) -> Tensor:
    """∇ of what an attack increases, with respect to the images: the loss, or minus the loss of a target.

    Raises:
        ValueError: there is none, or it is not finite.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = classifier(images)
        if not logits.requires_grad:
            raise ValueError(
                "the logits have no gradient with respect to the images, so no attack by gradients is possible"
            )
        if loss == "cross-entropy":
            value = F.cross_entropy(logits, classes, reduction="sum")
        else:
            own = logits.gather(1, classes[:, None]).squeeze(1)
            others = logits.scatter(1, classes[:, None], -torch.inf).amax(1)
            value = (others - own).sum()
        (gradient,) = torch.autograd.grad(-value if targeted else value, images, allow_unused=True)
    if gradient is None:
        raise ValueError("the logits do not depend on the images, so no attack by gradients is possible")
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError(
            "the gradient with respect to the images is not finite; the model's weights or outputs are not sound"
        )
    return gradient
