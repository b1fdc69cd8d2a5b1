"""A training loop for any optimizer: tasks in, a trained copy out; validated, timed, resumable.

:class:`Update` is what an optimizer has to offer. Plain PyTorch optimizers are wrapped by :class:`PlainUpdate`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

import attrs
import torch
from torch import Tensor, nn

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
        loss.backward()  # type: ignore[no-untyped-call]
        self._refuse_non_finite(loss.detach())
        self.optimizer.step()
        return {"loss": loss.detach(), "passes": 1}

    def _refuse_non_finite(self, loss: Tensor) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).to(loss)
        values = torch.stack([loss, norm]).tolist()  # the one synchronisation of an update
        for name, value in zip(("loss", "gradient's norm"), values, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} is {value}; lower the learning rate, or look at the data")

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class Checkpoint(Protocol):
    """Where a training keeps its state; :class:`plait.loops.Loop` is one."""

    def load(self) -> Any:
        """The last saved state, its tensors on the CPU; ``None`` where there is none."""

    def save(self, state: Any) -> None: ...


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
    *,
    num_steps: int = 200,
    eval_every: int = 5,
    patience: int | None = None,
    select: Literal["best", "last"] = "best",
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: Checkpoint | None = None,
    checkpoint_every: int = 100,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
    log: Callable[..., None] = lambda **_: None,
) -> nn.Module:
    """A trained copy of ``model``, in eval mode, with ``history``: one entry an update.

    An entry has ``update``, ``loss``, ``seconds`` (CPU time of this process on the CPU, else wall time), what the
    update reports, and ``val_accuracy`` where it was validated. Global random state is left alone.

    Args:
        num_steps: updates, at most.
        eval_every: updates between validations.
        patience: stop after so many validations in a row without a strictly greater accuracy; ``None``: never.
        select: weights of the ``best`` validation, or the ``last`` ones.
        checkpoint: is written every ``checkpoint_every`` updates. A training that finds a state there resumes from it,
            bit for bit on the CPU; the caller sees to it that the state is of the same training.
        track: is given the updates' numbers and hands them on, for a display of progress.
        log: is called with ``step`` and values after each update.
    """
    device = torch.device(device)
    model = copy.deepcopy(model).to(device).train()
    update = make_update(model)
    generator = torch.Generator().manual_seed(seed)
    progress = _Progress()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        running = _Running(model, update, generator, device)
        if checkpoint is not None and (state := checkpoint.load()) is not None:
            progress = running.restored(state)
        for t in track(range(progress.done, num_steps)):
            if patience is not None and progress.without_gain >= patience:
                break
            _one_update(t, update, objective.draw(generator), progress, device, log)
            progress.done = t + 1
            if progress.done % eval_every == 0 or progress.done == num_steps:
                _validate(model, objective, progress, log)
            if checkpoint is not None and progress.done % checkpoint_every == 0:
                checkpoint.save(running.state(progress))
    if select == "best" and progress.best_weights is not None:
        model.load_state_dict(progress.best_weights)
    model.history = progress.history  # type: ignore[assignment]
    model.zero_grad(set_to_none=True)
    return model.cpu().eval()


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
class _Running:
    """What changes while a model is trained, besides its progress."""

    model: nn.Module
    update: Update
    generator: torch.Generator
    device: torch.device

    def state(self, progress: _Progress) -> dict[str, Any]:
        state = attrs.asdict(progress, recurse=False) | {
            "model": self.model.state_dict(),
            "optimizer": self.update.state_dict(),
            "tasks": self.generator.get_state(),
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def restored(self, state: dict[str, Any]) -> _Progress:
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state["optimizer"])
        self.generator.set_state(state["tasks"])
        torch.set_rng_state(state["random"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        return _Progress(**{field.name: state[field.name] for field in attrs.fields(_Progress)})


def passes_per_update(model: nn.Module) -> float | None:
    """Mean number of passes of the graph network in an update of the model's history."""
    passes = [entry["passes"] for entry in getattr(model, "history", []) if "passes" in entry]
    return sum(passes) / len(passes) if passes else None


def seconds_per_update(model: nn.Module) -> float | None:
    """Mean time of an update in the model's history, its first tenth (warming up) left out."""
    history = getattr(model, "history", [])
    seconds = [entry["seconds"] for entry in history[len(history) // 10 :]]
    return sum(seconds) / len(seconds) if seconds else None
