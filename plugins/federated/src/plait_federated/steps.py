"""What a client does with one mini-batch: the update rules of local training.

Every rule works on one client ``[P]`` and on a stack of clients ``[k, P]`` alike, so norms run over the
last dimension. ``gradient(w)`` is the gradient of the mean loss of the current batch at w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Gradient = Callable[[Tensor], Tensor]


@dataclass
class Local:
    """One local training: what stays constant in it, and the velocity of rules with momentum.

    Attributes:
        start: parameters at its begin, the centre of proximal terms.
        offset: added to every gradient (the control variates of SCAFFOLD).
        max_grad_norm: threshold of the global-norm clip; ``None`` does not clip.
    """

    start: Tensor
    learning_rate: float
    weight_decay: float
    max_grad_norm: float | None
    offset: Tensor | None = None
    velocity: Tensor | None = None


LocalStep = Callable[[Tensor, Gradient, Local], Tensor]


def clip(g: Tensor, max_norm: float | None) -> Tensor:
    """g · min(1, max_norm / (‖g‖₂ + 1e-6)), one norm over all parameters of a client."""
    if max_norm is None:
        return g
    norm: Tensor = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
    return g * (max_norm / (norm + 1e-6)).clamp(max=1)


def sgd_step(w: Tensor, gradient: Gradient, local: Local) -> Tensor:
    """Plain SGD: clip the gradient, then add the weight decay."""
    return w - local.learning_rate * (clip(gradient(w), local.max_grad_norm) + local.weight_decay * w)


def momentum_step(w: Tensor, gradient: Gradient, local: Local, *, momentum: float) -> Tensor:
    """Heavy ball: v ← momentum·v + g, w ← w − lr·v; v starts at 0 in every round."""
    g = clip(gradient(w), local.max_grad_norm) + local.weight_decay * w
    local.velocity = g if local.velocity is None else momentum * local.velocity + g
    return w - local.learning_rate * local.velocity


def sam_step(w: Tensor, gradient: Gradient, local: Local, *, rho: float) -> Tensor:
    """Sharpness-aware: the gradient of the same batch at w + rho·g/‖g‖."""
    g = gradient(w)
    perturbation = rho * g / (torch.linalg.vector_norm(g, dim=-1, keepdim=True) + 1e-7)
    g = clip(gradient(w + perturbation), local.max_grad_norm)
    return w - local.learning_rate * (g + local.weight_decay * w)


def prox_step(w: Tensor, gradient: Gradient, local: Local, *, prox_lambda: float) -> Tensor:
    """SGD on loss + (prox_lambda/2)·‖w − start‖², the whole gradient clipped."""
    g = clip(gradient(w) + prox_lambda * (w - local.start), local.max_grad_norm)
    return w - local.learning_rate * (g + local.weight_decay * w)


def check_prox(prox_lambda: float, learning_rate: float) -> None:
    """λ·lr < 1, or the proximal step overshoots its centre.

    Raises:
        ValueError: it is not, or λ is negative.
    """
    if not prox_lambda >= 0:
        raise ValueError(f"prox_lambda is {prox_lambda}; it must be 0 or more")
    if prox_lambda * learning_rate >= 1:
        raise ValueError(
            f"prox_lambda · learning_rate is {prox_lambda * learning_rate:g}; it must be below 1, lower either"
        )


def corrected_step(w: Tensor, gradient: Gradient, local: Local) -> Tensor:
    """SGD on gradient + offset: SCAFFOLD's correction c − c_i lies inside the clip."""
    g = gradient(w) if local.offset is None else gradient(w) + local.offset
    g = clip(g, local.max_grad_norm)
    return w - local.learning_rate * (g + local.weight_decay * w)
