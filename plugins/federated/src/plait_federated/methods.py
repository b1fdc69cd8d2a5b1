"""What the adapters of federated methods share: their fields, and one training from plait's hook to the engines.

A method is a class derived from :class:`Decentralised` or :class:`Centralised` that says its ``rule``; one that has more
to do than follow a rule overrides ``aggregate`` and calls :func:`train`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import torch
from datasets import Dataset
from plait import hookimpl
from plait.fields import field, in_range
from plait.freezing import thawed
from plait_vision import DATA, in_order_of
from torch import nn

from plait_federated.client_data import (
    client_members,
    inputs_of,
    joined,
    labels_of,
    own_class_names,
    split_of,
    train_of,
    with_numbered_classes,
)
from plait_federated.engines import Precision
from plait_federated.layout import Layout
from plait_federated.rounds import Gossip, Server, ServerWeights
from plait_federated.settings import FederatedSettings, UpdateOrder
from plait_federated.shards import Augmentation, ClientShards
from plait_federated.steps import check_prox
from plait_federated.topology import Graph, MixingWeights, Topology, column_sums, read_graph
from plait_federated.training import EngineName, TrainingOutcome, follow

CURVES = ("accuracy", "loss", "consensus_distance", "mean_client_accuracy", "worst_client_accuracy")


@attrs.frozen(kw_only=True)
class Federated:
    """Local training and engine of every federated method."""

    renamed_fields: ClassVar[Mapping[str, str]] = {"lr_decay": "learning_rate_decay"}
    # Several clients may be a list of datasets, of which each is one.
    takes = {"model": "classifier", "clients": DATA}

    rounds: int = field(500, "communication rounds", in_range(1))
    local_epochs: int = field(5, "passes over a client's data in a round", in_range(1))
    local_steps: int | None = field(None, "stop a round after so many batches; null does whole epochs", in_range(1))
    batch_size: int = field(128, "samples in a batch", in_range(1))
    learning_rate: float = field(0.1, "of the first round", in_range(0, low_open=True))
    learning_rate_decay: float = field(
        0.998, "factor of the learning rate after every round", in_range(0, 1, low_open=True)
    )
    weight_decay: float = field(5e-4, "L2 weight decay", in_range(0))
    max_grad_norm: float | None = field(
        10.0, "clip of a client's whole gradient norm; null does not clip", in_range(0, low_open=True)
    )
    augment_padding: int | None = field(
        None,
        "flip and crop images out of a border of so many pixels (4 for CIFAR, 8 for 64×64); null does not augment",
        in_range(0),
    )
    augment_fill: tuple[float, ...] | None = field(
        None, "colour of that border in [0, 1]; null takes what the model subtracts, or black"
    )
    buffers: Literal["error", "average", "local"] = field(
        "error", "BatchNorm-like buffers: refuse them, average them like weights, or leave each client its own"
    )
    engine: EngineName = field(
        "auto",
        "loop: client after client; stacked: all at once; peers: a process each; auto: the faster of the first two",
    )
    chunk_size: int | None = field(None, "clients in one stack of engine stacked; null takes all", in_range(1))
    precision: Precision = field("fp32", "of forward and backward passes; weights and mixing stay in fp32")
    eval_clients_every: int = field(
        0, "rounds between tests of all local models; 0 tests them after the last", in_range(0)
    )
    checkpoint_every: int = field(1, "rounds between checkpoints", in_range(1))
    column: str | None = field(None, "column to train on; null finds image, pixel_values, features or input_ids")
    output: Literal["model", "all"] = field(
        "model", "model: the averaged model; all: a mapping of model, clients (the local models) and history"
    )

    @property
    def columns_needed(self) -> dict[str, tuple[str, ...]]:
        return {"clients": ("label", *filter(None, [self.column]))}

    @property
    def gives(self) -> str | None:
        return "model" if self.output == "model" else None

    @property
    def splits(self) -> tuple[str, ...] | None:
        return None if self.output == "model" else ("model", "clients", "history")

    def rule(self) -> Gossip | Server:
        """Where a client starts in a round, and how it steps."""
        raise NotImplementedError(f"{type(self).__name__} has no rule")

    @hookimpl
    def aggregate(self, model: Any, clients: Any, run: Any) -> Any:
        return train(self, partial(follow, self.rule()), model, clients, run)

    def settings(self, seed: int) -> FederatedSettings:
        """The fields that the algorithm takes."""
        shared = {one.name for one in attrs.fields(type(self))} & set(FederatedSettings.__dataclass_fields__)
        return FederatedSettings(**{name: getattr(self, name) for name in shared}, seed=seed)


@attrs.frozen(kw_only=True, slots=False)
class PeerGraph:
    """The graph of peers without a server."""

    topology: Topology = field("random", "graph of the peers; random and er are drawn afresh every round")
    weights: MixingWeights = field(
        "uniform", "mixing weights; metropolis and lazy are doubly stochastic on undirected graphs"
    )
    active_ratio: float = field(
        0.1, "random: int(ratio · clients) − 1 draws a peer; er: probability of an edge", in_range(0, 1, low_open=True)
    )
    rows: int | None = field(None, "rows of torus and mesh; null takes the most square shape", in_range(1))
    edges: tuple[tuple[int, int], ...] | None = field(None, "custom: undirected edges between clients, numbered from 0")
    graph_file: Path | None = field(
        None, "custom: .csv or .npy with two columns (edges) or one column a client (mixing matrix)"
    )

    def __attrs_post_init__(self) -> None:
        given = (self.edges is not None) + (self.graph_file is not None)
        if given != (self.topology == "custom"):
            raise ValueError(
                f"topology is {self.topology!r} with {given} of edges and graph_file; "
                "custom needs exactly one of them, any other topology none"
            )

    def graph(self, num_clients: int, seed: int) -> Graph:
        """The graph rule for so many clients."""
        edges, matrix = self.edges, None
        if self.graph_file is not None:
            edges, matrix = read_graph(self.graph_file, num_clients)
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
class Decentralised(Federated, PeerGraph):
    """Order and graph of every method without a server."""

    update_order: UpdateOrder = field(
        "synchronous",
        "synchronous: all read last round's models; sequential: each reads what earlier ones have trained",
    )
    strict: bool = field(False, "refuse mixing weights that are not doubly stochastic")
    ranks: int | None = field(None, "processes of engine peers; null takes one a client", in_range(1))
    peer_timeout: float = field(1800.0, "seconds that a peer waits for another", in_range(0, low_open=True))
    allow_wavefront: bool = field(
        False, "let sequential order run on engine peers, where peers then wait for each other"
    )


@attrs.frozen(kw_only=True)
class Centralised(Federated):
    """Who takes part in a round of a method with a server."""

    active_ratio: float = field(0.1, "probability that a client takes part in a round", in_range(0, 1, low_open=True))
    server_learning_rate: float = field(
        1.0, "step of the server towards the average of the clients", in_range(0, low_open=True)
    )
    weights: ServerWeights = field("uniform", "of the clients in the average: uniform, or by the size of their data")


def _does_not_overshoot(instance: Any, attribute: attrs.Attribute[Any], value: float) -> None:
    check_prox(value, instance.learning_rate)


@attrs.frozen(kw_only=True, slots=False)
class Proximal:
    """The field of methods with a proximal term in local training."""

    prox_lambda: float = field(
        0.05,
        "λ of the proximal term (λ/2)‖w − start‖²; λ · learning_rate < 1",
        attrs.validators.and_(in_range(0), _does_not_overshoot),
    )


@attrs.frozen(kw_only=True, slots=False)
class SharpnessAware:
    """The field of methods with sharpness-aware local steps."""

    renamed_fields: ClassVar[Mapping[str, str]] = {**Federated.renamed_fields, "sam_rho": "rho"}

    rho: float = field(0.05, "radius of the sharpness-aware perturbation", in_range(0))


def train(
    config: Federated, method: Callable[..., TrainingOutcome], model: nn.Module, clients: Any, run: Any
) -> nn.Module | dict[str, Any]:
    """Train with one method and return what ``config.output`` asks for.

    Args:
        method: what :func:`plait_federated.training.follow` is once it has its rule.
        clients: a dataset with a column ``client``, a mapping with it as ``train`` (and a ``test``), or a list of
            datasets, one a client.

    Raises:
        TypeError: the model is not a torch module.
        ValueError: the data, the model and the fields do not fit together.
        FloatingPointError: the models diverge.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch module")
    model = thawed(model)
    if run.seed >= 2**31:
        raise ValueError(f"seed is {run.seed}; federated methods need one below 2**31")
    clients = with_numbered_classes(joined(clients))
    split, test = train_of(clients), split_of(clients, "test")
    labels = _numbers(split, model)
    shards = ClientShards(
        inputs_of(split, config.column),
        labels,
        client_members(split),
        seed=run.seed,
        batch_size=config.batch_size,
        local_epochs=config.local_epochs,
        local_steps=config.local_steps,
        augmentation=_augmentation(config, model),
    )
    graph, of_peers = None, {}
    if isinstance(config, Decentralised):
        graph = config.graph(shards.num_clients, run.seed)
        of_peers = {"ranks": config.ranks, "peer_timeout": config.peer_timeout}
        _check_stochastic(config, graph, run)
    mixing = None if graph is None else graph.mixing(0)
    with run.loop(config, "round", inputs=(model, split, test, mixing), total=config.rounds) as loop:

        def on_round(record: Mapping[str, Any]) -> None:
            loop.log(step=record["round"], **{name: record[name] for name in CURVES if name in record})
            loop.done(record["round"] - 1)

        outcome = method(
            model,
            shards,
            config.settings(run.seed),
            graph=graph,
            test=None if test is None else (inputs_of(test, config.column), _numbers(test, model)),
            engine=config.engine,
            folder=loop.folder,
            device=run.device,
            precision=config.precision,
            chunk_size=config.chunk_size,
            on_round=on_round,
            **of_peers,
        )
    return _result(config, outcome, model)


def _numbers(data: Dataset, model: nn.Module) -> torch.Tensor:
    """The labels, int64 ``[N]``, by the numbers of the model's classes where it and the data have names for them."""
    labels = torch.from_numpy(labels_of(data))
    return in_order_of(labels, own_class_names(data), getattr(model, "class_names", None))


def _result(config: Federated, outcome: TrainingOutcome, model: nn.Module) -> nn.Module | dict[str, Any]:
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


def _augmentation(config: Federated, model: nn.Module) -> Augmentation | None:
    if config.augment_padding is None:
        return None
    fill = config.augment_fill or getattr(model, "mean", None) or (0.0,)
    return Augmentation(config.augment_padding, tuple(fill))


def _check_stochastic(config: Decentralised, graph: Graph, run: Any) -> None:
    low, high = column_sums(graph.mixing(0))
    if max(1 - low, high - 1) <= 1e-5:
        return
    sentence = (
        f"the columns of the mixing matrix sum to {low:.2f} … {high:.2f}, so mixing does not keep the average of the models; "
        "weights: metropolis does on undirected graphs"
    )
    if config.strict:
        raise ValueError(sentence)
    if not graph.fresh_each_round:  # of drawn graphs everybody knows, and every round would have other sums
        run.warn(sentence)
