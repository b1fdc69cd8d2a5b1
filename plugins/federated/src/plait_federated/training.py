"""Rounds after rounds: the driver of every method on every engine, with checkpoints and a history."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from plait_federated import peers
from plait_federated.checkpoint import load_latest, save_part
from plait_federated.engines import Engine, LoopEngine, Precision, StackedEngine, fastest_engine
from plait_federated.evaluation import (
    Evaluator,
    Record,
    check_finite,
    check_history,
    drift,
    logits_of,
    of_clients,
    of_reported,
)
from plait_federated.layout import Layout
from plait_federated.rounds import (
    Gossip,
    ModelColumns,
    RoundState,
    Server,
    fedavg_round,
    scaffold_round,
    sequential_round,
    synchronous_round,
)
from plait_federated.settings import FederatedSettings
from plait_federated.shards import ClientShards
from plait_federated.topology import Graph, levels

EngineName = Literal["auto", "loop", "stacked", "peers"]


@dataclass(frozen=True)
class TrainingOutcome:
    """What a training leaves: the state's tables, the reported vector ``[D]``, one record a round."""

    state: RoundState
    reported: Tensor
    history: list[Record]
    engine: str


def follow(
    method: Gossip | Server,
    model: nn.Module,
    shards: ClientShards,
    settings: FederatedSettings,
    *,
    on_round: Callable[[Record], None] = lambda record: None,
    **options: Any,
) -> TrainingOutcome:
    """Train a model by one rule; ``options`` are those of :class:`FederatedTraining`, ``on_round`` gets every round's record."""
    return FederatedTraining(model, shards, method, settings, **options).run(on_round)


