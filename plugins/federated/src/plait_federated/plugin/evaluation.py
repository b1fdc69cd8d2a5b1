"""Tables: how fast a method got there, how good models are, what a graph does."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch
from plait import PlaitError, Report, hookimpl
from plait.fields import doc, in_range
from plait.report import Curve, Image, Panel, png
from torch import nn

from plait_federated.evaluation import accuracy_and_loss, rounds_to_target
from plait_federated.figures import graph_figure
from plait_federated.plugin.tables import client_members, inputs_of, labels_of, train_of, user_errors
from plait_federated.plugin.training import Decentralised
from plait_federated.topology import column_sums, levels, second_eigenvalue, smallest_eigenvalue

__plait_api__ = "0.1"


@attrs.frozen(kw_only=True)
class FederatedRounds:
    """Compare trainings by their histories: rounds to a target, accuracy, consensus distance, work and traffic.

    ``data`` maps the name of a row to a history (``step.history`` of a training with ``output: all``).
    """

    target: float = attrs.field(
        default=0.8, validator=in_range(0, 1, low_open=True), metadata=doc("test accuracy to be reached, in (0, 1]")
    )
    last: int = attrs.field(default=5, validator=in_range(1), metadata=doc("rounds at the end that are averaged"))

    @hookimpl
    def evaluate(self, data, run) -> Report:
        if not isinstance(data, Mapping) or not all(isinstance(history, list) and history for history in data.values()):
            raise PlaitError(
                "data has to map names to histories: {dfedavg: step.history}, of a training with output: all"
            )
        rows, curves = [], []
        for name, history in data.items():
            if "accuracy" not in history[0]:
                raise PlaitError(f"the history of {name} has no accuracy; give the clients a test split")
            accuracy = [record["accuracy"] for record in history]
            reached = rounds_to_target(accuracy, self.target)
            rows.append(
                {
                    "method": name,
                    f"rounds to {self.target:.0%}": len(history) + 1 if reached is None else reached,
                    "reached": float(reached is not None),
                    f"last-{self.last} accuracy": sum(accuracy[-self.last :]) / len(accuracy[-self.last :]),
                    "best accuracy": max(accuracy),
                    "worst client": history[-1].get("worst_client_accuracy"),
                    "consensus distance": history[-1].get("consensus_distance"),
                    "gradient steps": sum(record["gradient_steps"] for record in history),
                    "MB sent": sum(record["bytes"] for record in history) / 1e6,
                }
            )
            rounds = [record["round"] for record in history]
            curves.append(Curve(name=name, x=rounds, y=accuracy, x_label="round", y_label="test accuracy"))
            if "consensus_distance" in history[0]:
                distance = [record["consensus_distance"] for record in history]
                curves.append(Curve(name=name, x=rounds, y=distance, x_label="round", y_label="consensus distance"))
        return Report(
            rows=rows,
            better={
                f"rounds to {self.target:.0%}": "lower",
                f"last-{self.last} accuracy": "higher",
                "best accuracy": "higher",
                "worst client": "higher",
            },
            formats={
                f"rounds to {self.target:.0%}": ".1f",
                "reached": ".2f",
                f"last-{self.last} accuracy": ".3f",
                "best accuracy": ".3f",
                "worst client": ".3f",
                "consensus distance": ".2g",
                "gradient steps": ".0f",
                "MB sent": ".1f",
            },
            curves=curves,
            notes=[
                f"A training that never reached {self.target:.0%} counts as one round more than it had; reached is the share of "
                "seeds that did. Best accuracy is the maximum over rounds on the test set, which is optimistic. "
                "Clients of a server have no models of their own to compare. Methods without a server train all clients every round: compare gradient steps and MB, too."
            ],
        )


class MeanOverHeads(nn.Module):
    """A model with ``tasks`` and ``logits(images, task)``, all tasks being the same one; linear heads are so averaged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.model.logits(images, task) for task in self.model.tasks]).mean(0)


@attrs.frozen(kw_only=True)
class FederatedAccuracy:
    """Top-1 accuracy and cross-entropy of one model, or of each of several.

    A merged model that kept a linear head of each client answers with the mean of its heads.
    """

    column: str | None = attrs.field(default=None, metadata=doc("column of the inputs; null finds it"))
    batch_size: int = attrs.field(default=1024, validator=in_range(1), metadata=doc("samples in a batch"))

    @hookimpl
    def evaluate(self, model, data, run) -> Report:
        models = dict(model) if isinstance(model, Mapping) else {"model": model}
        inputs, labels = inputs_of(data, self.column).to(run.device), torch.from_numpy(labels_of(data)).to(run.device)
        rows = []
        for name, one in models.items():
            if not isinstance(one, nn.Module):
                raise PlaitError(f"model {name} is a {type(one).__name__}; expected is a torch module")
            was_training = one.training
            answering = MeanOverHeads(one) if hasattr(one, "task_heads") else one
            with user_errors():
                accuracy, loss = accuracy_and_loss(answering.to(run.device).eval(), inputs, labels, self.batch_size)
            one.train(was_training)
            if not math.isfinite(loss):
                raise PlaitError(
                    f"model {name} has loss {loss}: its weights or outputs are not finite, so no answer counts"
                )
            rows.append({"model": name, "accuracy": accuracy, "loss": loss})
        return Report(
            rows=rows,
            better={"accuracy": "higher", "loss": "lower"},
            formats={"accuracy": ".3f", "loss": ".3f"},
        )


@attrs.frozen(kw_only=True)
class FederatedGraph(Decentralised):
    """Spectrum, waiting depth and picture of a graph of the data's clients, in its first round."""

    @hookimpl
    def evaluate(self, data, run) -> Report:
        with user_errors():
            graph = self.graph(len(client_members(train_of(data))), run.seed)
            mixing, adjacency = graph.mixing(0), graph.adjacency(0)
        low, high = column_sums(mixing)
        psi = second_eigenvalue(mixing)
        row = {
            "graph": graph.name,
            "weights": graph.weights,
            "directed edges": int(adjacency.sum()),
            "second eigenvalue": psi,
            "spectral gap": 1 - psi,
            "smallest eigenvalue": smallest_eigenvalue(mixing),
            "smallest column sum": low,
            "largest column sum": high,
            "sequential levels": len(levels(mixing)),
        }
        picture = Image(caption=f"{graph.name}, round 1", data=png(graph_figure(adjacency)))
        return Report(rows=[row], panels=[Panel(title="Graph of the clients", images=[[picture]])])
