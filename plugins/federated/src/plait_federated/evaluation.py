"""How good the models of all clients are, and how far apart (Li et al., arXiv 2410.07272, official program)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from plait_vision import as_classifier
from torch import Tensor, nn

from plait_federated.layout import Layout
from plait_federated.shards import as_float

Record = dict[str, Any]

REMEDY = "lower learning_rate, or the extrapolation if there is one"
WORDS = {"local": "model", "mixed": "mixed model", "server": "model", "control": "control variate"}


class Evaluator:
    """Top-1 accuracy and mean cross-entropy of parameter vectors on one test set."""

    def __init__(self, model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int = 1024) -> None:
        self.layout = Layout(model)
        self.model = copy.deepcopy(model).float().eval()
        self.inputs, self.labels, self.batch_size = inputs, labels, batch_size

    def __call__(self, vector: Tensor) -> tuple[float, float]:
        self.layout.load(self.model, vector)
        return accuracy_and_loss(self.model, self.inputs, self.labels, self.batch_size)


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a model answers to raw inputs ``[b, ...]``: ``[b, classes]``.

    Raises:
        ValueError: the model fails on them, or answers with something else.
    """
    return as_classifier(model, prepared=True)(as_float(inputs))


@torch.no_grad()
def accuracy_and_loss(model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int = 1024) -> tuple[float, float]:
    """Share of right top-1 answers in [0, 1], and the cross-entropy averaged over samples, without penalties.

    Raises:
        ValueError: a label is none of the model's outputs, or as :func:`logits_of`.
    """
    highest = int(labels.max())
    correct = loss = 0.0
    for begin in range(0, len(labels), batch_size):
        y = labels[begin : begin + batch_size]
        logits = logits_of(model, inputs[begin : begin + batch_size])
        if highest >= logits.shape[1]:
            raise ValueError(f"label {highest} does not fit a model of {logits.shape[1]} outputs")
        correct += (logits.argmax(1) == y).sum().item()
        loss += F.cross_entropy(logits, y, reduction="sum").item()
    return correct / len(labels), loss / len(labels)


def consensus_distance(local: Tensor) -> float:
    """(1/n)·Σ_i ‖z_i − z̄‖² of the models ``[n, P]``."""
    return float((local - local.mean(0)).square().sum(1).mean())


def of_reported(reported: Tensor, evaluator: Evaluator | None) -> Record:
    """Test accuracy and loss of the reported model ``[D]``: the clients' mean, or the server's."""
    if evaluator is None:
        return {}
    accuracy, loss = evaluator(reported)
    return {"accuracy": accuracy, "loss": loss}


def of_clients(local: Tensor, initial: Tensor, num_parameters: int, evaluator: Evaluator | None) -> Record:
    """How far the clients' models ``[n, D]`` are from each other and from the start ``[D]``; their accuracies.

    Args:
        evaluator: ``None`` leaves the accuracies out.
    """
    record: Record = {
        "consensus_distance": consensus_distance(local[:, :num_parameters]),
        "drift_from_init": drift(local, initial, num_parameters),
    }
    return record if evaluator is None else record | client_accuracy([evaluator(vector)[0] for vector in local])


def drift(models: Tensor, initial: Tensor, num_parameters: int) -> float:
    """The mean of the squared distances of the models ``[k, D]`` to the start ``[D]``, buffers left out."""
    return float((models - initial)[:, :num_parameters].square().sum(1).mean())


def client_accuracy(accuracies: Sequence[float]) -> Record:
    return {"mean_client_accuracy": sum(accuracies) / len(accuracies), "worst_client_accuracy": min(accuracies)}


def rounds_to_target(accuracies: Sequence[float], target: float) -> int | None:
    """The first round (from 1) whose accuracy reaches the target; ``None`` if no round does."""
    return next((index for index, accuracy in enumerate(accuracies, start=1) if accuracy >= target), None)


