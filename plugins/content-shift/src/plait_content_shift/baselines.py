"""What gated amalgamation is compared with, at equal cost: mean, concatenation, plain averages over noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean(buckets: Sequence[Tensor]) -> Tensor:
    """Weights 1/b. Of plain buckets with noise of their own it is averaging over noise (DIFT), the equal-cost rival."""
    return torch.stack(list(buckets)).mean(0)


def concatenation(buckets: Sequence[Tensor]) -> Tensor:
    """[B, b·C, …]."""
    return torch.cat(list(buckets), 1)
