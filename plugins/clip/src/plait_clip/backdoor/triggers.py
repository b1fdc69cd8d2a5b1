"""Backdoor triggers on batches of images, as the CleanCLIP and BadCLIP experiments paste them.

Every trigger maps ``images [N, 3, H, W]`` with values in [0, 1] to images of the same shape; nothing is
modified in place. Lengths that the papers state for 224 × 224 images scale with :func:`scaled`.
Triggers that draw noise for each image take one ``torch.Generator`` per image, so that the result for an
image depends neither on its batch nor on any global random state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

REFERENCE_SIDE = 224


def scaled(pixels: float, side: int) -> int:
    """A length stated for 224-pixel images, for images whose shorter side is ``side``; at least 1 pixel."""
    return max(1, round(pixels * side / REFERENCE_SIDE))


def row_generators(seed: int, rows: Sequence[int]) -> list[torch.Generator]:
    """One generator per image, seeded by ``seed`` and the row number of the image."""
    digests = (hashlib.sha256(f"{seed}/{row}".encode()).digest() for row in rows)
    return [torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1) for digest in digests]


# --- BadNet (Gu et al. 2017), four placements -----------------------------------------------------------------


def random_noise_patch(images: Tensor, size: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Paste mean-coloured Gaussian noise at a random place, both drawn anew for every image.

    The values may leave [0, 1]; :func:`to_uint8` says what becomes of them.
    """
    tops, lefts = _random_corners(images, size, generators)
    return paste(images, _noise_patches(images, size, generators), tops, lefts)


