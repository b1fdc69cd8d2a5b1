"""What a model is called with: one tensor, or a mapping of keyword arguments such as token columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]


def call(model: Any, inputs: Inputs) -> Any:
    """``model(inputs)``, or ``model(**inputs)`` for a mapping."""
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def count(inputs: Inputs) -> int:
    """The number of samples, along axis 0."""
    return len(inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())))


def take(inputs: Inputs, index: Tensor) -> Inputs:
    """The samples at ``index``, in its order."""
    if isinstance(inputs, Tensor):
        return inputs[index]
    return {name: value[index] for name, value in inputs.items()}


def placed(inputs: Inputs, device: torch.device | str, dtype: torch.dtype | None = None) -> Inputs:
    """Inputs on a device, floating-point ones in ``dtype`` (``None``: as they are)."""
    if not isinstance(inputs, Tensor):
        return {name: placed(value, device, dtype) for name, value in inputs.items()}
    return inputs.to(device, dtype if inputs.is_floating_point() else None)


def input_dtype(model: nn.Module) -> torch.dtype | None:
    """The type that a model wants its images in: that of its first weight; ``None`` where it converts them itself."""
    if any(hasattr(module, "encode_image") for module in model.modules()):
        return None
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def token_mask(inputs: Inputs, x: Tensor) -> Tensor | None:
    """Which of the tokens of ``x`` (B, S, …) are no padding, bool (B, S); ``None`` where ``inputs`` do not tell."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask.bool() if mask is not None and x.dim() > 2 and mask.shape == x.shape[:2] else None
