"""What can be set in UBT, under the symbols of its description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RankMode = Literal["low_reference", "top_poisoned"]
Detection = Literal["overfit", "suspected", "reference", "oracle"]
TokenSelection = Literal["lift", "loo", "span", "all"]
ForgetLoss = Literal["hinge", "square", "ascent"]
Scope = Literal["all", "visual", "text", "proj"]
MIN_NEGATIVES = 8
"""Retained pairs that ``ascent`` needs in a batch: with fewer of them all its texts would nearly coincide."""


@dataclass(frozen=True, kw_only=True)
class UbtOptions:
    """The settings of :func:`plait_ubt.ubt.ubt`; numbers of pairs, unless said otherwise.

    Attributes:
        rank_mode: Step 1 takes the pairs that are least similar to the reference model, or most similar to the suspect.
        n_suspicious: n_s, or below 1 a share of all pairs; None: max(2000, 0.4 %), at most a quarter.
        n_normal: n_n; None: half of all, at most 50 n_s.
        detection: what ranks in Step 3: the overfitted model; or, to ablate, the suspected model, the first split
            itself, or the truth.
        overfit_normal_weight: α; num_overfit_epochs: passes over the suspicious pairs; min_gap_change: overfitting ends
            once the score gap G changes by a smaller share in an epoch (0: never).
        n_top: k. min_concentration: κ below which nothing is unlearned, unless ``force``.
        n_unlearn: k_u. token_selection, max_forget_words, loo_ratio: how Step 4 finds the forget words.
        forget_weight, retain_weight, keep_weight: w_f, w_r, w_k. forget_target: m of ``hinge``, τ of ``square``.
        betas: of AdamW in both trainings.
        text_grad: whether the forget term moves the text tower. scope: the parameters that Step 5 may change.

    Raises:
        ValueError: settings that do not go together.
    """

    rank_mode: RankMode = "low_reference"
    n_suspicious: float | None = None
    n_normal: int | None = None
    detection: Detection = "overfit"
    overfit_normal_weight: float = 1.0
    num_overfit_epochs: int = 15
    overfit_learning_rate: float = 1e-5
    overfit_batch_size: int = 128
    min_gap_change: float = 0.01
    n_top: int = 64
    min_concentration: float = 1.0
    force: bool = False
    n_unlearn: int = 64
    token_selection: TokenSelection = "lift"
    max_forget_words: int = 3
    loo_ratio: float = 0.25
    forget_loss: ForgetLoss = "hinge"
    forget_weight: float = 4.0
    forget_target: float = 0.0
    retain_weight: float = 1.0
    keep_weight: float = 0.0
    n_retain: int = 512
    unlearn_batch_size: int = 64
    retain_batch_size: int = 64
    num_unlearn_steps: int = 20
    unlearn_learning_rate: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = 1.0
    text_grad: bool = True
    scope: Scope = "all"

    def __post_init__(self) -> None:
        if self.n_unlearn > self.n_top:
            raise ValueError(f"n_unlearn is {self.n_unlearn}; allowed is up to n_top, {self.n_top}")
        asked = self.n_suspicious
        if asked is not None and 0.5 < asked < 1:
            raise ValueError(f"n_suspicious is {asked}; allowed is a share up to 0.5 or a number of pairs")
        if asked is not None and asked >= 1 and asked != int(asked):
            raise ValueError(f"n_suspicious is {asked}; allowed is a share up to 0.5 or a whole number")
        if self.forget_loss == "square" and self.forget_target < 0:
            raise ValueError(
                f"forget_target is {self.forget_target}; the square loss would pull the pairs together below 0"
            )
        if self.forget_loss == "ascent" and self.retain_batch_size < MIN_NEGATIVES:
            raise ValueError(
                f"retain_batch_size is {self.retain_batch_size}; forget_loss 'ascent' needs at least {MIN_NEGATIVES}"
            )

    def sizes(self, num_pairs: int) -> tuple[int, int]:
        """n_s and n_n for so many pairs.

        Raises:
            ValueError: there are too few pairs.
        """
        asked = self.n_suspicious
        if asked is None and num_pairs < 1000:
            raise ValueError(
                f"the data hold {num_pairs} pairs; give n_suspicious a value (the default is for 1,000 or more)"
            )
        if asked is None:
            n_suspicious = min(max(2000, int(0.004 * num_pairs)), num_pairs // 4)
        else:
            n_suspicious = int(asked * num_pairs) if asked < 1 else int(asked)
        n_normal = self.n_normal or min(num_pairs // 2, 50 * n_suspicious, num_pairs - n_suspicious)
        if n_suspicious + n_normal > num_pairs or n_normal < 1:
            raise ValueError(
                f"n_suspicious is {n_suspicious} and n_normal {n_normal}; together they may be at most the "
                f"{num_pairs} pairs of the data"
            )
        if self.n_top > n_suspicious:
            raise ValueError(f"n_top is {self.n_top}; allowed is up to n_suspicious, {n_suspicious}")
        batch_size = min(self.overfit_batch_size, n_suspicious)
        if self.detection == "overfit" and self.overfit_normal_weight > 0 and n_normal < batch_size:
            raise ValueError(f"n_normal is {n_normal}; with overfit_normal_weight it must fill a batch of {batch_size}")
        return n_suspicious, n_normal
