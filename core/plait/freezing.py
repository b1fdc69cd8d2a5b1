"""Who trains a model thaws it."""

from __future__ import annotations

import copy
from typing import Any


def thawed(model: Any) -> Any:
    """The module itself where a weight of it learns; else a copy of it in which all do.

    Weights that are frozen beside others that learn stay frozen: that is somebody's choice.

    Raises:
        ValueError: the module has no weight that could learn.
    """
    weights = list(model.parameters())
    if any(weight.requires_grad for weight in weights):
        return model
    learning = [weight.is_floating_point() or weight.is_complex() for weight in weights]
    if not any(learning):
        raise ValueError(f"the model (a {type(model).__name__}) has no weights that could be trained")
    model = copy.deepcopy(model)
    for weight, learns in zip(model.parameters(), learning, strict=True):
        weight.requires_grad_(learns)
    return model
