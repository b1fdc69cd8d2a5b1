"""Synthetic weather on photographs: haze, heavy rain, snow, raindrops on the lens. NumPy and SciPy only.

Images are float64 ``[H, W, 3]`` in [0, 1], depths ``[H, W]`` in [0, 1] with 0 near. Everything random comes from the
generator. Severity 1 is a usual scene, 0 no weather at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy  # whose large parts it imports when they are used

Depth = np.ndarray
Range = tuple[float, float]

# length, width and density of the streaks' layers; radius, density and opacity of the flakes'.
STREAKS = ((9.0, 0.9, 0.012), (15.0, 1.2, 0.006), (23.0, 1.6, 0.002))
FLAKES = ((0.7, 0.012, 0.6), (1.4, 0.003, 0.8), (2.6, 0.0006, 0.9))
DROPS_PER_PIXEL = 6 / 64**2


def guessed_depth(shape: tuple[int, int], generator: np.random.Generator) -> Depth:
    """Where no depth is known: far at the top and near at the bottom, and a quarter of smooth noise."""
    height, width = shape
    noise = scipy.ndimage.gaussian_filter(
        generator.standard_normal(shape), sigma=max(2.0, min(shape) / 8), mode="reflect"
    )
    spread = noise.max() - noise.min()
    smooth = (noise - noise.min()) / spread if spread > 0 else np.zeros(shape)
    ramp = np.linspace(1, 0, height)[:, None] if height > 1 else np.zeros((1, 1))
    result: Depth = 0.75 * np.broadcast_to(ramp, (height, width)) + 0.25 * smooth
    return result


def add_haze(
    image: np.ndarray,
    generator: np.random.Generator,
    severity: float = 1.0,
    *,
    depth: Depth | None = None,
    air_light: Range = (0.75, 0.95),
) -> np.ndarray:
    """``I = J e^{−β d} + A (1 − e^{−β d})`` with β = 1.2 · severity · U(.7, 1.3) and A ~ U(``air_light``), blue × 1.03."""
    return _veiled(image, generator, 1.2 * severity * generator.uniform(0.7, 1.3), depth, air_light)


def _veiled(
    image: np.ndarray, generator: np.random.Generator, beta: float, depth: Depth | None, air_light: Range
) -> np.ndarray:
    light = np.minimum(generator.uniform(*air_light) * np.array([1.0, 1.0, 1.03]), 1.0)
    depth = guessed_depth(image.shape[:2], generator) if depth is None else depth
    clear = np.exp(-beta * depth)[..., None]
    result: np.ndarray = np.clip(image * clear + light * (1 - clear), 0, 1)
    return result


def add_heavy_rain(
    image: np.ndarray,
    generator: np.random.Generator,
    severity: float = 1.0,
    *,
    depth: Depth | None = None,
    air_light: Range = (0.75, 0.95),
    angle: Range = (-0.35, 0.35),
) -> np.ndarray:
    """Three layers of streaks (``angle`` in radians from the vertical) screened over the image, then their veil.

    ``I = J + .75 S (1 − J)``, ``S = 1 − Π (1 − S_k)``; the veil is haze of β = .6 · severity, so streaks lie inside it.
    """
    if severity == 0:
        return image
    centre = generator.uniform(*angle)
    rest = np.ones(image.shape[:2])
    for length, width, density in STREAKS:
        kernel = _streak(length, width, centre + generator.uniform(-0.03, 0.03))
        impulses = _impulses(image.shape[:2], kernel.shape[0], density * severity, generator)
        gain = generator.uniform(0.4, 0.8) / kernel.max()
        rest *= 1 - np.clip(_spread(impulses, kernel) * gain, 0, 1)
    rainy = image + 0.75 * (1 - rest)[..., None] * (1 - image)
    return _veiled(rainy, generator, 0.6 * severity, depth, air_light)


def add_snow(
    image: np.ndarray,
    generator: np.random.Generator,
    severity: float = 1.0,
    *,
    depth: Depth | None = None,
    air_light: Range = (0.75, 0.95),
    angle: Range = (-0.35, 0.35),
) -> np.ndarray:
    """Three sizes of opaque flakes, blurred by their fall: ``I = J (1 − M) + C M``, then haze of β = .25 · severity."""
    if severity == 0:
        return image
    direction = generator.uniform(*angle)
    rest = np.ones(image.shape[:2])
    for radius, density, opacity in FLAKES:
        kernel = _flake(radius, direction)
        impulses = _impulses(image.shape[:2], kernel.shape[0], density * severity, generator)
        rest *= 1 - np.clip(_spread(impulses, kernel) / kernel.max(), 0, 1) * opacity
    colour = np.array([0.95, 0.97, 1.0]) * generator.uniform(0.9, 1)
    mask = (1 - rest)[..., None]
    return _veiled(image * (1 - mask) + colour * mask, generator, 0.25 * severity, depth, air_light)


def add_raindrops(image: np.ndarray, generator: np.random.Generator, severity: float = 1.0) -> np.ndarray:
    """Drops on the lens, at least one: inside each the scene stands on its head, small, blurred and a little lighter."""
    if severity == 0:
        return image
    height, width = image.shape[:2]
    count = max(1, int(generator.poisson(DROPS_PER_PIXEL * severity * height * width)))
    rows, columns = np.mgrid[:height, :width].astype(float)
    field = np.zeros((height, width))
    source_row, source_column, nearest = rows.copy(), columns.copy(), np.full((height, width), np.inf)
    for _ in range(count):
        top, left = generator.uniform(0, height), generator.uniform(0, width)
        radius, aspect = generator.uniform(2.5, 6.5), generator.uniform(0.9, 1.4)
        distance = ((rows - top) / (radius * aspect)) ** 2 + ((columns - left) / radius) ** 2
        field += np.exp(-1.5 * distance)
        here = distance < nearest
        nearest = np.where(here, distance, nearest)
        source_row = np.where(here, top - 2.5 * (rows - top), source_row)
        source_column = np.where(here, left - 2.5 * (columns - left), source_column)
    mask = scipy.ndimage.gaussian_filter(np.clip((field - 0.35) / 0.25, 0, 1), 0.7)[..., None]
    blurred = scipy.ndimage.gaussian_filter(image, (2, 2, 0), mode="reflect")
    places = np.stack([source_row, source_column])
    seen = [
        scipy.ndimage.map_coordinates(blurred[..., channel], places, order=1, mode="mirror") for channel in range(3)
    ]
    inside = np.stack(seen, axis=-1) * 0.85 + 0.12
    result: np.ndarray = np.clip(image * (1 - mask) + inside * mask, 0, 1)
    return result


Weather = Callable[..., np.ndarray]
WEATHERS: dict[str, Weather] = {
    "haze": add_haze,
    "rain": add_heavy_rain,
    "snow": add_snow,
    "raindrops": add_raindrops,
}


def _impulses(shape: tuple[int, int], margin: int, density: float, generator: np.random.Generator) -> np.ndarray:
    """Sparse points of weight U(0, 1], also around the image, from where they reach into it."""
    wide = (shape[0] + 2 * margin, shape[1] + 2 * margin)
    points: np.ndarray = (generator.random(wide) < density) * (1 - generator.random(wide))
    return points


def _spread(impulses: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    margin = kernel.shape[0]
    result: np.ndarray = scipy.signal.fftconvolve(impulses, kernel, mode="same")[margin:-margin, margin:-margin]
    return result


def _streak(length: float, width: float, angle: float) -> np.ndarray:
    """Gaussian across and flat along, ``angle`` from the vertical; square, odd side, largest value about 1."""
    half = math.ceil(length / 2 + 3 * width)
    rows, columns = np.mgrid[-half : half + 1, -half : half + 1].astype(float)
    along = rows * math.cos(angle) + columns * math.sin(angle)
    across = columns * math.cos(angle) - rows * math.sin(angle)
    ends = np.clip(length / 2 + 0.5 - np.abs(along), 0, 1)
    result: np.ndarray = np.exp(-0.5 * (across / (width / 2)) ** 2) * ends
    return result


def _flake(radius: float, direction: float) -> np.ndarray:
    """A Gaussian of ``radius``, moved by 2 + 3 · radius pixels."""
    half = math.ceil(4 * radius + 2 + 3 * radius)
    point = np.zeros((2 * half + 1, 2 * half + 1))
    point[half, half] = 1
    flake = scipy.ndimage.gaussian_filter(point, radius)
    path = _streak(2 + 3 * radius, 0.5, direction)
    result: np.ndarray = scipy.signal.fftconvolve(flake, path, mode="same")
    return result
