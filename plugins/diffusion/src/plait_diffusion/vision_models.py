"""Activations of any image model, by the paths of its modules: timm, transformers, the image tower of a CLIP model."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from plait.errors import nearest
from plait.optional import require
from torch import Tensor, nn

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Statistics = tuple[Sequence[float], Sequence[float]]


@attrs.frozen(eq=False)
class ImageTower:
    """A module and how it is called.

    Attributes:
        module: whose sub-modules are named.
        call: images [B, 3, size, size] in [0, 1] → whatever the model returns.
        size: side of the images that it takes.
        normalisation: what is done to images besides; None: nothing, or the model does it.
    """

    module: nn.Module
    call: Callable[[Tensor], Any]
    size: int
    normalisation: Statistics | None = None


def image_tower(model: nn.Module, size: int | None = None, normalisation: Statistics | None = None) -> ImageTower:
    """How to call a model; what is not given is taken from the model's own configuration.

    Raises:
        ValueError: it does not say which images it takes.
        TypeError: it is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch module, such as one of timm or transformers")
    if hasattr(model, "encode_image") and hasattr(model, "image_input"):  # an image-text model: it normalises by itself
        prefix = next(iter(getattr(model, "image_prefixes", ())), "").rstrip(".")
        return ImageTower(model.get_submodule(prefix), model.encode_image, size or model.image_input.size)
    facts: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config
    own = facts["input_size"][-1] if "input_size" in facts else getattr(config, "image_size", None)
    own = max(own) if isinstance(own, (tuple, list)) else own
    size = size or own
    if size is None:
        raise ValueError(f"a {type(model).__name__} does not say how large its images are; set image_size")
    statistics = normalisation or ((facts["mean"], facts["std"]) if "mean" in facts else IMAGENET if config else None)
    module = getattr(model, "vision_model", model)
    forward = module.forward_features if hasattr(module, "forward_features") else module
    return ImageTower(module, _normalised(forward, statistics), size, statistics)


def _normalised(forward: Callable[[Tensor], Any], statistics: Statistics | None) -> Callable[[Tensor], Any]:
    if statistics is None:
        return forward
    mean, std = (torch.tensor(tuple(values)).view(3, 1, 1) for values in statistics)
    return lambda images: forward((images - mean.to(images)) / std.to(images))


def load_vision_model(source: str, revision: str | None = None) -> nn.Module:
    """A pretrained image model: ``timm/NAME`` or ``hf-hub:NAME`` of timm, else a folder or name of transformers or timm.

    Raises:
        ValueError: the folder holds no such model.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json; give a folder that timm or transformers saved")
        if "architecture" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
            return require("timm").create_model(f"local-dir:{folder}", pretrained=True)
    elif source.startswith(("timm/", "hf-hub:")):
        name = source if source.startswith("hf-hub:") else f"hf-hub:{source}"
        return require("timm").create_model(name, pretrained=True)
    return require("transformers").AutoModel.from_pretrained(source, revision=revision)


def resolve_layers(tower: ImageTower, patterns: Sequence[str]) -> list[str]:
    """Paths of modules that match the patterns, in the order of the model; without patterns the last block of the longest chain.

    Raises:
        ValueError: nothing matches a pattern.
    """
    names = [name for name, _ in tower.module.named_modules() if name]
    if not patterns:
        chain = max(_chains(tower.module), key=lambda found: len(found), default=names)
        return [chain[-1]]
    chosen = set()
    for pattern in patterns:
        found = [name for name in names if _matches(name, pattern)]
        if not found:
            raise ValueError(
                f"the model has no module {pattern!r}{nearest(pattern, names)}; layers are paths of modules, * stands for one part"
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _chains(module: nn.Module) -> Iterator[list[str]]:
    """Blocks of one class that follow each other."""
    for name, part in module.named_modules():
        children = list(part.named_children()) if isinstance(part, (nn.ModuleList, nn.Sequential)) else []
        if len(children) > 1 and len({type(child) for _, child in children}) == 1:
            yield [".".join(filter(None, (name, child))) for child, _ in children]


@torch.no_grad()
def capture(tower: ImageTower, layers: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Outputs of modules: path → [B, C, h, w], or [B, C] for what has no positions; in the order of execution.

    Args:
        images: [B, 3, size, size] in [0, 1].

    Raises:
        ValueError: a module was not called; tokens that are no grid.
    """
    found: dict[str, Tensor] = {}
    channels_last = getattr(tower.module, "output_fmt", "") == "NHWC"

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if name not in found:
                found[name] = _to_map(_tensor(output, name), tower, len(images), name, channels_last)

        return hook

    handles = [tower.module.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        tower.call(images)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in layers if name not in found]:
        raise ValueError(f"module {missing[0]!r} is not called when the model sees an image; name another layer")
    return found


def _tensor(output: Any, name: str) -> Tensor:
    while not isinstance(output, Tensor):
        try:
            output = output[0]
        except (TypeError, KeyError, IndexError) as error:
            raise ValueError(
                f"module {name!r} returns a {type(output).__name__}, not a tensor; name another layer"
            ) from error
    return output


def _to_map(value: Tensor, tower: ImageTower, batch: int, name: str, channels_last: bool) -> Tensor:
    if value.ndim == 4:
        return value.permute(0, 3, 1, 2) if channels_last else value
    if value.ndim == 2:
        return value
    if value.ndim != 3:
        raise ValueError(
            f"module {name!r} gives shape {list(value.shape)}; [B, C, h, w], [B, tokens, C] or [B, C] is needed"
        )
    if value.shape[0] != batch and value.shape[1] == batch:  # sequence first
        value = value.transpose(0, 1)
    tokens = value.shape[1]
    side = _side(tower, tokens)
    if side is None:
        raise ValueError(
            f"the {tokens} tokens of {name!r} are no square grid with few others before it; name another layer"
        )
    # Class and register tokens stand first.
    return value[:, tokens - side**2 :].transpose(1, 2).reshape(batch, -1, side, side)


def _side(tower: ImageTower, tokens: int) -> int | None:
    patches = (m for m in tower.module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == m.stride != (1, 1))
    patch = next(patches, None)
    if patch is not None and tower.size // patch.kernel_size[0] <= math.isqrt(tokens):
        return tower.size // patch.kernel_size[0]
    side = math.isqrt(tokens)  # later stages have fewer tokens
    return side if side**2 == tokens else None
