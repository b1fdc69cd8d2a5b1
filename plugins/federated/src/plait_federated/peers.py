"""Clients in processes of their own that talk to their neighbours only, over torch.distributed.

Every rank holds a block of clients (one each where there are as many ranks as clients). In a round it sends
each of its models to the ranks whose clients read it, and to no one else; graphs and batches are derived from
the seed on every rank, nothing is negotiated. Consensus distance and accuracy are collective operations of the
simulation and are not counted as traffic of the method.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from plait_federated.checkpoint import save_part
from plait_federated.engines import LoopEngine, Precision
from plait_federated.evaluation import Evaluator, Record, check_finite, check_history, client_accuracy
from plait_federated.layout import Layout
from plait_federated.rounds import Gossip, ModelColumns, RoundState
from plait_federated.settings import FederatedSettings
from plait_federated.shards import ClientShards
from plait_federated.topology import Graph, levels


@dataclass
class PeerJob:
    """What every rank gets; the shards' tensors are shared, not copied."""

    model: nn.Module
    shards: ClientShards
    method: Gossip
    settings: FederatedSettings
    graph: Graph
    test: tuple[Tensor, Tensor] | None
    folder: Path
    identity: str
    rounds_done: int
    history: list[Record]
    ranks: int
    device: str
    precision: Precision
    timeout: float


