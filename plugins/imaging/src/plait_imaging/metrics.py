"""PSNR and SSIM as the restoration literature computes them. PyTorch and scikit-image, float64."""

from __future__ import annotations

import math

import skimage  # whose large parts it imports when they are used
import torch

SSIM_WINDOW = 11


def luminance(image: torch.Tensor) -> torch.Tensor:
    """Y of ITU-R BT.601 in studio range: RGB ``[3, H, W]``, 0–255 → float64 ``[1, H, W]``, 16–235, not rounded."""
    red, green, blue = image.double()
    luma: torch.Tensor = 16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255
    return luma.clamp(0, 255)[None]


def crop_border(image: torch.Tensor, border: int) -> torch.Tensor:
    """Cut ``border`` pixels off each side of ``[C, H, W]``."""
    return image[:, border : image.shape[1] - border, border : image.shape[2] - border]


def psnr(image: torch.Tensor, target: torch.Tensor) -> float:
    """``10 log10(255² / MSE)`` in dB over all samples of ``[C, H, W]``, 0–255; infinite for equal images."""
    error = (image.double() - target.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error > 0 else math.inf


def ssim(image: torch.Tensor, target: torch.Tensor) -> float:
    """SSIM (Wang et al., IEEE TIP 13, 2004) of ``[C, H, W]``, 0–255, sides of at least 11 pixels.

    Gaussian window 11 × 11, σ = 1.5, positions where it lies inside the image, K = (0.01, 0.03), mean over
    channels and positions.
    """
    value = skimage.metrics.structural_similarity(
        image.double().numpy(),
        target.double().numpy(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        K1=0.01,
        K2=0.03,
        channel_axis=0,
    )
    return float(value)
