"""State dicts of the models to merge: where they come from, what must hold, task vectors and their sum, statistics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from plait.fingerprints import fingerprint
from plait.weights import read_weights
from torch import Tensor, nn

from plait_wemoe.inputs import Inputs, call

State = dict[str, Tensor]
Source: TypeAlias = nn.Module | Mapping[str, Tensor] | str | Path
# What normalisation layers track; in a state dict without its module they are known by these names.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
NO_STATISTICS = "statistics is recompute, but the model has no layer with running statistics"
PIECE = 1 << 18  # entries merged at a time


class Lazy(Mapping[str, Tensor]):
    """A state whose tensors are made when they are asked for and held by nobody, so that few are in memory at a time.

    Attributes:
        layout: name → a tensor of its shape and type, as a rule on the device ``meta``.
    """

    def __init__(self, layout: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
        self.layout, self._make = layout, make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layout:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self.layout

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def only(self, names: Iterable[str]) -> Lazy:
        """Some of its tensors, in this order."""
        return Lazy({name: self.layout[name] for name in names}, self._make)


def layout_of(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Shapes and types of a state, for which no tensor of a lazy one is made."""
    return state.layout if isinstance(state, Lazy) else state


def state_of(source: Source) -> State:
    """The state dict of a module, a mapping, or a file or folder of weights (see :func:`plait.weights.read_weights`).

    Of a module, a tensor with several names is there once, under the first of them.

    Raises:
        TypeError: an adapter (LoRA) is still unmerged, or the source is none of these.
        ValueError: no weights at the path.
    """
    if hasattr(source, "merge_and_unload"):
        raise TypeError(f"{type(source).__name__} carries unmerged adapters; call merge_and_unload() first")
    if isinstance(source, nn.Module):
        state = source.state_dict()
        tied = tied_names(state)
        return {name: value.detach() for name, value in state.items() if name not in tied and isinstance(value, Tensor)}
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, (str, Path)):
        raise TypeError(f"an expert is a module, a state dict or a path, not {type(source).__name__}")
    return read_weights(source)


def state_like(model: nn.Module, source: Source) -> State:
    """:func:`state_of` under the names of ``model``: what is one tensor there may have any of its names.

    Raises:
        ValueError: what is one tensor in the model is two that differ in the source.
    """
    state = state_of(source)
    for alias, name in tied_names(model.state_dict()).items():
        value = state.pop(alias, None)
        if value is None:
            continue
        if name in state and not torch.equal(state[name], value):
            raise ValueError(
                f"{name} and {alias} are one tensor in the base and differ in an expert; tie them there too"
            )
        state.setdefault(name, value)
    return state


def tied_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another one of the state again → the first name of that one."""
    first: dict[tuple[object, ...], str] = {}
    tied = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.device.type == "meta" or value.numel() == 0:
            continue
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if first.setdefault(place, name) != name:
            tied[name] = first[place]
    return tied


def buffer_names(model: nn.Module) -> set[str]:
    """Names of buffers, which are statistics and constants and not weights."""
    return {name for name, _ in model.named_buffers(remove_duplicate=False)}


def weight_names(state: Mapping[str, Tensor], buffers: Collection[str] | None = None) -> list[str]:
    """Floating-point entries that are weights: no buffers, and tied tensors once.

    Args:
        buffers: see :func:`buffer_names`; ``None``: what is named as in :data:`STATISTICS`.
    """
    tied = tied_names(state)
    return [
        name
        for name, value in state.items()
        if value.is_floating_point() and name not in tied and not _is_buffer(name, buffers)
    ]


def _is_buffer(name: str, buffers: Collection[str] | None) -> bool:
    return name.rpartition(".")[2] in STATISTICS if buffers is None else name in buffers


def check_states(base: State, experts: Mapping[str, State]) -> list[str]:
    """Refuse experts that are not fine-tuned copies of the base.

    Returns:
        Names of the experts that are bitwise equal to the base.

    Raises:
        ValueError: no expert, another shape, a non-finite weight.
        KeyError: other parameter names.
        TypeError: quantised weights (an entry that is floating-point in one model only).
    """
    if not experts:
        raise ValueError("there is no expert to merge; give at least one fine-tuned model")
    unchanged = []
    for expert, state in {"the base": base, **{f"expert {name!r}": state for name, state in experts.items()}}.items():
        if state.keys() != base.keys():
            missing, surplus = sorted(base.keys() - state.keys())[:3], sorted(state.keys() - base.keys())[:3]
            raise KeyError(f"{expert} is of another architecture than the base: missing {missing}, surplus {surplus}")
        for name, value in state.items():
            if value.shape != base[name].shape:
                raise ValueError(f"{name} is {tuple(value.shape)} in {expert}, {tuple(base[name].shape)} in the base")
            if value.is_floating_point() != base[name].is_floating_point():
                raise TypeError(f"{name} is {value.dtype} in {expert}, {base[name].dtype} in the base; dequantise it")
            if not is_finite(value):
                raise ValueError(f"{name} of {expert} holds a value that is not finite")
    for name, state in experts.items():
        if all(torch.equal(value.to(base[key].device), base[key]) for key, value in state.items()):
            unchanged.append(name)
    return unchanged


def is_finite(value: Tensor) -> bool:
    """Whether no entry is NaN or infinite; integers always are."""
    if not value.is_floating_point() or value.numel() == 0:
        return True
    low, high = torch.aminmax(value)  # a NaN is in both, and no mask as large as the tensor is made
    return math.isfinite(low.item()) and math.isfinite(high.item())


def completed(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    weights: Mapping[str, Tensor],
    method: str,
    buffers: Collection[str] | None = None,
) -> State:
    """The whole state of a merged model, no tensor of which is one of the base's; see :func:`merged_entries`."""
    found = dict(merged_entries(base, experts, weights, method, buffers))
    tied = tied_names(layout_of(base))
    return {name: found[tied.get(name, name)] for name in base}


