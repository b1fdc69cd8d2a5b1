"""Semantic correspondence: which point of one image is which point of another, by features, in PCK (Min et al., SPair-71k, 2019).

Points are (x, y) in pixels of the original images. Cells of a feature map are matched after bilinear upsampling to a finer
grid, which is never built: similarities are linear in the map, and the length of an interpolated vector follows from the
products of neighbouring cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from plait_vision import finite_loss
from torch import Tensor, nn


@attrs.frozen(kw_only=True, eq=False)
class Pair:
    """Two images with the same points marked.

    Attributes:
        source, target: names of the images.
        source_points, target_points: float32 [K, 2], (x, y) in pixels.
        source_size, target_size: height and width.
        target_box: (x0, y0, x1, y1) of the object in the target.
    """

    source: str
    target: str
    source_points: Tensor
    target_points: Tensor
    source_size: tuple[int, int]
    target_size: tuple[int, int]
    target_box: tuple[float, float, float, float]
    category: str = ""


def cells(points: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """Points (x, y) of an image of this (height, width) → flat numbers of cells of a side × side grid, rounded and clipped."""
    height, width = size
    scale = points.new_tensor([side / width, side / height])
    x, y = (points * scale).round().long().clamp(0, side - 1).unbind(1)
    return y * side + x


def points_of(numbers: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """The inverse of :func:`cells`: (x, y) in pixels of the image."""
    height, width = size
    return torch.stack([(numbers % side) * (width / side), (numbers // side) * (height / side)], 1).float()


def upsampled_norms(grid: Tensor, side: int) -> Tensor:
    """[C, h, w] → [side, side], the length of every vector of the map upsampled bilinearly, without building it."""
    grid = grid.float()
    right = torch.cat([grid[:, :, 1:], grid[:, :, -1:]], 2)
    down = torch.cat([grid[:, 1:], grid[:, -1:]], 1)
    diagonal = torch.cat([down[:, :, 1:], down[:, :, -1:]], 2)
    own, with_right, with_down = ((grid * other).sum(0) for other in (grid, right, down))
    with_diagonal, across = (grid * diagonal).sum(0), (right * down).sum(0)
    (y0, y1, v), (x0, x1, u) = (_around(side, cells_, grid.device) for cells_ in grid.shape[1:])
    v, u = v[:, None], u[None]
    corners = {(0, 0): (1 - v) * (1 - u), (0, 1): (1 - v) * u, (1, 0): v * (1 - u), (1, 1): v * u}
    ys, xs = (y0, y1), (x0, x1)
    total = sum(weight**2 * own[ys[a]][:, xs[b]] for (a, b), weight in corners.items())
    for a in (0, 1):
        total = total + 2 * corners[a, 0] * corners[a, 1] * with_right[ys[a]][:, x0]
        total = total + 2 * corners[0, a] * corners[1, a] * with_down[y0][:, xs[a]]
    total = total + 2 * corners[0, 0] * corners[1, 1] * with_diagonal[y0][:, x0]
    total = total + 2 * corners[0, 1] * corners[1, 0] * across[y0][:, x0]
    assert isinstance(total, Tensor)
    return total.clamp(min=0).sqrt()


def _around(size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    place = ((torch.arange(size, dtype=torch.float32, device=device) + 0.5) * (count / size) - 0.5).clamp(min=0)
    first = place.floor().long().clamp(max=count - 1)
    return first, (first + 1).clamp(max=count - 1), place - first


@torch.no_grad()
def match(source: Tensor, target: Tensor, pair: Pair, side: int) -> Tensor:
    """For every source point, the point of the target whose feature has the highest cosine: [K, 2] in pixels.

    Args:
        source, target: [C, h, w] feature maps.
        side: of the grid that both are upsampled to bilinearly.
    """
    wanted = cells(pair.source_points, pair.source_size, side).to(source.device)
    vectors = F.interpolate(source[None].float(), (side, side), mode="bilinear", align_corners=False)[0].flatten(1)
    vectors = F.normalize(vectors[:, wanted], dim=0)  # [C, K]
    similar = torch.einsum("ck,chw->khw", vectors, target.float())
    similar = F.interpolate(similar[None], (side, side), mode="bilinear", align_corners=False)[0]
    similar = similar / upsampled_norms(target, side).clamp(min=1e-12)
    return points_of(similar.flatten(1).argmax(1).cpu(), pair.target_size, side)


def correct(predicted: Tensor, pair: Pair, share: float = 0.1) -> tuple[Tensor, Tensor]:
    """Whether each predicted point is within ``share`` of the larger side of the image, and of the object's box."""
    distance = (predicted - pair.target_points).norm(dim=1)
    x0, y0, x1, y1 = pair.target_box
    return distance <= share * max(pair.target_size), distance <= share * max(x1 - x0, y1 - y0)