def summary(history: Sequence[Record], target: float, last: int) -> Record:
    """One row of a comparison of trainings: how fast, how good, how much work.

    Args:
        target: test accuracy in (0, 1]; a training that never reaches it counts as one round more than it had.
        last: rounds at the end whose accuracy is averaged.
    """
    accuracy = [record["accuracy"] for record in history]
    reached = rounds_to_target(accuracy, target)
    return {
        f"rounds to {target:.0%}": len(history) + 1 if reached is None else reached,
        "reached": float(reached is not None),
        f"last-{last} accuracy": sum(accuracy[-last:]) / len(accuracy[-last:]),
        "best accuracy": max(accuracy),
        "worst client": history[-1].get("worst_client_accuracy"),
        "consensus distance": history[-1].get("consensus_distance"),
        "gradient steps": sum(record["gradient_steps"] for record in history),
        "MB sent": sum(record["bytes"] for record in history) / 1e6,
    }


def diverging(distances: Sequence[float]) -> bool:
    """Whether the consensus distance grew at least tenfold in each of the last 3 rounds."""
    last = distances[-4:]
    return len(last) == 4 and all(after > 10 * before > 0 for before, after in itertools.pairwise(last))


def check_finite(state: Mapping[str, Tensor], clients: Sequence[int], round_index: int) -> None:
    """Refuse NaN and infinity in any table of the state, ``[k, D]``, a row a client, or one of the server.

    Raises:
        FloatingPointError: it names the first client, else the server.
    """
    for name in sorted(state, key=lambda name: name.startswith("server")):  # whose values come from the clients'
        bad = (~torch.isfinite(state[name]).all(1)).nonzero().flatten().tolist()
        if bad:
            whose = "the server" if name.startswith("server") else f"client {clients[bad[0]]}"
            what = WORDS.get(name.removeprefix("server_"), name)
            raise FloatingPointError(f"the {what} of {whose} is not finite after round {round_index + 1}; {REMEDY}")


def check_history(history: Sequence[Record], start_norm: float) -> None:
    """Stop a training whose figures overflow, or whose models fall apart fast or over the whole run.

    Args:
        start_norm: ‖w‖₂ of the parameters that all clients started from.

    Raises:
        FloatingPointError: with the figure, the round and what to do.
    """
    last = history[-1]
    overflown = next((k for k, value in last.items() if isinstance(value, float) and not math.isfinite(value)), None)
    if overflown:
        raise FloatingPointError(f"{overflown} is {last[overflown]} after round {last['round']}; {REMEDY}")
    check_dispersion(history)
    check_growth(history, start_norm)


def check_dispersion(history: Sequence[Record]) -> None:
    """Stop models that fall apart tenfold a round."""
    if diverging([record.get("consensus_distance", 0.0) for record in history]):
        raise FloatingPointError(
            f"the consensus distance grew tenfold in each of the last 3 rounds, to {history[-1]['consensus_distance']:.3g} "
            f"in round {history[-1]['round']}; lower learning_rate, or take weights: lazy"
        )


def check_growth(history: Sequence[Record], start_norm: float) -> None:
    """Stop models that run away, however slowly.

    Stable training moves them by about as much in every round, so that their distance from the start grows no faster
    than the number of rounds; what diverges grows by a factor. A hundred times the former is the limit, and 10⁴ times
    the norm of the start (at least 1), since a first round may diverge, too.
    """
    last = history[-1]
    distance, first = (math.sqrt(record["drift_from_init"]) for record in (last, history[0]))
    steady = start_norm + last["round"] * first
    if distance > 100 * steady > 0 or distance > 1e4 * max(start_norm, 1.0):
        raise FloatingPointError(
            f"the models are {distance:.3g} away from their start, of norm {start_norm:.3g}, after round {last['round']}, "
            f"where round 1 moved them by {first:.3g}: they diverge; {REMEDY}"
        )