def merged_entries(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    weights: Mapping[str, Tensor],
    method: str,
    buffers: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The state of a merged model, tensor by tensor, in the order of the base; of tied names the first.

    Args:
        weights: merged weights; the base's stand where there are none.
        method: what merged them, for the error.
        buffers: see :func:`weight_names`. They are averaged over the experts, see :func:`merged_buffer`.

    Raises:
        ValueError: a merged entry that is not finite, or buffers that cannot be averaged.
    """
    layout = layout_of(base)
    tied = tied_names(layout)
    for name, like in layout.items():
        if name in tied:
            continue
        if name in weights:
            value = weights[name].to(like.dtype)
        elif like.is_floating_point() and not _is_buffer(name, buffers):
            value = base[name].clone()
        else:
            value = merged_buffer(name, base[name], [expert[name] for expert in experts.values()])
        if not is_finite(value):
            worst = "NaN" if value.isnan().any() else f"beyond the range of {value.dtype}"
            raise ValueError(
                f"{name} merged by {method} is {worst}; lower its scaling, or convert base and experts to float32"
            )
        yield name, value


def merged_buffer(name: str, base: Tensor, values: Iterable[Tensor]) -> Tensor:
    """The mean of a statistic, never beyond the experts' own values; an integer count is rounded.

    Raises:
        ValueError: integers that are no count (an index, a mask) and differ between the experts.
    """
    values = [value.to(base.device) for value in values]
    if all(torch.equal(value, values[0]) for value in values):
        return values[0].to(base.dtype, copy=True)
    if base.is_floating_point() or base.is_complex():
        wide = torch.promote_types(base.dtype, torch.float32)
        return (sum(value.to(wide) for value in values) / len(values)).to(base.dtype)
    if base.dim() == 0 and base.dtype != torch.bool:
        return torch.stack(values).double().mean().round().to(base.dtype)
    raise ValueError(f"buffer {name} holds {base.dtype} values that differ between the experts and have no mean")


def task_vectors(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    names: Collection[str],
    dtype: torch.dtype = torch.float32,
) -> dict[str, State]:
    """τ_t = θ_t − θ₀ of the entries named, computed in ``dtype``."""
    return {
        expert: {name: task_vector(base[name], state[name], dtype) for name in names}
        for expert, state in experts.items()
    }


def task_vector(base: Tensor, expert: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return expert.to(base.device, dtype) - base.to(dtype)


def scaled_sum(base: Tensor, experts: Sequence[Tensor], scaling: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """θ₀ + λ Σ_t (θ_t − θ₀) of one tensor, summed in ``dtype``, in the type of the base.

    It goes through the tensor in pieces that stay in a core's cache: nothing but the result is as large as it.
    """
    flat, flat_experts = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    merged = torch.empty_like(flat)
    # Written over and over, for fresh memory costs more than the arithmetic.
    total, vector = (torch.empty(min(PIECE, len(flat)), dtype=dtype, device=base.device) for _ in range(2))
    for start in range(0, len(flat), PIECE):
        piece = slice(start, start + PIECE)
        origin = flat[piece].to(dtype)
        total, vector = total[: len(origin)], vector[: len(origin)]
        torch.sub(flat_experts[0][piece].to(base.device, dtype), origin, out=total)
        for expert in flat_experts[1:]:
            total += torch.sub(expert[piece].to(base.device, dtype), origin, out=vector)
        merged[piece] = total.mul_(scaling).add_(origin)
    return merged.view(base.shape)


def changed(base: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> State:
    """θ₀ + change of the entries that change, summed in the type of the change, in the type of the base."""
    return {name: (base[name].to(value.dtype) + value).to(base[name].dtype) for name, value in change.items()}


def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model that holds these very tensors; what ``state`` lacks is copied.

    Raises:
        KeyError: names that the model has not.
    """
    own = model.state_dict(keep_vars=True)
    if unknown := state.keys() - own.keys():
        raise KeyError(f"{type(model).__name__} has no entry {sorted(unknown)[0]!r}")
    replaced: dict[int, Tensor] = {}
    for name, value in state.items():
        old = own[name]
        new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        replaced.setdefault(id(old), new)
    return copy.deepcopy(model, replaced)


def same_tensors(model: nn.Module) -> nn.Module:
    """A copy of the modules of a model around its own parameters and buffers."""
    return copy.deepcopy(model, {id(value): value for value in (*model.parameters(), *model.buffers())})


@torch.no_grad()
def recompute_statistics(model: nn.Module, inputs: Iterable[Iterable[Inputs]]) -> bool:
    """Running statistics of normalisation layers anew: means over the batches that the model is called with.

    Args:
        inputs: batches, task by task; they are read only where there is such a layer.

    Returns:
        Whether there is such a layer.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        for batches in inputs if norms else ():
            for batch in batches:
                call(model, batch)
    finally:
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)
    return bool(norms)


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of a state dict, whatever its order."""
    return fingerprint(dict(sorted(state.items())))
