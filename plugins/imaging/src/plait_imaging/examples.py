"""Small inputs on which ``plait check`` tries the methods that its built-in digits are too small or too few for."""

from __future__ import annotations

import tempfile
from pathlib import Path

import plait
import torch
from datasets import Dataset
from plait import Run
from plait.testing import Example

from plait_imaging.images import map_images
from plait_imaging.sources import Photos
from plait_imaging.transforms import GaussianNoise


def _noisy() -> Dataset:
    tiles = Photos(splits={"test": ("chelsea", "coffee")}, tile_size=32).load_data(Run())["test"]
    return GaussianNoise().transform(tiles, Run())


def _folder(column: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="plait-example-"))
    for row in _noisy():
        row[column].save(folder / f"{row['name']}.png")
    return folder


def image_folder() -> Example:
    """Four PNG files."""
    return Example(arguments={}, fields={"folder": str(_folder("image"))}, device=False)


def image_pairs() -> Example:
    """Four noisy PNG files and their clean partners."""
    fields = {"inputs": str(_folder("image")), "targets": str(_folder("target"))}
    return Example(arguments={}, fields=fields, device=False)


def hf_dataset() -> Example:
    """A saved dataset of four tiles."""
    folder = Path(tempfile.mkdtemp(prefix="plait-example-")) / "tiles"
    _noisy().save_to_disk(folder)
    return Example(arguments={}, fields={"path": str(folder)}, progress=False, device=False)


def compose() -> Example:
    """Four tiles."""
    data = _noisy()
    return Example(
        arguments={"data": data},
        random=True,
        keeps_rows=True,
        device=False,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image")},
    )


def random_crops() -> Example:
    """Four tiles, two windows of each."""
    data = _noisy()
    return Example(
        arguments={"data": data},
        fields={"size": 8, "crops_per_image": 2},
        random=True,
        device=False,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image")},
    )


def residual_cnn() -> Example:
    """A tiny network."""
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Example(
        arguments={}, fields={"channels": 4, "num_layers": 2}, device=False, progress=False, outputs=lambda net: net(images)
    )  # fmt: skip


def restoration_network() -> Example:
    """Four noisy tiles and a convolution."""
    data = _noisy()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = plait.build_module(torch.nn.Conv2d, in_channels=3, out_channels=3, kernel_size=3, padding=1)
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Example(
        arguments={"model": model, "data": data},
        fields={"num_steps": 4, "batch_size": 2, "crop_size": 8},
        random=True,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("target"), "model": object()},
        outputs=lambda net: net(images),
    )


def torch_model() -> Example:
    """Four noisy tiles and a convolution, run in tiles of 16 pixels."""
    data = _noisy()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 3, 3, padding=1)
    return Example(
        arguments={"model": model, "data": data},
        fields={"tile": 16, "overlap": 8},
        keeps_rows=True,
        empty={"data": data.select([])},
        wrong={"model": torch.nn.Linear(3, 3), "data": data.remove_columns("image")},
    )


def psnr_ssim() -> Example:
    """Two restorations of four noisy tiles."""
    data = _noisy()
    dimmed = map_images(Run(), data, lambda image, row: image - image // 8, "dim")
    return Example(
        arguments={"data": {"noisy": data, "dimmed": dimmed}, "reference": data},
        device=False,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image"), "reference": data.select([1, 0, 2, 3])},
    )