class FederatedTraining:
    """Federated training of one model by one method.

    Args:
        model: the module to train; its values are the common start, it is not changed.
        shards: the clients' data.
        method: :class:`Gossip` (needs ``graph``) or :class:`Server`.
        test: inputs and labels of the global test set, or ``None``.
        engine: ``loop``, ``stacked``, ``peers`` (one process a rank, local), or ``auto``: the faster of loop and
            stacked on two trial steps.
        folder: checkpoints; a training found there resumes after its last complete round.
        chunk_size: clients in one stack; ``None`` takes all.
        ranks: processes of the peers engine.

    Raises:
        ValueError: the parts do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        shards: ClientShards,
        method: Gossip | Server,
        settings: FederatedSettings,
        *,
        graph: Graph | None = None,
        test: tuple[Tensor, Tensor] | None = None,
        engine: EngineName = "auto",
        folder: Path,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        chunk_size: int | None = None,
        ranks: int | None = None,
        peer_timeout: float = 1800.0,
    ) -> None:
        self.device = torch.device(device)
        self.model = copy.deepcopy(model).float().cpu()
        self.layout = Layout(self.model)
        self.shards, self.method, self.settings, self.graph, self.test = shards, method, settings, graph, test
        self.engine, self.folder, self.precision, self.chunk_size = engine, Path(folder), precision, chunk_size
        self.ranks = min(ranks or shards.num_clients, shards.num_clients)
        self.peer_timeout = peer_timeout
        self._check()
        identity = asdict(settings) | {"rounds": 0, "eval_clients_every": 0, "checkpoint_every": 0}
        identity |= {
            "method": _describe(method),
            "graph": _identify(graph),
            "clients": [len(m) for m in shards.members],
        }
        identity |= {"batches": (shards.batch_size, shards.local_epochs, shards.local_steps, shards.augmentation)}
        initial = hashlib.sha256(self.layout.vector(self.model).cpu().numpy().tobytes()).hexdigest()
        self.identity = hashlib.sha256(repr((identity, initial)).encode()).hexdigest()

    def run(self, on_round: Callable[[Record], None] = lambda record: None) -> TrainingOutcome:
        """Train until ``settings.rounds`` rounds are done, counting those found in the folder.

        Raises:
            RuntimeError: a process of the peers engine died; run again to resume.
            FloatingPointError: the models diverge; the last checkpoint stays.
        """
        initial = self.layout.vector(self.model)
        history: list[Record] = []
        done, state = 0, self.method.initial_state(initial, self.shards.num_clients)
        if (found := load_latest(self.folder, self.identity)) is not None:
            done, state, history = found
        for record in history:
            on_round(record)
        name: str = self.engine
        if done < self.settings.rounds:
            if self.engine == "peers" and isinstance(self.method, Gossip):
                state, history = self._run_peers(self.method, done, state, history, on_round)
            else:
                name, state = self._run_here(done, state, history, initial, on_round)
        reported = state["server"][0] if "server" in state else state["local"].mean(0)
        return TrainingOutcome({key: table.cpu() for key, table in state.items()}, reported.cpu(), history, name)

    def model_from(self, vector: Tensor) -> nn.Module:
        """A copy of the model with the values of a vector ``[D]``."""
        model = copy.deepcopy(self.model)
        self.layout.load(model, vector)
        return model

    def _run_here(
        self, done: int, state: RoundState, history: list[Record], initial: Tensor, on_round: Callable[[Record], None]
    ) -> tuple[str, RoundState]:
        shards = self.shards.to(self.device)
        model = copy.deepcopy(self.model).to(self.device)
        engine = self._make_engine(model, shards)
        evaluator = None
        if self.test is not None:
            evaluator = Evaluator(model, self.test[0].to(self.device), self.test[1].to(self.device))
        state = {name: table.to(self.device) for name, table in state.items()}
        initial = initial.to(self.device)
        start_norm = float(initial[: self.layout.num_parameters].norm())
        for index in range(done, self.settings.rounds):
            begin = time.perf_counter()
            state, facts = self._round(engine, state, index)
            check_finite(state, range(len(state["local"])), index)
            reported = state["server"][0] if "server" in state else state["local"].mean(0)
            record = {"round": index + 1, "learning_rate": self.settings.learning_rate_of(index), **facts}
            record |= of_reported(reported, evaluator)
            if isinstance(self.method, Gossip):  # a server's clients have no models of their own between rounds
                testing = evaluator if self.settings.evaluates_clients(index) else None
                record |= of_clients(state["local"], initial, self.layout.num_parameters, testing)
            else:
                record["drift_from_init"] = drift(state["server"], initial, self.layout.num_parameters)
            record["seconds"] = time.perf_counter() - begin
            history.append(record)
            check_history(history, start_norm)
            if self.settings.saves(index):
                save_part(self.folder, index + 1, state, history, self.identity)
            on_round(record)
        return engine.name, state

    def _round(self, engine: Engine, state: RoundState, index: int) -> tuple[RoundState, Record]:
        settings, method = self.settings, self.method
        learning_rate = settings.learning_rate_of(index)
        prepare = partial(settings.local, learning_rate)

        def train(clients: np.ndarray, start: Tensor, offset: Tensor | None = None) -> Tensor:
            return engine.train(clients.tolist(), start, method.step, prepare, index, offset)

        size = 4 * (self.layout.num_parameters + self.layout.num_buffers)
        if isinstance(method, Server):
            clients = method.active(self.shards.num_clients, settings.seed, index)
            sizes = None
            if method.weights == "size":
                sizes = torch.tensor([len(rows) for rows in self.shards.members], device=self.device)
            steps = [self.shards.num_steps(client) for client in clients]
            if method.controlled:
                num_steps = torch.tensor(steps, dtype=torch.float32, device=self.device)
                state = scaffold_round(method, state, clients, train, num_steps, learning_rate, sizes)
            else:
                state = fedavg_round(method, state, clients, train, sizes)
            vectors = 2 * len(clients) * (2 if method.controlled else 1)
            return state, {"gradient_steps": sum(steps), "bytes": vectors * size}
        graph = self._graph_of_peers()
        mixing = graph.mixing(index)
        edges = int(np.count_nonzero(mixing - np.diag(np.diag(mixing))))
        power = np.linalg.matrix_power(mixing, method.gossip_steps)
        columns = ModelColumns(self.layout.num_parameters, settings.keep_buffers)
        play = sequential_round if settings.update_order == "sequential" else synchronous_round
        state = play(method, state, torch.tensor(power, dtype=torch.float32, device=self.device), columns, train)
        steps = [self.shards.num_steps(client) for client in range(self.shards.num_clients)]
        facts = graph.facts | {"edges": edges}
        return state, facts | {"gradient_steps": sum(steps), "bytes": edges * method.gossip_steps * size}

    def _make_engine(self, model: nn.Module, shards: ClientShards) -> Engine:
        if self.engine == "loop":
            return LoopEngine(model, shards, precision=self.precision)
        if self.engine == "stacked":
            return StackedEngine(model, shards, precision=self.precision, chunk_size=self.chunk_size)
        width = shards.num_clients
        if isinstance(self.method, Server):
            width = max(1, round(width * self.method.active_ratio))
        elif self.settings.update_order == "sequential":
            mixing = np.linalg.matrix_power(self._graph_of_peers().mixing(0), self.method.gossip_steps)
            width = max(1, width // len(levels(mixing)))
        return fastest_engine(model, shards, width, precision=self.precision)

    def _run_peers(
        self, method: Gossip, done: int, state: RoundState, history: list[Record], on_round: Callable[[Record], None]
    ) -> tuple[RoundState, list[Record]]:
        job = peers.PeerJob(
            model=self.model,
            shards=self.shards,
            method=method,
            settings=self.settings,
            graph=self._graph_of_peers(),
            test=self.test,
            folder=self.folder,
            identity=self.identity,
            rounds_done=done,
            history=history,
            ranks=self.ranks,
            device=self.device.type,
            precision=self.precision,
            timeout=self.peer_timeout,
        )
        peers.run(job, state, on_round)
        found = load_latest(self.folder, self.identity)
        if found is None:
            raise RuntimeError(f"the peers left no checkpoint in {self.folder}; run again")
        return found[1:]

    def _graph_of_peers(self) -> Graph:
        if self.graph is None:
            raise ValueError("a decentralised method needs a graph")
        return self.graph

    def _check(self) -> None:
        method, settings = self.method, self.settings
        for name, values in self.layout.split(self.layout.vector(self.model)).items():
            if not torch.isfinite(values).all():
                raise ValueError(f"{name} of the model holds NaN or infinite values; start from finite ones")
        if self.layout.num_buffers and settings.buffers == "error":
            name = self.layout.buffer_names[0]
            raise ValueError(
                f"module {name.rpartition('.')[0] or 'the model'} has the buffer {name}, which peers would not agree on; "
                "use a model without such buffers (GroupNorm for BatchNorm), or buffers: average or local"
            )
        if self.layout.num_buffers and isinstance(method, Server) and (method.controlled or settings.keep_buffers):
            raise ValueError(
                "models with buffers are trained by server methods with buffers: average only, not by SCAFFOLD"
            )
        if isinstance(method, Gossip):
            num_peers = self._graph_of_peers().num_clients
            if num_peers != self.shards.num_clients:
                raise ValueError(f"the graph is of {num_peers} peers, the data of {self.shards.num_clients}")
        elif self.engine == "peers":
            raise ValueError("a server method has no neighbours to exchange with; take engine loop or stacked")
        if self.engine == "peers" and settings.update_order == "sequential":
            if not settings.allow_wavefront:
                raise ValueError(
                    "update_order sequential makes peers wait for each other; take synchronous, or set allow_wavefront"
                )
            if isinstance(method, Gossip) and method.gossip_steps > 1:
                raise ValueError("update_order sequential with several gossip steps does not run on peers; take loop")
        self._check_labels()

    def _check_labels(self) -> None:
        model = copy.deepcopy(self.model).eval()
        outputs = logits_of(model, self.shards.inputs[:1]).shape[1]
        parts = [self.shards.labels] + ([] if self.test is None else [self.test[1]])
        for label in (int(end) for labels in parts for end in labels.aminmax()):
            if not 0 <= label < outputs:
                raise ValueError(
                    f"label {label} does not fit a model of {outputs} outputs; labels are 0 … {outputs - 1}"
                )


def _identify(graph: Graph | None) -> str:
    if graph is None or graph.matrix is None:
        return repr(graph)
    return hashlib.sha256(graph.mixing(0).tobytes()).hexdigest()  # repr shortens large arrays


def _describe(method: Gossip | Server) -> str:
    parts = []
    for value in vars(method).values():
        if isinstance(value, partial):
            value = (value.func.__qualname__, sorted(value.keywords.items()))
        parts.append(getattr(value, "__qualname__", repr(value)))
    return " ".join(map(str, parts))
