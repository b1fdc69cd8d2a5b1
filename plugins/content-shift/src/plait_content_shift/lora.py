"""Low-rank parts (LoRA) added to what modules compute; no weight is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch.nn.functional as F
from torch import Tensor, nn


@attrs.frozen(eq=False)
class LowRank:
    """What is added to the output of one module: ``scale · alpha / rank · up(down(x))``."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


LoraWeights = Mapping[str, Mapping[str, LowRank]]  # component → path of a module → its part


@contextmanager
def applied(components: Mapping[str, Any], weights: LoraWeights, scale: float) -> Iterator[None]:
    """While the context lasts, modules compute with their low-rank parts; after it nothing is left, also after an exception."""
    handles = []
    try:
        for root, parts in weights.items():
            for name, part in parts.items():
                module = components[root].get_submodule(name)
                handles.append(module.register_forward_hook(_hook(part, scale)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(part: LowRank, scale: float) -> Any:
    factor = scale * part.alpha / part.rank

    def add(module: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        if factor == 0:
            return output
        x = arguments[0]
        down, up = (weight.to(x.device, x.dtype) for weight in (part.down, part.up))
        if isinstance(module, nn.Conv2d):
            down = down if down.ndim == 4 else down[:, :, None, None]
            up = up if up.ndim == 4 else up[:, :, None, None]
            # The first half has the module's own window, unless the file reduces by 1×1 first.
            own = down.shape[2:] == module.weight.shape[2:]
            low = F.conv2d(x, down, stride=module.stride if own else 1, padding=module.padding if own else 0)
            added = F.conv2d(low, up, stride=1 if own else module.stride, padding=0 if own else module.padding)
        else:
            added = F.linear(F.linear(x, down.flatten(1)), up.flatten(1))
        return output + factor * added

    return add
