"""``load-model`` and ``restore``: saved models, and datasets restored by them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from datasets import Dataset
from plait import Run, hookimpl
from plait.fields import REQUIRED, field, in_range
from plait_imaging import names, over_splits, read_batches, to_float, write_images
from torch import Tensor

from plait_semiddm_weather.model import CONFIG, WeatherRestorer
from plait_semiddm_weather.released import load_released


@attrs.frozen(kw_only=True)
class LoadWeatherRestorer:
    """A saved SemiDDM-Weather model: a folder of save_pretrained, or a checkpoint of the released code."""

    gives = "restorer"

    path: Path = field(REQUIRED, "folder with config.json and model.safetensors, or a .pth of the released code")

    @hookimpl
    def load_model(self, run: Run) -> WeatherRestorer:
        """The model, on the CPU, in evaluation mode."""
        if self.path.is_dir():
            if not (self.path / CONFIG).is_file():
                raise ValueError(f"path {self.path} holds no {CONFIG}; give the folder of save_pretrained")
            return WeatherRestorer.from_pretrained(self.path)
        return load_released(self.path)


@attrs.frozen(kw_only=True)
class RestoreWeather:
    """Restores images with a SemiDDM-Weather model; several samples of each can be drawn."""

    takes = {"model": "restorer", "data": ("dataset", "clients")}
    columns_needed = ("image",)

    num_samples: int = field(
        1,
        "samples of an image; above 1, columns image_sample_0 … hold them, and every ensemble takes them",
        in_range(1),
    )
    weights: Literal["teacher", "student"] = field("teacher", "which network restores; the release tests the student")
    reduce: Literal["first", "mean"] = field("first", "column image: the first sample, or the mean of all")
    tile: int | None = field(None, "side of a tile, in pixels; without it the whole image at once", in_range(2))
    stride: int = field(16, "pixels from tile to tile", in_range(1))
    average: bool = field(False, "plain average where tiles overlap, as released, instead of Hann weights")
    batch_size: int = field(16, "samples or tiles at a time", in_range(1))
    first_seed: int | None = field(
        None,
        "image i, counted over all splits, draws with seed first_seed + i; without it, from run and name",
        in_range(0),
    )
    keep_float: bool = field(False, "also store unrounded images, which psnr-ssim with rounding: false then scores")

    def __attrs_post_init__(self) -> None:
        if self.tile is not None and self.stride > self.tile:
            raise ValueError(f"stride is {self.stride} and tile {self.tile}; a stride above the tile leaves gaps")

    @property
    def columns_made(self) -> tuple[str, ...]:
        return tuple(f"image_sample_{number}" for number in range(self.num_samples if self.num_samples > 1 else 0))

    @hookimpl
    def restore(self, model: Any, data: Any, run: Run) -> Any:
        """The data with every image restored; what an image gets depends on run, split and its name."""
        if not isinstance(model, WeatherRestorer):
            raise ValueError(f"model is a {type(model).__name__}; give one of semiddm-weather")
        before = model.device
        network = model.to(run.device)
        try:
            earlier = 0

            def restored(dataset: Dataset, split: str) -> Dataset:
                nonlocal earlier
                offset, earlier = earlier, earlier + len(dataset)
                return self._restored(network, dataset, split, offset, run)

            return over_splits(data, restored)
        finally:
            model.to(before)

    def _restored(self, model: WeatherRestorer, dataset: Dataset, split: str, offset: int, run: Run) -> Dataset:
        labels = names(dataset)

        def seed(row: int) -> int:
            if self.first_seed is not None:
                return self.first_seed + offset + row
            return run.derived_seed(f"{split}/{labels[row]}")

        def results() -> Iterator[Tensor]:
            rows = _of_one_size(dataset, max(1, self.batch_size // self.num_samples))
            done = 0
            for numbers, images in rows:
                samples = self._samples(model, images, [labels[n] for n in numbers], [seed(n) for n in numbers])
                for image in samples.transpose(0, 1):
                    chosen = image.mean(dim=0) if self.reduce == "mean" else image[0]
                    yield torch.cat([chosen[None], image]) if self.num_samples > 1 else chosen
                done += len(numbers)
                run.progress(f"images {split}".strip(), done, len(dataset))

        return write_images(run, dataset, results(), keep_float=self.keep_float, num_samples=self.num_samples)

    def _samples(self, model: WeatherRestorer, images: Tensor, labels: list[str], seeds: list[int]) -> Tensor:
        try:
            samples = model.restore(
                images.to(model.device),
                seeds,
                num_samples=self.num_samples,
                weights=self.weights,
                tile=self.tile,
                stride=self.stride,
                average=self.average,
                batch_size=self.batch_size,
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(f"image {labels[0]}: out of memory; set tile, or lower it or batch_size") from error
        except ValueError as error:
            raise ValueError(f"image {labels[0]}: {error}") from error
        return samples.cpu()


def _of_one_size(dataset: Dataset, most: int) -> Iterator[tuple[list[int], Tensor]]:
    """Row numbers and images ``[B, 3, H, W]`` in the rows' order, B at most ``most``."""
    numbers: list[int] = []
    held: list[Tensor] = []
    for rows, images in read_batches(dataset, "image", 1):
        if held and (len(held) == most or images[0].shape != held[0].shape):
            yield numbers, torch.stack(held)
            numbers, held = [], []
        numbers += rows
        held.append(to_float(images[0]))
    if held:
        yield numbers, torch.stack(held)
