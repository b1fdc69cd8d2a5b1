"""Federated methods: what they share, and one class a baseline."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
import torch
from plait import PlaitError, hookimpl
from plait.configuration import plain
from plait.fields import doc, in_range
from torch import nn

from plait_federated import rounds
from plait_federated.layout import Layout
from plait_federated.plugin.tables import (
    client_members,
    inputs_of,
    joined,
    labels_of,
    split_of,
    train_of,
    user_errors,
    with_numbered_classes,
)
from plait_federated.rounds import Gossip, Server, ServerWeights
from plait_federated.settings import Settings
from plait_federated.shards import Augmentation, Shards
from plait_federated.steps import check_prox
from plait_federated.topology import Graph, column_sums
from plait_federated.training import Outcome, follow

__plait_api__ = "0.1"

UpdateOrder = Literal["synchronous", "sequential"]
WeightsName = Literal["uniform", "metropolis", "lazy"]
CURVES = ("accuracy", "loss", "consensus_distance", "mean_client_accuracy", "worst_client_accuracy")


def _positive(default: float, text: str, high: float | None = None) -> Any:
    return attrs.field(default=default, validator=in_range(0, high, low_open=True), metadata=doc(text))


@attrs.frozen(kw_only=True)
class Federated:
    """Local training and engine of every federated method."""

    rounds: int = attrs.field(default=500, validator=in_range(1), metadata=doc("communication rounds"))
    local_epochs: int = attrs.field(
        default=5, validator=in_range(1), metadata=doc("passes over a client's data in a round")
    )
    local_steps: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("stop a round after so many batches; null does whole epochs")
    )
    batch_size: int = attrs.field(default=128, validator=in_range(1), metadata=doc("samples in a batch"))
    learning_rate: float = _positive(0.1, "of the first round")
    lr_decay: float = _positive(0.998, "factor of the learning rate after every round", 1)
    weight_decay: float = attrs.field(default=5e-4, validator=in_range(0), metadata=doc("L2 weight decay"))
    max_grad_norm: float | None = attrs.field(
        default=10.0,
        validator=in_range(0, low_open=True),
        metadata=doc("clip of a client's whole gradient norm; null does not clip"),
    )
    augment_padding: int | None = attrs.field(
        default=None,
        validator=in_range(0),
        metadata=doc(
            "flip and crop images out of a border of so many pixels (4 for CIFAR, 8 for 64×64); null does not augment"
        ),
    )
    augment_fill: tuple[float, ...] | None = attrs.field(
        default=None, metadata=doc("colour of that border in [0, 1]; null takes what the model subtracts, or black")
    )
    buffers: Literal["error", "average", "local"] = attrs.field(
        default="error",
        metadata=doc("BatchNorm-like buffers: refuse them, average them like weights, or leave each client its own"),
    )
    engine: Literal["auto", "loop", "stacked", "peers"] = attrs.field(
        default="auto",
        metadata=doc(
            "loop: client after client; stacked: all at once; peers: a process each; auto: the faster of the first two"
        ),
    )
    chunk_size: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("clients in one stack of engine stacked; null takes all")
    )
    precision: Literal["fp32", "tf32", "bf16"] = attrs.field(
        default="fp32", metadata=doc("of forward and backward passes; weights and mixing stay in fp32")
    )
    eval_clients_every: int = attrs.field(
        default=0,
        validator=in_range(0),
        metadata=doc("rounds between tests of all local models; 0 tests them after the last"),
    )
    checkpoint_every: int = attrs.field(default=1, validator=in_range(1), metadata=doc("rounds between checkpoints"))
    column: str | None = attrs.field(
        default=None, metadata=doc("column to train on; null finds image, pixel_values, features or input_ids")
    )
    output: Literal["model", "all"] = attrs.field(
        default="model",
        metadata=doc("model: the averaged model; all: a mapping of model, clients (the local models) and history"),
    )


@attrs.frozen(kw_only=True)
class Decentralised(Federated):
    """Order and graph of every method without a server."""

    update_order: UpdateOrder = attrs.field(
        default="synchronous",
        metadata=doc(
            "synchronous: all read last round's models; sequential: each reads what earlier ones have trained"
        ),
    )
    topology: Literal["random", "ring", "grid9", "torus", "mesh", "exp", "full", "er", "ws", "custom"] = attrs.field(
        default="random", metadata=doc("graph of the peers; random and er are drawn afresh every round")
    )
    weights: WeightsName = attrs.field(
        default="uniform",
        metadata=doc("mixing weights; metropolis and lazy are doubly stochastic on undirected graphs"),
    )
    active_ratio: float = _positive(0.1, "random: int(ratio · clients) − 1 draws a peer; er: probability of an edge", 1)
    rows: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("rows of torus and mesh; null takes the most square shape")
    )
    edges: tuple[tuple[int, int], ...] | None = attrs.field(
        default=None, metadata=doc("custom: undirected edges between clients, numbered from 0")
    )
    graph_file: Path | None = attrs.field(
        default=None,
        metadata=doc("custom: .csv or .npy with two columns (edges) or one column a client (mixing matrix)"),
    )
    strict: bool = attrs.field(default=False, metadata=doc("refuse mixing weights that are not doubly stochastic"))
    ranks: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("processes of engine peers; null takes one a client")
    )
    peer_timeout: float = _positive(1800.0, "seconds that a peer waits for another")
    allow_wavefront: bool = attrs.field(
        default=False, metadata=doc("let sequential order run on engine peers, where peers then wait for each other")
    )

    def __attrs_post_init__(self) -> None:
        given = (self.edges is not None) + (self.graph_file is not None)
        if given != (self.topology == "custom"):
            raise PlaitError(
                f"topology is {self.topology!r} with {given} of edges and graph_file; "
                "custom needs exactly one of them, any other topology none"
            )

    def graph(self, num_clients: int, seed: int) -> Graph:
        """The graph rule for so many clients."""
        edges, matrix = self.edges, None
        if self.graph_file is not None:
            edges, matrix = _read_graph(self.graph_file, num_clients)
        return Graph(
            name=self.topology,
            num_clients=num_clients,
            weights=self.weights,
            seed=seed,
            active_ratio=self.active_ratio,
            rows=self.rows,
            edges=edges,
            matrix=matrix,
        )


@attrs.frozen(kw_only=True)
class Centralised(Federated):
    """Who takes part in a round of a method with a server."""

    active_ratio: float = _positive(0.1, "probability that a client takes part in a round", 1)
    server_learning_rate: float = _positive(1.0, "step of the server towards the average of the clients")
    weights: ServerWeights = attrs.field(
        default="uniform", metadata=doc("of the clients in the average: uniform, or by the size of their data")
    )


def train(
    config: Federated, method: Gossip | Server | Callable[..., Outcome], model: nn.Module, clients: Any, run: Any
) -> Any:
    """Train with one method and return what ``config.output`` asks for.

    Args:
        method: a rule, or a function that takes what :func:`plait_federated.training.follow` takes after the rule.

    Raises:
        PlaitError: for every mistake in the data, the model or the configuration.
    """
    if not isinstance(model, nn.Module):
        raise PlaitError(f"model is a {type(model).__name__}; expected is a torch module")
    if run.seed >= 2**31:
        raise PlaitError(f"seed is {run.seed}; federated methods need one below 2**31")
    clients = with_numbered_classes(joined(clients))
    split, test = train_of(clients), split_of(clients, "test")
    labels = torch.from_numpy(labels_of(split))
    with user_errors():
        shards = Shards(
            inputs_of(split, config.column),
            labels,
            client_members(split),
            seed=run.seed,
            batch_size=config.batch_size,
            local_epochs=config.local_epochs,
            local_steps=config.local_steps,
            augmentation=_augmentation(config, model),
        )
        graph = None
        if isinstance(config, Decentralised):
            graph = config.graph(shards.num_clients, run.seed)
            _check_stochastic(config, graph, run)
        steps = iter(run.track(range(config.rounds), "round"))
        next(steps, None)

        def on_round(record: Mapping[str, Any]) -> None:
            run.log(step=record["round"], **{name: record[name] for name in CURVES if name in record})
            next(steps, None)

        outcome = (partial(follow, method) if isinstance(method, (Gossip, Server)) else method)(
            model,
            shards,
            _settings(config, run.seed),
            graph=graph,
            test=None if test is None else (inputs_of(test, config.column), torch.from_numpy(labels_of(test))),
            engine=config.engine,
            folder=_checkpoints(config, split, run),
            device=run.device,
            precision=config.precision,
            chunk_size=config.chunk_size,
            ranks=getattr(config, "ranks", None),
            peer_timeout=getattr(config, "peer_timeout", 1800.0),
            on_round=on_round,
        )
        return _result(config, outcome, model)


def _checkpoints(config: Federated, split: Any, run: Any) -> Path:
    """A folder for the rounds of this training: of this method, data and seed, and of no other."""
    made_of = f"{plain(config)} {run.seed} {run.step} {split._fingerprint}"
    return run.folder / "checkpoints" / hashlib.sha256(made_of.encode()).hexdigest()[:16]


def _result(config: Federated, outcome: Outcome, model: nn.Module) -> Any:
    averaged = _like(model, outcome.reported)
    if config.output == "model":
        return averaged
    local = outcome.state["local"]
    width = len(str(len(local) - 1))
    clients = {f"client-{row:0{width}d}": _like(model, vector) for row, vector in enumerate(local)}
    return {"model": averaged, "clients": clients, "history": outcome.history}


def _like(model: nn.Module, vector: torch.Tensor) -> nn.Module:
    """A copy of the user's model, in its own dtype, device and mode, with other values."""
    result = copy.deepcopy(model)
    Layout(result).load(result, vector)
    return result


