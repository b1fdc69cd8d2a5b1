"""Plain training of a restoration network on pairs of images. Nothing here knows plait."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from plait_vision import train_steps
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


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
    seconds_between_saves: float = 10.0,
) -> None:
    """Adam on the mean absolute or squared error, in place; all parameters learn.

    A step depends on the seed and its number alone, so that a training that goes on from a checkpoint ends in the same bits.

    Args:
        network: float ``[N, 3, H, W]`` in [0, 1] → the same, or a multiple of that size.
        pairs: numbers of pairs → degraded image ``[3, H, W]`` and its target ``[3, H·k, W·k]``, in [0, 1].
        checkpoint: has ``load()`` and ``save(state)``.

    Raises:
        ValueError: the network's result has not the target's shape.
        FloatingPointError: the loss is not finite.
    """
    network.requires_grad_(True).train()
    error = F.l1_loss if settings.loss == "l1" else F.mse_loss

    def loss_of(step: int) -> Tensor:
        rows = torch.randint(num_pairs, (settings.batch_size,)).tolist()
        images, targets = (one.to(device) for one in windows(pairs(rows), settings.crop_size, settings.flip))
        with torch.autocast(device.type, torch.bfloat16, settings.precision == "bf16"):
            results = network(images)
        _check_shape(results, targets)
        return error(results.float(), targets)

    def learning_rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / settings.num_steps))
        return settings.learning_rate * (cosine if settings.schedule == "cosine" else 1.0)

    train_steps(
        network,
        torch.optim.Adam(network.parameters(), lr=settings.learning_rate),
        loss_of,
        settings.num_steps,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        track=track,
        log=log,
        seconds_between_saves=seconds_between_saves,
    )


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


def _check_shape(results: Tensor, targets: Tensor) -> None:
    if results.shape != targets.shape:
        found, wanted = ("×".join(map(str, one.shape[1:])) for one in (results, targets))
        raise ValueError(
            f"the network makes {found} of an image whose target is {wanted}; set its scale to the targets', or "
            "train on pairs of its scale"
        )
