"""Pictures of activations: noise along the network, principal components as colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from plait.report import Image, Panel, png
from torch import Tensor

from plait_gdf.gdf import Properties, place_of

_COLOURS = {"down": "#4477aa", "mid": "#228833", "up": "#cc6677", "": "#888888"}
_SHOWN = 12
_PIXELS = 64


def level_name(name: str) -> str:
    """``up-level1`` of an official id; the stage, or the name itself, where there is no level."""
    place = place_of(name)
    return f"{place.stage}-level{place.level}" if place.level is not None else place.stage or name


def noise_bars(found: Sequence[Properties]) -> Panel:
    """Share of noise in every activation's variance, in the order of execution."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.09 * len(found)), 3.2))
    axes = figure.subplots()
    axes.bar(
        range(len(found)),
        [one.noise for one in found],
        color=[_COLOURS[place_of(one.name).stage] for one in found],
        width=0.9,
    )
    starts = [i for i, one in enumerate(found) if i == 0 or level_name(found[i - 1].name) != level_name(one.name)]
    starts = [
        i for i in starts if place_of(found[i].name).stage
    ]  # the ends of the network would be written over each other
    axes.set_xticks(starts, [level_name(found[i].name) for i in starts], rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("noise / variance")
    axes.set_ylim(0, 1)
    picture = Image(caption=f"{len(found)} activations, in the order of execution", data=png(figure))
    return Panel(title="Noise along the network", images=[[picture]])


def principal_components(features: Mapping[str, Tensor], images: int = 4) -> Panel:
    """The first three principal components of some activations as red, green and blue; fitted over the batch."""
    wanted = [
        name for name in features if name.endswith(("-res-out", "-vit-out", "cross-q", "self-k", "upsampler-out"))
    ]
    wanted = wanted or list(features)
    step = -(-len(wanted) // _SHOWN)
    rows = []
    for name in wanted[::step]:
        colours = colours_of(features[name][:images])
        strip = torch.cat(list(F.interpolate(colours, (_PIXELS, _PIXELS), mode="nearest")), dim=2)
        rows.append([Image(caption=name, data=png(strip))])
    return Panel(title="Principal components of activations", images=rows)


def colours_of(values: Tensor) -> Tensor:
    """``[B, C, h, w]`` → ``[B, 3, h, w]`` in [0, 1]: projections on the first three principal directions of all positions."""
    count, channels, height, width = values.shape
    rows = values.float().permute(0, 2, 3, 1).reshape(-1, channels)
    rows = rows - rows.mean(0)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    # The sign of a direction is arbitrary: let its largest entry be positive.
    directions = directions[:3]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    projected: Any = F.pad(rows @ (directions * largest.sign()).T, (0, max(0, 3 - len(directions))))
    low, high = projected.quantile(0.02, dim=0), projected.quantile(0.98, dim=0)
    scaled = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return scaled.reshape(count, height, width, 3).permute(0, 3, 1, 2)
