"""One communication round of each kind of method, and the baselines as one rule each.

Decentralised methods (:class:`Gossip`) mix with neighbours, choose a start, train. Server methods
(:class:`Server`) train a random part of the clients from one model. ``train(clients, start, offset)`` is
local training by an engine; the state maps names to tables with one row a client (or one row in all).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from plait_federated.steps import LocalStep, corrected_step, momentum_step, prox_step, sam_step, sgd_step
from plait_federated.topology import levels

RoundState = dict[str, Tensor]
Train = Callable[..., Tensor]
Start = Callable[[Tensor, Tensor, Tensor], Tensor]
ServerWeights = Literal["uniform", "size"]


@dataclass(frozen=True)
class Gossip:
    """A decentralised method.

    Attributes:
        step: the update rule of local training.
        start: where local training begins, from (mixed model, own last model, mixed model of the last round).
        gossip_steps: how often a round applies the mixing matrix.
        keeps_mixed: whether ``start`` needs the last round's mixed model, which is then kept in the state.
    """

    step: LocalStep
    start: Start
    gossip_steps: int = 1
    keeps_mixed: bool = False

    def initial_state(self, vector: Tensor, num_clients: int) -> RoundState:
        table = vector.expand(num_clients, -1).clone()
        return {"local": table, "mixed": table.clone()} if self.keeps_mixed else {"local": table}


def mixed_start(mixed: Tensor, own_previous: Tensor, previous_mixed: Tensor) -> Tensor:
    """Local training begins at the average of the neighbourhood."""
    return mixed


@dataclass(frozen=True)
class ModelColumns:
    """Which columns of a table are parameters; buffers follow them, and are mixed or stay with their client.

    ``num_parameters`` is P; ``keep_buffers`` leaves every client its own buffers.
    """

    num_parameters: int
    keep_buffers: bool = False

    def start(self, method: Gossip, mixed: Tensor, own: Tensor, previous: Tensor) -> Tensor:
        """The method's start for the parameters, with the buffers appended; all ``[k, P + buffers]``."""
        p = self.num_parameters
        if mixed.shape[1] == p:
            return method.start(mixed, own, previous)
        buffers = own if self.keep_buffers else mixed
        return torch.cat([method.start(mixed[:, :p], own[:, :p], previous[:, :p]), buffers[:, p:]], dim=1)


def synchronous_round(
    method: Gossip, state: RoundState, mixing: Tensor, columns: ModelColumns, train: Train
) -> RoundState:
    """All clients read the models as they were at the start of the round.

    Args:
        mixing: W to the power of the method's gossip steps, ``[n, n]``.
    """
    local = state["local"]
    mixed = mixing @ local
    start = columns.start(method, mixed, local, state.get("mixed", mixed))
    after = {"local": train(np.arange(len(local)), start)}
    return after | {"mixed": mixed} if method.keeps_mixed else after


def sequential_round(
    method: Gossip, state: RoundState, mixing: Tensor, columns: ModelColumns, train: Train
) -> RoundState:
    """Clients 0, 1, …, n−1 in turn, each reading neighbours that have already trained in this round.

    Clients of one level wait for no one else and train together; the result is that of one by one.
    """
    before, after = state["local"], state["local"].clone()
    earlier, later = mixing.tril(-1), mixing.triu()
    mixed = torch.empty_like(before)
    for clients in levels(mixing.cpu().numpy()):
        mixed[clients] = earlier[clients] @ after + later[clients] @ before
        previous = state["mixed"][clients] if method.keeps_mixed else mixed[clients]
        after[clients] = train(clients, columns.start(method, mixed[clients], before[clients], previous))
    return {"local": after, "mixed": mixed} if method.keeps_mixed else {"local": after}


@dataclass(frozen=True)
class Server:
    """A centralised method: a server averages the clients that were active in a round.

    Attributes:
        active_ratio: probability that a client is active in a round.
        server_learning_rate: of the step from the server's model towards the average.
        controlled: SCAFFOLD's control variates.
        weights: of the clients in averages: ``uniform``, or by the ``size`` of their data, n_k/n in McMahan et al.
    """

    step: LocalStep
    active_ratio: float = 0.1
    server_learning_rate: float = 1.0
    controlled: bool = False
    weights: ServerWeights = "uniform"

    def initial_state(self, vector: Tensor, num_clients: int) -> RoundState:
        state = {"server": vector[None].clone(), "local": vector.expand(num_clients, -1).clone()}
        if self.controlled:
            state |= {"control": torch.zeros_like(state["local"]), "server_control": torch.zeros_like(state["server"])}
        return state

    def active(self, num_clients: int, seed: int, round_index: int) -> np.ndarray:
        """The clients of one round: each with probability ``active_ratio``, drawn again while there is none."""
        random = np.random.RandomState(seed + round_index)
        while True:
            clients = np.flatnonzero(random.random_sample(num_clients) < self.active_ratio)
            if len(clients):
                return clients


