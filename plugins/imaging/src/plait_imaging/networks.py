"""Small restoration networks. Plain PyTorch."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualCNN(nn.Module):
    """Convolutions that predict what the enlarged image lacks.

    Zhang et al., "Beyond a Gaussian denoiser" (DnCNN, TIP 2017), without batch norms; with ``scale`` above 1 the last
    layer's channels become pixels (Shi et al., CVPR 2016), added to the bicubic enlargement. Fresh, it changes nothing
    but the size. A pixel of the result depends on inputs at most ``num_layers`` pixels away, and bicubic's two.

    Args:
        channels: of the hidden layers.
        num_layers: 3 × 3 convolutions.
        scale: the result is so many times as high and wide.
    """

    def __init__(self, channels: int = 32, num_layers: int = 6, scale: int = 1) -> None:
        super().__init__()
        if channels < 1 or num_layers < 2 or scale < 1:
            raise ValueError(
                f"channels {channels}, num_layers {num_layers}, scale {scale}; at least 1, 2 and 1 are needed"
            )
        self.channels, self.num_layers, self.scale = channels, num_layers, scale
        widths = [3, *[channels] * (num_layers - 1)]
        hidden = [
            part
            for before, after in itertools.pairwise(widths)
            for part in (nn.Conv2d(before, after, 3, padding=1), nn.ReLU())
        ]
        for part in hidden[::2]:
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
        last = nn.Conv2d(channels, 3 * scale**2, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.layers = nn.Sequential(*hidden, last)

    def forward(self, images: Tensor) -> Tensor:
        """Float ``[N, 3, H, W]`` in [0, 1] → ``[N, 3, H·scale, W·scale]``, not clipped."""
        details = F.pixel_shuffle(self.layers(images), self.scale)
        if self.scale == 1:
            return images + details
        enlarged = F.interpolate(images, scale_factor=self.scale, mode="bicubic", align_corners=False)
        return enlarged + details
