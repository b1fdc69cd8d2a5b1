"""How classification heads travel: an encoder with one head per task.

An expert is a :class:`MultiTaskModel` with a head for its task, or a classifier whose head is found by its name
(:func:`~plait_wemoe.heads.head_places`), or an image-text model (:mod:`plait_wemoe.clip`). The encoders are merged;
every task keeps the head of its own expert. Modules without any such head are merged whole: what they
return are the logits of every task.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plait_wemoe.heads import CosineHead, Features, InnerHead, feature_tensor, head_places, logits_of, split_head
from plait_wemoe.inputs import Inputs, call
from plait_wemoe.mixture import WeightEnsemblingMoE
from plait_wemoe.storing import load_module, save_module


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

    def features(self, inputs: Inputs) -> Tensor:
        """Inputs of the model → (B, D), what enters the heads."""
        raise NotImplementedError

    def logits(self, inputs: Inputs, task: str) -> Tensor:
        """(B, C_task). Raises KeyError if there is no head for the task."""
        return logits_of(self._head(task), self.features, inputs)

    def _head(self, task: str) -> nn.Module:
        if task not in self.tasks:
            raise KeyError(f"there is no head for task {task!r}; heads are there for {', '.join(self.tasks)}")
        return self.heads[task]

    def logits_by_task(self, inputs: Inputs, places: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Task → logits of the samples at its ``places``; the whole batch goes through the model."""
        heads = {task: self._head(task) for task in places}
        inside = {task: self.logits(inputs, task) for task in places if isinstance(heads[task], InnerHead)}
        if len(inside) == len(places):
            return {task: inside[task][here] for task, here in places.items()}
        features = self.features(inputs)
        return {
            task: inside[task][here] if task in inside else heads[task](features[here]) for task, here in places.items()
        }

    @property
    def mixture(self) -> WeightEnsemblingMoE | None:
        """The part that routes, if this is a WEMoE."""
        return next((module for module in self.modules() if isinstance(module, WeightEnsemblingMoE)), None)


class MultiTaskModel(WithHeads):
    """An encoder, (B, …) → (B, D), with one head per task; ``model(inputs, task)`` gives logits."""

    stores_parts: ClassVar[bool] = True

    def __init__(self, encoder: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.set_heads(heads)

    def features(self, inputs: Inputs) -> Tensor:
        return feature_tensor(call(self.encoder, inputs))

    def forward(self, inputs: Inputs, task: str) -> Tensor:
        return self.logits(inputs, task)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write encoder/ (see :mod:`~plait_wemoe.storing`), the heads and config.json."""
        save_module(self.encoder, Path(folder) / "encoder")
        write_heads(self.heads, Path(folder), {})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        _, heads = read_heads(folder)
        return cls(load_module(Path(folder) / "encoder"), heads)


class IndividualModels(WithHeads):
    """Every task keeps its own expert: the upper bound that merging is measured against, T times the size."""

    stores_parts: ClassVar[bool] = True

    def __init__(self, encoders: Mapping[str, nn.Module], heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = tuple(encoders)
        self.encoders = nn.ModuleList(encoders.values())
        self.set_heads(heads)

    def encoder(self, task: str) -> nn.Module:
        """The task's own one. Raises KeyError if there is none."""
        if task not in self.names:
            raise KeyError(f"there is no expert for task {task!r}; experts are there for {', '.join(self.names)}")
        return self.encoders[self.names.index(task)]

    def logits(self, inputs: Inputs, task: str) -> Tensor:
        encoder = Features(self.encoder(task))
        return logits_of(self.heads[task], encoder, inputs)

    def forward(self, inputs: Inputs, task: str) -> Tensor:
        return self.logits(inputs, task)

    def save_pretrained(self, folder: str | Path) -> None:
        for index, encoder in enumerate(self.encoders):
            save_module(encoder, Path(folder) / f"encoder-{index}")
        write_heads(self.heads, Path(folder), {"names": self.names})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        config, heads = read_heads(folder)
        encoders = {name: load_module(Path(folder) / f"encoder-{i}") for i, name in enumerate(config["names"])}
        return cls(encoders, heads)


def with_heads(model: Any, tasks: Iterable[str]) -> WithHeads:
    """A model with a head per task; the head of a classifier that has but its own answers for all of ``tasks``.

    Raises:
        ValueError: a model without a head that is found by its name.
    """
    if isinstance(model, WithHeads):
        return model
    places = head_places(model) if isinstance(model, nn.Module) else ()
    if not places:
        raise ValueError(
            f"a {type(model).__name__} has no classification head that is known by its name; give a model with heads, as a "
            "merge returns it, or a classifier"
        )
    encoder, head = split_head(model, places)
    return MultiTaskModel(encoder, {task: copy.deepcopy(head) for task in tasks})


# ---------------------------------------------------------------------------------------------- files


def write_heads(heads: Mapping[str, nn.Module], folder: Path, config: dict[str, Any]) -> None:
    """config.json and the heads: cosine, linear and identity ones in heads.safetensors, others in head-<number>/."""
    tensors: dict[str, Tensor] = {}
    kinds = []
    folder.mkdir(parents=True, exist_ok=True)
    for index, head in enumerate(heads.values()):
        parts = list(head) if isinstance(head, InnerHead) else [head]
        about_parts = []
        for number, part in enumerate(parts):
            name = f"{index}.{number}" if isinstance(head, InnerHead) else f"{index}"
            kind = {CosineHead: "cosine", nn.Linear: "linear", nn.Identity: "identity"}.get(type(part), "module")
            about: dict[str, Any] = {"kind": kind}
            if kind == "module":
                save_module(part, folder / f"head-{name}")
            else:
                tensors |= {f"{name}.{key}": value.detach().cpu().clone() for key, value in part.state_dict().items()}
            if isinstance(part, CosineHead):
                about["scale"] = part.scale
            about_parts.append(about)
        kinds.append({"inner": isinstance(head, InnerHead), "parts": about_parts})
    save_file(tensors, folder / "heads.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "tasks": list(heads), "heads": kinds}, indent=1) + "\n")


def read_heads(folder: str | Path) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "heads.safetensors")
    heads: dict[str, nn.Module] = {}
    for index, (task, about) in enumerate(zip(config["tasks"], config["heads"], strict=True)):
        names = [f"{index}.{number}" for number in range(len(about["parts"]))] if about["inner"] else [f"{index}"]
        parts = [_read_head(folder, name, part, tensors) for name, part in zip(names, about["parts"], strict=True)]
        heads[task] = InnerHead(parts) if about["inner"] else parts[0]
    return config, heads


def _read_head(folder: Path, name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    if about["kind"] == "identity":
        return nn.Identity()
    if about["kind"] == "module":
        return load_module(folder / f"head-{name}")
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    if about["kind"] == "cosine":
        return CosineHead(weight, about["scale"])
    head = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    head.weight = nn.Parameter(weight)
    head.bias = None if bias is None else nn.Parameter(bias)
    return head
