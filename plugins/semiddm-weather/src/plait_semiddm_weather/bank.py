"""A bank of pseudo-labels that only gets better: quality screening for any semi-supervised method (sections 2.7, 2.8).

For every unlabelled image the bank keeps the best result seen so far and its score. A candidate replaces it where all
gates are passed. Nothing here knows how candidates are made or scored::

    bank = Bank.of(restored, score(restored), scorer="ranker 1f3a…")
    accepted, said = passes(Gates(), score(candidates), score(students), bank.best_score[keys], distance)
    bank.replace(keys, candidates, score(candidates), accepted)
    labels = bank.get(keys)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from plait_semiddm_weather.wavelets import SubBands

ContentGate = Literal["l1", "low-band", "ssim"]


@dataclass
class Bank:
    """Pseudo-labels of N images and their scores.

    Attributes:
        images: uint8 ``[N, 3, H, W]``.
        best_score: float64 ``[N]``; never falls.
        scorer: which scorer, fitted how, gave the scores; others cannot be compared with them.
    """

    images: Tensor
    best_score: Tensor
    scorer: str

    @classmethod
    def of(cls, images: Tensor, scores: Tensor, scorer: str) -> Bank:
        """A first bank from float images ``[N, 3, H, W]`` in [0, 1] and their scores ``[N]``."""
        return cls(to_levels(images), scores.detach().cpu().double(), scorer)

    def __len__(self) -> int:
        return len(self.images)

    def get(self, keys: Tensor) -> Tensor:
        """The pseudo-labels of ``keys``, float in [0, 1]."""
        return self.images[keys].float() / 255

    def rescore(self, score: Callable[[Tensor], Tensor], scorer: str, batch_size: int = 64) -> None:
        """Scores by another scorer: the stored images stay."""
        parts = [score(self.get(keys)).detach().cpu().double() for keys in torch.arange(len(self)).split(batch_size)]
        self.best_score, self.scorer = torch.cat(parts), scorer

    def replace(self, keys: Tensor, candidates: Tensor, scores: Tensor, accepted: Tensor) -> None:
        """Store the accepted candidates; all other rows stay to the bit. Of a key's several, the one with the best score."""
        scores, accepted = scores.detach().cpu().double(), accepted.cpu()
        ascending = [place for place in scores.argsort(stable=True).tolist() if accepted[place]]
        best = {int(keys[place]): place for place in ascending}
        if best:
            rows, places = list(best), list(best.values())
            self.images[rows] = to_levels(candidates[places])
            self.best_score[rows] = scores[places]

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {"images": self.images, "best_score": self.best_score, "scorer": self.scorer}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Bank:
        """The bank that :meth:`state_dict` describes."""
        return cls(state["images"].clone(), state["best_score"].clone(), state["scorer"])


@dataclass(frozen=True)
class Gates:
    """Which conditions a candidate has to meet, all strictly.

    Attributes:
        beats_bank: scores above the best result stored.
        beats_student: scores above the student's own result.
        content: distance to the student's result that has to be below ``threshold``, or ``None``.
    """

    beats_bank: bool = True
    beats_student: bool = True
    content: ContentGate | None = "l1"
    threshold: float = 0.15


def passes(
    gates: Gates, teacher: Tensor, student: Tensor, best: Tensor, distance: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Which candidates pass, ``[B]`` bool, and what each gate says alone. A score that is NaN never passes.

    Args:
        teacher, student, best: scores ``[B]`` of the candidates, the student's results, the bank.
        distance: ``[B]`` between candidate and student's result.
    """
    said = {}
    if gates.beats_bank:
        said["bank"] = teacher > best
    if gates.beats_student:
        said["student"] = teacher > student
    if gates.content is not None:
        said["content"] = distance < gates.threshold
    ok = torch.isfinite(teacher)
    for one in said.values():
        ok = ok & one
    return ok, said


def content_distance(kind: ContentGate, candidate: Tensor, other: Tensor) -> Tensor:
    """``[B]``, 0 for equal images: mean L1; L1 of the LL band at the images' scale; or 1 − SSIM (7 × 7, uniform)."""
    if kind == "l1":
        return (candidate - other).abs().flatten(1).mean(dim=1)
    if kind == "low-band":
        low = SubBands().to(candidate.device)
        return ((low(candidate)[:, :3] - low(other)[:, :3]).abs() / 2).flatten(1).mean(dim=1)
    return 1 - _ssim(candidate, other)


def _ssim(one: Tensor, other: Tensor) -> Tensor:
    """Mean structural similarity ``[B]`` of images in [0, 1], uniform windows of 7 × 7, sample covariance."""
    window, size = 7, 49
    means = [F.avg_pool2d(x, window, 1) for x in (one, other, one * one, other * other, one * other)]
    a, b, aa, bb, ab = means
    scale = size / (size - 1)
    var_a, var_b, cov = scale * (aa - a * a), scale * (bb - b * b), scale * (ab - a * b)
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * a * b + c1) * (2 * cov + c2) / ((a * a + b * b + c1) * (var_a + var_b + c2))
    return value.flatten(1).mean(dim=1)


def to_levels(images: Tensor) -> Tensor:
    """Float in [0, 1] → uint8 on the CPU, rounded."""
    return images.detach().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
