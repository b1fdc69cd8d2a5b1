"""A training loop for any optimizer: tasks in, a trained copy out; validated, timed, resumable.

:class:`Update` is what an optimizer has to offer. Plain PyTorch optimizers are wrapped by :class:`PlainUpdate`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import attrs
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from plait_graph.tasks import Objective, Task


class Update(Protocol):
    """One optimizer on one model."""

    def step(self, task: Task) -> dict[str, Any]:
        """Update the weights; returns at least ``loss`` and ``passes``, those with message passing, forward and back.

        Values are numbers or 0-dim tensors.
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class PlainUpdate:
    """Gradient of the mean loss, then a step of a ``torch.optim`` optimizer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def step(self, task: Task) -> dict[str, Any]:
        self.optimizer.zero_grad()
        loss = task.losses(self.model).mean()
        if not loss.requires_grad:
            raise ValueError("the loss depends on no tensor that requires a gradient; unfreeze what the model uses")
        loss.backward()
        self._refuse_non_finite(loss.detach())
        self.optimizer.step()
        return {"loss": loss.detach(), "passes": 1}

    def _refuse_non_finite(self, loss: Tensor) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).to(loss)
        values = torch.stack([loss, norm]).tolist()  # the one synchronisation of an update
        for name, value in zip(("loss", "gradient's norm"), values, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} is {value}; lower lr, or look at the data")

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


@attrs.frozen(kw_only=True)
class Settings:
    """How long to train and what to keep.

    Attributes:
        num_updates: at most.
        eval_every: updates between validations.
        patience: stop after so many validations in a row without a strictly greater accuracy; ``None``: never.
        select: weights of the ``best`` validation, or the ``last`` ones.
        checkpoint_every: updates between checkpoints.
    """

    num_updates: int = 200
    eval_every: int = 5
    patience: int | None = None
    select: Literal["best", "last"] = "best"
    checkpoint_every: int = 100


@attrs.define
class _Progress:
    """What a checkpoint holds besides weights, optimizer and random numbers."""

    done: int = 0
    best_accuracy: float = -1.0
    best_weights: dict[str, torch.Tensor] | None = None
    without_gain: int = 0
    history: list[dict[str, float]] = attrs.field(factory=list)


def train(
    model: nn.Module,
    objective: Objective,
    make_update: Callable[[nn.Module], Update],
    settings: Settings,
    *,
    seed: int,
    device: torch.device,
    folder: Path,
    made_by: str,
    track: Callable[[Iterable[int], str], Iterator[int]] = lambda items, _: iter(items),
    log: Callable[..., None] = lambda **_: None,
) -> nn.Module:
    """A trained copy of ``model``, in eval mode, with ``history``: one entry an update.

    An entry has ``update``, ``loss``, ``seconds`` (CPU time of this process on the CPU, else wall time), what the
    update reports, and ``val_accuracy`` where it was validated. The training goes on from a checkpoint in
    ``folder``, bit for bit on the CPU, where that was written by a training of the same ``made_by``
    (:func:`fingerprint`); global random state is left alone.
    """
    model = copy.deepcopy(model).to(device).train()
    update = make_update(model)
    generator = torch.Generator().manual_seed(seed)
    progress = _Progress()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        checkpoint = _Checkpoint(folder, made_by, model, update, generator, device)
        checkpoint.read(progress)
        for t in track(range(progress.done, settings.num_updates), "update"):
            if settings.patience is not None and progress.without_gain >= settings.patience:
                break
            _one_update(t, update, objective.draw(generator), progress, device, log)
            progress.done = t + 1
            if progress.done % settings.eval_every == 0 or progress.done == settings.num_updates:
                _validate(model, objective, progress, log)
            if progress.done % settings.checkpoint_every == 0:
                checkpoint.write(progress)
    if settings.select == "best" and progress.best_weights is not None:
        model.load_state_dict(progress.best_weights)
    model.history = progress.history
    checkpoint.path.unlink(missing_ok=True)  # another training in this folder starts from its own weights
    model.zero_grad(set_to_none=True)
    return model.cpu().eval()


def fingerprint(description: str, model: nn.Module, data: Data) -> str:
    """Digest of what a training's result depends on: its description, the initial weights, the graph."""
    digest = hashlib.sha256(description.encode())
    for name, value in [*model.state_dict().items(), *data.to_dict().items()]:
        digest.update(f"{name} ".encode())
        if not isinstance(value, Tensor):
            digest.update(repr(value).encode())
            continue
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        for part in _dense_parts(value.detach().cpu()):
            digest.update(part.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _dense_parts(value: Tensor) -> tuple[Tensor, ...]:
    if value.layout == torch.strided:
        return (value,)
    sparse = value.to_sparse_coo().coalesce()
    return sparse.indices(), sparse.values()


def _one_update(
    t: int, update: Update, task: Task, progress: _Progress, device: torch.device, log: Callable[..., None]
) -> None:
    clock = _clock(device)
    started = clock()
    info = update.step(task)
    seconds = clock() - started
    entry = {"update": t, "seconds": seconds, **{name: float(value) for name, value in info.items()}}
    progress.history.append(entry)
    shown = {n: v for n, v in entry.items() if n not in ("update", "seconds", "exact", "passes") and math.isfinite(v)}
    log(step=t, **shown)


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall


def _validate(model: nn.Module, objective: Objective, progress: _Progress, log: Callable[..., None]) -> None:
    model.eval()
    accuracy = objective.validate(model)
    model.train()
    if accuracy is None:
        return
    progress.history[-1]["val_accuracy"] = accuracy
    log(step=progress.done - 1, val_accuracy=accuracy)
    if accuracy > progress.best_accuracy:
        progress.best_accuracy, progress.without_gain = accuracy, 0
        progress.best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    else:
        progress.without_gain += 1


@attrs.frozen
class _Checkpoint:
    folder: Path
    made_by: str
    model: nn.Module
    update: Update
    generator: torch.Generator
    device: torch.device

    @property
    def path(self) -> Path:
        return self.folder / "training.pt"

    def write(self, progress: _Progress) -> None:
        state = attrs.asdict(progress, recurse=False) | {"history": json.dumps(progress.history)}
        state |= {
            "made by": self.made_by,
            "model": self.model.state_dict(),
            "optimizer": self.update.state_dict(),
            "tasks": self.generator.get_state(),
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        torch.save(state, self.path.with_suffix(".new"))
        os.replace(self.path.with_suffix(".new"), self.path)

    def read(self, progress: _Progress) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        if state.get("made by") != self.made_by:
            return
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state["optimizer"])
        self.generator.set_state(state["tasks"])
        torch.set_rng_state(state["random"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        progress.done, progress.without_gain = state["done"], state["without_gain"]
        progress.best_accuracy, progress.best_weights = state["best_accuracy"], state["best_weights"]
        progress.history = json.loads(state["history"])


def passes_per_update(model: nn.Module) -> float | None:
    """Mean number of passes of the graph network in an update of the model's history."""
    passes = [entry["passes"] for entry in getattr(model, "history", []) if "passes" in entry]
    return sum(passes) / len(passes) if passes else None


def seconds_per_update(model: nn.Module) -> float | None:
    """Mean time of an update in the model's history, its first tenth (warming up) left out."""
    history = getattr(model, "history", [])
    seconds = [entry["seconds"] for entry in history[len(history) // 10 :]]
    return sum(seconds) / len(seconds) if seconds else None
