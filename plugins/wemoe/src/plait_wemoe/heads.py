"""Classification heads apart from their encoders: where a model's head is, and how another one takes its place.

A classifier is merged without its head. In its place sits a :class:`Socket`; for a call, the head of the task
that is asked for is put in (:class:`InnerHead`), so that what the model does before and after its head stays
the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait_wemoe.inputs import Inputs, call
from plait_wemoe.states import same_tensors, with_state

# Attributes that hold a classifier's head, in the order in which they are looked for; distilled transformers
# have two, whose answers the model averages.
HEAD_NAMES = (
    ("cls_classifier", "distillation_classifier"),
    ("head", "head_dist"),
    ("head",),
    ("classifier",),
    ("fc",),
    ("heads",),
    ("score",),
    ("classification_head",),
    ("last_linear",),
)
_PLUGGED: ContextVar[tuple[nn.Module, ...]] = ContextVar("plugged", default=())


class CosineHead(nn.Module):
    """scale · cos(features, class vector): zero-shot CLIP heads are of this kind. features (B, D) → (B, C)."""

    def __init__(self, weight: Tensor, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.scale = float(scale)

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.normalize(features.float(), dim=-1) @ F.normalize(self.weight.float(), dim=-1).T


class Socket(nn.Module):
    """The place of a head: what is plugged in for the call, or the identity.

    Attributes:
        own: the module that the model was built with; no part of the state, it only makes the model complete on disk.
    """

    def __init__(self, own: nn.Module, index: int) -> None:
        super().__init__()
        self._own = (own,)
        self.index = index

    @property
    def own(self) -> nn.Module:
        return self._own[0]

    def forward(self, x: Tensor) -> Tensor:
        plugged = _PLUGGED.get()
        return plugged[self.index](x) if plugged else x


class InnerHead(nn.ModuleList):
    """A head that answers from its place inside the model: one module for every socket."""

    def around(self, encoder: Callable[[Inputs], Any], inputs: Inputs) -> Tensor:
        """The model's logits (B, C) with this head in its place."""
        before = _PLUGGED.set(tuple(self))
        try:
            return feature_tensor(encoder(inputs))
        finally:
            _PLUGGED.reset(before)


def logits_of(head: Callable[[Tensor], Tensor], encoder: Callable[[Inputs], Any], inputs: Inputs) -> Tensor:
    """``head(encoder(inputs))``; a head inside the encoder answers from there."""
    return head.around(encoder, inputs) if isinstance(head, InnerHead) else head(encoder(inputs))


def feature_tensor(output: Any) -> Tensor:
    """(B, D) features or (B, C) logits from what a model returns: a tensor, or an output of transformers."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "image_embeds", "pooler_output"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"the model returns a {type(output).__name__}; expected a tensor, or an output with logits, image_embeds or pooler_output"
    )


class Features(nn.Module):
    """A model, called with a tensor or a mapping, whose output is the feature tensor."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs: Inputs) -> Tensor:
        return feature_tensor(call(self.encoder, inputs))


def head_places(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that are the model's classification head; empty where there is none.

    Of a classifier of transformers, all that stands beside its pre-trained body belongs to it.
    """
    body = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    if isinstance(body, nn.Module) and body is not model:
        parts = {name: part for name, part in model.named_children() if part is not body}
        beside = [name for name, part in parts.items() if next(part.parameters(), None) is not None]
        known = {name for names in HEAD_NAMES for name in names}
        return tuple(_head_place(model, name) or name for name in beside) if known.intersection(beside) else ()
    for names in HEAD_NAMES:
        places = [_head_place(model, name) for name in names]
        if all(places):
            return tuple(places)
    return ()


def _head_place(model: nn.Module, name: str) -> str:
    module = getattr(model, name, None)
    if isinstance(module, nn.Linear):
        return name
    linears = (
        [inner for inner, part in module.named_modules() if isinstance(part, nn.Linear)]
        if isinstance(module, nn.Module)
        else []
    )
    if not linears:
        return ""
    # transformers' own head modules are made for the task as a whole; elsewhere, what comes before the
    # last linear layer was pre-trained.
    if hasattr(model, "base_model_prefix") and not isinstance(module, nn.Sequential):
        return name
    return f"{name}.{linears[-1]}"


def split_head(model: nn.Module, places: tuple[str, ...]) -> tuple[nn.Module, InnerHead]:
    """The modules of a classifier around its own tensors, with sockets at ``places``; and a copy of its head."""
    encoder = same_tensors(model)
    heads = []
    for index, place in enumerate(places):
        own = encoder.get_submodule(place)
        encoder.set_submodule(place, Socket(own, index))
        heads.append(copy.deepcopy(own))
    return encoder, InnerHead(heads)


def join_head(encoder: nn.Module, head: InnerHead) -> nn.Module:
    """The inverse of :func:`split_head`: the classifier around the tensors of both."""
    model = same_tensors(encoder)
    for place, part in zip(socket_places(encoder), head, strict=True):
        model.set_submodule(place, part)
    return model


def with_place_of_head(base: nn.Module, expert: nn.Module, places: tuple[str, ...]) -> nn.Module:
    """A base of transformers that has no head, inside a classifier of an expert's class; any other base as it is.

    The expert may be whole, or split from its head.

    The classifier holds the base's own tensors. At the places of the head it has the expert's, which no merge reads.

    Raises:
        KeyError: the base lacks weights of the classifier besides its head.
    """
    prefix = getattr(expert, "base_model_prefix", "")
    body = getattr(expert, prefix, None) if prefix else None
    if body is None or not isinstance(base, type(body)):
        return base
    trainable = {f"{prefix}.{name}": parameter.requires_grad for name, parameter in base.named_parameters()}
    inner = {f"{prefix}.{name}": value for name, value in base.state_dict().items()}
    wanted = [name for name in expert.state_dict() if not name.startswith(tuple(f"{place}." for place in places))]
    if missing := [name for name in wanted if name not in inner]:
        raise KeyError(
            f"the base is a {type(base).__name__} without {missing[0]}, which a {type(expert).__name__} has besides its "
            "head; give a base of the experts' class"
        )
    model = with_state(expert, {name: inner[name] for name in wanted})
    for place in places:
        if isinstance(socket := model.get_submodule(place), Socket):
            model.set_submodule(place, copy.deepcopy(socket.own))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(name, True))
    return model


def socket_places(model: nn.Module) -> tuple[str, ...]:
    """Names of the places of the head of a model that has been split from it; empty where it has none."""
    sockets = {name: module for name, module in model.named_modules() if isinstance(module, Socket)}
    return tuple(sorted(sockets, key=lambda name: sockets[name].index))


def has_places(model: nn.Module, places: tuple[str, ...]) -> bool:
    found = dict(model.named_modules())
    return all(place in found for place in places)


@contextmanager
def own_heads(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """The model with its own heads in its sockets, for the time of the block; gives the names of the places."""
    sockets = {name: model.get_submodule(name) for name in socket_places(model)}
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        for name, socket in sockets.items():
            model.set_submodule(name, socket.own.to(first.device, first.dtype))
        yield tuple(sockets)
    finally:
        for name, socket in sockets.items():
            model.set_submodule(name, socket)
