"""Supervised training on several tasks at once: pre-training, experts (one task) and joint training (all)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plait_vision import train_steps
from torch import Tensor
from torch.nn import functional as F

from plait_wemoe.columns import Column, Reading, ShuffledBatches, column_of, reading_of, tokenizer_of
from plait_wemoe.folders import opened
from plait_wemoe.inputs import input_dtype, placed
from plait_wemoe.preprocessing import image_processor_of
from plait_wemoe.tasks import IndividualModels, WithHeads, with_heads

ONLY = "accuracy"  # what the task of a classifier's own head is called, where its data set has no name


@dataclass(frozen=True)
class LabelledTask:
    """Inputs of a task and their labels, int64 (N,)."""

    inputs: Column
    labels: Tensor

    def check_classes(self, logits: Tensor, task: str) -> None:
        """Raise ValueError where labels have no logit."""
        if (greatest := int(self.labels.max())) >= logits.shape[1]:
            raise ValueError(
                f"the data of task {task!r} has labels up to {greatest}, and its head answers for {logits.shape[1]} classes"
            )


def train_tasks(
    model: WithHeads,
    tasks: Mapping[str, LabelledTask],
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    device: torch.device | str = "cpu",
    trainable: str | None = None,
    train_heads: bool = False,
    checkpoint: Any = None,
    track: Callable[..., Any] = iter,
    log: Callable[..., None] = lambda **values: None,
    seconds_between_saves: float = 10.0,
) -> WithHeads:
    """AdamW on the sum of the tasks' cross-entropies, one batch of every task in every step; a trained copy on ``device``.

    It is trained whether or not the model's parameters require gradients; those of the copy all do.

    Args:
        trainable: regular expression for names of encoder parameters; ``None`` trains them all.
        checkpoint, track, log: as of :func:`plait_vision.train_steps`, so that a training that was stopped goes on.

    Raises:
        ValueError: no encoder parameter matches ``trainable``; labels that a head has no class for.
        KeyError: a task without a head.
        FloatingPointError: the loss is not finite.
    """
    model = copy.deepcopy(model).to(device).train()
    weights = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    heads = [p for name, p in weights.items() if name.startswith("task_heads.")] if train_heads else []
    encoder = [
        p
        for name, p in weights.items()
        if not name.startswith("task_heads.") and (trainable is None or re.search(trainable, name))
    ]
    if not encoder:
        raise ValueError(f"trainable is {trainable!r}, which matches no parameter of the encoder")
    model.requires_grad_(False)
    chosen = [p.requires_grad_(True) for p in (*encoder, *heads)]
    dtype = input_dtype(model)
    streams = {
        name: ShuffledBatches(task.inputs, batch_size, seed + index) for index, (name, task) in enumerate(tasks.items())
    }

    def loss_of(step: int) -> Tensor:
        losses = []
        for name, task in tasks.items():
            rows = streams[name].rows(step)
            logits = model.logits(placed(task.inputs.read(rows), device, dtype), name)
            task.check_classes(logits, name)
            losses.append(F.cross_entropy(logits, task.labels[rows].to(device)))
        return torch.stack(losses).sum()

    train_steps(
        model,
        torch.optim.AdamW(chosen, lr=learning_rate, weight_decay=weight_decay),
        loss_of,
        num_steps,
        learning_rate=lambda step: learning_rate,
        seed=seed,
        device=torch.device(device),
        checkpoint=checkpoint,
        track=track,
        log=log,
        seconds_between_saves=seconds_between_saves,
    )
    for parameter in weights.values():
        parameter.requires_grad_(True)
    return model.eval()


def first_per_class(labels: Tensor, number: int) -> Tensor:
    """Rows of the first ``number`` samples of every class, in order."""
    rows = [(labels == label).nonzero().squeeze(1)[:number] for label in labels.unique()]
    return torch.cat(rows).sort().values


def of_tasks(model: Any, data: Any) -> tuple[WithHeads, Mapping[str, Any]]:
    """A model with heads, and the labelled data of its tasks; a data set by itself is that of the only one.

    Raises:
        ValueError: a model without a head, or with several of them for one data set.
    """
    model = opened(model)
    if isinstance(data, Mapping):
        return with_heads(model, data), data
    model = with_heads(model, (ONLY,))
    if len(model.tasks) != 1:
        raise ValueError(
            f"data is one {type(data).__name__}, and the model has heads for {', '.join(model.tasks)}; give a mapping from "
            "task to labelled data"
        )
    return model, {model.tasks[0]: data}


def labelled_tasks(
    data: Mapping[str, Any],
    model: WithHeads,
    tokenizer: Path | None = None,
    image_processor: Path | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
    per_class: int | None = None,
) -> dict[str, LabelledTask]:
    """task → inputs as the model takes them, and labels; ``per_class`` keeps the first ones of every class.

    Args:
        tokenizer, image_processor: folders with those of transformers, where a text or image model needs them.

    Raises:
        ValueError: not datasets with a column ``label``, or inputs that the model does not take.
    """
    reading, found = _reading(model, tokenizer, image_processor, warn), {}
    for task, part in data.items():
        if "label" not in getattr(part, "column_names", ()):
            raise ValueError(f"the data of task {task!r} is not a dataset with a column 'label'")
        labels = _labels(part.with_format(None)["label"][:], task)
        if per_class is not None:
            rows = first_per_class(labels, per_class)
            part, labels = part.select(rows.tolist()), labels[rows]
        found[task] = LabelledTask(column_of(part, reading), labels)
    return found


def _labels(cells: Sequence[Any], task: str) -> Tensor:
    """int64 (N,). Raises ValueError for a cell that is no number of a class."""
    for row, cell in enumerate(cells):
        if isinstance(cell, bool) or not isinstance(cell, int) or cell < 0:
            raise ValueError(f"row {row} of the data of task {task!r} has label {cell!r}; give the number of a class")
    return torch.tensor(cells)


def _reading(model: Any, tokenizer: Path | None, image_processor: Path | None, warn: Callable[[str], None]) -> Reading:
    if hasattr(model, "encode_image"):
        return reading_of(model, model.image_size)
    encoder = model.encoders[0] if isinstance(model, IndividualModels) else model.encoder
    encoder = getattr(encoder, "backbone", encoder)
    size = getattr(encoder, "image_size", None)
    return reading_of(encoder, size, tokenizer_of(tokenizer), image_processor_of(image_processor), warn)
