"""Magnitude pruning of task vectors (E-WEMoE): each keeps its largest entries, unscaled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def magnitude_threshold(tensors: Sequence[Tensor], ratio: float) -> Tensor:
    """The order statistic that an entry must exceed in magnitude to be kept, over all tensors together.

    It selects the entries that lie strictly above the linearly interpolated ``ratio``-quantile of |τ|:
    between two neighbouring order statistics no entry can lie, so the lower one decides. The rank
    ratio · (n - 1) is computed in float32, as ``torch.quantile`` did for the paper; in float64, and in
    releases of torch that round it otherwise (2.14 does), it can differ by one.

    Raises:
        ValueError: ``ratio`` outside [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"prune_ratio is {ratio}; allowed is [0, 1], or none to prune nothing")
    magnitudes = torch.cat([tensor.abs().flatten() for tensor in tensors])
    rank_dtype = torch.float64 if magnitudes.dtype == torch.float64 else torch.float32
    rank = math.floor((torch.tensor(ratio, dtype=rank_dtype) * (magnitudes.numel() - 1)).item())
    return magnitudes.kthvalue(rank + 1).values


def prune(tensor: Tensor, ratio: float | None) -> Tensor:
    """τ · 1[|τ| > quantile]: ratio 1 keeps nothing, ratio 0 drops the smallest entry, ``None`` nothing."""
    return tensor if ratio is None else prune_together([tensor], ratio)[0]


def prune_together(tensors: Sequence[Tensor], ratio: float | None) -> list[Tensor]:
    """Prune tensors by one common threshold."""
    if ratio is None:
        return list(tensors)
    threshold = magnitude_threshold(tensors, ratio)
    return [keep_above(tensor, threshold) for tensor in tensors]


def keep_above(tensor: Tensor, threshold: Tensor) -> Tensor:
    """The entries above the threshold in magnitude, bit by bit as they were; 0 elsewhere."""
    return torch.where(tensor.abs() > threshold, tensor, 0)
