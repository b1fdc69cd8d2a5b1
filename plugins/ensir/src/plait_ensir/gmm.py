"""What EnsIR is made of: settings, the grid of cells, EM with frozen means, the table of weights.

:mod:`plait_ensir.ensir` puts it together and numbers the equations. Images are ``[N, C, H, W]`` or ``[C, H, W]`` tensors,
uint8, float32 or float64 in [0, 1]; inside, all arithmetic is on the 0–255 scale. A *group* is a (cell, channel) pair with
flat index ``cell · C + channel``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

EMPTY, FEW, FITTED, FAILED, UNKNOWN = 0, 1, 2, 3, 255
"""Where the weights of a group come from: no samples, too few for EM, EM, EM that failed, a file that does not say."""

MAX_CELLS = 2**24
LEVELS = 256
_AGREEMENT_FLOOR = 1e-10
_CONSTANT = 1e-9  # variances up to this are rounding: one sample in 10⁹ that is off by one level
_UNDERFLOW = -103.97  # log of the smallest positive float32: exp of less is 0
_APPLY_BLOCK = 2**16  # samples: index and gathered weights stay in cache


@dataclass(frozen=True)
class Settings:
    """How a table is estimated. The defaults are what the authors' published tables come from.

    Attributes:
        bin_width: width b of a bin in 8-bit levels, 1–256; T = ceil(256 / b) bins per model.
        default_weight: M non-negative numbers with sum 1 that replace the starting weights of every cell.
        min_samples: cells with fewer samples keep their starting weights; ≥ 2 (``math.inf``: no EM at all).
        max_iterations: most EM updates of a cell, ≥ 1.
        tolerance: EM stops when the mean log-likelihood gains less; ≥ 0.
        epsilon: floor of variances and responsibilities, > 0.
        initial_weights: ``agreement`` (softmax of the inverse distance from the average) or ``uniform``.
        variance_center: the M-step's variance is taken around the ``responsibility-mean``, as in the authors' code,
            or around the ``frozen`` mean, the textbook's step.
        empty_cells: weights of the ``previous`` group in flat order, as in the authors' code, or ``uniform``.
        channels: ``separate`` tables for R, G and B, or one ``shared`` table of all three pooled.
        clip_input: bin values outside [0, 255] at the border; otherwise refuse them.
        dtype: precision of EM, ``float64`` or ``float32``; tables are float32.
    """

    bin_width: int = 32
    default_weight: tuple[float, ...] | None = None
    min_samples: float = 100
    max_iterations: int = 1001
    tolerance: float = 1e-5
    epsilon: float = 1e-6
    initial_weights: Literal["agreement", "uniform"] = "agreement"
    variance_center: Literal["responsibility-mean", "frozen"] = "responsibility-mean"
    empty_cells: Literal["previous", "uniform"] = "previous"
    channels: Literal["separate", "shared"] = "separate"
    clip_input: bool = True
    dtype: Literal["float64", "float32"] = "float64"

    def __post_init__(self) -> None:
        if self.bin_width != int(self.bin_width) or not 1 <= self.bin_width <= LEVELS:
            raise ValueError(f"bin_width is {self.bin_width}; allowed is a whole number from 1 to 256")
        weight = self.default_weight
        if weight is not None and not (min(weight, default=-1) >= 0 and abs(sum(weight) - 1) <= 1e-6):
            raise ValueError(f"default_weight is {list(weight)}; allowed are non-negative numbers with sum 1")
        for name, kind in get_type_hints(Settings).items():
            if get_origin(kind) is Literal:
                _check_choice(name, getattr(self, name), get_args(kind))
        if not self.min_samples >= 2:
            raise ValueError(f"min_samples is {self.min_samples}; allowed is a number from 2 on")
        if self.max_iterations != int(self.max_iterations) or self.max_iterations < 1:
            raise ValueError(f"max_iterations is {self.max_iterations}; allowed is a whole number from 1 on")
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance is {self.tolerance}; allowed is a finite number from 0 on")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon is {self.epsilon}; allowed is a finite number above 0")

    def check_models(self, num_models: int) -> None:
        """Raise ValueError if a table of ``num_models`` models cannot be made."""
        if num_models < 2:
            raise ValueError(f"an ensemble needs at least 2 models, {num_models} was given")
        if self.default_weight is not None and len(self.default_weight) != num_models:
            given = len(self.default_weight)
            raise ValueError(f"default_weight has {given} numbers for {num_models} models; give one number a model")
        if num_bins(self.bin_width) ** num_models > MAX_CELLS:
            cells = f"{num_bins(self.bin_width)}^{num_models}"
            raise ValueError(f"bin_width {self.bin_width} makes {cells} cells, more than 2^24; give a larger bin_width")


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; allowed is {' or '.join(map(repr, choices))}")


def num_bins(bin_width: int) -> int:
    """T: bins per model; the last one may be narrower."""
    return math.ceil(LEVELS / bin_width)


def bins(levels: Tensor, bin_width: int) -> Tensor:
    """Bin of every value on the 0–255 scale, eq. (1): ``trunc(x / b)`` clipped to [0, T − 1], int32."""
    if levels.dtype == torch.uint8:
        bin_of_level = torch.arange(LEVELS, dtype=torch.int32, device=levels.device) // bin_width
        return bin_of_level.index_select(0, levels.flatten().int()).view(levels.shape)
    return (levels / bin_width).clamp(0, num_bins(bin_width) - 1).int()


def cell_index(levels: Sequence[Tensor], bin_width: int) -> Tensor:
    """Flat cell of every M-tuple, C order: M tensors ``[...]`` on the 0–255 scale → ``[...]`` int32."""
    cell = bins(levels[0], bin_width)
    for model in levels[1:]:
        cell = cell.mul_(num_bins(bin_width)).add_(bins(model, bin_width))
    return cell


def agreement_weights(mean_squared_distance: Tensor) -> Tensor:
    """Starting weights ``softmax_m(1 / e_m)``, eq. (3), e_m the RMS distance of model m from the average of all models.

    Args:
        mean_squared_distance: ``e_m²`` per group, ``[G, M]``.
    """
    return torch.softmax(1 / (_AGREEMENT_FLOOR + mean_squared_distance.sqrt()), dim=-1)


@dataclass(frozen=True)
class Mixtures:
    """G mixtures after EM. ``weight`` and ``variance`` are ``[G, M]``, the others ``[G]``.

    Where ``failed``, ``weight`` is the start's. ``updates`` counts EM updates; ``log_likelihood`` is the mean per
    sample after the last one.
    """

    weight: Tensor
    variance: Tensor
    log_likelihood: Tensor
    updates: Tensor
    failed: Tensor


def fit_mixtures(
    value: Tensor,
    count: Tensor,
    mean: Tensor,
    variance: Tensor,
    start: Tensor,
    *,
    max_iterations: int = 1001,
    tolerance: float = 1e-5,
    epsilon: float = 1e-6,
    variance_center: Literal["responsibility-mean", "frozen"] = "responsibility-mean",
) -> Mixtures:
    """EM with frozen means, eq. (4) to (6), for G one-dimensional mixtures at once; groups leave the batch as they converge.

    Args:
        value: distinct ground-truth values of each group, ``[G, V]``, 0–255; padding is arbitrary.
        count: how often each occurs, ``[G, V]``; 0 for padding.
        mean: frozen means, ``[G, M]``.
        variance: start values, ``[G, M]``.
        start: mixture weights to start from, ``[G, M]``.
        max_iterations, tolerance, epsilon, variance_center: see :class:`Settings`.

    A group fails, and keeps ``start``, where a start variance is 0 (a constant candidate) or a component dies: all its
    responsibilities underflow in float32. The authors' float32 code divides 0 by 0 in these two cases.

    Raises:
        ValueError: ``variance_center`` is none of the two.
    """
    _check_choice("variance_center", variance_center, get_args(get_type_hints(Settings)["variance_center"]))
    G, M = mean.shape
    done = Mixtures(
        weight=start.clone(),
        variance=variance.clone(),
        log_likelihood=torch.full_like(mean[:, 0], -math.inf),
        updates=torch.zeros(G, dtype=torch.int32, device=mean.device),
        failed=(variance <= _CONSTANT).any(dim=1),
    )
    active = (~done.failed).nonzero().squeeze(1)
    y, h, mu, var, pi = (t[active] for t in (value, count, mean, variance, start))
    n, previous = h.sum(dim=1), done.log_likelihood[active]
    log_joint = _log_joint(y, mu, var, pi)
    for update in range(1, max_iterations + 1):
        if not len(active):
            break
        # E-step, eq. (4)
        log_r = log_joint.log_softmax(dim=2)
        dead = (log_r.masked_fill(h.unsqueeze(2) == 0, -math.inf).amax(dim=1) < _UNDERFLOW).any(dim=1)
        r = log_r.exp_() * h.unsqueeze(2)
        # M-step, eq. (5): the means stay, the weights are not renormalised
        R = r.sum(dim=1)
        if variance_center == "frozen":
            center = mu
        else:
            center = torch.einsum("gvm,gv->gm", r, y) / (R + epsilon)
        var = (r * (y.unsqueeze(2) - center.unsqueeze(1)) ** 2).sum(dim=1) / R + epsilon
        pi = (R + epsilon) / n.unsqueeze(1)
        log_joint = _log_joint(y, mu, var, pi)
        log_likelihood = (log_joint.logsumexp(dim=2) * h).sum(dim=1) / n
        broken = ~dead & ~log_likelihood.isfinite()
        weight = torch.where(dead.unsqueeze(1), start[active], torch.where(broken.unsqueeze(1), 1 / M, pi))

        done.weight[active], done.variance[active], done.log_likelihood[active] = weight, var, log_likelihood
        done.updates[active] = update
        done.failed[active] = dead | broken
        # The gain, eq. (6)
        going = ~(dead | broken | (log_likelihood - previous < tolerance))
        previous = log_likelihood
        if not going.all():
            active, y, h, mu, var, pi, n, previous, log_joint = (
                t[going] for t in (active, y, h, mu, var, pi, n, previous, log_joint)
            )
    return done


def _log_joint(y: Tensor, mu: Tensor, var: Tensor, pi: Tensor) -> Tensor:
    """``log π_m + log N(y; μ_m, σ_m²)``, ``[G, V, M]``."""
    mu, var, pi = (t.unsqueeze(1) for t in (mu, var, pi))
    return pi.log() - 0.5 * (math.log(2 * math.pi) + var.log() + (y.unsqueeze(2) - mu) ** 2 / var)


class Table(nn.Module):
    """The fusion weights of every cell: what EnsIR learns, and what it needs to fuse new images.

    Buffers: ``lut`` float32 ``[T^M, C, M]``, ``count`` int64 ``[T^M, C]`` (reference samples of the group), ``source``
    uint8 and ``updates`` int32 of the same shape (EM updates). C is 3 for R, G, B, 1 for grey or shared channels.

    Attributes:
        models: names in the order of the cells' axes; candidates must come in this order.
        settings: how the table was estimated.
        num_images: reference images that it was estimated from.
    """

    lut: Tensor
    count: Tensor
    source: Tensor
    updates: Tensor

    def __init__(
        self,
        lut: Tensor,
        count: Tensor,
        source: Tensor,
        updates: Tensor,
        *,
        models: Sequence[str],
        settings: Settings,
        num_images: int,
    ) -> None:
        super().__init__()
        self.models, self.settings, self.num_images = tuple(models), settings, num_images
        settings.check_models(len(self.models))
        cells = num_bins(settings.bin_width) ** len(self.models)
        if lut.ndim != 3 or (lut.shape[0], lut.shape[2]) != (cells, len(self.models)):
            raise ValueError(
                f"a table of {len(self.models)} models at bin_width {settings.bin_width} has shape "
                f"[{cells}, channels, {len(self.models)}], and this one has {list(lut.shape)}"
            )
        if not lut.isfinite().all():
            raise ValueError("the table holds NaN or infinity; estimate it again")
        for name, buffer in (("count", count), ("source", source), ("updates", updates)):
            if buffer.shape != lut.shape[:2]:
                raise ValueError(
                    f"{name} has shape {list(buffer.shape)}; expected {list(lut.shape[:2])}, as the table's weights"
                )
        self.register_buffer("lut", lut.float().contiguous())
        self.register_buffer("count", count)
        self.register_buffer("source", source)
        self.register_buffer("updates", updates)

    def check(self, models: Sequence[str], bin_width: int) -> None:
        """Raise ValueError unless the table is one of these models, in this order, at this bin width."""
        if tuple(models) != self.models:
            raise ValueError(
                f"the table was made for the models {', '.join(self.models)} in this order, and the candidates are "
                f"{', '.join(models)}; give the same models in the same order"
            )
        if bin_width != self.settings.bin_width:
            made = self.settings.bin_width
            raise ValueError(f"the table was made with bin_width {made}, not {bin_width}; set bin_width to {made}")

    def apply(self, candidates: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """Fuse, eq. (8): ``Σ_m lut[cell, c, m] · x[m, c]`` per sample, float32 in [0, 1], neither clipped nor rounded.

        Args:
            candidates: one tensor per model, all ``[N, C, H, W]`` or ``[C, H, W]``, uint8, or float32 or float64 in [0, 1].

        Raises:
            ValueError: the candidates' number, shapes or channels do not fit, or they hold NaN, inf or refused values.
        """
        planes = self._planes(candidates)
        fused = torch.empty(planes[0].shape, device=planes[0].device)
        lut = self.lut.permute(1, 2, 0).contiguous()  # [C, M, T^M]: a gather reads one small row
        for n, c, block in _walk(planes[0].shape):
            x = [to_levels(plane[n, c, block]) for plane in planes]
            cell = cell_index(x, self.settings.bin_width)
            weights = lut[c % len(lut)]
            out = fused[n, c, block]
            torch.mul(weights[0].index_select(0, cell), x[0], out=out)
            for weight, levels in zip(weights[1:], x[1:], strict=True):
                out.addcmul_(weight.index_select(0, cell), levels)
            out.div_(LEVELS - 1)
        return fused.view(candidates[0].shape)

    def usage(self, candidates: Sequence[Tensor]) -> Tensor:
        """How many samples of the candidates look up each group, ``[T^M, C]`` int64."""
        planes = self._planes(candidates)
        used = torch.zeros_like(self.count.T)
        for n, c, block in _walk(planes[0].shape):
            x = [to_levels(plane[n, c, block]) for plane in planes]
            used[c % len(used)] += torch.bincount(cell_index(x, self.settings.bin_width), minlength=used.shape[1])
        return used.T.contiguous()

    def _planes(self, candidates: Sequence[Tensor]) -> list[Tensor]:
        if len(candidates) != len(self.models):
            raise ValueError(f"{len(candidates)} candidates were given to a table of {len(self.models)} models")
        planes = as_planes(candidates, self.models, self.settings.clip_input)
        if self.lut.shape[1] not in (1, planes[0].shape[1]):
            raise ValueError(f"the table has {self.lut.shape[1]} channels and the candidates have {planes[0].shape[1]}")
        return planes

    def save(self, path: Path | str) -> None:
        """Write a safetensors file: the four buffers, and names, settings and provenance as JSON metadata."""
        about = {
            "format": "plait-ensir 1",
            "models": self.models,
            "channels": _CHANNEL_ORDER[self.lut.shape[1]],
            "num_images": self.num_images,
            "settings": asdict(self.settings),
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={"ensir": json.dumps(about)})

    @classmethod
    def load(cls, path: Path | str) -> Table:
        """Read what :meth:`save` wrote, bit for bit.

        Raises:
            ValueError: the file is not a safetensors file, or not one of an EnsIR table.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["ensir"])
                tensors = {name: file.get_tensor(name) for name in ("lut", "count", "source", "updates")}
            settings = dict(about["settings"])
            if settings["default_weight"] is not None:
                settings["default_weight"] = tuple(settings["default_weight"])
            return cls(**tensors, models=about["models"], settings=Settings(**settings), num_images=about["num_images"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not an EnsIR table: {error}") from error

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``table.safetensors`` into ``folder``."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.save(Path(folder) / "table.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Table:
        """Read what :meth:`save_pretrained` wrote."""
        return cls.load(Path(folder) / "table.safetensors")


@dataclass(frozen=True)
class Mixture:
    """One fitted group: the histogram of its ground truth and the mixture over it, for a look at what was learned.

    ``bins`` is the cell's tuple of bins; ``value`` and ``count`` are ``[V]``, the parameters ``[M]``.
    """

    bins: tuple[int, ...]
    channel: int
    value: Tensor
    count: Tensor
    mean: Tensor
    variance: Tensor
    weight: Tensor


_CHANNEL_ORDER = {1: "all", 3: "RGB"}


def as_planes(images: Sequence[Tensor], names: Sequence[str], clip_input: bool) -> list[Tensor]:
    """Images as ``[N, C, H·W]`` views; refuses shapes that differ and values that are no levels."""
    first = images[0]
    for image, name in zip(images, names, strict=True):
        if image.ndim not in (3, 4) or image.shape[-3] not in _CHANNEL_ORDER:
            shape = list(image.shape)
            raise ValueError(f"{name} has shape {shape}; expected [N, C, H, W] or [C, H, W] with 1 or 3 channels")
        if image.shape != first.shape:
            raise ValueError(
                f"{name} has shape {list(image.shape)} and {names[0]} {list(first.shape)}; give all one size"
            )
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ValueError(f"{name} has dtype {image.dtype}; give uint8, or float in [0, 1]")
        if image.dtype != torch.uint8:
            _check_floats(image, name, clip_input)
    return [image.reshape(-1, image.shape[-3], image.shape[-2] * image.shape[-1]) for image in images]


def _check_floats(image: Tensor, name: str, clip_input: bool) -> None:
    if image.dtype not in (torch.float32, torch.float64):
        kind = str(image.dtype).removeprefix("torch.")
        raise ValueError(f"{name} has dtype {kind}, which rounds the 8-bit levels; give uint8, or float32 in [0, 1]")
    if not image.numel():
        return
    low, high = image.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"{name} holds NaN or infinity; give finite values")
    # A network's overshoots do not double the brightness, and are not whole numbers.
    if high > 1 and (image.mean() > 2 or bool((image == image.round()).all())):
        raise ValueError(
            f"{name} has values from {low:.4g} to {high:.4g}, as on the 0–255 scale; give uint8, or divide by 255"
        )
    if not clip_input and (low < 0 or high > 1):
        raise ValueError(f"{name} has values from {low:.4g} to {high:.4g}, outside [0, 1]; allow it with clip_input")


def to_levels(values: Tensor) -> Tensor:
    """Values on the 0–255 scale: uint8 as they are, floats times 255 (exact for all 256 levels in float32)."""
    return values if values.dtype == torch.uint8 else values.float() * (LEVELS - 1)


def _walk(shape: torch.Size) -> Iterator[tuple[int, int, slice]]:
    """Image, channel and block of samples, for planes of this shape."""
    for n in range(shape[0]):
        for c in range(shape[1]):
            for start in range(0, shape[2], _APPLY_BLOCK):
                yield n, c, slice(start, start + _APPLY_BLOCK)
