"""Baselines whose coefficients or masks are trained on unlabelled inputs: AdaMerging and Concrete masks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plait_wemoe.adaptation import Batches, Checkpoint, Encoder, History, minimise_entropy
from plait_wemoe.states import (
    State,
    buffer_names,
    changed,
    completed,
    merged_buffer,
    state_of,
    task_vectors,
    weight_names,
)

Heads = Mapping[str, Callable[[Tensor], Tensor]]
LEVELS = ("task", "layer")


class Coefficients(nn.Module):
    """w_t, one per expert (``task``), or one per expert and parameter tensor (``layer``)."""

    def __init__(self, names: list[str], num_experts: int, level: str, initial: float) -> None:
        super().__init__()
        if level not in LEVELS:
            raise ValueError(f"level is {level!r}; allowed is one of {', '.join(LEVELS)}")
        self.rows = {name: index if level == "layer" else 0 for index, name in enumerate(names)}
        self.weight = nn.Parameter(torch.full((len(names) if level == "layer" else 1, num_experts), initial))

    def combine(self, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Σ_t w_t τ_t for every entry; ``stacked`` holds (T, *shape)."""
        return {name: torch.tensordot(self.weight[self.rows[name]], tau, 1) for name, tau in stacked.items()}


def adamerging(
    base: nn.Module,
    experts: Mapping[str, State],
    heads: Heads,
    batches: Mapping[str, Batches],
    *,
    level: str = "layer",
    initial: float = 0.3,
    **training: Any,
) -> tuple[State, History]:
    """θ₀ + Σ_t w_t τ_t with w trained by entropy (Yang et al., ICLR 2024).

    The weights are merged once in a step and serve all its tasks. ``training`` goes to
    :func:`~plait_wemoe.adaptation.minimise_entropy`.
    """
    state, stacked = _stacked(base, experts)
    coefficients = Coefficients(list(stacked), len(experts), level, initial).to(_device(base))

    def encoder_at(step: int) -> Encoder:
        return _functional(base, {**state, **changed(state, coefficients.combine(stacked))})

    history = minimise_entropy(list(coefficients.parameters()), encoder_at, heads, batches, keep_graph=True, **training)
    with torch.no_grad():
        return _merged(base, experts, coefficients.combine(stacked), "AdaMerging"), history


class ConcreteMask(nn.Module):
    """A relaxed binary mask over all entries, shared by the experts; its logits are trained.

    (Concrete subspace learning, Tang et al., arXiv 2312.06173.)
    """

    def __init__(self, shapes: Mapping[str, torch.Size], temperature: float = 0.5) -> None:
        super().__init__()
        self.names, self.temperature = list(shapes), temperature
        self.logits = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes.values()])

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One draw, each tensor's mask divided by its mean; ``generator`` is on the CPU."""
        masks = {}
        for name, logits in zip(self.names, self.logits, strict=True):
            uniform = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(logits.device)
            mask = torch.sigmoid((logits + uniform.logit()) / self.temperature)
            masks[name] = mask / mask.mean()
        return masks


def concrete_task_arithmetic(
    base: nn.Module,
    experts: Mapping[str, State],
    heads: Heads,
    batches: Mapping[str, Batches],
    *,
    scaling: float = 0.3,
    temperature: float = 0.5,
    seed: int = 0,
    **training: Any,
) -> tuple[State, History]:
    """θ₀ + λ Σ_t m ⊙ τ_t, m trained by entropy; the merge uses one draw of m, of ``seed``."""
    state, stacked = _stacked(base, experts)
    coefficients = Coefficients(list(stacked), len(experts), "task", scaling).to(_device(base)).requires_grad_(False)
    mask, history = _train_mask(base, state, stacked, coefficients, heads, batches, temperature, seed, training)
    with torch.no_grad():
        masked = _masked(stacked, mask.sample(_seeded(seed, -1)))
        return _merged(base, experts, coefficients.combine(masked), "Concrete task arithmetic"), history


