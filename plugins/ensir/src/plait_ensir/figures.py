"""Pictures of what a table knows."""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from plait_ensir.gmm import EMPTY, Mixture, Table, num_bins

COLORS = ("#d62728", "#2ca02c", "#1f77b4", "#9467bd", "#ff7f0e", "#17becf")
TABLE_CAPTION = "a cell mixes its models' colours by weight; white: no reference sample fell there"
_MAX_SLICES = 8
_CHANNELS = ("R", "G", "B")


def draw_table(table: Table) -> Figure:
    """Weights over the grid of cells: the plane for two models, slices for three, the diagonal for more.

    Each model has a colour; a cell's colour mixes them by weight, averaged over the channels by samples.
    """
    T, M = num_bins(table.settings.bin_width), len(table.models)
    weight = _mean_over_channels(table).view(*[T] * M, M)
    if M == 2:
        slices = {"": weight}
    elif M == 3:
        first = np.unique(np.linspace(0, T - 1, min(T, _MAX_SLICES)).round().astype(int))
        slices = {f"{table.models[0]} {_range(int(q), table.settings.bin_width)}": weight[q] for q in first}
    else:
        diagonal = torch.arange(T)
        slices = {"all models in one bin": weight[(diagonal,) * M].unsqueeze(0)}

    columns = min(4, len(slices))
    rows = math.ceil(len(slices) / columns)
    figure = Figure(figsize=(2.2 * columns + 1, 2.3 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, (title, cells) in zip(axes.flat, slices.items(), strict=False):
        axis.set_visible(True)
        axis.imshow(_mixed_colors(cells), extent=_extent(cells, table.settings.bin_width), aspect="auto")
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=7)
        if M > 3:
            axis.set_yticks([])
            axis.set_xlabel("level", fontsize=8)
        else:
            axis.set_xlabel(table.models[-1], fontsize=8)
            axis.set_ylabel(table.models[-2], fontsize=8)
    handles = [figure.axes[0].plot([], [], "s", color=_color(m), label=name)[0] for m, name in enumerate(table.models)]
    figure.legend(handles=handles, loc="outside lower center", ncols=M, fontsize=8, frameon=False)
    return figure


def draw_mixture(mixture: Mixture, models: tuple[str, ...]) -> Figure:
    """The histogram of the truth in one cell and the fitted components over it."""
    figure = Figure(figsize=(3.6, 2.6), layout="constrained")
    axis = figure.subplots()
    seen = mixture.count > 0
    value, count = mixture.value[seen].cpu().numpy(), mixture.count[seen].cpu().numpy()
    axis.hist(
        value,
        bins=(np.arange(math.floor(value.min()), value.max() + 2) - 0.5).tolist(),
        weights=count / count.sum(),
        color="0.85",
    )
    level = np.linspace(value.min() - 2, value.max() + 2, 512)
    for m, name in enumerate(models):
        mean, variance, weight = (float(t[m]) for t in (mixture.mean, mixture.variance, mixture.weight))
        density = weight * np.exp(-((level - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        axis.plot(level, density, color=_color(m), label=f"{name}  {weight:.2f}")
        axis.axvline(mean, color=_color(m), linestyle=":", linewidth=1)
    # A narrow component would hide the histogram.
    axis.set_ylim(0, 1.6 * (count / count.sum()).max())
    axis.set_xlabel("true level", fontsize=8)
    axis.set_ylabel("share of the samples", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, frameon=False)
    return figure


def mixture_caption(mixture: Mixture, table: Table) -> str:
    """Which cell and channel, and how many samples."""
    ranges = ", ".join(
        f"{model} {_range(q, table.settings.bin_width)}" for model, q in zip(table.models, mixture.bins, strict=True)
    )
    channel = "" if table.lut.shape[1] == 1 else f"{_CHANNELS[mixture.channel]}: "
    return f"{channel}{ranges} ({int(mixture.count.sum())} samples)"


def _mean_over_channels(table: Table) -> torch.Tensor:
    """Weights ``[T^M, M]`` averaged over the channels by samples; NaN where there is none."""
    count = table.count.cpu().double()
    if not count.any():  # a file that does not say how many
        count = torch.ones_like(count)
    count = count.masked_fill(table.source.cpu() == EMPTY, 0)
    return (table.lut.cpu() * count.unsqueeze(2)).sum(dim=1) / count.sum(dim=1, keepdim=True)


def _mixed_colors(weight: torch.Tensor) -> np.ndarray:
    palette = torch.tensor([to_rgb(_color(m)) for m in range(weight.shape[-1])]).double()
    return torch.nan_to_num(weight @ palette, nan=1.0).clamp(0, 1).numpy()


def _extent(cells: torch.Tensor, bin_width: int) -> tuple[float, float, float, float]:
    return (0, cells.shape[1] * bin_width, cells.shape[0] * bin_width, 0)


def _range(index: int, bin_width: int) -> str:
    return f"{index * bin_width}–{min((index + 1) * bin_width, 256) - 1}"


def _color(model: int) -> str:
    return COLORS[model % len(COLORS)]
