"""Degradations of datasets. Each keeps the clean image in column ``target``.

The result is rounded to 8 bit. A ``target`` that is there already stays: after ``rain`` and then
``jpeg`` it is still the clean photograph.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import attrs
import numpy as np
import torch
from datasets import Dataset
from plait import Run, hookimpl
from plait.fields import field, in_range, method_list_field

from plait_imaging import degradations
from plait_imaging.images import map_images, names, over_splits, sizes


def _pixels(image: torch.Tensor) -> np.ndarray:
    """uint8 ``[3, H, W]`` → float64 ``[H, W, 3]`` in [0, 1]."""
    return image.permute(1, 2, 0).numpy() / 255.0


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    """Float ``[H, W, 3]`` → ``[3, H, W]``."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@attrs.frozen(kw_only=True)
class _Degradation:
    """A degradation that needs nothing but the image."""

    def degrade(self, image: np.ndarray) -> np.ndarray:
        """One float image ``[H, W, 3]`` in [0, 1], degraded."""
        raise NotImplementedError

    @hookimpl
    def transform(self, data: Any, run: Run) -> Any:
        """The degraded data; ``target`` holds the image as it was."""

        def degrade(dataset: Dataset, split: str) -> Dataset:
            return map_images(
                run,
                dataset,
                lambda image, row: _tensor(self.degrade(_pixels(image))),
                f"{type(self).__name__} {split}".strip(),
                keep_source_as="target",
            )

        return over_splits(data, degrade)