def _settings(config: Federated, seed: int) -> Settings:
    shared = {field.name for field in attrs.fields(type(config))} & set(Settings.__dataclass_fields__)
    return Settings(**{name: getattr(config, name) for name in shared}, seed=seed)


def _augmentation(config: Federated, model: nn.Module) -> Augmentation | None:
    if config.augment_padding is None:
        return None
    fill = config.augment_fill or getattr(model, "mean", None) or (0.0,)
    return Augmentation(config.augment_padding, tuple(fill))


def _check_stochastic(config: Decentralised, graph: Graph, run: Any) -> None:
    mixing = graph.mixing(0)
    low, high = column_sums(mixing)
    if max(1 - low, high - 1) <= 1e-5:
        return
    sentence = (
        f"the columns of the mixing matrix sum to {low:.2f} … {high:.2f}, so mixing does not keep the average of the models; "
        "weights: metropolis does on undirected graphs"
    )
    if config.strict:
        raise PlaitError(sentence)
    if not graph.fresh_each_round:  # of drawn graphs everybody knows, and every round would have other sums
        run.warn(sentence)


def _read_graph(file: Path, num_clients: int) -> tuple[tuple[tuple[int, int], ...] | None, np.ndarray | None]:
    try:
        table = (
            np.load(file, allow_pickle=False)
            if file.suffix == ".npy"
            else np.loadtxt(file, delimiter=",", ndmin=2, encoding="utf-8-sig")
        )
    except (OSError, ValueError) as error:
        raise PlaitError(f"graph_file {str(file)!r} cannot be read: {error}") from error
    if table.shape == (num_clients, num_clients):
        return None, table.astype(float)
    if table.ndim == 2 and table.shape[1] == 2 and (table == table.astype(int)).all():
        return tuple((int(first), int(second)) for first, second in table), None
    raise PlaitError(
        f"graph_file {str(file)!r} holds an array {table.shape}; expected is ({num_clients}, {num_clients}), or two columns of edges"
    )


