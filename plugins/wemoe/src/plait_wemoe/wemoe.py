"""WEMoE and E-WEMoE: one model out of a base and its fine-tuned experts, MLPs merged anew for every input.

:func:`wemoe` is the method from first to last step, in the order of the papers. The numbers are those of this package,
wherever a formula is met in the code:

(1) task vectors, as task arithmetic has them: τ_t = θ_t − θ₀. E-WEMoE keeps only the largest entries of those of the
    MLPs (:func:`pruned_task_vectors`);
(2) the static part: everything but the MLPs is merged once, by task arithmetic, θ₀ + λ Σ_t τ_t (:func:`static_state`);
(3) the weight-ensembling mixture of experts: each MLP keeps its pre-trained θ₀ and all τ_t, and a router turns the
    tokens that enter the block into one coefficient per expert, r = mean_tokens g(x), where g is linear or has one
    hidden layer (:class:`~plait_wemoe.routing.Router`). The MLP runs once, with θ₀ + Σ_t r_t τ_t
    (:class:`~plait_wemoe.ensembling.EnsembledLinear`). E-WEMoE shares one router between all blocks;
(4) test-time adaptation: the routers, and nothing else, are trained on unlabelled inputs to minimise the entropy of the
    predictions, min Σ_tasks mean_x −Σ_c p_c log p_c (:func:`~plait_wemoe.adaptation.minimise_entropy`);
(5) the merged model, routed by ``sample``, by ``batch`` or with ``fixed`` coefficients.

Sources: "Merging Multi-Task Models via Weight-Ensembling Mixture of Experts" (ICML 2024, arXiv 2402.00433), where it
presents the weight-ensembling MoE module and its test-time adaptation, for (1) to (5); "Efficient and Effective
Weight-Ensembling Mixture of Experts for Multi-Task Model Merging" (arXiv 2410.21804) for E-WEMoE.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait_wemoe.adaptation import History, UnlabelledBatches, minimise_entropy
from plait_wemoe.ensembling import EnsembledLinear
from plait_wemoe.heads import feature_tensor
from plait_wemoe.inputs import Inputs, call
from plait_wemoe.mixture import WeightEnsemblingMoE
from plait_wemoe.pruning import keep_above, magnitude_threshold, prune, prune_together
from plait_wemoe.states import (
    NO_STATISTICS,
    Source,
    State,
    buffer_names,
    check_states,
    completed,
    digest,
    recompute_statistics,
    scaled_sum,
    state_like,
    state_of,
    task_vector,
    tied_names,
    weight_names,
    with_state,
)
from plait_wemoe.upscaling import UpscaleConfig, block_linears, find_blocks, refuse_other_changes, upscaled_linears

E_WEMOE = UpscaleConfig(shared_router=True, prune_ratio=0.9)


def wemoe(
    base: nn.Module,
    experts: Mapping[str, Source],
    heads: Mapping[str, Callable[[Tensor], Tensor]],
    batches: Mapping[str, UnlabelledBatches],
    *,
    config: UpscaleConfig = UpscaleConfig(),  # noqa: B008 - it cannot be changed
    train_routing: str = "sample",
    eval_routing: str = "sample",
    gate_prune_ratio: float | None = None,
    statistics: str = "average",
    seed: int = 0,
    **training: Any,
) -> tuple[WeightEnsemblingMoE, History]:
    """Merge fine-tuned experts into one model that answers for all their tasks.

    Args:
        base: the pre-trained model, called with a batch of inputs; it is not changed.
        experts: task → fine-tuned copy of the base (module, state dict, or path to weights).
        heads: task → frozen function from features (B, D) to logits (B, C).
        batches: task → its unlabelled inputs, each batch of one task.
        config: λ, what is routed, the routers, pruning of task vectors; see :class:`~plait_wemoe.upscaling.UpscaleConfig`.
        train_routing: ``sample`` or ``batch``: coefficients of each sample, or their mean over the batch.
        eval_routing: of the returned model: ``sample``, ``batch``, or ``fixed`` (each block's mean coefficients over all
            unlabelled inputs, the tasks weighted alike).
        gate_prune_ratio: share of the entries of each trained router tensor that is dropped; ``None``: none.
        statistics: running statistics of normalisation layers: the experts' ``average``, or ``recompute`` them.
        seed: of the routers' first values.
        training: how the routers are trained, see :func:`~plait_wemoe.adaptation.minimise_entropy`.

    Raises:
        KeyError, ValueError, TypeError: experts that do not fit, no module to up-scale, a task without head or inputs.
        FloatingPointError: the entropy is not finite.
    """
    # (1) to (3): task vectors, static part, mixtures with routers that answer λ
    example = next(iter(next(iter(batches.values())).in_order(1)))
    mixture = upscale(base, experts, example, config, seed).eval()

    # (4): the routers learn from the entropy of the predictions
    mixture.set_routing(train_routing)
    history = minimise_entropy(
        mixture.router_parameters(),
        lambda step: lambda inputs: feature_tensor(call(mixture, inputs)),
        heads,
        batches,
        **training,
    )
    if gate_prune_ratio is not None:
        mixture.prune_routers(gate_prune_ratio)

    # (5): the merged model
    mixture.set_routing("sample" if eval_routing == "fixed" else eval_routing)
    if statistics == "recompute" and not recompute_statistics(mixture, (s.in_order() for s in batches.values())):
        history.warnings.append(NO_STATISTICS)
    if eval_routing == "fixed":
        mixture.set_routing("fixed", mean_coefficients(mixture, batches))
    return mixture, history


def e_wemoe(
    base: nn.Module,
    experts: Mapping[str, Source],
    heads: Mapping[str, Callable[[Tensor], Tensor]],
    batches: Mapping[str, UnlabelledBatches],
    *,
    config: UpscaleConfig = E_WEMOE,
    **options: Any,
) -> tuple[WeightEnsemblingMoE, History]:
    """:func:`wemoe` with one router for all blocks and task vectors of the MLPs pruned by 90 % (arXiv 2410.21804)."""
    return wemoe(base, experts, heads, batches, config=config, **options)


# --------------------------------------------------------------------------------- (1) to (3): up-scaling


def upscale(
    base: nn.Module, experts: Mapping[str, Source], example: Inputs, config: UpscaleConfig, seed: int = 0
) -> WeightEnsemblingMoE:
    """Merge experts into a copy of the base; routers are at their first values.

    Args:
        base: the pre-trained model; ``base(example)`` must run. It is not changed.
        experts: name → fine-tuned copy of the base (module, state dict or path to weights).
        example: one or more inputs, batched along axis 0, or a mapping of keyword arguments. It is only used
            to find which blocks are on the way, how wide they are and which axis counts samples.
        seed: of the routers' first values.

    Raises:
        KeyError, ValueError, TypeError: experts that do not fit (see :func:`~plait_wemoe.states.check_states`),
            a pattern that matches no module, modules that cannot be up-scaled.
    """
    if any(isinstance(module, EnsembledLinear) for module in base.modules()):
        raise ValueError("the base is a mixture of experts already; up-scale one of its export_static() models")
    base_state = state_of(base)
    expert_states = {name: state_like(base, source) for name, source in experts.items()}
    check_states(base_state, expert_states)
    blocks = find_blocks(base, example, config)
    linears = upscaled_linears(base, blocks)
    tied = tied_names(base.state_dict())
    origin, tuned = _under_all_names(base_state, tied), {n: _under_all_names(s, tied) for n, s in expert_states.items()}
    refuse_other_changes(base, blocks, linears, origin, tuned)

    routed = {tied.get(entry, entry) for entry in _entries(origin, linears)}
    static = static_state(base_state, expert_states, routed, config, buffer_names(base))
    model = WeightEnsemblingMoE(with_state(base, static), blocks, tuple(experts), config, seed)
    for task_vectors in pruned_task_vectors(origin, tuned, block_linears(base, blocks), config):
        model.install(task_vectors)
    model.sources = {"base": digest(base_state), **{n: digest(s) for n, s in expert_states.items()}}
    return model


def _under_all_names(state: State, tied: Mapping[str, str]) -> State:
    return {**state, **{alias: state[name] for alias, name in tied.items()}}


def static_state(
    base: State, experts: Mapping[str, State], routed: Collection[str], config: UpscaleConfig, buffers: Collection[str]
) -> State:
    """(2): θ₀ + λ Σ_t τ_t for every weight, but θ₀ itself for ``routed`` ones; buffers are averaged over the experts."""
    merged = {
        name: scaled_sum(base[name], [state[name] for state in experts.values()], config.init_lambda, config.dtype)
        for name in weight_names(base, buffers)
        if name not in routed
    }
    return completed(base, experts, merged, "the static part of WEMoE", buffers)


def pruned_task_vectors(
    base: State, experts: Mapping[str, State], blocks: Sequence[Sequence[str]], config: UpscaleConfig
) -> Iterator[dict[str, tuple[Tensor, Tensor | None]]]:
    """(1), pruned, block by block: linear → ((T, out, in), (T, out) or ``None``)."""
    thresholds: list[Tensor | None] = [None] * len(experts)
    if config.prune_ratio is not None and config.prune_granularity == "model":
        every = [name for linears in blocks for name in _entries(base, linears)]
        for t, state in enumerate(experts.values()):
            vectors = [task_vector(base[name], state[name], config.dtype) for name in every]
            thresholds[t] = magnitude_threshold(vectors, config.prune_ratio)
    for linears in blocks:
        names = _entries(base, linears)
        by_expert = []
        for state, threshold in zip(experts.values(), thresholds, strict=True):
            vectors = [task_vector(base[name], state[name], config.dtype) for name in names]
            if config.prune_granularity == "tensor":
                by_expert.append([prune(vector, config.prune_ratio) for vector in vectors])
            elif config.prune_granularity == "block":
                by_expert.append(prune_together(vectors, config.prune_ratio))
            else:
                by_expert.append(vectors if threshold is None else [keep_above(v, threshold) for v in vectors])
        stacks = {name: torch.stack(pruned) for name, pruned in zip(names, zip(*by_expert, strict=True), strict=True)}
        yield {linear: (stacks[f"{linear}.weight"], stacks.get(f"{linear}.bias")) for linear in linears}


def _entries(base: State, linears: Sequence[str]) -> list[str]:
    return [f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias") if f"{linear}.{kind}" in base]


# ----------------------------------------------------------------------------------------- (5): in use


def mean_coefficients(mixture: WeightEnsemblingMoE, batches: Mapping[str, UnlabelledBatches]) -> Tensor:
    """Each block's mean coefficients over all inputs of each task, averaged over the tasks, (K, T)."""
    means = []
    for stream in batches.values():
        weights = [call(mixture.routing_weights, inputs).cpu() for inputs in stream.in_order()]
        means.append(torch.cat(weights, dim=1).mean(dim=1))
    return torch.stack(means, dim=1).mean(dim=1)