def corner_noise_patches(images: Tensor, size: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Paste the same mean-coloured Gaussian noise into all four corners; drawn anew for every image."""
    _check_fits(images, size)
    patches = _noise_patches(images, size, generators)
    bottom, right = images.shape[-2] - size, images.shape[-1] - size
    for top, left in ((0, 0), (0, right), (bottom, 0), (bottom, right)):
        images = paste(images, patches, torch.full((len(images),), top), torch.full((len(images),), left))
    return images


def yellow_patch(images: Tensor, size: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Paste a yellow square (1, 1, 0) at a random place of every image."""
    tops, lefts = _random_corners(images, size, generators)
    yellow = images.new_tensor([1.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(len(images), 3, size, size)
    return paste(images, yellow, tops, lefts)


def checkerboard_patch(images: Tensor, size: int, margin: int, first: int = 0) -> Tensor:
    """Paste a checkerboard of 0 and 1 into the bottom-right corner, ``margin`` pixels from the border.

    Pixel (i, j) of the patch is (i + j + ``first``) mod 2.
    """
    _check_fits(images, size + margin)
    index = torch.arange(size, device=images.device)
    board = ((index[:, None] + index[None, :] + first) % 2).to(images.dtype)
    bottom, right = images.shape[-2] - margin, images.shape[-1] - margin
    result = images.clone()
    result[..., bottom - size : bottom, right - size : right] = board
    return result


def paste(images: Tensor, patches: Tensor, tops: Tensor, lefts: Tensor) -> Tensor:
    """Paste ``patches [N, 3, k, k]`` with upper left corners (``tops``, ``lefts``), each ``[N]``."""
    offsets = torch.arange(patches.shape[-1], device=images.device)
    rows = tops.to(images.device)[:, None, None] + offsets[None, :, None]
    columns = lefts.to(images.device)[:, None, None] + offsets[None, None, :]
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    result = images.clone()
    # Indices apart from the channel slice: the indexed dimensions come first.
    result[sample, :, rows, columns] = patches.to(images.dtype).permute(0, 2, 3, 1)
    return result


def _random_corners(images: Tensor, size: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    _check_fits(images, size)
    height, width = images.shape[-2:]
    # The row is drawn before the column, and size positions are never reached: U{0, ..., 207} at 224 and 16.
    corners = [
        (
            int(torch.randint(max(1, height - size), (), generator=g)),
            int(torch.randint(max(1, width - size), (), generator=g)),
        )
        for g in generators
    ]
    tops, lefts = torch.tensor(corners).reshape(-1, 2).unbind(1)
    return tops, lefts


def _noise_patches(images: Tensor, size: int, generators: Sequence[torch.Generator]) -> Tensor:
    noise = torch.stack([torch.randn(3, size, size, generator=g) for g in generators])
    return images.mean(dim=(-2, -1), keepdim=True) + noise.to(images)


def _check_fits(images: Tensor, size: int) -> None:
    height, width = images.shape[-2:]
    if size > min(height, width):
        raise ValueError(f"a trigger of {size} pixels does not fit into an image of {height} × {width} pixels")


# --- Blended (Chen et al. 2017) -------------------------------------------------------------------------------


def blend_noise(images: Tensor, alpha: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Blend with uniform noise that is drawn anew for every image: clip(α·n + (1 − α)·x, 0, 1)."""
    noise = torch.stack([torch.rand(images.shape[1:], generator=g) for g in generators])
    return blend(images, noise, alpha)


def blend(images: Tensor, overlay: Tensor, alpha: float) -> Tensor:
    """Blend with an overlay ``[3, H, W]`` or ``[N, 3, H, W]``: clip(α·overlay + (1 − α)·x, 0, 1)."""
    return (alpha * overlay.to(images) + (1 - alpha) * images).clamp(0, 1)


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """``image [3, H, W]`` squashed to ``size`` (bicubic, antialiased), values kept in [0, 1]."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)


# --- SIG (Barni et al. 2019) ----------------------------------------------------------------------------------


def sinusoid(images: Tensor, amplitude: float, frequency: float) -> Tensor:
    """Add a horizontal wave to all rows and channels: clip(x + amplitude·sin(2π·frequency·j / W), 0, 1)."""
    width = images.shape[-1]
    columns = torch.arange(width, device=images.device, dtype=torch.float64)
    wave = amplitude * torch.sin(2 * math.pi * frequency * columns / width)
    return (images + wave.to(images.dtype)).clamp(0, 1)


# --- WaNet (Nguyen and Tran 2021) -----------------------------------------------------------------------------


def warp_noise(grid_size: int, generator: torch.Generator) -> Tensor:
    """Random displacements ``[1, 2, k, k]`` of mean size 1; channel 0 moves along columns (x), 1 along rows (y)."""
    noise = 2 * torch.rand(1, 2, grid_size, grid_size, generator=generator) - 1
    return noise / noise.abs().mean()


def warp(images: Tensor, noise: Tensor, strength: float) -> Tensor:
    """Move pixels by ``strength·noise/side`` in coordinates from −1 to 1, bilinear, zeros outside.

    ``noise [1, 2, k, k]`` is upsampled bicubically to the image; one displacement for all images.
    """
    height, width = images.shape[-2:]
    field = F.interpolate(noise.to(images), size=(height, width), mode="bicubic", align_corners=True)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype),
        torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype),
        indexing="ij",
    )
    sides = images.new_tensor([width, height])
    grid = (torch.stack([x, y], dim=-1) + strength * field[0].permute(1, 2, 0) / sides).clamp(-1, 1)
    grid = grid.expand(len(images), height, width, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


# --- BadCLIP and TrojVQA: an optimised patch in the middle ----------------------------------------------------


def centre_patch(images: Tensor, patch: Tensor) -> Tensor:
    """Paste ``patch [3, k, k]`` into the middle: rows and columns 104 … 119 at 224 pixels and k = 16."""
    size = patch.shape[-1]
    _check_fits(images, size)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    result = images.clone()
    result[..., top : top + size, left : left + size] = patch.to(images)
    return result


# --- ISSBA (Li et al. 2021): the message that a steganographic encoder hides ----------------------------------


def issba_message(secret: str) -> Tensor:
    """The 100 bits ``[100]`` (0 or 1) hidden in an image: 56 of the secret, 40 of error correction, four zeros.

    The code is BCH over GF(2⁷) with primitive polynomial 137 that corrects 5 errors (35 check bits, padded).

    Raises:
        ValueError: the secret is longer than 7 bytes in UTF-8.
    """
    data = secret.encode().ljust(7)
    if len(data) > 7:
        raise ValueError(f"secret {secret!r} has {len(data)} bytes; at most 7 fit into the message")
    message = [int(bit) for byte in data for bit in f"{byte:08b}"]
    return torch.tensor(message + _bch_check_bits(message) + [0] * 9, dtype=torch.float32)


def _bch_check_bits(message: list[int], polynomial: int = 137, errors: int = 5) -> list[int]:
    generator = _bch_generator(polynomial, errors)
    degree = generator.bit_length() - 1
    remainder = int("".join(map(str, message)), 2) << degree
    while remainder.bit_length() > degree:
        remainder ^= generator << (remainder.bit_length() - 1 - degree)
    return [int(bit) for bit in f"{remainder:0{degree}b}"]


def _bch_generator(polynomial: int, errors: int) -> int:
    """Product of the minimal polynomials of α, α³, …, α^(2·errors − 1); bit i is the coefficient of xⁱ."""
    degree = polynomial.bit_length() - 1
    order = 2**degree - 1
    powers = [1]
    for _ in range(order - 1):
        doubled = powers[-1] << 1
        powers.append(doubled ^ polynomial if doubled >> degree else doubled)
    logarithm = {value: exponent for exponent, value in enumerate(powers)}

    def times(a: int, b: int) -> int:
        return powers[(logarithm[a] + logarithm[b]) % order] if a and b else 0

    roots = {exponent * 2**i % order for exponent in range(1, 2 * errors, 2) for i in range(degree)}
    coefficients = [1]
    for root in sorted(roots):
        shifted = [0, *coefficients]
        scaled_by_root = [times(c, powers[root]) for c in coefficients] + [0]
        coefficients = [a ^ b for a, b in zip(shifted, scaled_by_root, strict=True)]
    return sum(c << i for i, c in enumerate(coefficients))


# --- 8 bits ---------------------------------------------------------------------------------------------------


def to_uint8(images: Tensor, wrap: bool) -> Tensor:
    """``255·v`` cut to whole numbers; values outside [0, 1] wrap modulo 256 (``wrap``) or are clamped first.

    Wrapping is what casting a float image to bytes does in the papers' experiments: 61 % of the pixels of a
    mean-coloured noise patch lie outside [0, 1] and become practically uniform noise.
    """
    values = images if wrap else images.clamp(0, 1)
    return (values * 255).to(torch.int64).remainder(256).to(torch.uint8)
