"""Ensembles: several restorations of the same images → one. The simple ones, to hold a new method against.

What ``candidates`` and ``reference`` are, :mod:`plait_imaging.scenes` says.

Results are 8-bit images; with ``keep_float`` the unrounded ones stand beside them, four to ten times as large. Those that
learn pool the samples of R, G and B. All take a reference, so that one can be put in another's place, but only those that learn need it.

The set is that of Sun et al., "EnsIR", NeurIPS 2024 (arXiv 2410.22959), with least squares and the best single added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import attrs
import numpy as np
import torch
from datasets import Dataset
from plait import Report, Run, hookimpl
from plait.fields import field, in_range
from torch import Tensor

from plait_imaging.images import write_images
from plait_imaging.scenes import Scenes

if TYPE_CHECKING:
    from sklearn.base import RegressorMixin


@attrs.frozen(kw_only=True)
class _Ensemble:
    """What all have in common."""

    takes = {"candidates": "dataset", "reference": "dataset"}
    gives = "dataset"

    keep_float: bool = field(False, "also store unrounded images, which psnr-ssim with rounding: false then scores")

    def fused(self, run: Run, scenes: Scenes, fuse: Callable[[Tensor], Tensor]) -> Dataset:
        """Write ``fuse`` of every scene; it takes float32 ``[M, 3, H, W]`` and gives ``[3, H, W]``, both on 0–255."""

        def results() -> Iterator[Tensor]:
            for images in run.track(scenes, "fusing"):
                yield fuse(torch.stack(images).to(run.device).float()).cpu() / 255

        return write_images(run, scenes.source, results(), keep_float=self.keep_float)


def _weighted(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda images: torch.tensordot(weight.to(images), images, dims=1)


@attrs.frozen(kw_only=True)
class Average(_Ensemble):
    """The plain average of the candidates."""

    @hookimpl
    def ensemble(self, candidates: Any, reference: Any | None, run: Run) -> Dataset:
        """The mean over the models."""
        return self.fused(run, Scenes.of_candidates(candidates), lambda images: images.mean(dim=0))


@attrs.frozen(kw_only=True)
class PixelMedian(_Ensemble):
    """The median of the candidates, sample by sample."""

    @hookimpl
    def ensemble(self, candidates: Any, reference: Any | None, run: Run) -> Dataset:
        """The median over the models; of an even number, the mean of the middle two."""
        return self.fused(run, Scenes.of_candidates(candidates), pixel_median)


@attrs.frozen(kw_only=True)
class ZZPM(_Ensemble):
    """Weights per image, larger for candidates near the average (a challenge team's rule)."""

    @hookimpl
    def ensemble(self, candidates: Any, reference: Any | None, run: Run) -> Dataset:
        """The weighted mean with ``softmax(1 / (1e-3 + mean squared distance from the average))``."""
        return self.fused(run, Scenes.of_candidates(candidates), lambda images: _weighted(zzpm_weights(images))(images))


def pixel_median(images: Tensor) -> Tensor:
    """Median over the first dimension; of an even number, the mean of the middle two."""
    ordered = images.sort(dim=0).values
    return (ordered[(len(images) - 1) // 2] + ordered[len(images) // 2]) / 2


def zzpm_weights(images: Tensor) -> Tensor:
    """Weights ``[M]`` of one scene ``[M, 3, H, W]``, 0–255."""
    distance = (images - images.mean(dim=0)).square().flatten(1).mean(dim=1)
    return torch.softmax(1 / (1e-3 + distance), dim=0)


@attrs.frozen
class Products:
    """Inner products of M candidates and the truth, all that a global weight needs to know of a reference.

    Attributes:
        sums: ``Σ z zᵀ`` over the samples of each scene with ``z = (x_1, …, x_M, y)`` on 0–255, ``[N, M + 1, M + 1]``
            float64; sums of whole numbers, so exact.
        num_samples: ``[N]``.
    """

    sums: Tensor
    num_samples: Tensor

    @classmethod
    def of(cls, scenes: Scenes, run: Run) -> Products:
        """From scenes with a target, one at a time."""
        sums = []
        for images in run.track(scenes, "reference"):
            z = torch.stack(images).to(run.device).flatten(1).double()
            sums.append((z @ z.T).cpu())
        return cls(torch.stack(sums), torch.tensor(scenes.num_samples))

    @property
    def mean_squared_errors(self) -> Tensor:
        """Of every model in every scene, ``[N, M]``."""
        return torch.diagonal(_errors(self.sums), dim1=1, dim2=2) / self.num_samples.unsqueeze(1)


def _errors(sums: Tensor) -> Tensor:
    """``E = Σ (x − y)(x − y)ᵀ``, ``[..., M, M]``."""
    xx, xy, yy = sums[..., :-1, :-1], sums[..., :-1, -1:], sums[..., -1:, -1:]
    return xx - xy - xy.transpose(-1, -2) + yy


@attrs.frozen(kw_only=True)
class _GlobalWeights(_Ensemble):
    """One weight per model, learned from the reference."""

    def weights(self, products: Products) -> Tensor:
        """``[M]``."""
        raise NotImplementedError

    @hookimpl
    def ensemble(self, candidates: Any, reference: Any, run: Run) -> Dataset:
        """The weighted sum with weights learned from the reference."""
        scenes = Scenes.of_candidates(candidates)
        weight = self.weights(Products.of(Scenes.of_reference(reference, scenes.models), run))
        rows: list[dict[str, Any]] = [
            {"model": model, "weight": float(w)} for model, w in zip(scenes.models, weight, strict=True)
        ]
        run.add(Report(title="weights", rows=rows, formats={"weight": ".3f"}))
        return self.fused(run, scenes, _weighted(weight))


@attrs.frozen(kw_only=True)
class InverseMSE(_GlobalWeights):
    """One weight per model, inverse to its mean squared error on the reference."""

    def weights(self, products: Products) -> Tensor:
        """``w_m ∝ 1 / MSE_m``; models without any error share the weight."""
        errors = torch.diagonal(_errors(products.sums.sum(dim=0)))
        inverse = torch.where(errors == 0, 1.0, 0.0) if (errors == 0).any() else 1 / errors
        return inverse / inverse.sum()


@attrs.frozen(kw_only=True)
class LeastSquares(_GlobalWeights):
    """One weight per model, the least squares of the reference; no intercept, weights may be negative."""

    sum_to_one: bool = field(False, "least squares among weights with sum 1")

    def weights(self, products: Products) -> Tensor:
        """``argmin ‖Xᵀw − y‖²``; with ``sum_to_one`` ``w ∝ E⁻¹ 1``, E the products of the errors."""
        sums = products.sums.sum(dim=0)
        if not self.sum_to_one:
            return least_squares(sums)
        errors = _errors(sums)
        floor = 1e-12 * errors.trace() + 1e-6  # equal or perfect models make E singular
        weight: Tensor = torch.linalg.solve(
            errors + floor * torch.eye(len(errors)), torch.ones(len(errors), dtype=errors.dtype)
        )
        return weight.div(weight.sum())


def least_squares(sums: Tensor) -> Tensor:
    """``argmin ‖Xᵀw − y‖²`` of products ``[M + 1, M + 1]``, as :class:`Products` has them → ``[M]`` float64."""
    # Models that are equal share a weight: the driver finds the shortest of all solutions.
    weight: Tensor = torch.linalg.lstsq(sums[:-1, :-1], sums[:-1, -1], driver="gelsd").solution
    return weight


@attrs.frozen(kw_only=True)
class RangeLeastSquares(_Ensemble):
    """One weight per model and range of brightness: the least squares of the reference samples of that range.

    The brightness of a colour sample is the mean of its candidates. A range with fewer than ``min_samples`` reference
    samples, or with models that cannot be told apart there, has the weights of all samples together.
    """

    bin_width: int = field(32, "width of a range, in 8-bit levels; 256: plain least squares", in_range(1, 256))
    min_samples: int = field(100, "ranges with fewer reference samples take the weights of all", in_range(1))

    @hookimpl
    def ensemble(self, candidates: Any, reference: Any, run: Run) -> Dataset:
        """The weighted sum, every sample with the weights of its range."""
        scenes = Scenes.of_candidates(candidates)
        sums, counts = self._products(Scenes.of_reference(reference, scenes.models), run)
        weights, fitted = self.weights(sums, counts)
        self._report(run, scenes.models, weights, fitted, counts)
        by_model = weights.T.float().to(run.device)

        def fuse(images: Tensor) -> Tensor:
            ranges = self._ranges(images)
            fused = torch.zeros_like(images[0])
            for weight, image in zip(by_model, images, strict=True):
                fused += weight[ranges] * image
            return fused

        return self.fused(run, scenes, fuse)

    def weights(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of every range.

        Args:
            sums: products of the samples of each range, ``[T, M + 1, M + 1]`` float64, as :class:`Products` has them.
            counts: samples of each range, ``[T]``.

        Returns:
            weights ``[T, M]`` float64, and ``[T]`` bool: whether a range has its own.
        """
        spread = torch.linalg.eigvalsh(sums[:, :-1, :-1])
        fitted = (counts >= self.min_samples) & (spread[:, 0] > 1e-9 * spread[:, -1])
        weights = least_squares(sums.sum(dim=0)).repeat(len(sums), 1)
        for number in fitted.nonzero().flatten().tolist():
            weights[number] = least_squares(sums[number])
        return weights, fitted

    def _ranges(self, images: Tensor) -> Tensor:
        """Number of the range of every sample; ``images`` ``[M, …]``, whole levels 0–255."""
        return images.sum(dim=0).long() // (len(images) * self.bin_width)

    def _products(self, scenes: Scenes, run: Run) -> tuple[Tensor, Tensor]:
        num_ranges, size = -(-256 // self.bin_width), len(scenes.models) + 1
        sums = torch.zeros(num_ranges, size, size, dtype=torch.float64)
        counts = torch.zeros(num_ranges, dtype=torch.long)
        for images in run.track(scenes, "reference"):
            z = torch.stack(images).to(run.device).flatten(1).double()
            ranges = self._ranges(z[:-1])
            in_scene = torch.bincount(ranges, minlength=num_ranges).cpu()
            parts = z[:, ranges.argsort()].split(in_scene.tolist(), dim=1)
            sums += torch.stack([part @ part.T for part in parts]).cpu()
            counts += in_scene
        return sums, counts

    def _report(self, run: Run, models: tuple[str, ...], weights: Tensor, fitted: Tensor, counts: Tensor) -> None:
        rows: list[dict[str, Any]] = []
        for number, (weight, own, count) in enumerate(zip(weights.tolist(), fitted, counts, strict=True)):
            first = number * self.bin_width
            levels = f"{first}–{min(first + self.bin_width, 256) - 1}"
            learned = "its own samples" if own else "all samples"
            row = {"levels": levels, "samples": int(count), "learned from": learned}
            rows.append(row | dict(zip(models, weight, strict=True)))
        run.add(Report(title="weights by brightness", rows=rows, formats=dict.fromkeys(models, ".3f")))


@attrs.frozen(kw_only=True)
class BestSingle(_GlobalWeights):
    """The one model with the highest PSNR on the reference."""

    def weights(self, products: Products) -> Tensor:
        """1 for the model with the highest mean PSNR over the scenes, on R, G and B; 0 for the others."""
        best = products.mean_squared_errors.log().mean(dim=0).argmin()
        return torch.nn.functional.one_hot(best, products.sums.shape[1] - 1).double()


@attrs.frozen(kw_only=True)
class Regressor(_Ensemble):
    """A regressor of scikit-learn, with its defaults: candidates' values → true value of a sample."""

    kind: Literal[
        "hist-gradient-boosting", "gradient-boosting", "ada-boost", "bagging", "extra-trees", "random-forest"
    ] = field(
        "hist-gradient-boosting",
        "which regressor of scikit-learn",
    )
    max_samples: int | None = field(
        200_000, "most reference samples to fit on, drawn without replacement; null: all of them", in_range(1)
    )

    @hookimpl
    def ensemble(self, candidates: Any, reference: Any, run: Run) -> Dataset:
        """The regressor's predictions, unclipped."""
        scenes = Scenes.of_candidates(candidates)
        inputs, truth, total = self._draw(Scenes.of_reference(reference, scenes.models), run)
        regressor = make_regressor(self.kind, run.derived_seed("regressor") % 2**32).fit(inputs, truth)
        if len(truth) < total:
            note = (
                f"{self.kind} was fitted on {len(truth)} of {total} reference samples, drawn at random (max_samples)."
            )
            run.add(Report(notes=[note]))

        def predict(images: Tensor) -> Tensor:
            samples = images.cpu().flatten(1).T.numpy()
            return torch.from_numpy(regressor.predict(samples)).float().view(images.shape[1:])

        return self.fused(run, scenes, predict)

    def _draw(self, scenes: Scenes, run: Run) -> tuple[np.ndarray, np.ndarray, int]:
        """Candidates' values ``[n, M]`` and true values ``[n]`` of the drawn samples, and how many there were."""
        per_scene = scenes.num_samples
        total = sum(per_scene)
        drawn = np.arange(total)
        if self.max_samples is not None and self.max_samples < total:
            generator = run.numpy_generator("samples")
            drawn = np.sort(generator.choice(total, self.max_samples, replace=False, shuffle=False))
        bounds = np.searchsorted(drawn, np.cumsum([0, *per_scene]))
        rows, first = [], 0
        for scene, images in enumerate(run.track(scenes, "reference")):
            chosen = torch.from_numpy(drawn[bounds[scene] : bounds[scene + 1]] - first)
            rows.append(torch.stack(images).flatten(1)[:, chosen].T.numpy().astype(np.float32))
            first += per_scene[scene]
        samples = np.concatenate(rows)
        return samples[:, :-1], samples[:, -1], total


def make_regressor(kind: str, seed: int) -> RegressorMixin:
    """A regressor of scikit-learn with its defaults."""
    from sklearn import ensemble

    classes = {
        "hist-gradient-boosting": ensemble.HistGradientBoostingRegressor,
        "gradient-boosting": ensemble.GradientBoostingRegressor,
        "ada-boost": ensemble.AdaBoostRegressor,
        "bagging": ensemble.BaggingRegressor,
        "extra-trees": ensemble.ExtraTreesRegressor,
        "random-forest": ensemble.RandomForestRegressor,
    }
    return classes[kind](random_state=seed)
