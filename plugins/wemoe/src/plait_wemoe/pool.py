"""What arrives at a merge step, brought into one form: encoders to merge and a head per task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from plait_wemoe.columns import Column, Reading, column_of
from plait_wemoe.heads import has_places, head_places, socket_places, split_head, with_place_of_head
from plait_wemoe.mixture import WeightEnsemblingMoE
from plait_wemoe.states import State, buffer_names, check_states, state_like, state_of
from plait_wemoe.storing import Portable, check_storable, saves_itself
from plait_wemoe.tasks import IndividualModels, MultiTaskModel, WithHeads


@dataclass(frozen=True)
class Pool:
    """Encoders of one architecture, every task's own head, and what to return a merged encoder as.

    Attributes:
        heads: of the experts' tasks, and of any other task that the base has a head for.
        wrap: (merged encoder, heads) → model.
        unchanged: experts whose encoder is bitwise the base's.
    """

    base: nn.Module
    encoders: dict[str, nn.Module]
    heads: dict[str, nn.Module]
    wrap: Callable[[nn.Module, Mapping[str, nn.Module]], nn.Module]
    image_size: int | None
    unchanged: list[str]

    @property
    def base_state(self) -> State:
        return state_of(self.base)

    @property
    def states(self) -> dict[str, State]:
        return {task: state_like(self.base, encoder) for task, encoder in self.encoders.items()}

    @property
    def buffers(self) -> set[str]:
        return buffer_names(self.base)

    @property
    def task_heads(self) -> dict[str, nn.Module]:
        return {task: self.heads[task] for task in self.encoders}

    def merged(self, encoder: nn.Module) -> nn.Module:
        """The model to return, in evaluation mode; what could be trained in the base can be trained in it."""
        if isinstance(encoder, WeightEnsemblingMoE) and not isinstance(self.base, WeightEnsemblingMoE):
            trainable_like(self.base, encoder.backbone)
            encoder.routers.requires_grad_(True)
        else:
            trainable_like(self.base, encoder)
        model = self.wrap(encoder, self.heads)
        for head in self.heads.values():
            head.requires_grad_(True)
        return model.eval()

    def individual(self) -> IndividualModels:
        encoders = {task: copy.deepcopy(encoder) for task, encoder in self.encoders.items()}
        for task, encoder in encoders.items():
            trainable_like(self.encoders[task], encoder)
        return IndividualModels(encoders, {t: head.requires_grad_(True) for t, head in self.task_heads.items()}).eval()

    def to(self, device: torch.device) -> Pool:
        """The pool on a device; models that are elsewhere are copied, the caller's stay where they are."""
        return replace(
            self,
            base=_on(self.base, device),
            encoders={task: _on(encoder, device) for task, encoder in self.encoders.items()},
            heads={task: head.to(device) for task, head in self.heads.items()},
        )


def pool_of(
    base: Any,
    experts: Mapping[str, Any],
    class_names: Mapping[str, Sequence[str]],
    templates: Sequence[str] | str,
) -> Pool:
    """Take models apart into encoders and heads. Encoders are made of the caller's own tensors.

    Args:
        class_names: of image-text models' tasks; other models bring their heads along.

    Raises:
        ValueError, KeyError, TypeError: experts that cannot be merged, or have no head where others have one; a
            base that could not be stored.
    """
    if not experts:
        raise ValueError("there is no expert to merge; give at least one fine-tuned model")
    if isinstance(base, IndividualModels):
        raise TypeError("the base is several models (IndividualModels); give the one that the experts were made of")
    experts = {task: _of_task(model, task) for task, model in experts.items()}
    wrap: Callable[[nn.Module, Mapping[str, nn.Module]], nn.Module]
    if hasattr(base, "encode_image") and hasattr(base, "encode_tokens"):
        from plait_wemoe.clip import MergedImageText, head_for, tower_of

        heads = {task: head_for(model, task, class_names.get(task), templates) for task, model in experts.items()}
        encoder, encoders = tower_of(base), {task: tower_of(model) for task, model in experts.items()}
        wrap, size = MergedImageText, base.image_size
    else:
        for name, model in {"the base": base, **{f"expert {t!r}": model for t, model in experts.items()}}.items():
            if not isinstance(model, nn.Module):
                raise TypeError(f"{name} is a {type(model).__name__}; give a torch module")
        encoder, encoders, found = _without_heads(base, experts)
        wrap, size = MultiTaskModel if found else whole, getattr(encoder, "image_size", None)
        heads = found or {task: nn.Identity() for task in experts}
    if isinstance(base, WithHeads):
        heads = {**base.heads, **heads}
    check_storable(encoder)
    heads = {task: copy.deepcopy(head).requires_grad_(False) for task, head in heads.items()}
    states = {task: state_like(encoder, e) for task, e in encoders.items()}
    return Pool(encoder, encoders, heads, wrap, size, check_states(state_of(encoder), states))


