"""Local training of many clients: one after another (loop), or all at once (stacked).

Both engines train the same batches with the same rule and agree to float tolerance. Rows of parameters
are ``[k, D]`` float32, D = parameters + buffers of :class:`plait_federated.layout.Layout`.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from plait_vision import as_logits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from plait_federated.layout import Layout
from plait_federated.shards import ClientBatches, ClientShards
from plait_federated.steps import Local, LocalStep

Precision = Literal["fp32", "tf32", "bf16"]
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each sample, ``[b]``."""
    return F.cross_entropy(logits, labels, reduction="none")


class Engine(Protocol):
    """Trains clients from given starts; ``prepare`` makes the :class:`Local` of a stack of starts."""

    name: str
    layout: Layout
    model: nn.Module
    shards: ClientShards

    def train(
        self,
        clients: Sequence[int],
        start: Tensor,
        step: LocalStep,
        prepare: Callable[[Tensor], Local],
        round_index: int,
        offset: Tensor | None = None,
    ) -> Tensor: ...


class LoopEngine:
    """One client after another through one module whose parameters are views of one flat vector."""

    name = "loop"

    def __init__(
        self, model: nn.Module, shards: ClientShards, loss: Loss = cross_entropy, precision: Precision = "fp32"
    ):
        self.layout = Layout(model)
        self.model = copy.deepcopy(model).float().train()
        self.shards, self.loss, self.precision = shards, loss, precision
        self.flat = self.layout.vector(self.model)
        self.flat_gradient = torch.zeros_like(self.flat[: self.layout.num_parameters])
        self.buffers = self.flat[self.layout.num_parameters :]
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name, view in self.layout.split(self.flat).items():
            tensors[name].data = view
        for name, view in self.layout.split(self.flat_gradient).items():
            tensors[name].grad = view

    def train(
        self,
        clients: Sequence[int],
        start: Tensor,
        step: LocalStep,
        prepare: Callable[[Tensor], Local],
        round_index: int,
        offset: Tensor | None = None,
    ) -> Tensor:
        trained = torch.empty_like(start)
        with _numerics(self.precision, start.device), _forked_random(start.device):
            for row, client in enumerate(clients):
                torch.manual_seed(_noise_seed(self.shards.seed, round_index, client))  # dropout
                trained[row] = self._train_one(
                    start[row],
                    step,
                    prepare(start[row, : self.layout.num_parameters]),
                    self.shards.batches(client, round_index),
                    None if offset is None else offset[row],
                )
        return trained

    def _train_one(
        self, start: Tensor, step: LocalStep, local: Local, batches: ClientBatches, offset: Tensor | None
    ) -> Tensor:
        local.offset = offset
        w = start[: self.layout.num_parameters].clone()
        self.flat.copy_(start)
        for position in range(len(batches.index)):
            kept = batches.index[position] >= 0
            x, y = self.shards.batch(*_taken(batches, (position, kept)))
            w = step(w, partial(self._gradient, x=x, y=y), local)
        return torch.cat([w, self.buffers]) if len(self.buffers) else w

    def _gradient(self, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        self.flat[: len(w)].copy_(w)
        self.flat_gradient.zero_()
        with _autocast(self.precision, w.device):
            logits = as_logits(self.model(x))
        torch.autograd.backward(self.loss(logits.float(), y).mean())
        return self.flat_gradient


class StackedEngine:
    """Clients of one stack ``[k, P]`` trained by one vectorised pass; ``chunk_size`` clients at a time."""

    name = "stacked"

    def __init__(
        self,
        model: nn.Module,
        shards: ClientShards,
        loss: Loss = cross_entropy,
        precision: Precision = "fp32",
        chunk_size: int | None = None,
    ):
        self.layout = Layout(model)
        if self.layout.num_buffers:
            raise ValueError(
                f"the stacked engine cannot train models with buffers ({self.layout.buffer_names[0]}); use engine loop"
            )
        self.model = copy.deepcopy(model).float().train()
        self.shards, self.loss, self.precision, self.chunk_size = shards, loss, precision, chunk_size
        self._gradients = vmap(grad(self._loss), randomness="different")

    def train(
        self,
        clients: Sequence[int],
        start: Tensor,
        step: LocalStep,
        prepare: Callable[[Tensor], Local],
        round_index: int,
        offset: Tensor | None = None,
    ) -> Tensor:
        chunk = self.chunk_size or len(clients)
        trained = torch.empty_like(start)
        with _numerics(self.precision, start.device), _forked_random(start.device):
            for begin in range(0, len(clients), chunk):
                rows = slice(begin, begin + chunk)
                torch.manual_seed(_noise_seed(self.shards.seed, round_index, clients[begin]))
                local = prepare(start[rows])
                local.offset = None if offset is None else offset[rows]
                batches = _stack([self.shards.batches(client, round_index) for client in clients[rows]])
                trained[rows] = self._train_chunk(start[rows], step, local, batches)
        return trained

    def _train_chunk(self, w: Tensor, step: LocalStep, local: Local, batches: ClientBatches) -> Tensor:
        real = (batches.index >= 0).to(w.device)
        widths = (batches.index >= 0).sum(-1).amax(0).tolist()  # columns that any client fills, for each step
        for position, width in enumerate(widths):
            x, y = self.shards.batch(*_taken(batches, (slice(None), position, slice(width))))
            mask = real[:, position, :width]
            stepped = step(w, partial(self._gradient, x=x, y=y, mask=mask), local)
            # A client whose shard is exhausted keeps what it has.
            w = torch.where(mask.any(1, keepdim=True), stepped, w)
        return w

    def _gradient(self, w: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        gradients = self._gradients(self.layout.split(w), x, y, mask)
        return torch.cat([gradients[name].reshape(len(w), -1) for name in self.layout.shapes], dim=1)

    def _loss(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        with _autocast(self.precision, x.device):
            logits = as_logits(functional_call(self.model, parameters, (x,)))
        return (self.loss(logits.float(), y) * mask).sum() / mask.sum().clamp(min=1)


def fastest_engine(
    model: nn.Module, shards: ClientShards, width: int, loss: Loss = cross_entropy, precision: Precision = "fp32"
) -> Engine:
    """Time two local steps a client in a loop, then in stacks of 8, 32 and all ``width`` clients; take the fastest.

    Stacking pays where a client's own step is tiny; compute-bound steps are faster in a loop. Models that
    cannot be vectorised (buffers, data-dependent control flow) get the loop; stacks that might not fit into the free
    memory are not tried.
    """
    looping = LoopEngine(model, shards, loss, precision)
    if looping.layout.num_buffers or width < 2:
        return looping
    trial = ClientShards(
        shards.inputs,
        shards.labels,
        tuple(rows[: 2 * shards.batch_size] for rows in shards.members),
        seed=shards.seed,
        batch_size=shards.batch_size,
        local_epochs=1,
        augmentation=shards.augmentation,
    )
    room = _free_bytes(shards.inputs.device) // (3 * _bytes_of_a_step(looping, trial))
    best: Engine = looping
    best_seconds = _seconds_of_a_client(looping, trial, min(8, width))
    for size in sorted({min(8, width), min(32, width), width}):
        if size > room:
            break
        stacked = StackedEngine(model, shards, loss, precision, None if size == width else size)
        try:
            seconds = _seconds_of_a_client(stacked, trial, size)
        except RuntimeError:  # what vmap raises where it has no rule for an operation
            break
        if seconds > 1.5 * best_seconds:  # far off: larger stacks, which take long to try, do not come back
            break
        if seconds < best_seconds:
            best, best_seconds = stacked, seconds
    return best


def _bytes_of_a_step(loop: LoopEngine, shards: ClientShards) -> int:
    """What autograd keeps for one batch of one client, and four copies of the parameters."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    x, y = shards.batch(*_taken(shards.batches(0, 0), 0))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), _forked_random(x.device):
        loop.loss(as_logits(loop.model(x)).float(), y).mean()
    return kept + 4 * loop.flat.nbytes


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # others need memory, too


def _seconds_of_a_client(engine: Engine, trial: ClientShards, num_clients: int) -> float:
    """The faster of two passes of a stack over the trial's batches, divided by its clients."""
    start = engine.layout.vector(engine.model).expand(num_clients, -1).clone()
    shards, engine.shards = engine.shards, trial
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        engine.train(range(num_clients), start, _time_step, lambda start: Local(start, 0.0, 0.0, None), round_index=0)
        if start.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    engine.shards = shards
    return min(seconds) / num_clients


def _time_step(w: Tensor, gradient: Callable[[Tensor], Tensor], local: Local) -> Tensor:
    return w - local.learning_rate * gradient(w)


def _taken(batches: ClientBatches, where: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Index, flip and offset at some places."""
    flip = None if batches.flip is None else batches.flip[where]
    return batches.index[where], flip, None if batches.offset is None else batches.offset[where]


def _stack(batches: list[ClientBatches]) -> ClientBatches:
    """Batches of several clients, ``[k, steps, B]``; shorter ones are filled up with index −1."""
    steps = max(len(one.index) for one in batches)

    def joined(parts: list[Tensor], fill: int) -> Tensor:
        tail = [0, 0] * (parts[0].ndim - 1)
        return torch.stack([F.pad(part, (*tail, 0, steps - len(part)), value=fill) for part in parts])

    flips = [one.flip for one in batches if one.flip is not None]
    offsets = [one.offset for one in batches if one.offset is not None]
    return ClientBatches(
        joined([one.index for one in batches], -1),
        joined(flips, 0) if flips else None,
        joined(offsets, 0) if offsets else None,
    )


def _noise_seed(seed: int, round_index: int, client: int) -> int:
    return int(np.random.SeedSequence([seed, round_index, client, 1]).generate_state(1)[0])


@contextlib.contextmanager
def _forked_random(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def _numerics(precision: Precision, device: torch.device) -> Iterator[None]:
    """Full float32 on CUDA unless TF32 is asked for."""
    if device.type != "cuda":
        yield
        return
    allowed = precision == "tf32"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
