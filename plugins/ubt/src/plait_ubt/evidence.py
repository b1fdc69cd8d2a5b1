"""What UBT finds in Steps 1 to 4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from plait_ubt.embeddings import CaptionedImages
from plait_ubt.options import UbtOptions
from plait_ubt.tokens import CaptionSplit, WordLift

SplitOfRow = Callable[[int, torch.Generator], CaptionSplit]
"""(row number, generator) → forget and keep text of its caption; asked in every step, so it may draw."""


@dataclass(frozen=True)
class Split:
    """Row numbers: ``suspicious`` from most to least suspicious, ``normal`` disjoint from it."""

    suspicious: np.ndarray
    normal: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The result of Steps 1 to 4.

    Attributes:
        similarity: float32 [N], c(x, t) under the model that made the first split.
        suspicion: float32 [N], larger is more suspicious; pairs outside D_susp come last.
        scores: q of ``split.suspicious``. gaps: the score gap G after every epoch of overfitting.
        top, unlearn_rows: row numbers of D_top and U, most suspicious first.
        num_dropped: rows of U left out because they hold no forget word.
        concentration: κ. coherent: whether there is something to unlearn.
        overfitted: the overfitted model, whose backdoor is stronger; None where Step 2 was left out.
    """

    options: UbtOptions
    pairs: CaptionedImages
    similarity: np.ndarray
    suspicion: np.ndarray
    split: Split
    overfitted: nn.Module | None
    gaps: list[float]
    scores: np.ndarray
    top: np.ndarray
    lifts: Mapping[str, WordLift]
    concentration: float
    coherent: bool
    forget_words: list[str]
    caption_split: SplitOfRow
    unlearn_rows: np.ndarray
    num_dropped: int
