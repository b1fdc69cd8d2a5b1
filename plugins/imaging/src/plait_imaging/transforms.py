"""Degradations of datasets. Each keeps the clean image in column ``target``.

The result is rounded to 8 bit. A ``target`` that is there already stays: after ``rain`` and then
``jpeg`` it is still the clean photograph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import attrs
import numpy as np
import torch
from datasets import Dataset
from plait import Run, hookimpl
from plait.contract import Declared, declared
from plait.fields import field, in_range, method_list_field

from plait_imaging import degradations, weather
from plait_imaging.images import DATA, ImageColumn, map_images, names, over_splits, read_batches, sizes, write_images


def _pixels(image: torch.Tensor) -> np.ndarray:
    """uint8 ``[3, H, W]`` → float64 ``[H, W, 3]`` in [0, 1]."""
    return image.permute(1, 2, 0).numpy() / 255.0


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    """Float ``[H, W, 3]`` → ``[3, H, W]``."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@attrs.frozen(kw_only=True)
class _Degradation:
    """A degradation that needs nothing but the image."""

    takes = {"data": DATA}
    gives = "data"
    columns_needed = ("image",)
    columns_made: ClassVar[tuple[str, ...]] = ("target",)

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

    takes = {"data": DATA}
    gives = "data"
    columns_needed: ClassVar[Any] = ("image",)
    columns_made: ClassVar[tuple[str, ...]] = ("target",)

    first_seed: int | None = field(
        None,
        "image i, counted over all splits, draws with seed first_seed + i; without it, from run and name",
        in_range(0),
    )

    def degrade(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """One float image ``[H, W, 3]`` in [0, 1], degraded."""
        raise NotImplementedError

    def beside(self, source: Dataset) -> ImageColumn | None:
        """Images of another column that matter, too."""
        return None

    def degrade_row(
        self, image: np.ndarray, generator: np.random.Generator, beside: ImageColumn | None, row: int
    ) -> np.ndarray:
        """The same where it depends on the row."""
        return self.degrade(image, generator)

    @hookimpl
    def transform(self, data: Any, run: Run) -> Any:
        """The degraded data; ``target`` holds the image as it was."""
        earlier = 0

        def degrade(dataset: Dataset, split: str) -> Dataset:
            nonlocal earlier
            labels, offset, beside = names(dataset), earlier, self.beside(dataset)
            earlier += len(dataset)

            def one(image: torch.Tensor, row: int) -> torch.Tensor:
                if self.first_seed is None:
                    generator = run.numpy_generator(f"{split}/{labels[row]}")
                else:
                    generator = np.random.default_rng(self.first_seed + offset + row)
                return _tensor(self.degrade_row(_pixels(image), generator, beside, row))

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


def _low_to_high(instance: Any, attribute: Any, value: tuple[float, float]) -> None:
    if len(value) != 2 or value[0] > value[1]:
        raise ValueError(f"{attribute.name} is {list(value)}; allowed is [low, high]")


def _range(default: tuple[float, float], text: str, low: float, high: float | None) -> Any:
    return field(default, f"{text}; drawn from [low, high]", attrs.validators.and_(in_range(low, high), _low_to_high))


@attrs.frozen(kw_only=True)
class _Weather(_RandomDegradation):
    """Weather in front of a photograph."""

    severity: tuple[float, float] = _range((0.8, 1.2), "1: a usual scene, 0: none", 0, None)

    def options(self, image: np.ndarray, beside: ImageColumn | None, row: int) -> dict[str, Any]:
        """More arguments of the degradation of a row."""
        return {}

    def kind(self, row: int) -> str:
        """Which weather a row gets."""
        raise NotImplementedError

    def degrade_row(
        self, image: np.ndarray, generator: np.random.Generator, beside: ImageColumn | None, row: int
    ) -> np.ndarray:
        """One float image ``[H, W, 3]`` in [0, 1] with weather."""
        severity = generator.uniform(*self.severity)
        known = _OPTIONS[self.kind(row)]
        options = {name: value for name, value in self.options(image, beside, row).items() if name in known}
        return weather.WEATHERS[self.kind(row)](image, generator, severity, **options)


_OPTIONS: dict[str, tuple[str, ...]] = {
    "haze": ("depth", "air_light"),
    "rain": ("depth", "air_light", "angle"),
    "snow": ("depth", "air_light", "angle"),
    "raindrops": (),
}


@attrs.frozen(kw_only=True)
class _Veil(_Weather):
    """Weather with a veil that grows with the distance."""

    air_light: tuple[float, float] = _range((0.75, 0.95), "brightness of the veil, in [0, 1]", 0, 1)
    depth: str | None = field(
        None, "column with depth maps as images, black near and white far; without it, far is up and some noise"
    )

    @property
    def columns_needed(self) -> tuple[str, ...]:
        """The image, and its depth map."""
        return ("image",) if self.depth is None else ("image", self.depth)

    def beside(self, source: Dataset) -> ImageColumn | None:
        """The depth maps."""
        return None if self.depth is None else ImageColumn(source, self.depth)

    def options(self, image: np.ndarray, beside: ImageColumn | None, row: int) -> dict[str, Any]:
        """Air light, and the depth of a row."""
        return {"air_light": self.air_light, "depth": None if beside is None else _depth(beside, row, image)}


def _depth(maps: ImageColumn, row: int, image: np.ndarray) -> np.ndarray:
    depth, (height, width) = maps[row], image.shape[:2]
    if tuple(depth.shape[1:]) != (height, width):
        raise ValueError(
            f"column {maps.name!r}, row {row} is {depth.shape[1]}×{depth.shape[2]} pixels and its image {height}×{width}; "
            "give depth maps of the images' sizes"
        )
    return depth.double().mean(dim=0).div(255).numpy()


@attrs.frozen(kw_only=True)
class Haze(_Veil):
    """Haze that thickens with the distance."""

    def kind(self, row: int) -> str:
        """Haze."""
        return "haze"


@attrs.frozen(kw_only=True)
class _Falling(_Veil):
    """Weather that falls."""

    angle: tuple[float, float] = _range((-0.35, 0.35), "of the fall, in radians from the vertical", -1.5, 1.5)

    def options(self, image: np.ndarray, beside: ImageColumn | None, row: int) -> dict[str, Any]:
        """Air light, depth and angle."""
        return {**super().options(image, beside, row), "angle": self.angle}


@attrs.frozen(kw_only=True)
class HeavyRain(_Falling):
    """Heavy rain: streaks of three sizes inside the veil that they make."""

    def kind(self, row: int) -> str:
        """Rain."""
        return "rain"


@attrs.frozen(kw_only=True)
class Snow(_Falling):
    """Snow: flakes of three sizes, and a thin veil."""

    def kind(self, row: int) -> str:
        """Snow."""
        return "snow"


@attrs.frozen(kw_only=True)
class Raindrops(_Weather):
    """Raindrops on the lens, at least one."""

    def kind(self, row: int) -> str:
        """Raindrops."""
        return "raindrops"


@attrs.frozen(kw_only=True)
class Weathers(_Falling):
    """Several weathers, image by image in turn; column ``weather`` says which."""

    columns_made = ("target", "weather")

    weathers: tuple[Literal["rain", "snow", "raindrops", "haze"], ...] = field(
        ("rain", "snow", "raindrops", "haze"), "which ones, in their turn"
    )

    def __attrs_post_init__(self) -> None:
        if not self.weathers:
            raise ValueError("weathers is empty; list at least one of rain, snow, raindrops, haze")

    def kind(self, row: int) -> str:
        """The weather of a row."""
        return self.weathers[row % len(self.weathers)]

    @hookimpl
    def transform(self, data: Any, run: Run) -> Any:
        """The degraded data; ``target`` holds the image as it was, ``weather`` what came over it."""

        def told(dataset: Dataset, split: str) -> Dataset:
            kept = dataset.remove_columns("weather") if "weather" in dataset.column_names else dataset
            return kept.add_column("weather", [self.kind(row) for row in range(len(dataset))])

        return over_splits(super().transform(data, run), told)


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
class RandomCrops:
    """Square windows of the images at random places, as rows of their own; ``NAME_0``, ``NAME_1`` …"""

    takes = {"data": DATA}
    gives = "data"
    columns_needed = ("image",)
    columns_made = ("name",)

    size: int = field(64, "side of a window, in pixels", in_range(1))
    crops_per_image: int = field(8, "windows of an image; they may overlap", in_range(1))
    least_contrast: float = field(
        0.06, "a window whose values have a smaller standard deviation (in [0, 1] units) is drawn again", in_range(0, 1)
    )

    @hookimpl
    def transform(self, data: Any, run: Run) -> Any:
        """The windows of ``image``, and the same of ``target`` where there is one."""
        return over_splits(data, lambda dataset, split: self._cropped(dataset, split, run))

    def _cropped(self, dataset: Dataset, split: str, run: Run) -> Dataset:
        labels = names(dataset)
        boxes: list[tuple[int, int]] = []
        for row, image in enumerate(run.track(_one_by_one(dataset, "image"), f"crops {split}".strip(), len(dataset))):
            generator = run.numpy_generator(f"{split}/{labels[row]}")
            boxes += [self._box(image, generator, labels[row]) for _ in range(self.crops_per_image)]
        rows = dataset.select([row for row in range(len(dataset)) for _ in range(self.crops_per_image)])
        if "name" in rows.column_names:
            rows = rows.remove_columns("name")
        numbered = [f"{label}_{number}" for label in labels for number in range(self.crops_per_image)]
        rows = rows.add_column("name", numbered)
        cut = write_images(run, rows, self._windows(dataset, "image", boxes))
        if "target" not in dataset.column_names:
            return cut
        if list(sizes(dataset, "target")) != list(sizes(dataset)):
            raise ValueError("targets differ in size from their images; crop before they are downsampled")
        return write_images(run, cut, self._windows(dataset, "target", boxes), column="target")

    def _box(self, image: torch.Tensor, generator: np.random.Generator, name: str) -> tuple[int, int]:
        height, width = image.shape[1:]
        if min(height, width) < self.size:
            raise ValueError(f"image {name} is {height}×{width} pixels; lower size, which is {self.size}")
        for _ in range(100):  # of a plain photograph, the last place is taken as it is
            top = int(generator.integers(height - self.size + 1))
            left = int(generator.integers(width - self.size + 1))
            window = image[:, top : top + self.size, left : left + self.size]
            if float(window.float().std(correction=0)) / 255 >= self.least_contrast:
                break
        return top, left

    def _windows(self, dataset: Dataset, column: str, boxes: list[tuple[int, int]]) -> Iterator[torch.Tensor]:
        for row, image in enumerate(_one_by_one(dataset, column)):
            for top, left in boxes[row * self.crops_per_image : (row + 1) * self.crops_per_image]:
                yield image[:, top : top + self.size, left : left + self.size]


def _one_by_one(dataset: Dataset, column: str) -> Iterator[torch.Tensor]:
    for _, images in read_batches(dataset, column, 1):
        yield from images


@attrs.frozen(kw_only=True)
class Compose:
    """Several transforms one after the other, each with randomness of its own; 8-bit images in between."""

    transforms: tuple[Any, ...] = method_list_field(
        "transform", "the transforms, first to last", default=(GaussianBlur(), GaussianNoise(sigma=10 / 255), JPEG())
    )

    def __attrs_post_init__(self) -> None:
        if not self.transforms:
            raise ValueError("transforms is empty; list at least one, e.g. [{gaussian-blur: {sigma: 2}}, jpeg]")

    @property
    def gives(self) -> str | None:
        """What it is given, where all parts give that."""
        return "data" if all(part.gives == "data" for part in self._parts()) else None

    @property
    def columns_needed(self) -> tuple[str, ...]:
        """What the parts need and no earlier one makes."""
        made: set[str] = set()
        needed: list[str] = []
        for part in self._parts():
            needed += [column for column in part.columns_needed.get("data", ()) if column not in made]
            made |= set(part.columns_made or ())
        return tuple(dict.fromkeys(needed))

    @property
    def columns_made(self) -> tuple[str, ...] | None:
        """What the last parts leave of what they make."""
        made: dict[str, None] = {}
        for part in self._parts():
            kept = made if part.columns_kept is None else [name for name in made if name in part.columns_kept]
            made = dict.fromkeys([*kept, *(part.columns_made or ())])
        return tuple(made)

    @property
    def columns_kept(self) -> tuple[str, ...] | None:
        """What every part keeps."""
        limits = [set(part.columns_kept) for part in self._parts() if part.columns_kept is not None]
        return tuple(sorted(set.intersection(*limits))) if limits else None

    def _parts(self) -> list[Declared]:
        return [declared(method, "transform") for method in self.transforms]

    @hookimpl
    def transform(self, data: Any, run: Run) -> Any:
        """What the last transform returns."""
        for place, method in enumerate(self.transforms):
            data = method.transform(data, run.child(str(place)))
        return data
