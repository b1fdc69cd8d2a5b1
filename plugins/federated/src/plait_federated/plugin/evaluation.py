"""Tables: how fast a method got there, how good models are, what a graph does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from datasets import Dataset
from plait import Report, hookimpl
from plait.fields import field, in_range
from plait.report import Curve, Image, Panel, png
from plait_vision import CLASSIFIERS, DATA, ClassifierFields, class_names_of, evaluating

from plait_federated.client_data import client_members, inputs_of, train_of
from plait_federated.evaluation import accuracy_and_loss, summary
from plait_federated.methods import PeerGraph
from plait_federated.topology import column_sums, levels, second_eigenvalue, smallest_eigenvalue


@attrs.frozen(kw_only=True)
class FederatedRounds:
    """Compare trainings by their histories: rounds to a target, accuracy, consensus distance, work and traffic.

    ``data`` maps the name of a row to a history (``step.history`` of a training with ``output: all``).
    """

    target: float = field(0.8, "test accuracy to be reached, in (0, 1]", in_range(0, 1, low_open=True))
    last: int = field(5, "rounds at the end that are averaged", in_range(1))

    @hookimpl
    def evaluate(self, data: Any, run: Any) -> Report:
        if not isinstance(data, Mapping) or not all(isinstance(history, list) and history for history in data.values()):
            raise ValueError(
                "data has to map names to histories: {dfedavg: step.history}, of a training with output: all"
            )
        for name, history in data.items():
            if "accuracy" not in history[0]:
                raise ValueError(f"the history of {name} has no accuracy; give the clients a test split")
        curves = []
        for name, history in data.items():
            for figure, label in (("accuracy", "test accuracy"), ("consensus_distance", "consensus distance")):
                if figure in history[0]:
                    x, y = ([record[of] for record in history] for of in ("round", figure))
                    curves.append(Curve(name=name, x=x, y=y, x_label="round", y_label=label))
        to_target, last = f"rounds to {self.target:.0%}", f"last-{self.last} accuracy"
        return Report(
            rows=[{"method": name} | summary(history, self.target, self.last) for name, history in data.items()],
            better={to_target: "lower", last: "higher", "best accuracy": "higher", "worst client": "higher"},
            formats={
                to_target: ".1f",
                "reached": ".2f",
                last: ".3f",
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


@attrs.frozen(kw_only=True)
class FederatedAccuracy(ClassifierFields):
    """Top-1 accuracy and cross-entropy of one model, or of each of several, on one data set or each of several.

    Plain modules get the inputs as in federated training. Of a model of several tasks, such as a merged one with a linear head
    of each client, the default is the mean of the logits of all.
    """

    takes = {"model": CLASSIFIERS, "data": DATA}

    column: str | None = field(None, "column of the inputs; null finds it")
    batch_size: int = field(1024, "samples in a batch", in_range(1))

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return ("label", *filter(None, [self.column]))

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Any) -> Report:
        models = dict(model) if isinstance(model, Mapping) else {"model": model}
        sets = dict(data) if isinstance(data, Mapping) else {"": data}
        if not sets:
            raise ValueError("data is an empty mapping; give at least one data set")
        rows = []
        for name, some in sets.items():
            index = {"data": str(name)} if isinstance(data, Mapping) else {}
            if not isinstance(some, Dataset):
                which = f"data {name}" if name else "data"
                raise ValueError(f"{which} is a {type(some).__name__}; a dataset is needed")
            rows += [{"model": row.pop("model"), **index, **row} for row in self._rows(models, some, run)]
        return Report(
            rows=rows,
            better={"accuracy": "higher", "loss": "lower"},
            formats={"accuracy": ".3f", "loss": ".3f"},
        )

    def _rows(self, models: Mapping[str, Any], data: Dataset, run: Any) -> Iterator[dict[str, Any]]:
        inputs, names = inputs_of(data, self.column).to(run.device), class_names_of(data)
        for name, one in models.items():
            try:
                classifier = self.classifier(one, run.device, names, prepared=True, all_tasks=True)
                labels = self.labels(data, classifier).to(run.device)
            except (TypeError, ValueError) as error:
                raise type(error)(f"model {name}: {error}") from error
            with evaluating(classifier):
                accuracy, loss = accuracy_and_loss(classifier, inputs, labels, self.batch_size)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"model {name} has loss {loss}: its weights or outputs are not finite, so no answer counts"
                )
            yield {"model": name, "accuracy": accuracy, "loss": loss}


@attrs.frozen(kw_only=True)
class FederatedGraph(PeerGraph):
    """Spectrum, waiting depth and picture of a graph of the data's clients, in its first round."""

    takes = {"data": DATA}

    @hookimpl
    def evaluate(self, data: Any, run: Any) -> Report:
        from plait_federated.figures import graph_figure  # matplotlib

        graph = self.graph(len(client_members(train_of(data))), run.seed)
        mixing, adjacency = graph.mixing(0), graph.adjacency(0)
        low, high = column_sums(mixing)
        psi = second_eigenvalue(mixing)
        row: dict[str, str | int | float] = {
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
