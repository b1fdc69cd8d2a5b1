"""Small inputs on which ``plait check`` tries the methods."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from plait import Run
from plait.testing import Example
from plait_imaging.sources import Photos
from plait_imaging.transforms import GaussianBlur, Weathers

from plait_semiddm_weather.model import WeatherRestorer, new_scorer
from plait_semiddm_weather.settings import Architecture

TINY: dict[str, Any] = {
    "base_channels": 4,
    "channel_mult": (1,),
    "latent_dim": 4,
    "latent_embed_dim": 8,
    "mapping_layers": 1,
    "disc_base_channels": 4,
    "disc_num_layers": 3,
    "time_embed_dim": 8,
    "num_train_timesteps": 2,
}


def _weather(photo: str) -> Dataset:
    tiles = Photos(splits={"data": (photo,)}, tile_size=16, tiles_per_photo=4, layout="grid").load_data(Run())["data"]
    return Weathers().transform(tiles, Run())


def _restored(model: Any) -> torch.Tensor:
    """What a model makes of a few pixels."""
    image = torch.rand(1, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = model.restore(image, [0])
    return found


def training() -> Example:
    """Four pairs and four unlabelled tiles, three steps of each stage."""
    labelled = _weather("chelsea")
    data = {"labelled": labelled, "unlabelled": _weather("coffee")}
    return Example(
        arguments={"data": data},
        fields={
            **TINY,
            "crop_size": 16,
            "batch_size": 4,
            "num_steps_stage1": 3,
            "num_steps_stage2": 3,
            "ranker_steps": 2,
            "checkpoint_every": 1,
        },
        random=True,
        outputs=_restored,
        empty={"data": {**data, "labelled": labelled.select([])}},
        wrong={"data": labelled.remove_columns("target"), "model": torch.nn.Linear(3, 3)},
    )


def saved() -> Example:
    """The folder of a small model."""
    folder = Path(tempfile.mkdtemp(prefix="plait-example-"))
    WeatherRestorer(Architecture(**TINY)).save_pretrained(folder)
    return Example(arguments={}, fields={"path": str(folder)}, progress=False, device=False, outputs=_restored)


def scoring() -> Example:
    """Four tiles, dimmed, and a model with a scorer."""
    data = _weather("chelsea")
    model = WeatherRestorer(Architecture(**TINY))
    model.scorer = new_scorer("nss")
    return Example(
        arguments={"model": model, "data": {"dim": GaussianBlur().transform(data, Run())}, "reference": data},
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image"), "model": WeatherRestorer(Architecture(**TINY))},
    )


def restoring_first() -> Example:
    """A small image-text model and a small restorer."""
    from plait_clip import tiny_model

    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Example(
        arguments={"model": tiny_model(), "reference": WeatherRestorer(Architecture(**TINY)).eval()},
        progress=False,
        outputs=lambda model: model.encode_image(images).detach(),
        wrong={"model": torch.nn.Linear(2, 2), "reference": torch.nn.Linear(2, 2)},
    )


def restoring() -> Example:
    """Four tiles and a small model, two samples of each."""
    data = _weather("chelsea")
    return Example(
        arguments={"model": WeatherRestorer(Architecture(**TINY)), "data": data},
        fields={"num_samples": 2},
        random=False,
        keeps_rows=True,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image"), "model": torch.nn.Linear(3, 3)},
    )
