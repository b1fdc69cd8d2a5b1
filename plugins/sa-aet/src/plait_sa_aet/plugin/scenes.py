"""``load-data: digit-scenes`` and ``load-model: scene-encoder``: the bed of the small-scale check."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import datasets
import torch
from plait import PlaitError, hookimpl
from plait.fields import doc, in_range, one_of
from plait_clip.model import ImageTextModel

from plait_sa_aet import scene_encoders, scenes


@attrs.frozen(kw_only=True)
class DigitScenes:
    """Scenes of two coloured digits with five captions each; needs no file. Splits: train, test."""

    num_train: int = attrs.field(
        default=4000, validator=in_range(1), metadata=doc("scenes of the 1,300 training digits")
    )
    num_test: int = attrs.field(default=150, validator=in_range(1), metadata=doc("scenes of the other 497 digits"))
    grey: tuple[float, float] = attrs.field(
        default=(0.1, 0.45), validator=in_range(0, 1), metadata=doc("range of the background's level, in [0, 1]")
    )
    opacity: float = attrs.field(
        default=0.5,
        validator=in_range(0, 1, low_open=True),
        metadata=doc("of the digits' paint; 1 covers the background"),
    )

    def __attrs_post_init__(self) -> None:
        if self.grey[0] > self.grey[1]:
            raise PlaitError(f"grey is {list(self.grey)}; give the lower level first")

    @hookimpl
    def load_data(self, run: Any) -> dict[str, datasets.Dataset]:
        train, test = scenes.digit_pools()
        return {
            "train": scenes.scenes(train, self.num_train, run.generator("train"), grey=self.grey, opacity=self.opacity),
            "test": scenes.scenes(test, self.num_test, run.generator("test"), grey=self.grey, opacity=self.opacity),
        }


@attrs.frozen(kw_only=True)
class SceneEncoder:
    """A small dual encoder for digit-scenes, with fresh weights; optimize: clip-contrastive trains it."""

    architecture: Literal["cnn", "vit", "convnet"] = attrs.field(
        default="cnn", validator=one_of("cnn", "vit", "convnet"), metadata=doc("image tower")
    )
    cone: float = attrs.field(
        default=2.0, validator=in_range(0), metadata=doc("weight of the direction that all features share; 0: none")
    )
    directions: Literal["per-tower", "per-encoder"] = attrs.field(
        default="per-tower",
        validator=one_of("per-tower", "per-encoder"),
        metadata=doc("whether images and texts share a direction each, or one together"),
    )

    @hookimpl
    def load_model(self, run: Any) -> ImageTextModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.derived_seed("weights"))
            model = scene_encoders.ARCHITECTURES[self.architecture](
                self.cone, one_direction=self.directions == "per-encoder"
            )
        return model.eval().to(run.device)