def fedavg_round(
    method: Server, state: RoundState, clients: np.ndarray, train: Train, sizes: Tensor | None = None
) -> RoundState:
    """x ← x + η·Σ_active p_i (LT_i(x) − x), p_i equal or in proportion to the client's size, Σ_active p_i = 1.

    Args:
        sizes: samples of every client, ``[n]``, to weigh them by; ``None`` weighs all alike.
    """
    x = state["server"]
    trained = train(clients, x.expand(len(clients), -1))
    local = state["local"].clone()
    local[clients] = trained
    return {"server": x + method.server_learning_rate * _average(trained - x, clients, sizes), "local": local}


def scaffold_round(
    method: Server,
    state: RoundState,
    clients: np.ndarray,
    train: Train,
    num_steps: Tensor,
    learning_rate: float,
    sizes: Tensor | None = None,
) -> RoundState:
    """FedAvg with gradients corrected by c − c_i (Karimireddy et al., ICML 2020, option II).

    Args:
        num_steps: local steps K of each active client, ``[k]``.
        sizes: samples of every client, ``[n]``, to weigh them by; ``None`` weighs all alike.
    """
    x, c, c_i = state["server"], state["server_control"], state["control"][clients]
    trained = train(clients, x.expand(len(clients), -1), offset=c - c_i)
    new = c_i - c - (trained - x) / (num_steps[:, None] * learning_rate)
    control, local = state["control"].clone(), state["local"].clone()
    control[clients], local[clients] = new, trained
    if sizes is None:
        change = (new - c_i).sum(0, keepdim=True) / len(control)
    else:
        change = _weighted(new - c_i, sizes[clients] / sizes.sum())
    return {
        "server": x + method.server_learning_rate * _average(trained - x, clients, sizes),
        "server_control": c + change,
        "control": control,
        "local": local,
    }


def _average(rows: Tensor, clients: np.ndarray, sizes: Tensor | None) -> Tensor:
    """Of the rows of these clients, ``[k, D]`` → ``[1, D]``."""
    if sizes is None:
        return rows.mean(0, keepdim=True)
    return _weighted(rows, sizes[clients] / sizes[clients].sum())


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    return weights.to(rows.dtype)[None] @ rows


# The baselines, each from its rule alone ------------------------------------------------------------------------


def dfedavg() -> Gossip:
    """Mix, then local SGD. D-PSGD is the same with one local step."""
    return Gossip(sgd_step, mixed_start)


def dfedavgm(momentum: float) -> Gossip:
    """DFedAvg with heavy-ball momentum inside local training."""
    return Gossip(partial(momentum_step, momentum=momentum), mixed_start)


def dfedsam(rho: float, gossip_steps: int) -> Gossip:
    """DFedAvg with sharpness-aware local steps; more than one gossip step is DFedSAM-MGS."""
    return Gossip(partial(sam_step, rho=rho), mixed_start, gossip_steps)


def dfedprox(prox_lambda: float) -> Gossip:
    """DFedAvg with a proximal term around the mixed model."""
    return Gossip(partial(prox_step, prox_lambda=prox_lambda), mixed_start)


def fedavg(active_ratio: float, server_learning_rate: float, weights: ServerWeights = "uniform") -> Server:
    return Server(sgd_step, active_ratio, server_learning_rate, weights=weights)


def fedprox(
    active_ratio: float, server_learning_rate: float, prox_lambda: float, weights: ServerWeights = "uniform"
) -> Server:
    """FedAvg with a proximal term around the server's model."""
    return Server(partial(prox_step, prox_lambda=prox_lambda), active_ratio, server_learning_rate, weights=weights)


def fedsam(active_ratio: float, server_learning_rate: float, rho: float, weights: ServerWeights = "uniform") -> Server:
    """FedAvg with sharpness-aware local steps."""
    return Server(partial(sam_step, rho=rho), active_ratio, server_learning_rate, weights=weights)


def scaffold(active_ratio: float, server_learning_rate: float, weights: ServerWeights = "uniform") -> Server:
    """FedAvg with control variates."""
    return Server(corrected_step, active_ratio, server_learning_rate, controlled=True, weights=weights)
