"""LoRA files, and their low-rank parts added to what modules compute; no weight is touched.

Read are peft's and diffusers' names (``unet.….lora_A.weight``, ``….lora.down.weight``) and kohya's
(``lora_unet_….lora_down.weight`` with ``….alpha``), linear layers and convolutions (LoCon).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from plait.weights import read_weights
from torch import Tensor, nn

_PARTS = {
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".alpha": "alpha",
}  # fmt: skip
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
_ROOTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


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


def read_lora(path: Path | str, components: Mapping[str, Any]) -> LoraWeights:
    """The low-rank parts in a file, by component and module.

    Args:
        components: diffusers' names → modules that the file is for.

    Raises:
        ValueError: keys that belong to no module or do not make up pairs, all of them listed; parts of wrong shapes.
    """
    modules = {
        root: dict(components[root].named_modules()) for root in _ROOTS if isinstance(components.get(root), nn.Module)
    }
    kohya = {
        f"{prefix}{name.replace('.', '_')}": (root, name)
        for prefix, root in _KOHYA.items()
        for name in modules.get(root, {})
        if name
    }
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    unexpected = []
    for key, tensor in read_weights(path).items():
        place = _place(key, modules, kohya)
        if place is None:
            unexpected.append(key)
        else:
            root, name, part = place
            found.setdefault((root, name), {})[part] = tensor
    unexpected += [
        f"{root}.{name} (without {part})"
        for (root, name), parts in found.items()
        for part in ("down", "up")
        if part not in parts
    ]
    if unexpected or not found:
        listed = ", ".join(sorted(unexpected)[:6]) + (f" and {len(unexpected) - 6} more" if len(unexpected) > 6 else "")
        raise ValueError(
            f"{path} does not fit the model: {listed or 'it has no LoRA weights'}; give a LoRA of this very model"
        )
    weights: dict[str, dict[str, LowRank]] = {}
    for (root, name), parts in found.items():
        alpha = float(parts["alpha"]) if "alpha" in parts else float(parts["down"].shape[0])
        pair = LowRank(parts["down"], parts["up"], alpha)
        _check(pair, modules[root][name], f"{root}.{name}", path)
        weights.setdefault(root, {})[name] = pair
    return weights


def _place(
    key: str, modules: Mapping[str, Mapping[str, Any]], kohya: Mapping[str, tuple[str, str]]
) -> tuple[str, str, str] | None:
    for suffix, part in _PARTS.items():
        if not key.endswith(suffix):
            continue
        stem = key.removesuffix(suffix)
        if stem in kohya:
            return (*kohya[stem], part)
        stem = re.sub(r"(^|\.)base_model\.model\.", r"\1", stem)
        root, _, name = stem.partition(".")
        if root in modules and name in modules[root]:
            return root, name, part
        if len(modules) == 1 and stem in next(iter(modules.values())):
            return next(iter(modules)), stem, part
    return None


def _check(part: LowRank, module: nn.Module, name: str, path: Path | str) -> None:
    weight = getattr(module, "weight", None)
    fits = (
        isinstance(module, (nn.Linear, nn.Conv2d))
        and weight is not None
        and part.down.shape[0] == part.up.shape[1]
        and part.down.shape[1] == weight.shape[1]
        and part.up.shape[0] == weight.shape[0]
    )
    if not fits:
        raise ValueError(
            f"{path} has parts {list(part.down.shape)} and {list(part.up.shape)} for {name}, a {type(module).__name__} with weight"
            f" {list(weight.shape) if weight is not None else []}; give a LoRA of this very model"
        )


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


def save_lora(weights: LoraWeights, path: Path) -> None:
    """Write in peft's names, with ``alpha``."""
    from safetensors.torch import save_file

    tensors = {}
    for root, parts in weights.items():
        for name, part in parts.items():
            tensors[f"{root}.{name}.lora_A.weight"] = part.down.contiguous()
            tensors[f"{root}.{name}.lora_B.weight"] = part.up.contiguous()
            tensors[f"{root}.{name}.alpha"] = torch.tensor(part.alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
