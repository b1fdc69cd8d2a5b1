"""How good the models of all clients are, and how far apart (Li et al., arXiv 2410.07272, official program)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait_federated.engines import as_logits
from plait_federated.layout import Layout
from plait_federated.shards import as_float

Record = dict[str, Any]


class DivergenceError(RuntimeError):
    """The models of the clients fell apart."""


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
def accuracy_and_loss(model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int = 1024) -> tuple[float, float]:
    """Share of right top-1 answers in [0, 1], and the cross-entropy averaged over samples, without penalties."""
    correct = loss = 0.0
    for begin in range(0, len(labels), batch_size):
        y = labels[begin : begin + batch_size]
        logits = as_logits(model(as_float(inputs[begin : begin + batch_size]))).float()
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
    p = num_parameters
    record: Record = {
        "consensus_distance": consensus_distance(local[:, :p]),
        "drift_from_init": float((local[:, :p] - initial[:p]).square().sum(1).mean()),
    }
    return record if evaluator is None else record | client_accuracy([evaluator(vector)[0] for vector in local])


def client_accuracy(accuracies: Sequence[float]) -> Record:
    return {"mean_client_accuracy": sum(accuracies) / len(accuracies), "worst_client_accuracy": min(accuracies)}


def rounds_to_target(accuracies: Sequence[float], target: float) -> int | None:
    """The first round (from 1) whose accuracy reaches the target; ``None`` if no round does."""
    return next((index for index, accuracy in enumerate(accuracies, start=1) if accuracy >= target), None)


def diverging(distances: Sequence[float]) -> bool:
    """Whether the consensus distance grew at least tenfold in each of the last 3 rounds."""
    last = distances[-4:]
    return len(last) == 4 and all(after > 10 * before > 0 for before, after in itertools.pairwise(last))


def check_finite(local: Tensor, clients: Sequence[int], round_index: int) -> None:
    """Refuse rows with NaN or infinity."""
    bad = (~torch.isfinite(local).all(1)).nonzero().flatten().tolist()
    if bad:
        raise DivergenceError(
            f"the model of client {clients[bad[0]]} is not finite after round {round_index + 1}; "
            "lower learning_rate, or the extrapolation if there is one"
        )


def check_dispersion(history: Sequence[Record]) -> None:
    """Stop models that fall apart tenfold a round."""
    if diverging([record.get("consensus_distance", 0.0) for record in history]):
        raise DivergenceError(
            f"the consensus distance grew tenfold in each of the last 3 rounds, to {history[-1]['consensus_distance']:.3g} "
            f"in round {history[-1]['round']}; lower learning_rate, or take weights: lazy"
        )
