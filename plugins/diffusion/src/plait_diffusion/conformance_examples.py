"""Small real inputs to try the kit's models and their training on."""

from __future__ import annotations

from typing import Any

import torch
from plait.demo.pictures import digits
from plait.testing import Example

from plait_diffusion.backbone import Backbone
from plait_diffusion.small import small_backbone


def _prediction(backbone: Backbone) -> Any:
    sample = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    with torch.no_grad():
        return backbone.denoise(sample, 50.0, backbone.condition(["3"], 16))


def load_model() -> Example:
    """The small fresh model."""
    return Example(arguments={"data": digits(3)}, random=True, progress=False, device=False, outputs=_prediction)


def load_data() -> Example:
    """Digits, which are the same for every seed."""
    return Example(arguments={}, progress=False, device=False)


def optimize() -> Example:
    """A few steps on a few digits."""
    data = digits(6)
    return Example(
        arguments={"model": small_backbone([str(digit) for digit in range(10)], 0), "data": data},
        fields={"num_steps": 4, "batch_size": 2, "checkpoint_every": 1},
        random=True,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image"), "model": object()},
        outputs=_prediction,
    )