def run(job: PeerJob, state: RoundState, on_round: Callable[[Record], None]) -> None:
    """Carry out the remaining rounds in ``job.ranks`` processes; results are the checkpoints in ``job.folder``.

    Raises:
        RuntimeError: a process died; the message names its clients and the last round that is whole.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    blocks = np.array_split(np.arange(job.shards.num_clients), job.ranks)
    rendezvous = job.folder / f"rendezvous-{uuid.uuid4().hex}"
    context = mp.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    for tensor in (job.shards.inputs, job.shards.labels, *(job.test or ())):
        tensor.share_memory_()
    processes = []
    for rank, block in enumerate(blocks):
        _error_file(job, rank).unlink(missing_ok=True)
        own = {name: table[block].clone() for name, table in state.items()}
        arguments = (rank, job, blocks, own, str(rendezvous), sender if rank == 0 else None)
        processes.append(context.Process(target=_rank, args=arguments, daemon=True))
    try:
        for process in processes:
            process.start()
        sender.close()
        _watch(job, blocks, processes, receiver, on_round)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
        rendezvous.unlink(missing_ok=True)


def _watch(
    job: PeerJob, blocks: list[np.ndarray], processes: list[Any], receiver: Any, on_round: Callable[[Record], None]
) -> None:
    """Pass records on until all ranks have ended well; on the first that has not, say which."""
    last, listening = job.rounds_done, True
    while any(process.exitcode is None for process in processes) or listening:
        waiting = [process.sentinel for process in processes if process.exitcode is None]
        multiprocessing.connection.wait(waiting + [receiver] * listening, timeout=1)
        while listening and receiver.poll():
            try:
                message = receiver.recv()
            except EOFError:
                listening = False
                break
            last = message["round"]
            on_round(message)
        if any(process.exitcode for process in processes):
            time.sleep(0.5)  # so that a killed rank is seen beside those that noticed it missing
            failed = [rank for rank, process in enumerate(processes) if process.exitcode]
            rank = min(failed, key=lambda rank: _time_of_error(job, rank))
            raise RuntimeError(_explain(job, blocks[rank], rank, processes[rank].exitcode, last))


def _time_of_error(job: PeerJob, rank: int) -> int:
    """When the rank wrote why it stops; 0 for one that could not: it is the cause, the others lost it."""
    note = _error_file(job, rank)
    return note.stat().st_mtime_ns if note.exists() else 0


def _explain(job: PeerJob, block: np.ndarray, rank: int, code: int, last: int) -> str:
    clients = ", ".join(map(str, block[:5])) + (" …" if len(block) > 5 else "")
    note = _error_file(job, rank)
    if note.exists():
        what = f"stopped: {note.read_text()}"
    elif code < 0:
        what = f"died of {signal.Signals(-code).name}"
    else:
        what = f'ended with code {code} (a script needs `if __name__ == "__main__":` to start processes)'
    return f"peer process {rank} (clients {clients}) {what}, after round {last}; run again to resume from the last complete round"


def _error_file(job: PeerJob, rank: int) -> Path:
    return job.folder / f"error-{rank}.txt"


def _rank(rank: int, job: PeerJob, blocks: list[np.ndarray], own: RoundState, rendezvous: str, sender: Any) -> None:
    torch.set_num_threads(1)
    device = torch.device(job.device)
    backend = "gloo"
    if job.device == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # NCCL needs a GPU for each rank; ranks that share one talk through the host.
        if torch.cuda.device_count() >= job.ranks:
            backend = "nccl"
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=job.ranks,
            timeout=timedelta(seconds=job.timeout),
        )
        _Peer(rank, job, blocks, own, device, sender).run()
        dist.destroy_process_group()
    except Exception as error:
        note = f"{error}".strip().splitlines()[0][:400] if str(error) else type(error).__name__
        _error_file(job, rank).write_text(note)
        os._exit(1)  # the interpreter's own end would abort on the threads of a connection that broke


class _Peer:
    """One rank: its clients' models, and what it exchanges."""

    def __init__(
        self, rank: int, job: PeerJob, blocks: list[np.ndarray], own: RoundState, device: torch.device, sender: Any
    ) -> None:
        self.rank, self.job, self.blocks, self.sender, self.device = rank, job, blocks, sender, device
        self.clients = blocks[rank]
        self.state = {name: table.to(device) for name, table in own.items()}
        shards = job.shards.to(device)
        model = job.model.to(device)
        self.layout = Layout(model)
        self.initial = self.layout.vector(model)
        self.engine = LoopEngine(model, shards, precision=job.precision)
        self.evaluator = None if job.test is None else Evaluator(model, job.test[0].to(device), job.test[1].to(device))
        self.columns = ModelColumns(self.layout.num_parameters, job.settings.keep_buffers)
        self.exchange = Exchange(rank, blocks)
        self.history = list(job.history)

    def run(self) -> None:
        settings = self.job.settings
        start_norm = float(self.initial[: self.layout.num_parameters].norm())
        for index in range(self.job.rounds_done, settings.rounds):
            begin, before = time.perf_counter(), self.exchange.bytes_sent
            mixing = self.job.graph.mixing(index)
            play = self._sequential if settings.update_order == "sequential" else self._synchronous
            play(mixing, index)
            check_finite(self.state, self.clients.tolist(), index)
            record = {"round": index + 1, "learning_rate": settings.learning_rate_of(index)}
            record |= self.job.graph.facts
            record["edges"] = int(np.count_nonzero(mixing - np.diag(np.diag(mixing))))
            record |= self._measure(self.exchange.bytes_sent - before, settings.evaluates_clients(index))
            record["seconds"] = time.perf_counter() - begin
            self.history.append(record)
            check_history(self.history, start_norm)
            if settings.saves(index):
                history = self.history if self.rank == 0 else []
                arguments = (self.job.folder, index + 1, self.state, history, self.job.identity)
                save_part(*arguments, part=self.rank, num_parts=self.job.ranks)
            if self.sender is not None:
                self.sender.send(record)

    def _synchronous(self, mixing: np.ndarray, index: int) -> None:
        method, local = self.job.method, self.state["local"]
        mixed = local
        for _ in range(method.gossip_steps):
            mixed = self.exchange.mix(mixing, mixed)
        start = self.columns.start(method, mixed, local, self.state.get("mixed", mixed))
        self.state["local"] = self._train(self.clients, start, index)
        if method.keeps_mixed:
            self.state["mixed"] = mixed

    def _sequential(self, mixing: np.ndarray, index: int) -> None:
        """Level by level; models of the last round travel first, new ones after each level that made them."""
        method, before = self.job.method, self.state["local"]
        after, mixed = before.clone(), self.exchange.mix(np.triu(mixing), before)
        for level in levels(mixing):
            earlier = np.zeros_like(mixing)
            earlier[level] = np.tril(mixing, -1)[level]
            mixed = mixed + self.exchange.mix(earlier, after)
            rows = np.flatnonzero(np.isin(self.clients, level))
            if len(rows):
                previous = self.state["mixed"][rows] if method.keeps_mixed else mixed[rows]
                start = self.columns.start(method, mixed[rows], before[rows], previous)
                after[rows] = self._train(self.clients[rows], start, index)
        self.state["local"] = after
        if method.keeps_mixed:
            self.state["mixed"] = mixed

    def _train(self, clients: np.ndarray, start: Tensor, index: int) -> Tensor:
        prepare = partial(self.job.settings.local, self.job.settings.learning_rate_of(index))
        return self.engine.train(clients.tolist(), start, self.job.method.step, prepare, index)

    def _measure(self, bytes_sent: int, of_clients: bool) -> Record:
        """The same record on every rank, by sums over ranks; accuracy of the average is rank 0's work."""
        local, p = self.state["local"], self.layout.num_parameters
        n = self.job.shards.num_clients
        mean = local.sum(0)
        dist.all_reduce(mean)
        mean /= n
        steps = sum(self.job.shards.num_steps(client) for client in self.clients)
        sums = torch.tensor(
            [
                (local - mean)[:, :p].square().sum().item() / n,
                (local - self.initial)[:, :p].square().sum().item() / n,
                steps,
                bytes_sent,
            ],
            dtype=torch.float64,
            device=self.device,
        )
        dist.all_reduce(sums)
        record: Record = {
            "consensus_distance": sums[0].item(),
            "drift_from_init": sums[1].item(),
            "gradient_steps": int(sums[2]),
            "bytes": int(sums[3]),
        }
        if self.evaluator is None:
            return record
        if self.rank == 0:
            record["accuracy"], record["loss"] = self.evaluator(mean)
        if of_clients:
            gathered: list[list[float]] = [[] for _ in self.blocks]
            dist.all_gather_object(gathered, [self.evaluator(vector)[0] for vector in local])
            record |= client_accuracy([accuracy for block in gathered for accuracy in block])
        return record