def concrete_adamerging(
    base: nn.Module,
    experts: Mapping[str, State],
    heads: Heads,
    batches: Mapping[str, Batches],
    *,
    level: str = "layer",
    initial: float = 0.3,
    temperature: float = 0.5,
    seed: int = 0,
    **training: Any,
) -> tuple[State, History]:
    """First the mask as in :func:`concrete_task_arithmetic`, then AdaMerging's w with one draw of it."""
    state, stacked = _stacked(base, experts)
    fixed = Coefficients(list(stacked), len(experts), "task", initial).to(_device(base)).requires_grad_(False)
    checkpoint: Checkpoint | None = training.pop("checkpoint", None)
    parts = {} if checkpoint is None else checkpoint.load() or {}
    saved = {name: None if checkpoint is None else _Part(checkpoint, parts, name) for name in ("mask", "coefficients")}
    mask, _ = _train_mask(
        base, state, stacked, fixed, heads, batches, temperature, seed, {**training, "checkpoint": saved["mask"]}
    )
    with torch.no_grad():
        masked = _masked(stacked, mask.sample(_seeded(seed, -1)))
    coefficients = Coefficients(list(stacked), len(experts), level, initial).to(_device(base))

    def encoder_at(step: int) -> Encoder:
        return _functional(base, {**state, **changed(state, coefficients.combine(masked))})

    training["checkpoint"] = saved["coefficients"]
    history = minimise_entropy(list(coefficients.parameters()), encoder_at, heads, batches, keep_graph=True, **training)
    with torch.no_grad():
        return _merged(base, experts, coefficients.combine(masked), "Concrete AdaMerging"), history


class _Part:
    """One of several trainings that share a checkpoint."""

    def __init__(self, whole: Checkpoint, parts: dict[str, Any], name: str) -> None:
        self.whole, self.parts, self.name = whole, parts, name

    def load(self) -> Any:
        return self.parts.get(self.name)

    def save(self, state: Any) -> None:
        self.parts[self.name] = copy.deepcopy(state)  # the tensors of a training that is over move on in the next one
        self.whole.save(self.parts)


def _train_mask(
    base: nn.Module,
    state: State,
    stacked: Mapping[str, Tensor],
    coefficients: Coefficients,
    heads: Heads,
    batches: Mapping[str, Batches],
    temperature: float,
    seed: int,
    training: Mapping[str, Any],
) -> tuple[ConcreteMask, History]:
    mask = ConcreteMask({name: tau.shape[1:] for name, tau in stacked.items()}, temperature).to(_device(base))

    def encoder_at(step: int) -> Encoder:
        masked = _masked(stacked, mask.sample(_seeded(seed, step)))
        return _functional(base, {**state, **changed(state, coefficients.combine(masked))})

    return mask, minimise_entropy(list(mask.parameters()), encoder_at, heads, batches, keep_graph=True, **training)


def _masked(stacked: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tau * mask[name] for name, tau in stacked.items()}


def _seeded(seed: int, step: int) -> torch.Generator:
    # A draw depends on its step alone, so that a resumed training repeats it.
    return torch.Generator().manual_seed((seed * 1_000_003 + step + 1) % 2**63)


def _stacked(base: nn.Module, experts: Mapping[str, State]) -> tuple[State, dict[str, Tensor]]:
    """The base's state with the experts' mean statistics, and every weight's task vectors (T, *shape).

    Weights that no expert changed are left out.
    """
    state, buffers = state_of(base), buffer_names(base)
    names = weight_names(state, buffers)
    for name in state.keys() & buffers:
        state[name] = merged_buffer(name, state[name], [expert[name] for expert in experts.values()])
    vectors = list(task_vectors(state, experts, names).values())
    stacked = {name: torch.stack([vector[name] for vector in vectors]) for name in names}
    return state, {name: tau for name, tau in stacked.items() if tau.any()}


def _merged(base: nn.Module, experts: Mapping[str, State], change: Mapping[str, Tensor], method: str) -> State:
    state = state_of(base)
    return completed(state, experts, changed(state, change), method, buffer_names(base))


def _functional(model: nn.Module, state: State) -> Encoder:
    return lambda x: functional_call(model, state, (x,))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
