"""Loss terms of the backdoor defences, on unit-norm embeddings ``[B, D]`` of images and texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def one_way_loss(rows: Tensor, columns: Tensor, scale: Tensor | float) -> Tensor:
    """Cross-entropy of each row against all columns, the matching column being the right one; mean over rows."""
    return F.cross_entropy(scale * rows @ columns.T, torch.arange(len(rows), device=rows.device))


def self_supervised_loss(
    images: Tensor, augmented_images: Tensor, texts: Tensor, augmented_texts: Tensor, scale: Tensor | float
) -> Tensor:
    """CleanCLIP's in-modal loss: each original against the augmented ones, in this direction only."""
    return (one_way_loss(images, augmented_images, scale) + one_way_loss(texts, augmented_texts, scale)) / 2


def square_unlearn_loss(images: Tensor, texts: Tensor, target: float) -> Tensor:
    """Mean of (c + ``target``)² over flagged pairs with cosine c.

    A target of 0 or 1 drives the pairs apart; −1 would pull them together.
    """
    return ((images * texts).sum(dim=1) + target).square().mean()


def embedding_shift(now: Tensor, before: Tensor, limit: float) -> Tensor:
    """PAR's d: mean squared distance to the embeddings of the frozen model; the constant 0 above ``limit``."""
    distance = (now - before).square().sum(dim=1).mean()
    return torch.where(distance > limit, torch.zeros_like(distance), distance)
