"""Small real inputs to try the methods on."""

from __future__ import annotations

from typing import Any

from plait.demo.pictures import digits
from plait.testing import Example
from plait_diffusion import Backbone, FeatureSet, Origin, image_tensors, small_backbone
from plait_diffusion.toy_models import tiny_backbone

from plait_gdf.gdf import Extraction, gdf


def _small() -> Backbone:
    return small_backbone([str(digit) for digit in range(10)], 0)


def extraction() -> Example:
    """gdf and dift on the small model."""
    data = digits(5)
    return Example(
        arguments={"model": _small(), "data": data},
        fields={"layers": ["up-level0-upsampler-out", "up-level1-repeat0-vit-block0-cross-q"], "batch_size": 2},
        random=True,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image"), "model": object()},
    )


def dift() -> Example:
    """A block output at a late timestep."""
    example = extraction()
    fields: dict[str, Any] = {"batch_size": 2, "ensemble_size": 2, "image_size": 16}
    return Example(arguments=example.arguments, fields=fields, random=True, empty=example.empty, wrong=example.wrong)


def ddpm_seg() -> Example:
    """Decoder blocks of a tiny DDPM in pixel space."""
    data = digits(3)
    return Example(
        arguments={"model": tiny_backbone("ddpm"), "data": data},
        fields={"batch_size": 2, "blocks": [2, 5], "timesteps": [50, 150]},
        random=True,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image"), "model": object()},
    )


def noise_report() -> Example:
    """Properties of the small model's up stage."""
    data = digits(6)
    return Example(
        arguments={"model": _small(), "data": data},
        fields={"layers": ["up-level0-*-out", "unet-out"], "batch_size": 4, "draws": 2, "pictures": False},
        random=True,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image"), "model": object()},
    )


def ranking() -> Example:
    """Activations of 60 digits, ranked."""
    model, data = _small(), digits(60)
    layers = ("up-level0-repeat0-res-out", "up-level0-upsampler-out", "up-level1-upsampler-out")
    found = gdf(model, image_tensors(data, 16), extraction=Extraction(layers=layers))
    features = FeatureSet.of_tensors(data, found, Origin(model="small"))
    return Example(
        arguments={"data": features, "reference": features},
        fields={"num_labels": 30, "num_validation": 20, "against": {"legacy": list(layers[1:])}},
        random=True,
        device=False,
        wrong={"data": data},
    )