@attrs.frozen(kw_only=True)
class _RandomDegradation:
    """A degradation that draws; what an image gets depends on its name, not on its place in the data."""

    first_seed: int | None = field(
        None,
        "image i, counted over all splits, draws with seed first_seed + i; without it, from run and name",
        in_range(0),
    )

    def degrade(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """One float image ``[H, W, 3]`` in [0, 1], degraded."""
        raise NotImplementedError

    @hookimpl
    def transform(self, data: Any, run: Run) -> Any:
        """The degraded data; ``target`` holds the image as it was."""
        earlier = 0

        def degrade(dataset: Dataset, split: str) -> Dataset:
            nonlocal earlier
            labels, offset = names(dataset), earlier
            earlier += len(dataset)

            def one(image: torch.Tensor, row: int) -> torch.Tensor:
                if self.first_seed is None:
                    generator = run.numpy_generator(f"{split}/{labels[row]}")
                else:
                    generator = np.random.default_rng(self.first_seed + offset + row)
                return _tensor(self.degrade(_pixels(image), generator))

            return map_images(run, dataset, one, f"{type(self).__name__} {split}".strip(), keep_source_as="target")

        return over_splits(data, degrade)


@attrs.frozen(kw_only=True)
class Rain(_RandomDegradation):
    """Synthetic rain: bright anti-aliased streaks screened over the image."""

    density: float = field(0.02, "share of pixels with a drop", in_range(0, 1))
    length: float = field(15.0, "length of a streak, in pixels", in_range(1))
    angle: float = field(80.0, "of the streaks, in degrees from the horizontal", in_range(-180, 180))
    strength: float = field(0.5, "largest opacity of a streak", in_range(0, 1))
    brightness: float = field(0.95, "level of a streak, in [0, 1]", in_range(0, 1))

    def degrade(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """One float image ``[H, W, 3]`` in [0, 1] with rain."""
        return degradations.add_rain(
            image, generator, self.density, self.length, self.angle, self.strength, self.brightness
        )


@attrs.frozen(kw_only=True)
class GaussianNoise(_RandomDegradation):
    """White normal noise."""

    sigma: float = field(25 / 255, "standard deviation, in [0, 1] units, e.g. 25/255", in_range(0))

    def degrade(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """One float image ``[H, W, 3]`` in [0, 1] with noise."""
        return degradations.add_gaussian_noise(image, generator, self.sigma)


@attrs.frozen(kw_only=True)
class PoissonGaussianNoise(_RandomDegradation):
    """Photon (Poisson) noise plus normal read noise."""

    peak: float = field(30.0, "photons counted at white; fewer is noisier", in_range(0, low_open=True))
    sigma: float = field(5 / 255, "standard deviation of the read noise, in [0, 1] units", in_range(0))

    def degrade(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """One float image ``[H, W, 3]`` in [0, 1] with noise."""
        return degradations.add_poisson_gaussian_noise(image, generator, self.peak, self.sigma)


@attrs.frozen(kw_only=True)
class GaussianBlur(_Degradation):
    """Convolution with a Gaussian; beyond its border the image is mirrored."""

    sigma: float = field(1.6, "standard deviation, in pixels", in_range(0, low_open=True))

    def kernel(self) -> np.ndarray:
        """The point-spread function, odd side, sum 1."""
        return degradations.gaussian_kernel(self.sigma)

    def degrade(self, image: np.ndarray) -> np.ndarray:
        """One float image ``[H, W, 3]`` in [0, 1], blurred."""
        return degradations.convolve(image, self.kernel())


@attrs.frozen(kw_only=True)
class MotionBlur(_Degradation):
    """Convolution with an anti-aliased line; beyond its border the image is mirrored."""

    length: float = field(9.0, "length of the line, in pixels", in_range(1))
    angle: float = field(30.0, "of the line, in degrees from the horizontal", in_range(-180, 180))

    def kernel(self) -> np.ndarray:
        """The point-spread function, odd side, sum 1."""
        return degradations.line_kernel(self.length, self.angle)

    def degrade(self, image: np.ndarray) -> np.ndarray:
        """One float image ``[H, W, 3]`` in [0, 1], blurred."""
        return degradations.convolve(image, self.kernel())


@attrs.frozen(kw_only=True)
class JPEG(_Degradation):
    """JPEG compression and back."""

    quality: int = field(30, "1 worst, 100 best", in_range(1, 100))
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = field("4:2:0", "of the colour channels")

    def degrade(self, image: np.ndarray) -> np.ndarray:
        """One float image ``[H, W, 3]`` in [0, 1], compressed."""
        return degradations.compress(np.round(image * 255).astype(np.uint8), self.quality, self.subsampling) / 255.0


@attrs.frozen(kw_only=True)
class Downsample(_Degradation):
    """Bicubic downsampling with anti-aliasing, as in super-resolution papers (MATLAB's imresize).

    Image and target are cut at the bottom and right to a multiple of ``factor`` first.
    """

    factor: int = field(4, "height and width are divided by this", in_range(2))

    @hookimpl
    def transform(self, data: Any, run: Run) -> Any:
        """The small images; ``target`` is the large one."""
        return super().transform(over_splits(data, lambda dataset, split: self._cut(dataset, run)), run)

    def degrade(self, image: np.ndarray) -> np.ndarray:
        """One float image ``[H, W, 3]`` in [0, 1], ``factor`` times smaller."""
        return degradations.downsample(image, self.factor)

    def _cut(self, dataset: Dataset, run: Any) -> Dataset:
        shapes = list(sizes(dataset))
        for name, shape in zip(names(dataset), shapes, strict=True):
            if min(shape) < self.factor:
                raise ValueError(f"image {name} is {shape[0]}×{shape[1]} pixels, smaller than factor {self.factor}")
        if all(height % self.factor == 0 and width % self.factor == 0 for height, width in shapes):
            return dataset
        cut = map_images(run, dataset, self._multiple, "cut")
        if "target" not in dataset.column_names:
            return cut
        if list(sizes(dataset, "target")) != shapes:
            raise ValueError(
                f"factor {self.factor} does not divide all images, and targets differ in size; downsample once, or crop"
            )
        return map_images(run, cut, self._multiple, "cut targets", column="target")

    def _multiple(self, image: torch.Tensor, row: int) -> torch.Tensor:
        height, width = (side - side % self.factor for side in image.shape[1:])
        return image[:, :height, :width]


@attrs.frozen(kw_only=True)
class Compose:
    """Several transforms one after the other, each with randomness of its own; 8-bit images in between."""

    transforms: tuple[Any, ...] = method_list_field(
        "transform", "the transforms, first to last", default=(GaussianBlur(), GaussianNoise(sigma=10 / 255), JPEG())
    )

    def __attrs_post_init__(self) -> None:
        if not self.transforms:
            raise ValueError("transforms is empty; list at least one, e.g. [{gaussian-blur: {sigma: 2}}, jpeg]")

    @hookimpl
    def transform(self, data: Any, run: Run) -> Any:
        """What the last transform returns."""
        for place, method in enumerate(self.transforms):
            data = method.transform(data, _child(run, str(place)))
        return data


def _child(run: Run, name: str) -> Run:
    """The same surroundings with random numbers of its own."""
    child = copy.copy(run)
    child.step = f"{run.step}/{name}"
    child._folder = run.folder / name
    return child