# Baselines --------------------------------------------------------------------------------------------------------


def _rho(default: float = 0.05) -> Any:
    return attrs.field(
        default=default, validator=in_range(0), metadata=doc("radius of the sharpness-aware perturbation")
    )


def _prox(default: float = 0.05) -> Any:
    return attrs.field(
        default=default,
        validator=in_range(0),
        metadata=doc("λ of the proximal term (λ/2)‖w − start‖²; λ · learning_rate < 1"),
    )


@attrs.frozen(kw_only=True)
class DPSGD(Decentralised):
    """D-PSGD: mix with the neighbours, then one mini-batch step (Lian et al., NeurIPS 2017)."""

    local_steps: int | None = attrs.field(
        default=1, validator=in_range(1), metadata=doc("mini-batch steps in a round; null does whole epochs")
    )

    @hookimpl
    def aggregate(self, model, clients, run) -> Any:
        return train(self, rounds.dfedavg(), model, clients, run)


@attrs.frozen(kw_only=True)
class DFedAvg(Decentralised):
    """DFedAvg: mix with the neighbours, then local SGD (Sun et al., TPAMI 2022)."""

    @hookimpl
    def aggregate(self, model, clients, run) -> Any:
        return train(self, rounds.dfedavg(), model, clients, run)


@attrs.frozen(kw_only=True)
class DFedAvgM(Decentralised):
    """DFedAvgM: DFedAvg with heavy-ball momentum in local training (Sun et al., TPAMI 2022)."""

    momentum: float = attrs.field(
        default=0.9, validator=in_range(0, 1, high_open=True), metadata=doc("of the heavy ball, reset every round")
    )

    @hookimpl
    def aggregate(self, model, clients, run) -> Any:
        return train(self, rounds.dfedavgm(self.momentum), model, clients, run)


