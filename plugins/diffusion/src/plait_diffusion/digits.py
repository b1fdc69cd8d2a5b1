"""The small models' data: scikit-learn's digits, warped and enlarged to 16×16."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

SIDE = 16
TRAIN_ROWS = 1200
_ROTATION, _SHIFT, _SCALE = 0.26, 0.12, (0.85, 1.1)  # radians, half sides, factors


def warped_digits() -> dict[str, Any]:
    """``train`` (1200 rows) and ``test`` (597) of a fixed permutation: ``image`` (RGB, 16×16), ``label``; no download."""
    import datasets

    bunch = load_digits()
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(len(bunch.images), generator=draw)
    pixels = torch.from_numpy(bunch.images).float()[order].unsqueeze(1) / 16
    levels = (_warped(pixels, draw).clamp(0, 1) * 255).round().byte().squeeze(1).numpy()
    labels = torch.from_numpy(bunch.target)[order].tolist()
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    )

    def part(rows: slice) -> Any:
        pictures = [Image.fromarray(np.stack([level] * 3, axis=-1)) for level in levels[rows]]
        return datasets.Dataset.from_dict({"image": pictures, "label": labels[rows]}, features=features)

    return {"train": part(slice(TRAIN_ROWS)), "test": part(slice(TRAIN_ROWS, None))}


def _warped(pixels: Tensor, draw: torch.Generator) -> Tensor:
    """Each turned by up to 15°, shifted and scaled a little, and enlarged bilinearly in the same step."""
    count = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=draw)

    angle, scale = uniform(-_ROTATION, _ROTATION), uniform(*_SCALE)
    shift = torch.stack([uniform(-_SHIFT, _SHIFT), uniform(-_SHIFT, _SHIFT)], dim=1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2) / scale.view(
        -1, 1, 1
    )
    grid = F.affine_grid(torch.cat([turn, shift.unsqueeze(2)], dim=2), [count, 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
