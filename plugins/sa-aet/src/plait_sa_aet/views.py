"""The rescaled copies over which the attacks average their gradient (set-level guidance, SGA; kept by DRA and SA-AET).

Any callable ``(images [B, 3, H, W], randomness) → [V, B, 3, H, W]``, or a list of V batches, can take the place of
:class:`ScaledViews`; it has to be differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from plait_sa_aet.randomness import Randomness

Views = Callable[[Tensor, Randomness], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class ScaledViews:
    """The batch itself, then per scale: add noise, resize by the scale, clamp to [0, 1], resize back.

    The way back is not clamped, the first view has no noise.

    Args:
        scales: factors of height and width, each above 0; ``()`` gives the batch alone.
        noise_std: standard deviation of the noise, ≥ 0, images being in [0, 1].
        antialias: of the bicubic resize; the released attacks have none.

    Raises:
        ValueError: a number outside its range; when called, a scale that leaves no pixel.
    """

    scales: tuple[float, ...] = (0.5, 0.75, 1.25, 1.5)
    noise_std: float = 0.05
    antialias: bool = False

    def __post_init__(self) -> None:
        if not all(scale > 0 for scale in self.scales):
            raise ValueError(f"scales {self.scales}; each has to be above 0")
        if not self.noise_std >= 0:
            raise ValueError(f"noise_std {self.noise_std}; it has to be at least 0")

    def __call__(self, images: Tensor, rng: Randomness) -> Tensor:
        """[B, 3, H, W] → [1 + number of scales, B, 3, H, W]."""
        views = [images]
        height, width = images.shape[-2:]
        for scale in self.scales:
            small = int(scale * height), int(scale * width)
            if min(small) < 1:
                raise ValueError(f"scale {scale} leaves nothing of images of {height} × {width} pixels")
            noisy = images
            if self.noise_std > 0:
                noisy = images + rng.noise(images.shape, self.noise_std).to(images.device)
            resized = bicubic(noisy, small, antialias=self.antialias).clamp(0, 1)
            views.append(bicubic(resized, (height, width), antialias=self.antialias))
        return torch.stack(views)


def bicubic(images: Tensor, size: tuple[int, int], *, antialias: bool = False) -> Tensor:
    """Resize float32 [..., H, W] as ``torch.nn.functional.interpolate`` does, as a matrix per axis."""
    rows = _resizing_matrix(images.shape[-2], size[0], antialias, images.device)
    columns = _resizing_matrix(images.shape[-1], size[1], antialias, images.device)
    return rows @ images @ columns.T


@lru_cache(maxsize=64)
def _resizing_matrix(length: int, new_length: int, antialias: bool, device: torch.device) -> Tensor:
    """[new_length, length]: a linear map is known from what it makes of the unit vectors."""
    # In float32 like the images: interpolate rounds its sampling positions to the images' type.
    unit = torch.eye(length)[None, None]
    resized = F.interpolate(unit, size=(new_length, length), mode="bicubic", align_corners=False, antialias=antialias)
    return resized[0, 0].to(device)