class Aggregation(nn.Module):
    """What is trained on top of frozen features: one 3×3 convolution without bias."""

    def __init__(self, channels: int, out_channels: int | None, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = nn.utils.skip_init(nn.Conv2d, channels, out_channels or channels, 3, padding=1, bias=False)
        bound = (9 * channels) ** -0.5  # torch's own start, Kaiming uniform with a = sqrt(5)
        with torch.no_grad():
            self.layer.weight.uniform_(-bound, bound, generator=generator)

    def forward(self, grid: Tensor) -> Tensor:
        """[B, C, h, w] → [B, C', h, w]."""
        return self.layer(grid)


def correspondence_loss(source: Tensor, target: Tensor, pair: Pair, temperature: float = 0.07) -> Tensor:
    """Cross-entropy of each point over all cells of the other image, both ways, averaged.

    Args:
        source, target: [C, g, g]. Only the rows of the points are multiplied, never all pairs of cells.
    """
    side = source.shape[-1]
    source, target = (F.normalize(grid.flatten(1), dim=0) for grid in (source, target))
    here = cells(pair.source_points, pair.source_size, side).to(source.device)
    there = cells(pair.target_points, pair.target_size, side).to(source.device)
    forth = F.cross_entropy(source[:, here].T @ target / temperature, there)
    back = F.cross_entropy(target[:, there].T @ source / temperature, here)
    return (forth + back) / 2


def train_aggregation(
    read: Callable[[str], Tensor],
    pairs: Sequence[Pair],
    channels: int,
    generator: torch.Generator,
    *,
    out_channels: int | None = None,
    learning_rate: float = 5e-4,
    weight_decay: float = 0.01,
    num_epochs: int = 2,
    pairs_per_epoch: int = 5000,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
    checkpoint: Any = None,
    track: Callable[..., Iterable[Any]] = iter,
    log: Callable[..., None] = lambda **values: None,
    save_every: int = 500,
) -> Aggregation:
    """Train on pairs, one a step, drawn anew for every epoch.

    Args:
        read: name of an image → its features [C, g, g].
        checkpoint: with ``load()`` and ``save(state)``; a run that was killed goes on with the same bits.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    model = Aggregation(channels, out_channels, generator).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    order = _order(len(pairs), num_epochs, pairs_per_epoch, generator)
    state = checkpoint.load() if checkpoint is not None else None
    begin = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    for step in track(range(begin, len(order))):
        pair = pairs[order[step]]
        source, target = model(torch.stack([read(pair.source), read(pair.target)]).to(device))
        loss = correspondence_loss(source, target, pair, temperature)
        value = finite_loss(loss, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log(step=step, loss=value)
        if checkpoint is not None and (step + 1) % save_every == 0:
            checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    return model.eval()


def _order(count: int, num_epochs: int, per_epoch: int, generator: torch.Generator) -> list[int]:
    epochs = [torch.randperm(count, generator=generator)[:per_epoch] for _ in range(num_epochs)]
    return torch.cat(epochs).tolist()


def score(
    read: Callable[[str], Tensor], pairs: Iterable[Pair], side: int, share: float = 0.1, model: nn.Module | None = None
) -> Iterator[tuple[Pair, Tensor, Tensor, Tensor]]:
    """(pair, predicted points, right by the image, right by the box) of every pair, by nearest neighbour."""
    for pair in pairs:
        grids = torch.stack([read(pair.source), read(pair.target)])
        if model is not None:
            with torch.no_grad():
                grids = model(grids)
        predicted = match(grids[0], grids[1], pair, side)
        yield pair, predicted, *correct(predicted, pair, share)
