"""Losses on image and text embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """[N, D] and [M, D] → [N, M] in float32, also under autocast: the scale magnifies rounding a hundredfold."""
    with torch.autocast(images.device.type, enabled=False):
        return F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T


def clip_loss(images: Tensor, texts: Tensor, scale: Tensor | float, bias: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy over the cosines of a batch (Radford et al., ICML 2021, figure 3).

    ``½ [CE(s·U Vᵀ, y) + CE(s·V Uᵀ, y)]`` with ``y = 0, …, B−1``.

    Args:
        images, texts: [B, D], matching row by row; normalised here.
        scale: s, the factor of the cosines (not its logarithm).
        bias: added to the logits; without influence on this loss but for rounding.
    """
    logits = scale * cosines(images, texts)
    if bias is not None:
        logits = logits + bias
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(images: Tensor, texts: Tensor, scale: Tensor | float, bias: Tensor) -> Tensor:
    """SigLIP's loss: every pair of the batch is a binary decision (Zhai et al., ICCV 2023, equation 1).

    ``−(1/B) Σᵢⱼ log σ(zᵢⱼ (s·uᵢᵀvⱼ + b))`` with ``z = 1`` on the diagonal and −1 elsewhere.
    """
    logits = scale * cosines(images, texts) + bias
    sign = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)