@attrs.frozen(kw_only=True)
class DFedSAM(Decentralised):
    """DFedSAM: sharpness-aware local steps; DFedSAM-MGS with several gossip steps (Shi et al., ICML 2023)."""

    sam_rho: float = _rho()
    gossip_steps: int = attrs.field(
        default=1, validator=in_range(1), metadata=doc("how often a round mixes; more than 1 is DFedSAM-MGS")
    )

    @hookimpl
    def aggregate(self, model, clients, run) -> Any:
        return train(self, rounds.dfedsam(self.sam_rho, self.gossip_steps), model, clients, run)


@attrs.frozen(kw_only=True)
class DFedProx(Decentralised):
    """DFedAvg with a proximal term around the mixed model: the proximal part of DFedCata alone."""

    prox_lambda: float = _prox()

    @hookimpl
    def aggregate(self, model, clients, run) -> Any:
        with user_errors():
            check_prox(self.prox_lambda, self.learning_rate)
        return train(self, rounds.dfedprox(self.prox_lambda), model, clients, run)


@attrs.frozen(kw_only=True)
class FedAvg(Centralised):
    """FedAvg: a server averages the active clients' local SGD (McMahan et al., AISTATS 2017)."""

    @hookimpl
    def aggregate(self, model, clients, run) -> Any:
        method = rounds.fedavg(self.active_ratio, self.server_learning_rate, self.weights)
        return train(self, method, model, clients, run)


@attrs.frozen(kw_only=True)
class FedProx(Centralised):
    """FedProx: FedAvg with a proximal term around the server's model (Li et al., MLSys 2020)."""

    prox_lambda: float = _prox()

    @hookimpl
    def aggregate(self, model, clients, run) -> Any:
        with user_errors():
            check_prox(self.prox_lambda, self.learning_rate)
        method = rounds.fedprox(self.active_ratio, self.server_learning_rate, self.prox_lambda, self.weights)
        return train(self, method, model, clients, run)


@attrs.frozen(kw_only=True)
class FedSAM(Centralised):
    """FedSAM: FedAvg with sharpness-aware local steps (Qu et al., ICML 2022)."""

    sam_rho: float = _rho()

    @hookimpl
    def aggregate(self, model, clients, run) -> Any:
        method = rounds.fedsam(self.active_ratio, self.server_learning_rate, self.sam_rho, self.weights)
        return train(self, method, model, clients, run)


@attrs.frozen(kw_only=True)
class Scaffold(Centralised):
    """SCAFFOLD: FedAvg with control variates against client drift (Karimireddy et al., ICML 2020)."""

    @hookimpl
    def aggregate(self, model, clients, run) -> Any:
        method = rounds.scaffold(self.active_ratio, self.server_learning_rate, self.weights)
        return train(self, method, model, clients, run)
