"""LoRA files: peft's and diffusers' names (``unet.….lora_A.weight``, ``….lora.down.weight``) and kohya's
(``lora_unet_….lora_down.weight`` with ``….alpha``), linear layers and convolutions (LoCon).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.weights import read_weights
from torch import Tensor, nn

from plait_content_shift.lora import LoraWeights, LowRank

_PARTS = {
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".alpha": "alpha",
}  # fmt: skip
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
_ROOTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


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
