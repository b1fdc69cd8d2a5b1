"""No-reference quality: images ``[N, 3, H, W]`` in [0, 1] → scores ``[N]``, higher is better.

Scores rank results for one image; of two scorers, or two fits of one, they cannot be compared.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Score = Callable[[Tensor], Tensor]
RankerPairs = Literal["blends", "restorations", "both"]

# The reference implementation of NIQE and BRISQUE: 7 × 7 Gaussian of σ = 7/6.
WINDOW, WINDOW_SIGMA = 7, 7 / 6


def checked(score: Score, images: Tensor, name: str) -> Tensor:
    """Scores of images that are clipped to [0, 1] first.

    Raises:
        ValueError: the scorer returns another shape.
    """
    with torch.no_grad():
        values = score(images.clamp(0, 1))
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"scorer {name} returned {found} for {len(images)} images; it has to return one number an image"
        )
    return values


class Ranker(nn.Module):
    """A small CNN that is fitted to tell which of two versions of an image is nearer to the clean one."""

    kind = "ranker"

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 16, 32, 32, 64]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(4, outputs), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean(dim=(2, 3)))[:, 0]


@dataclass(frozen=True)
class RankerSettings:
    """How the ranker is fitted.

    Attributes:
        num_steps, num_pairs: AdamW steps, and pairs of versions in each.
        pairs: ``blends`` of clean, degraded and restored images with further corruptions; pairs of real
            ``restorations`` (and the degraded image); or ``both``, half each.
    """

    num_steps: int = 400
    num_pairs: int = 12
    learning_rate: float = 2e-3
    final_learning_rate: float = 1e-5
    weight_decay: float = 1e-2
    pairs: RankerPairs = "blends"


def fit_ranker(
    clean: Tensor,
    degraded: Tensor,
    restorations: Tensor,
    settings: RankerSettings,
    random: torch.Generator,
    device: torch.device,
    track: Callable[[Iterable[int], str], Iterable[int]] = lambda steps, _: steps,
) -> Ranker:
    """Fit a ranker on versions of labelled images.

    Args:
        clean, degraded: ``[N, 3, H, W]`` in [0, 1].
        restorations: ``[K, N, 3, H, W]``, K restorations of each.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=random)))
        ranker = Ranker().to(device)
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    end = settings.final_learning_rate / settings.learning_rate
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 + (end - 1) * min(step / max(1, settings.num_steps - 1), 1)
    )
    for _ in track(range(settings.num_steps), "scorer"):
        rows = torch.randint(len(clean), (settings.num_pairs,), generator=random)
        first, second = _versions(clean, degraded, restorations, rows, settings.pairs, random)
        truth = clean[rows]
        flip = torch.rand(len(rows), generator=random) < 0.5
        first, second, truth = (torch.where(flip[:, None, None, None], x.flip(-1), x) for x in (first, second, truth))
        loss = ranking_loss(ranker, *(x.to(device) for x in (first, second, truth)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return ranker.eval().requires_grad_(False)


def ranking_loss(score: Score, first: Tensor, second: Tensor, truth: Tensor) -> Tensor:
    """``min(|e_1 − e_2| / .03, 1) · softplus(−2 sign(e_2 − e_1) (q_1 − q_2)) + 1e-3 mean q²``, e the L1 to the truth."""
    e1, e2 = ((x - truth).abs().flatten(1).mean(dim=1) for x in (first, second))
    q1, q2 = score(torch.cat([first, second])).chunk(2)
    weight = ((e1 - e2).abs() / 0.03).clamp_max(1)
    ranking = (weight * F.softplus(-2 * (e2 - e1).sign() * (q1 - q2))).mean()
    return ranking + 1e-3 * (q1.square().mean() + q2.square().mean()) / 2


def _versions(
    clean: Tensor, degraded: Tensor, restorations: Tensor, rows: Tensor, pairs: RankerPairs, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two versions of each clean image of ``rows``."""
    blends = tuple(_blend(clean, degraded, restorations, rows, random) for _ in range(2))
    if pairs == "blends":
        return blends[0], blends[1]
    real = _two_restorations(degraded, restorations, rows, random)
    if pairs == "restorations":
        return real
    chosen = (torch.rand(len(rows), generator=random) < 0.5)[:, None, None, None]
    return torch.where(chosen, real[0], blends[0]), torch.where(chosen, real[1], blends[1])


def _two_restorations(
    degraded: Tensor, restorations: Tensor, rows: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    pool = torch.cat([degraded[None], restorations])
    first = torch.randint(len(pool), (len(rows),), generator=random)
    second = (first + 1 + torch.randint(len(pool) - 1, (len(rows),), generator=random)) % len(pool)
    return pool[first, rows], pool[second, rows]


def _blend(clean: Tensor, degraded: Tensor, restorations: Tensor, rows: Tensor, random: torch.Generator) -> Tensor:
    """``y + a (x − y) + b (r − y)`` with veil, gamma, and noise or blur now and then."""
    count = len(rows)

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=random))[:, None, None, None]

    def chance(p: float) -> Tensor:
        return (torch.rand(count, generator=random) < p)[:, None, None, None]

    y, x = clean[rows], degraded[rows]
    r = restorations[torch.randint(len(restorations), (count,), generator=random), rows]
    a, b = uniform(0, 1) * ~chance(0.3), uniform(0, 1.3) * ~chance(0.3)
    image = (y + a * (x - y) + b * (r - y)).clamp(0, 1)
    strength, light = uniform(0, 0.5), uniform(0.7, 0.95)
    image = torch.where(chance(0.3), image * (1 - strength) + light * strength, image)
    image = torch.where(chance(0.3), image.clamp_min(1e-6) ** uniform(0.7, 1.3), image)
    disturbed, noisy = chance(0.4), chance(0.5)
    noise = uniform(0, 0.08) * torch.randn(image.shape, generator=random)
    sigmas = uniform(0.3, 1.5).flatten().tolist()
    blurred = torch.cat([_smoothed(one[None], 7, sigma) for one, sigma in zip(image, sigmas, strict=True)])
    return torch.where(disturbed, torch.where(noisy, image + noise, blurred), image).clamp(0, 1)


def _smoothed(images: Tensor, size: int, sigma: float) -> Tensor:
    """Every channel through a Gaussian window; the border is repeated."""
    offsets = torch.arange(size, dtype=images.dtype, device=images.device) - size // 2
    row = torch.exp(-0.5 * (offsets / sigma) ** 2)
    row = row / row.sum()
    channels, pad = images.shape[1], size // 2
    padded = F.pad(images, (pad, pad, pad, pad), mode="replicate")
    across = F.conv2d(padded, row.expand(channels, 1, 1, size), groups=channels)
    return F.conv2d(across, row.view(1, 1, size, 1).expand(channels, 1, size, 1), groups=channels)


class NaturalStatistics(nn.Module):
    """NIQE-style (Mittal et al., 2013): how far 36 statistics of local contrast lie from those of clean images."""

    kind = "nss"
    mean: Tensor
    precision: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(36, dtype=torch.float64))
        self.register_buffer("precision", torch.eye(36, dtype=torch.float64))

    def fit(self, clean: Tensor) -> NaturalStatistics:
        """Mean and Ledoit–Wolf covariance of the features of clean images ``[N, 3, H, W]``.

        Raises:
            ValueError: fewer than two images.
        """
        from sklearn.covariance import LedoitWolf

        if len(clean) < 2:
            raise ValueError(f"scorer nss learns from {len(clean)} clean image; give at least 2")
        fitted = LedoitWolf().fit(natural_features(clean).cpu().numpy())
        self.mean.copy_(torch.from_numpy(fitted.location_))
        self.precision.copy_(torch.from_numpy(fitted.precision_))
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Minus the Mahalanobis distance."""
        offset = natural_features(images) - self.mean
        squared = torch.einsum("ni,ij,nj->n", offset, self.precision, offset)
        return -squared.clamp_min(0).sqrt().float()


def natural_features(images: Tensor) -> Tensor:
    """18 statistics at full and 18 at half size of the luminance: ``[N, 3, H, W]`` → float64 ``[N, 36]``.

    Generalised Gaussians of the locally normalised luminance (shape, width) and of its products with the neighbours
    in four directions (shape, mean, two widths).
    """
    grey = (images.double() * torch.tensor([65.481, 128.553, 24.966], device=images.device)[:, None, None]).sum(1) + 16
    features = []
    for _ in range(2):
        features += _of_scale(grey)
        grey = F.avg_pool2d(grey[:, None], 2)[:, 0]
    return torch.stack(features, dim=1)


def _of_scale(grey: Tensor) -> list[Tensor]:
    mean = _smoothed(grey[:, None], WINDOW, WINDOW_SIGMA)[:, 0]
    square = _smoothed(grey[:, None].square(), WINDOW, WINDOW_SIGMA)[:, 0]
    normal = (grey - mean) / ((square - mean.square()).abs().sqrt() + 1)
    shape, left, right, _ = asymmetric_gaussian(normal)
    found = [shape, (left + right) / 2]
    for rows, columns in ((0, 1), (1, 0), (1, 1), (1, -1)):
        product = normal * normal.roll((rows, columns), dims=(1, 2))
        shape, left, right, centre = asymmetric_gaussian(product)
        found += [shape, centre, left, right]
    return found


_SHAPES = torch.arange(0.2, 10.001, 0.001, dtype=torch.float64)
_RATIOS = torch.exp(2 * torch.lgamma(2 / _SHAPES) - torch.lgamma(1 / _SHAPES) - torch.lgamma(3 / _SHAPES))


def asymmetric_gaussian(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape, left and right width and mean of an asymmetric generalised Gaussian, by moments; one an image."""
    flat = values.flatten(1)
    left = _root_mean_square(flat, flat < 0)
    right = _root_mean_square(flat, flat > 0)
    ratio = left / right
    measured = flat.abs().mean(1).square() / flat.square().mean(1).clamp_min(1e-12)
    wanted = measured * (ratio**3 + 1) * (ratio + 1) / (ratio.square() + 1).square()
    ratios = _RATIOS.to(flat.device)
    place = torch.searchsorted(ratios, wanted.contiguous()).clamp(0, len(ratios) - 1)
    shape = _SHAPES.to(flat.device)[place]
    scale = torch.exp((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2)
    centre = (right - left) * scale * torch.exp(torch.lgamma(2 / shape) - torch.lgamma(1 / shape))
    return shape, left * scale, right * scale, centre


def _root_mean_square(values: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum(1).clamp_min(1)
    return ((values.square() * mask).sum(1) / count + 1e-12).sqrt()


class External(nn.Module):
    """A scorer whose parameters are kept elsewhere: a function, pyiqa's or the package brisque's."""

    def __init__(self, name: str, score: Score) -> None:
        super().__init__()
        self.kind = name
        self.score = score

    def forward(self, images: Tensor) -> Tensor:
        return self.score(images)


def brisque() -> External:
    """BRISQUE of the package ``brisque``, which brings its parameters; images one by one on the CPU.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from brisque import BRISQUE
    except ImportError as error:
        raise ValueError(
            'scorer brisque needs the package brisque; pip install "plait-semiddm-weather[brisque]"'
        ) from error
    judge = BRISQUE(url=False)

    def score(images: Tensor) -> Tensor:
        pictures = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([-float(judge.score(img=picture)) for picture in pictures], device=images.device)

    return External("brisque", score)


def pyiqa_scorer(name: str, weights: Path | str | None, device: torch.device) -> External:
    """A metric of pyiqa, negated where lower is better.

    Args:
        name: e.g. ``musiq-paq2piq``.
        weights: its parameter file; nothing is downloaded.

    Raises:
        ValueError: pyiqa is not installed or does not know it, or there is no such file.
    """
    try:
        import pyiqa
    except ImportError as error:
        raise ValueError(f'scorer pyiqa:{name} needs pyiqa; pip install "plait-semiddm-weather[pyiqa]"') from error
    if name not in pyiqa.list_models():
        raise ValueError(f"scorer is pyiqa:{name}, which pyiqa does not know; pyiqa.list_models() gives all")
    if weights is None or not Path(weights).is_file():
        raise ValueError(
            f"scorer pyiqa:{name} needs its parameter file, which is never downloaded here; give scorer_weights its path"
        )
    metric: Any = pyiqa.create_metric(name, device=device, pretrained_model_path=str(weights))
    sign = -1.0 if metric.lower_better else 1.0
    return External(f"pyiqa:{name}", lambda images: sign * metric(images).flatten())


def identity_of(scorer: nn.Module) -> str:
    """Name and digest of what a scorer has learned: equal for equal scorers."""
    digest = hashlib.sha256()
    for name, value in _sorted_state(scorer):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{scorer.kind} {digest.hexdigest()[:16]}"


def _sorted_state(scorer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from sorted(scorer.state_dict().items())