class Exchange:
    """Models that cross from rank to rank, and how many bytes of them this rank has sent."""

    def __init__(self, rank: int, blocks: list[np.ndarray]) -> None:
        self.rank, self.blocks, self.bytes_sent = rank, blocks, 0

    def mix(self, weights: np.ndarray, own: Tensor) -> Tensor:
        """This rank's rows of ``weights`` @ all models; ``own`` [k, D] are its rows of the models.

        A row travels once to every other rank with a non-zero weight for it. All ranks must call this with
        the same weights.
        """
        operations, columns, rows = [], list(self.blocks[self.rank]), [own]
        sources = []
        for other in range(len(self.blocks)):
            if other == self.rank:
                continue
            wanted = self._read(weights, reader=other, source=self.rank)
            if len(wanted):
                outgoing = own[wanted - self.blocks[self.rank][0]].contiguous()
                self.bytes_sent += outgoing.nbytes
                operations.append(dist.P2POp(dist.isend, outgoing, other))
                sources.append(other)
            offered = self._read(weights, reader=self.rank, source=other)
            if len(offered):
                rows.append(own.new_empty(len(offered), own.shape[1]))
                operations.append(dist.P2POp(dist.irecv, rows[-1], other))
                sources.append(other)
                columns.extend(offered)
        if operations:
            self._wait(dist.batch_isend_irecv(operations), sources)
        mine = weights[np.ix_(self.blocks[self.rank], columns)]
        return torch.tensor(mine, dtype=own.dtype, device=own.device) @ torch.cat(rows)

    def _read(self, weights: np.ndarray, reader: int, source: int) -> np.ndarray:
        block = self.blocks[source]
        is_read: np.ndarray = (weights[np.ix_(self.blocks[reader], block)] != 0).any(axis=0)
        read: np.ndarray = block[is_read]
        return read

    def _wait(self, requests: list[Any], others: list[int]) -> None:
        # NCCL returns one request for the whole batch.
        for position, request in enumerate(requests):
            try:
                request.wait()
            except RuntimeError as error:
                named = f"peer process {others[position]} (clients {', '.join(map(str, self.blocks[others[position]][:5]))})"
                raise RuntimeError(f"{named if len(requests) == len(others) else 'a peer'} did not answer") from error
