"""``load-data: digit-scenes`` and ``load-model: scene-encoder``: toy data on which attacks are tried."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs
from plait import hookimpl
from plait.fields import field, in_range

if TYPE_CHECKING:
    import datasets
    from plait_clip import ImageTextModel


@attrs.frozen(kw_only=True)
class DigitScenes:
    """Scenes of two coloured digits with five captions each; needs no file. Splits: train, test."""

    num_train: int = field(4000, "scenes of the 1,300 training digits", in_range(1))
    num_test: int = field(150, "scenes of the other 497 digits", in_range(1))
    grey: tuple[float, float] = field((0.1, 0.45), "range of the background's level, in [0, 1]", in_range(0, 1))
    opacity: float = field(0.5, "of the digits' paint; 1 covers the background", in_range(0, 1, low_open=True))

    gives = "dataset"
    columns_made = ("image", "captions", "left", "left_colour", "right", "right_colour", "label")
    splits = ("train", "test")

    def __attrs_post_init__(self) -> None:
        if self.grey[0] > self.grey[1]:
            raise ValueError(f"grey is {list(self.grey)}; give the lower level first")

    @hookimpl
    def load_data(self, run: Any) -> dict[str, datasets.Dataset]:
        from plait_sa_aet import scenes

        train, test = scenes.digit_pools()
        return {
            "train": scenes.scenes(train, self.num_train, run.generator("train"), grey=self.grey, opacity=self.opacity),
            "test": scenes.scenes(test, self.num_test, run.generator("test"), grey=self.grey, opacity=self.opacity),
        }


@attrs.frozen(kw_only=True)
class SceneEncoder:
    """A small dual encoder for digit-scenes, with fresh weights; optimize: clip-contrastive trains it."""

    gives = "image-text-model"

    architecture: Literal["cnn", "vit", "convnet"] = field("cnn", "image tower")
    cone: float = field(2.0, "weight of the direction that all features share; 0: none", in_range(0))
    directions: Literal["per-tower", "per-encoder"] = field(
        "per-tower", "whether images and texts share a direction each, or one together"
    )

    @hookimpl
    def load_model(self, run: Any) -> ImageTextModel:
        import torch

        from plait_sa_aet import scene_encoders

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.derived_seed("weights"))
            model = scene_encoders.ARCHITECTURES[self.architecture](
                self.cone, one_direction=self.directions == "per-encoder"
            )
        return model.eval().to(run.device)
