"""Small inputs to try the methods on: the diffusion kit's small model, with a ControlNet, on a few digits."""

from __future__ import annotations

from typing import Any

import torch
from plait.testing import Example
from plait_diffusion import Backbone, FeatureSet, Origin, small_backbone, small_controlnet, warped_digits

LAYERS = ["up-level0-upsampler-out", "up-level1-upsampler-out"]
EXTRACTOR = {"gdf": {"layers": LAYERS, "batch_size": 4}}
CONTROL = {"extractor": EXTRACTOR, "control": "own", "control_image": "outlines"}


def model() -> Backbone:
    """Untrained, its ControlNet's last convolutions not zero, so that it changes something."""
    backbone = small_backbone([str(digit) for digit in range(10)], 0)
    control = small_controlnet(backbone.denoiser, 1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in control.named_parameters():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block")):
            parameter.data.normal_(0, 0.05, generator=generator)
    return backbone.with_components(controlnet=control)


def digits(count: int = 6) -> Any:
    """The first test digits."""
    return warped_digits()["test"].select(range(count))


def _on_images(**fields: Any) -> Example:
    data = digits()
    return Example(
        arguments={"model": model(), "data": data},
        fields=fields,
        random=True,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image"), "model": torch.nn.Linear(1, 1)},
    )


def extraction() -> Example:
    return _on_images(**CONTROL, num_draws=2, dtype="float32")


def guideline() -> Example:
    return _on_images(combinations=[{"content-shift": CONTROL}], timesteps=[400], num_steps=2, num_panels=1)


def score() -> Example:
    return _on_images(combinations=[{"content-shift": CONTROL}], num_panels=1)


def buckets(count: int = 8) -> dict[str, FeatureSet]:
    """Two sets of the same rows."""
    rows = digits(count)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        {"a": torch.randn(count, 6, 4, 4, generator=generator), "b": torch.randn(count, 2, 2, 2, generator=generator)}
        for _ in range(2)
    ]
    return {
        name: FeatureSet.of_tensors(rows, one, Origin(model="toy"))
        for name, one in zip(("plain", "control"), tensors, strict=True)
    }


def amalgamation() -> Example:
    sets = buckets()
    return Example(
        arguments={"model": None, "data": sets},
        fields={"fusion": "mean"},
        device=False,
        empty={"data": {name: one.select([]) for name, one in sets.items()}},
        wrong={"data": {"plain": sets["plain"], "control": sets["control"].only("a")}},
    )


def gate() -> Example:
    sets = buckets()
    return Example(
        arguments={"data": sets},
        fields={"num_steps": 3, "batch_size": 4, "hidden": 4},
        random=True,
        empty={"data": {name: one.select([]) for name, one in sets.items()}},
        wrong={"data": {"plain": sets["plain"], "control": sets["control"].only("a")}},
        outputs=lambda trained: trained.gate([torch.ones(1, 8, 4, 4), torch.zeros(1, 8, 4, 4)]),
    )
