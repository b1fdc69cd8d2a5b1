"""Weak and strong augmentation (sections 2.6 and 2.8); random numbers come from a ``torch.Generator`` on the CPU."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Strength = Literal["none", "mild", "official"]
GREY = torch.tensor([0.299, 0.587, 0.114])
BLUR_KERNELS, BLUR_SHARES = (1, 3, 5), (0.40, 0.41, 0.19)


def random_crop(images: tuple[Tensor, ...], size: int, random: torch.Generator) -> tuple[Tensor, ...]:
    """The same ``size × size`` window of each ``[3, H, W]``, flipped left to right with probability 1/2.

    Raises:
        ValueError: the images are smaller.
    """
    check_crop(images[0], size)
    height, width = images[0].shape[1:]
    top = int(torch.randint(height - size + 1, (), generator=random))
    left = int(torch.randint(width - size + 1, (), generator=random))
    flip = bool(torch.rand((), generator=random) < 0.5)
    crops = tuple(image[:, top : top + size, left : left + size] for image in images)
    return tuple(crop.flip(-1) for crop in crops) if flip else crops


def check_crop(image: Tensor, size: int) -> None:
    """Raises:
    ValueError: ``image`` is smaller than ``size`` in height or width.
    """
    height, width = image.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"an image is {height}×{width} pixels and crop_size {size}; lower crop_size or leave it out")


def strong(images: Tensor, strength: Strength, random: torch.Generator) -> Tensor:
    """``[B, 3, H, W]`` in [0, 1], each image changed by numbers of its own; the geometry stays.

    ``mild``: contrast × U(.85, 1.15) and noise of σ up to .02. ``official``: colour jitter (brightness, contrast and
    saturation .5, hue .25) with p = .8, grey with p = .2, Gaussian blur with p = .5.
    """
    if strength == "none":
        return images
    changed = [_mild(image, random) if strength == "mild" else _official(image, random) for image in images]
    return torch.stack(changed).clamp(0, 1)


def _uniform(low: float, high: float, random: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=random))


def _mild(image: Tensor, random: torch.Generator) -> Tensor:
    mean = image.mean()
    sigma = _uniform(0, 0.02, random)
    noise = torch.randn(image.shape, generator=random).to(image.device)
    return (image - mean) * _uniform(0.85, 1.15, random) + mean + sigma * noise


def _official(image: Tensor, random: torch.Generator) -> Tensor:
    if _uniform(0, 1, random) < 0.8:
        image = _jittered(image, random)
    if _uniform(0, 1, random) < 0.2:
        image = _grey(image).expand_as(image)
    if _uniform(0, 1, random) < 0.5:
        weights = torch.tensor(BLUR_SHARES)
        kernel = BLUR_KERNELS[int(torch.multinomial(weights, 1, generator=random))]
        image = _blurred(image, kernel, _uniform(0.1, 2, random))
    return image


def _grey(image: Tensor) -> Tensor:
    return (image * GREY.to(image.device)[:, None, None]).sum(dim=0, keepdim=True)


def _jittered(image: Tensor, random: torch.Generator) -> Tensor:
    factors = [_uniform(0.5, 1.5, random) for _ in range(3)]
    turn = _uniform(-0.25, 0.25, random)
    for change in torch.randperm(4, generator=random).tolist():
        if change == 0:
            image = image * factors[0]
        elif change == 1:
            mean = _grey(image).mean()
            image = (image - mean) * factors[1] + mean
        elif change == 2:
            grey = _grey(image)
            image = (image - grey) * factors[2] + grey
        else:
            image = turn_hue(image, turn)
        image = image.clamp(0, 1)
    return image


def turn_hue(image: Tensor, turn: float) -> Tensor:
    """The hue of ``[3, H, W]`` moved by ``turn`` of a full circle (HSV)."""
    high, low = image.amax(dim=0), image.amin(dim=0)
    span = (high - low).clamp_min(1e-8)
    red, green, blue = image
    sector = torch.where(
        high == red,
        (green - blue) / span,
        torch.where(high == green, 2 + (blue - red) / span, 4 + (red - green) / span),
    )
    hue = (sector / 6 + turn) % 1
    # HSV → RGB: a channel is high − (high − low) · clip(min(k, 4 − k), 0, 1), k = (n + 6 hue) mod 6, n = 5, 3, 1.
    k = (torch.tensor([5.0, 3.0, 1.0], device=image.device)[:, None, None] + 6 * hue) % 6
    return high - (high - low) * torch.minimum(k, 4 - k).clamp(0, 1)


def _blurred(image: Tensor, kernel: int, sigma: float) -> Tensor:
    if kernel == 1:
        return image
    offsets = torch.arange(kernel, dtype=torch.float32, device=image.device) - kernel // 2
    row = torch.exp(-0.5 * (offsets / sigma) ** 2)
    row = row / row.sum()
    pad = kernel // 2
    padded = F.pad(image[:, None], (pad, pad, pad, pad), mode="reflect")
    return F.conv2d(padded, torch.outer(row, row)[None, None])[:, 0]
