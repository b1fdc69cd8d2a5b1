"""Plain supervised training of a classifier. Nothing here knows plait."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait_vision.training_loop import train_steps


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train: see the fields of ``optimize: classifier-training``, which are the same."""

    num_epochs: int
    batch_size: int
    learning_rate: float
    optimizer: Literal["adamw", "sgd"]
    momentum: float
    weight_decay: float
    schedule: Literal["cosine", "constant"]
    label_smoothing: float
    flip: bool
    crop_padding: int
    precision: Literal["fp32", "bf16"]


def train_classifier(
    classifier: nn.Module,
    images: Callable[[list[int]], Tensor],
    labels: Tensor,
    settings: Settings,
    *,
    seed: int,
    device: torch.device,
    checkpoint: Any = None,
    track: Callable[..., Any] = iter,
    log: Callable[..., None] = lambda **values: None,
    seconds_between_saves: float = 10.0,
) -> None:
    """Cross-entropy on all parameters of the classifier that want a gradient, in place.

    Rows are shuffled anew in each epoch; a step depends on the seed and its number alone, so that a training which goes on
    from a checkpoint ends in the same bits.

    Args:
        images: rows → images ``[n, 3, H, W]`` in [0, 1].
        labels: int64 [N].
        checkpoint: has ``load()`` and ``save(state)``.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            parameters, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    batches = _bounds(len(labels), settings.batch_size)
    per_epoch = len(batches)
    total = settings.num_epochs * per_epoch
    order, epoch_of_order = torch.empty(0, dtype=torch.long), -1

    def loss_of(step: int) -> Tensor:
        nonlocal order, epoch_of_order
        epoch, place = divmod(step, per_epoch)
        if epoch != epoch_of_order:
            generator = torch.Generator().manual_seed((seed + 1_000_003 * epoch) % 2**63)
            order, epoch_of_order = torch.randperm(len(labels), generator=generator), epoch
        rows = order[batches[place]]
        batch = images(rows.tolist()).to(device, non_blocking=True)
        batch = augmented(batch, flip=settings.flip, crop_padding=settings.crop_padding)
        with torch.autocast(device.type, torch.bfloat16, settings.precision == "bf16"):
            logits = classifier(batch)
        smoothing = settings.label_smoothing
        return F.cross_entropy(logits.float(), labels[rows].to(device), label_smoothing=smoothing)

    def learning_rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * (step / total)))
        return settings.learning_rate * (cosine if settings.schedule == "cosine" else 1.0)

    train_steps(
        classifier,
        optimizer,
        loss_of,
        total,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        track=track,
        log=log,
        seconds_between_saves=seconds_between_saves,
    )


def _bounds(count: int, batch_size: int) -> list[slice]:
    """The batches of an epoch; a single row that is left over joins the last one, since batch norms cannot take it alone."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and batch_size > 1 and count - starts[-1] == 1:
        starts.pop()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def augmented(images: Tensor, *, flip: bool, crop_padding: int) -> Tensor:
    """Each image ``[n, 3, H, W]`` flipped or not, and cropped out of a black border of so many pixels; drawn by torch."""
    count, _, height, width = images.shape
    if flip:
        turned = torch.rand(count) < 0.5
        images = torch.where(turned.to(images.device)[:, None, None, None], images.flip(-1), images)
    if crop_padding:
        padded = F.pad(images, [crop_padding] * 4).permute(0, 2, 3, 1)
        offsets = torch.randint(2 * crop_padding + 1, (2, count, 1)).to(images.device)
        rows = offsets[0] + torch.arange(height, device=images.device)
        columns = offsets[1] + torch.arange(width, device=images.device)
        each = torch.arange(count, device=images.device)[:, None, None]
        images = padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return images
