"""Images larger than the memory, or than what a network was trained on, tile by tile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tile_starts(length: int, tile: int, stride: int) -> list[int]:
    """0, stride, … along one axis, and the last tile at the border; the one start 0 where the tile covers all."""
    if tile >= length:
        return [0]
    starts = list(range(0, length - tile + 1, stride))
    return starts if starts[-1] == length - tile else [*starts, length - tile]


def hann(tile: int) -> Tensor:
    """Weights along one side of a tile: a raised cosine, above 0 everywhere."""
    positions = (torch.arange(tile, dtype=torch.float32) + 0.5) / tile
    return (torch.sin(torch.pi * positions) ** 2).clamp_min(1e-3)


def restore_tiled(
    restore: Callable[[Tensor, list[int]], Tensor],
    image: Tensor,
    tile: int,
    stride: int,
    *,
    average: bool = False,
    batch_size: int = 16,
) -> Tensor:
    """Restore overlapping tiles each by itself, and blend them.

    Args:
        restore: tiles ``[N, 3, h, w]`` and their numbers → restored tiles.
        image: ``[3, H, W]``.
        average: plain average of the overlaps, as released, instead of Hann weights.

    Raises:
        ValueError: ``stride`` is above ``tile``, so that gaps would be left.
    """
    if not 1 <= stride <= tile:
        raise ValueError(f"stride is {stride} and tile {tile}; allowed is 1 to {tile}")
    height, width = image.shape[1:]
    rows, columns = tile_starts(height, tile, stride), tile_starts(width, tile, stride)
    tall, wide = min(tile, height), min(tile, width)
    weight = torch.ones(tall, wide) if average else torch.outer(hann(tall), hann(wide))
    weight = weight.to(image.device)
    places = [(top, left) for top in rows for left in columns]
    total, weights = torch.zeros_like(image), torch.zeros_like(image[:1])
    for first in range(0, len(places), batch_size):
        numbers = list(range(first, min(first + batch_size, len(places))))
        tiles = [image[:, places[n][0] : places[n][0] + tall, places[n][1] : places[n][1] + wide] for n in numbers]
        for number, restored in zip(numbers, restore(torch.stack(tiles), numbers), strict=True):
            top, left = places[number]
            total[:, top : top + tall, left : left + wide] += weight * restored
            weights[:, top : top + tall, left : left + wide] += weight
    return total / weights
