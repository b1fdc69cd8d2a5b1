"""From [0, 1] images of any size to what an image tower expects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImageInput(nn.Module):
    """Resize, crop and normalise a batch; differentiable.

    Args:
        size: side of the square that the image tower takes, in pixels.
        mean, std: per channel, of images in [0, 1].
        resize: ``"crop"`` brings the shorter side to ``size`` and crops the centre, ``"squash"``
            ignores the aspect ratio. Images of ``size`` × ``size`` pass unchanged.
        interpolation: ``"bicubic"`` or ``"bilinear"``, both with antialiasing.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        resize: str = "crop",
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        if resize not in ("crop", "squash") or interpolation not in ("bicubic", "bilinear"):
            raise ValueError(
                f"resize {resize!r}, interpolation {interpolation!r}; allowed are crop or squash, bicubic or bilinear"
            )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {mean} and std {std}: give three numbers each, std above 0")
        self.size = size
        self.resize = resize
        self.interpolation = interpolation
        self._mean, self._std = tuple(map(float, mean)), tuple(map(float, std))
        # No buffers: a model cast to bf16 would round them.
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def config(self) -> dict[str, Any]:
        """The arguments that make an equal object."""
        return {
            "size": self.size,
            "mean": list(self._mean),
            "std": list(self._std),
            "resize": self.resize,
            "interpolation": self.interpolation,
        }

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] → [N, 3, size, size], normalised."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)}; expected [N, 3, H, W]")
        images = self.to_size(images)
        if images.device not in self._on_device:
            mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self._mean, self._std))
            self._on_device[images.device] = (mean, std)
        mean, std = self._on_device[images.device]
        return (images - mean) / std

    def to_size(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, 3, size, size], still in [0, 1]."""
        height, width = images.shape[-2:]
        if (height, width) == (self.size, self.size):
            return images
        if self.resize == "squash":
            target = (self.size, self.size)
        else:
            scale = self.size / min(height, width)
            target = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
        if target != (height, width):
            images = F.interpolate(images, target, mode=self.interpolation, antialias=True, align_corners=False)
            images = images.clamp(0, 1)  # bicubic weights overshoot
        top, left = (target[0] - self.size) // 2, (target[1] - self.size) // 2
        return images[..., top : top + self.size, left : left + self.size]
