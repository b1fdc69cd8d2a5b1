"""One loop for plain training: steps that depend on the seed and their number alone, resumable to the same bits. Nothing here knows plait."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def train_steps(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int], Tensor],
    num_steps: int,
    *,
    learning_rate: Callable[[int], float],
    seed: int,
    device: torch.device,
    checkpoint: Any = None,
    track: Callable[..., Any] = iter,
    log: Callable[..., None] = lambda **values: None,
    seconds_between_saves: float = 10.0,
) -> None:
    """Train a module in place.

    Args:
        optimizer: of the module's parameters.
        loss_of: step from 0 → the loss that is lowered. What it draws from torch's global generators, they draw from the seed
            and the number of the step; of its own it may depend on these two, and on what the step before left in the module.
        learning_rate: of a step from 0.
        checkpoint: has ``load()`` and ``save(state)``; a training that finds a state goes on from it, to the same bits.
        track: is given the numbers of the steps and hands them on; for a display of progress.
        log: is called with ``step``, from 1, and ``loss``.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    first = 0
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    saved_at = time.monotonic()
    for step in track(range(first, num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad(set_to_none=True)
        with drawing((seed + 7_919 * (step + 1)) % 2**63, device):
            loss = loss_of(step)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        log(step=step + 1, loss=finite_loss(loss, step + 1))
        if checkpoint is not None and time.monotonic() - saved_at >= seconds_between_saves:
            checkpoint.save({"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
            saved_at = time.monotonic()
    optimizer.zero_grad(set_to_none=True)


def finite_loss(loss: Tensor, step: int) -> float:
    """A loss as a number.

    Raises:
        FloatingPointError: it is not finite, so that the weights are not, either, after the step.
    """
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} in step {step}; lower learning_rate, or look at the data")
    return value


@contextlib.contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's own random numbers (dropout, augmentation) from a seed; its state is as before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
