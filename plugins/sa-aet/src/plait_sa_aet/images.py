"""Images as the attacks take them, and as 8-bit files hold what they return."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def checked_images(images: Tensor) -> Tensor:
    """Images as float32.

    Raises:
        ValueError: integers, not [B, 3, H, W] with B ≥ 1, NaN, or values outside [0, 1]; names the image.
    """
    if not images.is_floating_point():
        raise ValueError(f"images of type {images.dtype}; give floats in [0, 1]")
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images of shape {tuple(images.shape)}; expected [B, 3, H, W] with at least one image")
    images = images.detach().float()
    wrong = (~((images >= 0) & (images <= 1))).flatten(1).any(dim=1).nonzero().flatten().tolist()  # NaN is in no range
    if wrong:
        image = images[wrong[0]]
        found = "NaN" if image.isnan().any() else f"values from {image.min():.3g} to {image.max():.3g}"
        raise ValueError(f"image {wrong[0]} of the batch has {found}; images have to lie in [0, 1]")
    return images


def quantize(
    images: Tensor, clean: Tensor, epsilon: float, mode: Literal["round", "floor", "none"] = "round"
) -> Tensor:
    """Images as 8-bit files hold them, still within epsilon of the clean ones.

    Args:
        images, clean: [B, 3, H, W] in [0, 1].
        mode: to the nearest level, to the one below, or leave the images as they are.

    Returns:
        float32, multiples of 1/255 nearest to the rounded images that lie in the ball; with epsilon 0 the clean
        images themselves.

    Raises:
        ValueError: unknown mode, or a ball smaller than one 8-bit level.
    """
    if mode not in ("round", "floor", "none"):
        raise ValueError(f"quantize {mode!r}; allowed are round, floor and none")
    if mode == "none":
        return images
    if epsilon == 0:
        return clean.clone()
    slack = 1e-4  # of a level: float32 cannot hold k/255
    if not 255 * epsilon > 1 - slack:
        raise ValueError(f"epsilon {epsilon:.5f} is below one 8-bit level (1/255); give more, or quantize 'none'")
    levels, center = 255 * images.double(), 255 * clean.double()
    levels = levels.round() if mode == "round" else (levels + slack).floor()
    lower = (center - 255 * epsilon - slack).ceil().clamp(min=0)
    upper = (center + 255 * epsilon + slack).floor().clamp(max=255)
    return (levels.clamp(lower, upper) / 255).float()
