"""Plain training of a restoration network on pairs of images. Nothing here knows plait."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
_SECONDS_BETWEEN_SAVES = 60.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train: see the fields of ``optimize: restoration-network``, which are the same."""

    loss: Literal["l1", "l2"]
    num_steps: int
    batch_size: int
    crop_size: int
    flip: bool
    learning_rate: float
    schedule: Literal["cosine", "constant"]
    precision: Literal["fp32", "bf16"]


def train_restorer(
    network: nn.Module,
    pairs: Callable[[list[int]], Sequence[Pair]],
    num_pairs: int,
    settings: Settings,
    *,
    seed: int,
    device: torch.device,
    checkpoint: Any = None,
    track: Callable[..., Any] = iter,
    log: Callable[..., None] = lambda **values: None,
) -> None:
    """Adam on the mean absolute or squared error, in place; all parameters learn.

    A step depends on the seed and its number alone, so that a training that goes on from a checkpoint ends in the same bits.

    Args:
        network: float ``[N, 3, H, W]`` in [0, 1] → the same, or a multiple of that size.
        pairs: numbers of pairs → degraded image ``[3, H, W]`` and its target ``[3, H·k, W·k]``, in [0, 1].
        checkpoint: has ``load()`` and ``save(state)``.

    Raises:
        ValueError: the network's result has not the target's shape; the loss is not finite.
    """
    network.requires_grad_(True).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    first = 0
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    saved_at = time.monotonic()
    for step in track(range(first, settings.num_steps)):
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((seed + 7_919 * (step + 1)) % 2**63)
            rows = torch.randint(num_pairs, (settings.batch_size,)).tolist()
            images, targets = windows(pairs(rows), settings.crop_size, settings.flip)
            loss = _step(network, optimizer, images.to(device), targets.to(device), settings, step)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} in step {step + 1}; lower learning_rate")
        log(step=step + 1, loss=loss)
        if checkpoint is not None and time.monotonic() - saved_at > _SECONDS_BETWEEN_SAVES:
            checkpoint.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
            saved_at = time.monotonic()
    optimizer.zero_grad(set_to_none=True)


def windows(pairs: Sequence[Pair], crop_size: int, flip: bool) -> Pair:
    """The same random window of image and target of every pair, each flipped or not; drawn by torch.

    Where an image is smaller than ``crop_size``, the windows of all are.
    """
    height = min(crop_size, *(image.shape[1] for image, _ in pairs))
    width = min(crop_size, *(image.shape[2] for image, _ in pairs))
    images: list[Tensor] = []
    targets: list[Tensor] = []
    for image, target in pairs:
        scale = target.shape[1] // image.shape[1]
        top = int(torch.randint(image.shape[1] - height + 1, ()))
        left = int(torch.randint(image.shape[2] - width + 1, ()))
        mirrored = flip and bool(torch.rand(()) < 0.5)
        for picture, many, found in ((image, 1, images), (target, scale, targets)):
            window = picture[:, top * many : (top + height) * many, left * many : (left + width) * many]
            found.append(window.flip(-1) if mirrored else window)
    return torch.stack(images), torch.stack(targets)


def _step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    settings: Settings,
    step: int,
) -> float:
    factor = 0.5 * (1 + math.cos(math.pi * step / settings.num_steps)) if settings.schedule == "cosine" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * factor
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, torch.bfloat16, settings.precision == "bf16"):
        results = network(images)
    if results.shape != targets.shape:
        found, wanted = ("×".join(map(str, one.shape[1:])) for one in (results, targets))
        raise ValueError(
            f"the network makes {found} of an image whose target is {wanted}; set its scale to the targets', or "
            "train on pairs of its scale"
        )
    error = F.l1_loss if settings.loss == "l1" else F.mse_loss
    loss = error(results.float(), targets)
    loss.backward()
    optimizer.step()
    return loss.item()
