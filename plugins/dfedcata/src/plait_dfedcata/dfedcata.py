"""DFedCata (Li et al., arXiv 2410.07272, with its official program at commit 0589458).

In a round, peer i mixes, extrapolates, and trains on loss + (λ/2)‖w − s_i‖² from s_i:

    m_i = Σ_j W_ij · z_j
    s_i = m_i + β · (m_i − ref_i)
    z_i = LocalTrain(s_i)

Only z_j is sent. ``ref_i`` (the *anchor*) is z_i of the last round, as in the official program, or m_i of the last
round, the textbook Nesterov sequence on the mixed iterate. OledFL (Li et al., arXiv 2410.06482) is the same start
with the former anchor and without the proximal term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from plait_federated.rounds import Gossip
from plait_federated.steps import Gradient, Local, clip, prox_step, sam_step, sgd_step
from torch import Tensor

Anchor = Literal["own_previous", "mixed_previous"]
ClipScope = Literal["split", "joint"]
Model = Mapping[str, Tensor]


# Aggregation ------------------------------------------------------------------------------------------------------


def own_previous_start(mixed: Tensor, own_previous: Tensor, previous_mixed: Tensor, *, beta: float) -> Tensor:
    """s = m + β(m − z): away from the peer's own last trained model."""
    return mixed + beta * (mixed - own_previous)


def mixed_previous_start(mixed: Tensor, own_previous: Tensor, previous_mixed: Tensor, *, beta: float) -> Tensor:
    """s = m + β(m − m of the last round): Nesterov's extrapolation of the mixed model."""
    return mixed + beta * (mixed - previous_mixed)


STARTS = {"own_previous": own_previous_start, "mixed_previous": mixed_previous_start}


# Local training ---------------------------------------------------------------------------------------------------


def split_prox_step(w: Tensor, gradient: Gradient, local: Local, *, prox_lambda: float) -> Tensor:
    """One SGD step of the official program: −λs lies inside the clip, λw outside.

    Without an active clip this is w − lr·(∇f + λ(w − s) + wd·w).
    """
    g = clip(gradient(w) - prox_lambda * local.start, local.max_grad_norm)
    return w - local.learning_rate * (g + (prox_lambda + local.weight_decay) * w)


STEPS = {"split": split_prox_step, "joint": prox_step}


# Methods ----------------------------------------------------------------------------------------------------------


def dfedcata(beta: float, prox_lambda: float, anchor: Anchor, clip_scope: ClipScope) -> Gossip:
    """The method as a rule for the engines of plait-federated."""
    step = partial(STEPS[clip_scope], prox_lambda=prox_lambda)
    return Gossip(step, partial(STARTS[anchor], beta=beta), keeps_mixed=anchor == "mixed_previous")


def oledfl(beta: float, rho: float) -> Gossip:
    """Opposite-lookahead start with plain (rho = 0) or sharpness-aware local steps."""
    step = partial(sam_step, rho=rho) if rho > 0 else sgd_step
    return Gossip(step, partial(own_previous_start, beta=beta))


# For programs with a transport of their own -----------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What peers remember between rounds, in the container of the models; ``None`` before round 0."""

    previous_local: object = None
    previous_mixed: object = None
    round: int = 0


def aggregate(
    local: Tensor | Sequence[Model],
    mixing: Tensor,
    state: State,
    *,
    beta: float,
    anchor: Anchor,
) -> tuple[Tensor | list[dict[str, Tensor]], State]:
    """All peers' mix and extrapolation, synchronous.

    Args:
        local: the peers' trained models, ``[n, P]`` or one mapping name → tensor a peer.
        mixing: W, ``[n, n]``, dense or sparse; rows sum to 1.

    Returns:
        The starts of local training in the container, dtype and device of ``local``, and the next state.

    Raises:
        ValueError: models of different names, shapes or dtypes; values that are not finite; W is no mixing matrix.
    """
    if not isinstance(local, Tensor):
        tables = _stack(local)
        previous = None if state.previous_mixed is None else _stack(state.previous_mixed)
        starts, mixed = {}, {}
        for name, table in tables.items():
            memory = State(previous_mixed=None if previous is None else previous[name].flatten(1), round=state.round)
            start, after = aggregate(table.flatten(1), mixing, memory, beta=beta, anchor=anchor)
            starts[name], mixed[name] = start.view_as(table), after.previous_mixed.view_as(table)
        rows = range(len(local))
        next_state = State(local, [{name: mixed[name][row] for name in mixed} for row in rows], state.round + 1)
        return [{name: starts[name][row] for name in starts} for row in rows], next_state
    _check_mixing(mixing, len(local))
    finite = torch.isfinite(local).flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"the model of peer {int((~finite).nonzero()[0])} is not finite in round {state.round}")
    mixed = mixing.to(local.dtype) @ local
    previous_mixed = mixed if state.previous_mixed is None else state.previous_mixed
    start = STARTS[anchor](mixed, local, previous_mixed, beta=beta)
    return start, State(local, mixed, state.round + 1)


def aggregate_peer(
    own: Tensor,
    received: Mapping[int, Tensor],
    weights: Mapping[int, float],
    state: State,
    *,
    beta: float,
    anchor: Anchor,
) -> tuple[Tensor, State]:
    """One peer's mix and extrapolation.

    Args:
        own: its trained model ``[P]``; its weight is what ``weights`` leaves of 1.
        received: neighbour → model ``[P]``; weights: neighbour → W_ij.
    """
    if set(received) != set(weights):
        raise ValueError(f"models came from peers {sorted(received)}, weights are given for {sorted(weights)}")
    mixed = (1 - sum(weights.values())) * own
    for peer, model in received.items():
        if model.shape != own.shape or model.dtype != own.dtype:
            raise ValueError(
                f"peer {peer} sent {tuple(model.shape)} {model.dtype}, expected {tuple(own.shape)} {own.dtype}"
            )
        if not torch.isfinite(model).all():
            raise ValueError(f"the model of peer {peer} is not finite in round {state.round}")
        mixed = mixed + weights[peer] * model
    previous_mixed = mixed if state.previous_mixed is None else state.previous_mixed
    return STARTS[anchor](mixed, own, previous_mixed, beta=beta), State(own, mixed, state.round + 1)


def _stack(models: Sequence[Model]) -> dict[str, Tensor]:
    first = models[0]
    for peer, model in enumerate(models):
        if model.keys() != first.keys():
            raise ValueError(f"peer {peer} has other tensors than peer 0: {sorted(model.keys() ^ first.keys())}")
        for name, tensor in model.items():
            if tensor.shape != first[name].shape or tensor.dtype != first[name].dtype:
                raise ValueError(
                    f"tensor {name} of peer {peer} is {tuple(tensor.shape)} {tensor.dtype}, "
                    f"that of peer 0 {tuple(first[name].shape)} {first[name].dtype}"
                )
    return {name: torch.stack([model[name] for model in models]) for name in first}


def _check_mixing(mixing: Tensor, n: int) -> None:
    if tuple(mixing.shape) != (n, n):
        raise ValueError(f"the mixing matrix is {tuple(mixing.shape)}; {n} peers need ({n}, {n})")
    dense = mixing.to_dense() if mixing.layout != torch.strided else mixing
    if (dense < 0).any() or (dense.sum(1) - 1).abs().max() > 1e-5:
        raise ValueError("the mixing matrix must have weights ≥ 0 and rows that sum to 1")
