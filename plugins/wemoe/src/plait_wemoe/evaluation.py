"""Accuracy of a multi-task model on batches of one task or of all tasks mixed, and what its routers do."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait_wemoe.columns import Column
from plait_wemoe.inputs import Inputs, call, input_dtype, placed, take
from plait_wemoe.mixture import WeightEnsemblingMoE
from plait_wemoe.supervised import LabelledTask
from plait_wemoe.tasks import IndividualModels, WithHeads


def scores(
    model: WithHeads,
    tasks: Mapping[str, LabelledTask],
    batch_size: int,
    batches: Sequence[str],
    routings: Sequence[str],
    generator: Callable[[], torch.Generator],
) -> Iterator[dict[str, Any]]:
    """A row for each kind of batches and routing: accuracy (%) of each task, and their mean.

    Args:
        batches: of ``one-task`` and ``mixed``; where an output does not depend on its batch, only the first is measured.
        routings: to measure of a model that routes; empty: the one that it is set to.
        generator: makes one that mixes the tasks.
    """
    mixture = model.mixture
    before = "–" if mixture is None else mixture.gates[0].routing
    for routing in (routings if mixture is not None else ()) or (before,):
        if mixture is not None and routing != before:
            mixture.set_routing(routing)
        try:
            for kind in batches:
                # Without routing by batch an output does not depend on the batch; experts cannot be mixed.
                if kind == "mixed" and (mixture is None or isinstance(model, IndividualModels)):
                    continue
                if kind == "mixed":
                    found = mixed_accuracy(model, tasks, batch_size, generator())
                else:
                    found = one_task_accuracy(model, tasks, batch_size)
                facts = {"routing": routing, "batches": kind if mixture is not None else "any"}
                yield {**facts, **found, "mean": sum(found.values()) / len(found)}
        finally:
            if mixture is not None and routing != before:
                mixture.set_routing(before)


@torch.no_grad()
def one_task_accuracy(model: WithHeads, tasks: Mapping[str, LabelledTask], batch_size: int) -> dict[str, float]:
    """Top-1 accuracy (%) of each task; a batch holds one task, in the order of the data."""
    found = {}
    for name, task in tasks.items():
        predictions = []
        for inputs in task.inputs.batches(batch_size):
            logits = model.logits(_for(model, inputs), name)
            task.check_classes(logits, name)
            predictions.append(logits.argmax(dim=1).cpu())
        found[name] = _percentage(torch.cat(predictions), task.labels)
    return found


@torch.no_grad()
def mixed_accuracy(
    model: WithHeads, tasks: Mapping[str, LabelledTask], batch_size: int, generator: torch.Generator
) -> dict[str, float]:
    """As :func:`one_task_accuracy`, but all tasks' inputs are shuffled into common batches."""
    names = list(tasks)
    places = torch.cat([torch.tensor([[i, row] for row in range(len(tasks[n].inputs))]) for i, n in enumerate(names)])
    places = places[torch.randperm(len(places), generator=generator)]
    correct = dict.fromkeys(names, 0)
    for batch in places.split(batch_size):
        mine = {name: (batch[:, 0] == i).nonzero().squeeze(1) for i, name in enumerate(names)}
        mine = {name: places for name, places in mine.items() if len(places)}
        read = [tasks[name].inputs.read(batch[places, 1].tolist()) for name, places in mine.items()]
        order = torch.cat(list(mine.values())).argsort()  # from task after task to the shuffled order
        inputs = _for(model, take(tasks[names[0]].inputs.join(read), order))
        for name, logits in model.logits_by_task(inputs, mine).items():
            correct[name] += int((logits.argmax(dim=1).cpu() == tasks[name].labels[batch[mine[name], 1]]).sum())
    return {name: 100 * correct[name] / len(tasks[name].inputs) for name in names}


@torch.no_grad()
def task_routing(mixture: WeightEnsemblingMoE, columns: Mapping[str, Column], batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean coefficients (K, tasks, T), and the share of samples whose largest one is expert t's, (K, tasks, T)."""
    means, shares = [], []
    for column in columns.values():
        batches = (_for(mixture, inputs) for inputs in column.batches(batch_size))
        weights = [call(mixture.routing_weights, inputs).cpu() for inputs in batches]
        coefficients = torch.cat(weights, dim=1)
        means.append(coefficients.mean(dim=1))
        first = torch.nn.functional.one_hot(coefficients.argmax(dim=-1), coefficients.shape[-1])
        shares.append(first.float().mean(dim=1))
    return torch.stack(means, dim=1), torch.stack(shares, dim=1)


def stored_numbers(model: WithHeads) -> int:
    """Numbers that the model keeps, heads left out; of sparse task vectors only values count, as in the papers."""
    if model.mixture is not None:
        return model.mixture.summary()["total"]
    heads = sum(parameter.numel() for parameter in model.task_heads.parameters())
    return sum(parameter.numel() for parameter in model.parameters()) - heads


def bytes_on_disk(model: Any) -> int:
    """Bytes of the files of weights that ``save_pretrained`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        weights = [path for path in Path(folder).rglob("*") if path.suffix in (".safetensors", ".pt", ".bin")]
        return sum(path.stat().st_size for path in weights)


def routing_figure(values: Tensor, tasks: list[str], experts: list[str], label: str) -> Any:
    """One heat map (tasks × experts) per block, values (K, tasks, T), as a matplotlib figure."""
    from matplotlib.figure import Figure

    count = len(values)
    figure = Figure(figsize=(1.2 + 1.9 * count, 0.8 + 0.45 * len(tasks) + 0.4))
    axes = figure.subplots(1, count, squeeze=False)[0]
    low, high = min(0.0, values.min().item()), max(values.max().item(), 1e-6)
    for block, (axis, rows) in enumerate(zip(axes, values.tolist(), strict=True)):
        drawn = axis.imshow(rows, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axis.set_title(f"block {block}", fontsize=8)
        axis.set_xticks(range(len(experts)), experts, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(tasks)), tasks if block == 0 else [""] * len(tasks), fontsize=7)
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                axis.text(
                    x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color="w" if value < high * 0.6 else "k"
                )
    figure.colorbar(drawn, ax=list(axes), fraction=0.02, pad=0.02).set_label(label, fontsize=7)
    return figure


def _percentage(predictions: Tensor, labels: Tensor) -> float:
    return 100 * (predictions == labels).double().mean().item()


def _for(model: torch.nn.Module, inputs: Inputs) -> Inputs:
    return placed(inputs, next(model.parameters()).device, input_dtype(model))
