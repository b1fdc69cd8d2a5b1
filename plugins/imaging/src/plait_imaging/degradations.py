"""Degradations of one image: float64 arrays ``[H, W, 3]`` in [0, 1], plain NumPy and SciPy.

Nothing here knows about datasets; every random function takes its generator.
"""

from __future__ import annotations

import io
import math

import numpy as np
import scipy  # whose large parts it imports when they are used
from PIL import Image


def line_kernel(length: float, angle: float) -> np.ndarray:
    """Anti-aliased line segment through the centre, square, odd side, sum 1.

    Args:
        length: of the segment, in pixels.
        angle: in degrees from the horizontal, clockwise (the second axis points down).
    """
    size = 2 * math.ceil(length / 2 + 2) + 1
    centre = size // 2
    along = np.linspace(-length / 2, length / 2, max(200, math.ceil(4 * length)))
    y, x = centre + along * math.sin(math.radians(angle)), centre + along * math.cos(math.radians(angle))
    i, j = np.floor(y).astype(int), np.floor(x).astype(int)
    kernel = np.zeros((size, size))
    for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1)):
        np.add.at(kernel, (i + di, j + dj), (1 - abs(y - i - di)) * (1 - abs(x - j - dj)))
    result: np.ndarray = kernel / kernel.sum()
    return result


def gaussian_kernel(sigma: float) -> np.ndarray:
    """Gaussian with standard deviation ``sigma`` pixels, cut off at 4 of them, sum 1."""
    offsets = np.arange(-math.ceil(4 * sigma), math.ceil(4 * sigma) + 1)
    profile = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = np.outer(profile, profile)
    result: np.ndarray = kernel / kernel.sum()
    return result


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve each channel with an odd-sided kernel; beyond its border the image is mirrored."""
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = np.pad(image, ((rows, rows), (columns, columns), (0, 0)), mode="symmetric")
    result: np.ndarray = scipy.signal.fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))
    return result


def add_rain(
    image: np.ndarray,
    generator: np.random.Generator,
    density: float,
    length: float,
    angle: float,
    strength: float,
    brightness: float,
) -> np.ndarray:
    """Screen bright streaks over an image: ``x (1 − s) + brightness · s``.

    Drops fall on a share ``density`` of the pixels with weights U(0.4, 1); the line of ``length`` pixels
    through each drop, times 0.9 of that length and cut at 1, times ``strength`` is the opacity ``s``.
    """
    kernel = line_kernel(length, angle)
    margin = kernel.shape[0] - 1
    shape = (image.shape[0] + 2 * margin, image.shape[1] + 2 * margin)
    drops = (generator.random(shape) < density) * generator.uniform(0.4, 1, shape)
    streaks = scipy.signal.fftconvolve(drops, kernel, mode="same")[margin:-margin, margin:-margin] * length * 0.9
    opacity = np.clip(streaks, 0, 1)[..., None] * strength
    result: np.ndarray = image * (1 - opacity) + brightness * opacity
    return result


def add_gaussian_noise(image: np.ndarray, generator: np.random.Generator, sigma: float) -> np.ndarray:
    """Add independent normal noise of standard deviation ``sigma`` (in [0, 1] units) to every sample."""
    return image + sigma * generator.standard_normal(image.shape)


def add_poisson_gaussian_noise(
    image: np.ndarray, generator: np.random.Generator, peak: float, sigma: float
) -> np.ndarray:
    """Photon noise of a sensor that counts ``peak`` photons at white, then normal read noise ``sigma``."""
    return generator.poisson(image * peak) / peak + sigma * generator.standard_normal(image.shape)


def downsample(image: np.ndarray, factor: int) -> np.ndarray:
    """Bicubic downsampling with anti-aliasing as the restoration literature does it.

    Keys' kernel (a = −1/2) stretched by ``factor``, weights normalised to sum 1, borders mirrored:
    the conventions of MATLAB's ``imresize``. Height and width must be multiples of ``factor``.
    """
    rows = _resize_weights(image.shape[0], factor)
    columns = _resize_weights(image.shape[1], factor)
    result: np.ndarray = np.einsum("ih,hwc,jw->ijc", rows, image, columns, optimize=True)
    return result


def _resize_weights(length: int, factor: int) -> np.ndarray:
    """``[length / factor, length]``: row i holds the weights of the samples that make output i."""
    outputs = np.arange(length // factor)
    centres = (outputs + 0.5) * factor - 0.5
    taps = np.floor(centres[:, None]) + np.arange(-2 * factor, 2 * factor + 2)
    weights = _cubic((taps - centres[:, None]) / factor)
    weights /= weights.sum(axis=1, keepdims=True)
    mirrored = taps.astype(int) % (2 * length)
    mirrored = np.where(mirrored < length, mirrored, 2 * length - 1 - mirrored)
    matrix = np.zeros((len(outputs), length))
    np.add.at(matrix, (outputs[:, None], mirrored), weights)
    return matrix


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = −1/2 (IEEE Trans. ASSP 29, 1981)."""
    x = np.abs(x)
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0))


def compress(image: np.ndarray, quality: int, subsampling: str) -> np.ndarray:
    """uint8 ``[H, W, 3]`` → JPEG → uint8. ``subsampling`` of colour: 4:4:4, 4:2:2 or 4:2:0."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return np.array(Image.open(io.BytesIO(buffer.getvalue())))
