"""How classification heads travel: an encoder with one frozen head per task.

An expert is a :class:`MultiTaskModel` with a head for its task, or any module with a linear ``head``,
``classifier`` or ``fc`` on top, or an image-text model (:mod:`plait_wemoe.clip`). The encoders are merged;
every task keeps the head of its own expert. Modules without any such head are merged whole: what they
return are the logits of every task.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from plait_wemoe.upscaling import WEMoE, import_class

LINEAR_HEADS = ("head", "classifier", "fc")


class CosineHead(nn.Module):
    """scale · cos(features, class vector): zero-shot CLIP heads are of this kind. features (B, D) → (B, C)."""

    def __init__(self, weight: Tensor, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.scale = float(scale)

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.normalize(features.float(), dim=-1) @ F.normalize(self.weight.float(), dim=-1).T


class WithHeads(nn.Module):
    """What has :meth:`features` and a head per task can answer for every task.

    Attributes:
        tasks: names in the order of ``task_heads``.
    """

    tasks: tuple[str, ...]
    task_heads: nn.ModuleList

    def set_heads(self, heads: Mapping[str, nn.Module]) -> None:
        self.tasks = tuple(heads)
        self.task_heads = nn.ModuleList(heads.values())

    @property
    def heads(self) -> dict[str, nn.Module]:
        return dict(zip(self.tasks, self.task_heads, strict=True))

    def features(self, images: Tensor) -> Tensor:
        """Inputs of the model → (B, D)."""
        raise NotImplementedError

    def logits(self, images: Tensor, task: str) -> Tensor:
        """(B, C_task). Raises KeyError if there is no head for the task."""
        if task not in self.tasks:
            raise KeyError(f"there is no head for task {task!r}; heads are there for {', '.join(self.tasks)}")
        return self.heads[task](self.features(images))

    @property
    def mixture(self) -> WEMoE | None:
        """The part that routes, if this is a WEMoE."""
        return next((module for module in self.modules() if isinstance(module, WEMoE)), None)


class MultiTaskModel(WithHeads):
    """An encoder, (B, …) → (B, D), with one head per task; ``model(images, task)`` gives logits."""

    def __init__(self, encoder: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.set_heads(heads)

    def features(self, images: Tensor) -> Tensor:
        return feature_tensor(self.encoder(images))

    def forward(self, images: Tensor, task: str) -> Tensor:
        return self.logits(images, task)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write encoder/ by its own ``save_pretrained``, heads.safetensors and config.json."""
        folder = Path(folder)
        save_module(self.encoder, folder / "encoder")
        write_heads(self.heads, folder, {"encoder": class_path(self.encoder)})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        config, heads = read_heads(folder)
        return cls(import_class(config["encoder"]).from_pretrained(Path(folder) / "encoder"), heads)


class IndividualModels(WithHeads):
    """Every task keeps its own expert: the upper bound that merging is measured against, T times the size."""

    def __init__(self, encoders: Mapping[str, nn.Module], heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = tuple(encoders)
        self.encoders = nn.ModuleList(encoders.values())
        self.set_heads(heads)

    def logits(self, images: Tensor, task: str) -> Tensor:
        if task not in self.names:
            raise KeyError(f"there is no expert for task {task!r}; experts are there for {', '.join(self.names)}")
        return self.heads[task](feature_tensor(self.encoders[self.names.index(task)](images)))

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        for index, encoder in enumerate(self.encoders):
            save_module(encoder, folder / f"encoder-{index}")
        write_heads(self.heads, folder, {"encoders": [class_path(e) for e in self.encoders], "names": self.names})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        config, heads = read_heads(folder)
        encoders = [
            import_class(path).from_pretrained(Path(folder) / f"encoder-{index}")
            for index, path in enumerate(config["encoders"])
        ]
        return cls(dict(zip(config["names"], encoders, strict=True)), heads)


def feature_tensor(output: Any) -> Tensor:
    """(B, D) features from what an encoder returns: a tensor, or an output of transformers."""
    if isinstance(output, Tensor):
        return output
    for name in ("image_embeds", "pooler_output"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    raise TypeError(f"the encoder returns {type(output).__name__}; a tensor, image_embeds or pooler_output is needed")


def head_name(model: nn.Module) -> str | None:
    """Which attribute of :data:`LINEAR_HEADS` is the model's last linear layer."""
    return next((name for name in LINEAR_HEADS if isinstance(getattr(model, name, None), nn.Linear)), None)


def split_head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """A copy of a classifier without its last linear layer, and that layer."""
    name = head_name(model)
    if name is None:
        raise TypeError(f"{type(model).__name__} has no linear layer named {', '.join(LINEAR_HEADS)}")
    encoder = copy.deepcopy(model)
    head = getattr(encoder, name)
    setattr(encoder, name, nn.Identity())
    return encoder, head


# ---------------------------------------------------------------------------------------------- files


def class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}:{type(module).__qualname__}"


def save_module(module: nn.Module, folder: Path) -> None:
    if not hasattr(module, "save_pretrained") or not hasattr(type(module), "from_pretrained"):
        raise TypeError(
            f"{type(module).__name__} cannot be saved: it has no save_pretrained and from_pretrained; "
            "derive it from huggingface_hub.PyTorchModelHubMixin"
        )
    module.save_pretrained(folder)


def write_heads(heads: Mapping[str, nn.Module], folder: Path, config: dict[str, Any]) -> None:
    """heads.safetensors and config.json; a head is a CosineHead, an ``nn.Linear`` or an ``nn.Identity``."""
    tensors, scales = {}, []
    for index, head in enumerate(heads.values()):
        tensors |= {f"{index}.{name}": value.detach().cpu().clone() for name, value in head.state_dict().items()}
        scales.append(head.scale if isinstance(head, CosineHead) else None)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "heads.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "tasks": list(heads), "scales": scales}, indent=1) + "\n")


def read_heads(folder: str | Path) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    config = json.loads((Path(folder) / "config.json").read_text())
    tensors = load_file(Path(folder) / "heads.safetensors")
    heads: dict[str, nn.Module] = {}
    for index, (task, scale) in enumerate(zip(config["tasks"], config["scales"], strict=True)):
        weight, bias = tensors.get(f"{index}.weight"), tensors.get(f"{index}.bias")
        if weight is None:
            heads[task] = nn.Identity()
            continue
        if scale is not None:
            heads[task] = CosineHead(weight, scale)
            continue
        heads[task] = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
        heads[task].load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return config, heads


@torch.no_grad()
def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with these weights."""
    merged = copy.deepcopy(model)
    merged.load_state_dict(state)
    return merged