def _of_task(model: Any, task: str) -> Any:
    """Of individual models, the one for the task."""
    if not isinstance(model, IndividualModels):
        return model
    return MultiTaskModel(model.encoder(task), {task: model.heads[task]})


def _without_heads(
    base: nn.Module, experts: Mapping[str, nn.Module]
) -> tuple[nn.Module, dict[str, nn.Module], dict[str, nn.Module]]:
    """Classifiers and models with a head per task apart from their heads; models without any are merged whole.

    Raises:
        ValueError: experts whose heads are in different places. KeyError: an expert without a head for its task where
            others have one; a base without the place, or one without a head that lacks more than it.
    """
    encoders, heads = {}, {}
    for task, model in experts.items():
        if isinstance(model, MultiTaskModel):
            if task not in model.tasks:
                raise KeyError(f"expert {task!r} has no head for its task; its heads are for {', '.join(model.tasks)}")
            encoders[task], heads[task] = model.encoder, model.heads[task]
        elif places := head_places(model):
            encoders[task], heads[task] = split_head(model, places)
    if not heads and not isinstance(base, MultiTaskModel):
        return base, dict(experts), {}
    if missing := [task for task in experts if task not in heads]:
        raise KeyError(
            f"expert {missing[0]!r}, a {type(experts[missing[0]]).__name__}, has no classification head, and other models have"
        )
    task, example = next(iter(encoders.items()))
    first = socket_places(example)
    for other, encoder in encoders.items():
        if (found := socket_places(encoder)) != first:
            there, here = (", ".join(places) or "outside it" for places in (found, first))
            raise ValueError(f"the head of expert {other!r} is {there}, that of another one {here}")
    if isinstance(base, MultiTaskModel):
        return base.encoder, encoders, heads
    base = with_place_of_head(base, example, first)
    if not has_places(base, first):
        raise KeyError(
            f"the base is of another architecture than its experts: it has no module {first[0]!r}, where their heads are"
        )
    return split_head(base, first)[0] if first else base, encoders, heads


def trainable_like(origin: nn.Module, model: nn.Module) -> None:
    """Let a model's parameters be trained that can be in the one it was made of; all, where that is frozen as a whole."""
    flags = {name: parameter.requires_grad for name, parameter in origin.named_parameters()}
    # A model that is frozen as a whole, for being a pre-trained one, says nothing about which weights may move.
    frozen = not any(flags.values())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and (frozen or flags.get(name, True)))


def whole(model: nn.Module, heads: Mapping[str, nn.Module]) -> nn.Module:
    """A model without heads is returned as it is, or in a wrapper that can save it."""
    return model if saves_itself(model) else Portable(model)


def _on(module: nn.Module, device: torch.device) -> nn.Module:
    here = all(value.device.type == device.type for value in module.state_dict().values())
    return module if here else copy.deepcopy(module).to(device)


def columns_of(data: Mapping[str, Any] | None, tasks: Sequence[str], reading: Reading) -> dict[str, Column]:
    """The unlabelled inputs of every task.

    Raises:
        KeyError: a task without data, or data of no task. ValueError: a task without samples.
    """
    if data is None or set(data) != set(tasks):
        missing = [task for task in tasks if task not in (data or {})]
        surplus = [task for task in data or {} if task not in tasks]
        what = f"no unlabelled data for task {missing[0]!r}" if missing else f"data {surplus[0]!r} belongs to no expert"
        raise KeyError(f"{what}; data needs the same names as experts: {', '.join(tasks)}")
    found = {}
    for task in tasks:
        try:
            found[task] = column_of(data[task], reading)
        except ValueError as error:
            raise ValueError(f"task {task!r}: {error}") from error
    return found


def label_names(data: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Names of classes that datasets declare; no label is read."""
    features = {task: getattr(part, "features", None) or {} for task, part in (data or {}).items()}
    return {task: list(f["label"].names) for task, f in features.items() if getattr(f.get("label"), "names", None)}
