"""How good models of a graph are: accuracy of nodes and of episodes, and one table to compare several models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from plait import Report
from plait.report import Image, Panel, png
from torch import nn
from torch_geometric.data import Data

from plait_graph.datasets import features
from plait_graph.models import check_is_module
from plait_graph.tasks import node_logits
from plait_graph.training_loop import passes_per_update, seconds_per_update

BETTER: dict[str, Literal["higher", "lower"]] = {
    "accuracy": "higher",
    "macro-F1": "higher",
    "gain": "higher",
    "time": "lower",
    "GNN passes": "lower",
}
FORMATS = dict.fromkeys(
    ("accuracy", "± 95 % of one seed", "macro-F1", "gain", "ms/update", "time", "GNN passes"), ".2f"
)


def node_scores(model: nn.Module, data: Data, mask: torch.Tensor, device: torch.device) -> dict[str, float]:
    """Accuracy with half the width of its 95 % interval (normal approximation), and macro-F1, all in %.

    Args:
        model: is moved to ``device`` and put into eval mode.
        mask: the nodes that count, bool [n].
    """
    from sklearn.metrics import f1_score

    model = model.to(device).eval()
    placed = data.clone()
    placed.x = features(data).to_dense() if data.get("x") is None else data.x
    placed = placed.to(device)
    with torch.no_grad():
        predicted = node_logits(model, placed).argmax(-1).cpu()[mask]
    truth = data.y[mask]
    accuracy = float((predicted == truth).float().mean())
    return {
        "accuracy": 100 * accuracy,
        "± 95 % of one seed": 196 * math.sqrt(accuracy * (1 - accuracy) / len(truth)),
        "macro-F1": 100 * f1_score(truth.numpy(), predicted.numpy(), average="macro"),
    }


def episode_scores(shares: list[float]) -> dict[str, float]:
    """Mean accuracy over episodes with half the width of its 95 % interval, in %; ``shares`` are in [0, 1]."""
    mean, half = interval95(100 * np.asarray(shares))
    return {"accuracy": mean, "± 95 % of one seed": half}


def interval95(values: Any) -> tuple[float, float]:
    """Mean of the numbers, and half the width of its 95 % interval (Student's t)."""
    from scipy.stats import t

    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(t.ppf(0.975, len(values) - 1) * error)


def compare(model: Any, reference: Any, score: Callable[[nn.Module], dict[str, float]]) -> Report:
    """One row a model; against the reference: ``gain`` in accuracy points, and ``time`` of an update as a ratio.

    ``GNN passes`` are those of an update with message passing. Several models with times give a picture.

    With models and reference of one seed the gain is paired; over several seeds the report shows means with their
    standard errors.

    Args:
        model: one, or name → model.
        reference: one, or ``None``.
        score: the scores of a model, among them ``accuracy``; it may change the copy that it is given.

    Raises:
        ValueError: a model is not a module.
    """
    several = isinstance(model, dict)
    candidates = model if several else {"": model}
    for candidate in [*candidates.values(), *([] if reference is None else [reference])]:
        check_is_module(candidate)
    base = None if reference is None else score(copy.deepcopy(reference))
    base_seconds = None if reference is None else seconds_per_update(reference)
    rows: list[dict[str, Any]] = []
    for name, candidate in candidates.items():
        row: dict[str, Any] = {"model": name} if several else {}
        row |= score(copy.deepcopy(candidate))
        if base is not None:
            row["gain"] = row["accuracy"] - base["accuracy"]
        seconds = seconds_per_update(candidate)
        if seconds is not None:
            row["ms/update"] = 1000 * seconds
        if seconds is not None and base_seconds:
            row["time"] = seconds / base_seconds
        passes = passes_per_update(candidate)
        if passes is not None:
            row["GNN passes"] = passes
        rows.append(row)
    panels = []
    if several and all("time" in row for row in rows):
        panels.append(Panel(title="Accuracy and time", images=[[Image(caption=_CAPTION, data=png(_figure(rows)))]]))
    return Report(rows=rows, better=BETTER, formats=FORMATS, spread="standard error", panels=panels)


_CAPTION = "Accuracy with its 95 % interval over the time of an update, the reference's being 100 %"


def _figure(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for row in rows:
        axes.errorbar(
            100 * row["time"], row["accuracy"], row["± 95 % of one seed"], fmt="o", capsize=3, label=row["model"]
        )
    axes.set(xlabel="time of an update, % of the reference", ylabel="accuracy, %")
    axes.set_xlim(left=0)
    axes.legend()
    return figure
