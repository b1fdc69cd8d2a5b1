"""Run an image-to-image network over images of any size, tile by tile, without seams. Plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def run_tiled(
    network: Callable[[torch.Tensor], torch.Tensor],
    image: torch.Tensor,
    *,
    tile: int,
    overlap: int,
    scale: int,
    multiple_of: int,
    batch_size: int,
) -> torch.Tensor:
    """Restore one image in overlapping tiles that are blended linearly.

    The outer quarter of an overlap is not used and the tiles cross-fade over its middle half. A network
    whose output depends on inputs at most ``overlap // 4`` pixels away therefore gives what it gives for
    the whole image.

    Args:
        network: ``[N, 3, h, w]`` → ``[N, 3, h·scale, w·scale]``.
        image: float ``[3, H, W]``, on the device of the network.
        tile: side of a tile, in pixels; 0: the whole image at once.
        overlap: pixels that neighbouring tiles share, below ``tile``.
        multiple_of: tiles are padded (mirrored) to a multiple of this, and the result is cut back.
        batch_size: tiles that go through the network together.

    Returns:
        float32 ``[3, H·scale, W·scale]`` on the CPU.

    Raises:
        ValueError: the network returns another shape.
    """
    height, width = image.shape[1:]
    tops, lefts = _starts(height, tile, overlap), _starts(width, tile, overlap)
    tile_height, tile_width = (min(tile, height), min(tile, width)) if tile else (height, width)
    row_weights = _weights(tops, tile_height, height, overlap, scale)
    column_weights = _weights(lefts, tile_width, width, overlap, scale)
    result = torch.zeros(3, height * scale, width * scale)
    places = [(i, j) for i in range(len(tops)) for j in range(len(lefts))]
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        tiles = [image[:, tops[i] : tops[i] + tile_height, lefts[j] : lefts[j] + tile_width] for i, j in batch]
        outputs = _run_padded(network, torch.stack(tiles), scale, multiple_of).float().cpu()
        for (i, j), output in zip(batch, outputs, strict=True):
            top, left = tops[i] * scale, lefts[j] * scale
            blended = output * row_weights[i][:, None] * column_weights[j]
            result[:, top : top + tile_height * scale, left : left + tile_width * scale] += blended
    return result


def _run_padded(
    network: Callable[[torch.Tensor], torch.Tensor], tiles: torch.Tensor, scale: int, multiple_of: int
) -> torch.Tensor:
    height, width = tiles.shape[2:]
    below, right = -height % multiple_of, -width % multiple_of
    if below or right:
        # Mirroring needs more pixels than it adds.
        mode = "reflect" if below < height and right < width else "replicate"
        tiles = F.pad(tiles, (0, right, 0, below), mode=mode)
    outputs = network(tiles)
    expected = (len(tiles), 3, tiles.shape[2] * scale, tiles.shape[3] * scale)
    if not isinstance(outputs, torch.Tensor) or tuple(outputs.shape) != expected:
        found = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ValueError(f"the model returned {found} for an input of {tuple(tiles.shape)}; expected {expected}")
    return outputs[..., : height * scale, : width * scale]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one axis; the last one ends at the border, whatever it then overlaps."""
    if tile == 0 or tile >= length:
        return [0]
    starts = list(range(0, length - tile, tile - overlap))
    return [*starts, length - tile]


def _weights(starts: list[int], tile: int, length: int, overlap: int, scale: int) -> list[torch.Tensor]:
    """One weight vector a tile along one axis; at every pixel they sum to 1."""
    position = torch.arange(tile * scale, dtype=torch.float32) + 0.5
    rising = ((position / scale - overlap / 4) / max(overlap / 2, 1e-6)).clamp(0, 1)
    raw = []
    for start in starts:
        weight = torch.ones(tile * scale)
        if start > 0:
            weight = weight * rising
        if start + tile < length:
            weight = weight * rising.flip(0)
        raw.append(weight)
    total = torch.zeros(length * scale)
    for start, weight in zip(starts, raw, strict=True):
        total[start * scale : (start + tile) * scale] += weight
    return [weight / total[start * scale : (start + tile) * scale] for start, weight in zip(starts, raw, strict=True)]
