"""What a ControlNet is shown of an image: its edges."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from plait_diffusion import gradient_magnitude
from torch import Tensor

ControlImages = Callable[[Tensor], Tensor]


def has_exact_canny() -> bool:
    """Whether OpenCV is there, whose Canny the ControlNets were trained with."""
    return importlib.util.find_spec("cv2") is not None


def canny(images: Tensor, low: int = 100, high: int = 200) -> Tensor:
    """Canny edges [B, 3, H, W], 0 or 1, three equal channels, of images [B, 3, H, W] in [0, 1].

    With OpenCV exactly what the authors use (largest gradient of the channels, L1 norm, no blur). Without it scikit-image's
    on luminance, which is close: its gradient is smaller by a factor of 4, and its norm is L2.
    """
    levels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    edges = np.stack([_edges(image, low, high) for image in levels])
    return torch.from_numpy(edges).float()[:, None].expand(-1, 3, -1, -1).contiguous().to(images.device)


def _edges(image: np.ndarray, low: int, high: int) -> np.ndarray:
    if has_exact_canny():
        edges: np.ndarray = importlib.import_module("cv2").Canny(image, low, high) > 0
        return edges
    from skimage.feature import canny as approximate

    grey = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return approximate(grey, sigma=0, low_threshold=low / 4, high_threshold=high / 4)


def outlines(images: Tensor) -> Tensor:
    """Magnitude of the gradient, [B, 1, H, W] in [0, 1]: what the small ControlNet of the diffusion kit is trained with."""
    return gradient_magnitude(images)
