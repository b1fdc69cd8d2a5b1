"""``extract-feature: vision``: features of image models that are not diffusion models, in the same sets."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import attrs
import datasets
import torch
from plait import Run, hookimpl
from plait.errors import ConfigurationError
from plait.fields import field, in_range, path_or_name_field
from plait.fingerprints import fingerprint
from plait_vision import DATA
from torch import nn

from plait_diffusion.feature_sets import FeatureSet, Origin, image_tensors, write_features
from plait_diffusion.vision_models import capture, image_tower, load_vision_model, resolve_layers

_STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@attrs.frozen(kw_only=True)
class VisionFeatures:
    """Activations of any image model by the paths of its modules: timm, transformers, a CLIP model's image tower."""

    takes = {"data": DATA}
    gives = "feature-set"
    columns_needed = ("image",)

    source: str | None = path_or_name_field(
        None, "folder, name on the hub (timm/NAME: of timm, else of transformers); without it the step's model"
    )
    revision: str | None = field(None, "of a name on the hub")
    layers: tuple[str, ...] = field(
        (), "paths of modules, * for any one part (blocks.*); the last block of the longest chain"
    )
    image_size: int | None = field(None, "side that images are resized to; the model's own", in_range(1))
    mean: tuple[float, ...] | None = field(None, "of every channel, in [0, 1] units; the model's own, else ImageNet's")
    std: tuple[float, ...] | None = field(None, "of every channel; with mean", in_range(0, low_open=True))
    batch_size: int = field(16, "images at a time", in_range(1))
    precision: Literal["float32", "bfloat16"] = field("float32", "of the computation; bfloat16: mixed")
    dtype: Literal["float32", "float16", "bfloat16"] = field("float16", "of the stored features")

    def __attrs_post_init__(self) -> None:
        if (self.mean is None) != (self.std is None) or {len(v) for v in (self.mean, self.std) if v is not None} - {3}:
            raise ConfigurationError(f"mean is {self.mean} and std {self.std}; give three numbers each, or neither")

    @hookimpl
    def extract_feature(self, model: Any | None, data: Any, run: Run) -> FeatureSet | dict[str, FeatureSet]:
        """A feature set of the images in column ``image``, each resized to a square as a whole; of a mapping one each."""
        if (model is None) == (self.source is None):
            raise ValueError("give a model in from or a source in with, one of them")
        parts = data if isinstance(data, Mapping) else {"": data}
        for part in parts.values():
            if not isinstance(part, datasets.Dataset):
                raise ValueError(f"data is a {type(part).__name__}; give a dataset with images, or several by name")
        model = load_vision_model(self.source, self.revision) if self.source is not None else model
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"model is a {type(model).__name__}; give a torch module, such as one of timm or transformers"
            )
        used = copy.deepcopy(model).to(run.device).eval()
        statistics = (self.mean, self.std) if self.mean is not None and self.std is not None else None
        tower = image_tower(used, self.image_size, statistics)
        layers = resolve_layers(tower, self.layers)
        digest = fingerprint(model)
        origin = Origin(
            model=self.source or type(model).__name__,
            digest=digest,
            revision=self.revision,
            dtype=self.precision,
            more={"image_size": tower.size, "normalisation": tower.normalisation},
        )

        def compute(start: int, batch: datasets.Dataset) -> dict[str, torch.Tensor]:
            images = image_tensors(batch, tower.size).to(run.device)
            with torch.autocast(run.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                return capture(tower, layers, images)

        found = {
            name: write_features(
                run,
                self,
                part,
                origin,
                compute,
                batch_size=self.batch_size,
                dtype=_STORED[self.dtype],
                inputs=digest,
                description=f"features {name}".strip(),
            )
            for name, part in parts.items()
        }
        return found if isinstance(data, Mapping) else found[""]
