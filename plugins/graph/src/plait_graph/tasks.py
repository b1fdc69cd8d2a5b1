"""What one update learns from: labelled nodes of a graph, or an episode.

A task gives its losses two ways: with the whole graph, and from the rows that carry the loss alone (used by methods
that train a graph network also without its edges).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch_geometric.data import Data
from torch_geometric.utils import k_hop_subgraph

from plait_graph.datasets import EDGE_VALUES, check_graph, features
from plait_graph.episodes import Episode, EpisodeSampler
from plait_graph.fewshot import EpisodeGraph, EpisodeModel, FixedSparse
from plait_graph.sampling import NeighbourSampler
from plait_graph.splits import CLASSES


class Task(Protocol):
    """One update's work."""

    def losses(self, model: nn.Module) -> Tensor:
        """Cross-entropy of each target, with message passing, [targets]."""

    def row_losses(self, model: nn.Module) -> Tensor:
        """The same from the targets' rows alone, on the graph where each has only itself, [targets]."""


class Objective(Protocol):
    """A stream of tasks and a validation."""

    def draw(self, generator: torch.Generator) -> Task: ...

    def validate(self, model: nn.Module) -> float | None:
        """Validation accuracy in [0, 1], ``None`` without validation nodes."""


def _logits(model: nn.Module, data: Data, x: Tensor, edge_index: Tensor) -> Tensor:
    """Logits; models whose forward names edge weights or attributes are given them.

    On rows alone each node is joined to itself, by an edge of weight 1 with attributes 0.
    """
    names = inspect.signature(model.forward).parameters
    values = {name: data[name] for name in EDGE_VALUES if name in names and data.get(name) is not None}
    if edge_index is not data.edge_index:
        of_loop = {"edge_weight": 1, "edge_attr": 0}
        values = {n: v.new_full((edge_index.shape[1], *v.shape[1:]), of_loop[n]) for n, v in values.items()}
    try:
        logits: Tensor = model(x, edge_index, **values)
    except ValueError as error:
        if len(x) > 1:
            raise
        raise ValueError(
            f"the model cannot be trained on one row ({error}); raise batch_size or num_hops, or leave out BatchNorm"
        ) from error
    return logits


@contextmanager
def _one_sentence(model: nn.Module, x: Tensor | FixedSparse, remedy: str) -> Iterator[None]:
    """What PyTorch says of a model that does not fit features x [n, d], in one sentence."""
    if any(is_lazy(p) for p in model.parameters()):
        raise ValueError("layers of the model have no weights before its first call; call it once on the graph before")
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except (RuntimeError, TypeError, IndexError) as error:
        x = x.matrix if isinstance(x, FixedSparse) else x
        weights = next((p for p in model.parameters() if p.is_floating_point()), x)
        if weights.dtype != x.dtype:
            raise ValueError(
                f"x is {x.dtype}, but the model's weights are {weights.dtype}; convert one of them, as with x.float()"
            ) from error
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"the model cannot be run on the graph, which has {x.shape[1]} features a node ({why}); {remedy}"
        ) from error


def node_logits(model: nn.Module, data: Data) -> Tensor:
    """Logits of all nodes, [n, classes].

    Raises:
        ValueError: the model answers episodes, has no weights yet (lazy layers), does not fit the graph's features, or
            has too few outputs.
    """
    if isinstance(model, EpisodeModel):
        raise ValueError(
            f"the model is a {type(model).__name__}, which answers episodes of few nodes; use gnn, or episode-accuracy"
        )
    with _one_sentence(model, data.x, "its forward must take x [n, d] and edge_index [2, edges]"):
        logits = _logits(model, data, data.x, data.edge_index)
    classes = int(data.y.max()) + 1
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(data.y) or logits.shape[1] < classes:
        raise ValueError(f"the model returned {shape}; expected logits [{len(data.y)}, {classes}], one column a class")
    return logits


# -- node classification -------------------------------------------------------------------------------------------


@attrs.frozen
class NodeTask:
    """Labelled nodes ``targets`` of ``data``."""

    data: Data
    targets: Tensor

    def losses(self, model: nn.Module) -> Tensor:
        logits = _logits(model, self.data, self.data.x, self.data.edge_index)
        return F.cross_entropy(logits[self.targets], self.data.y[self.targets], reduction="none")

    def row_losses(self, model: nn.Module) -> Tensor:
        alone = torch.arange(len(self.targets), device=self.targets.device).expand(2, -1)
        logits = _logits(model, self.data, self.data.x[self.targets], alone)
        return F.cross_entropy(logits, self.data.y[self.targets], reduction="none")


class NodeObjective:
    """All labelled nodes in every update, or random batches of them.

    Args:
        data: with ``train_mask`` and, to validate, ``val_mask``, both [n].
        batch_size: labelled nodes an update; ``None`` for all.
        num_hops: passes see the subgraph within so many hops of their targets; ``None`` for the whole graph.
            One more than the model has layers changes nothing for layers that normalise by degree.
        num_neighbors: of these hops, only so many random neighbours a node, drawn anew for every task.

    Raises:
        ValueError: the graph cannot be used, no training node has a label, or ``num_neighbors`` lacks ``num_hops``.
    """

    def __init__(
        self,
        data: Data,
        device: torch.device,
        batch_size: int | None = None,
        num_hops: int | None = None,
        num_neighbors: int | None = None,
    ) -> None:
        check_graph(data)
        for name in ("train_mask", "val_mask"):
            mask = data.get(name)
            if mask is not None and mask.dim() != 1:
                raise ValueError(f"{name} has shape {tuple(mask.shape)}; pick one split with transform node-split")
        if data.get("train_mask") is None or not data.train_mask.any():
            raise ValueError("no node is labelled for training; draw a split with transform node-split")
        dense = data.clone()
        dense.x = features(data).to_dense() if data.get("x") is None else data.x
        self.data = dense.to(device)
        self.training = torch.nonzero(self.data.train_mask).flatten()
        self.batch_size, self.num_hops = batch_size, num_hops
        if num_neighbors is not None and num_hops is None:
            raise ValueError(f"num_neighbors is {num_neighbors} without num_hops; say how many hops to draw")
        self.sampler = None
        if num_neighbors is not None:
            self.sampler = NeighbourSampler(self.data.edge_index, self.data.num_nodes, num_neighbors)

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        """Try the model on the graph, before the work starts; it is left as it was.

        Raises:
            ValueError: see :func:`node_logits`.
        """
        node_logits(copy.deepcopy(model).to(self.data.x.device).eval(), self.data)

    @cached_property
    def whole(self) -> NodeTask:
        """All labelled nodes, with all their neighbours."""
        return self._task(self.training)

    def draw(self, generator: torch.Generator) -> NodeTask:
        targets = self.training
        if self.batch_size is not None and self.batch_size < len(targets):
            targets = targets[torch.randperm(len(targets), generator=generator)[: self.batch_size].to(targets.device)]
        if self.sampler is not None and self.num_hops is not None:
            return self._sampled(targets, *self.sampler.draw(targets, self.num_hops, generator))
        return self.whole if targets is self.training else self._task(targets)

    def _sampled(self, targets: Tensor, nodes: Tensor, kept: Tensor) -> NodeTask:
        position = torch.empty(self.data.num_nodes, dtype=torch.long, device=nodes.device)
        position[nodes] = torch.arange(len(nodes), device=nodes.device)
        part = self._part(nodes, position[self.data.edge_index[:, kept]], kept)
        return NodeTask(part, position[targets])

    def _task(self, targets: Tensor) -> NodeTask:
        if self.num_hops is None:
            return NodeTask(self.data, targets)
        nodes, edges, places, kept = k_hop_subgraph(
            targets, self.num_hops, self.data.edge_index, relabel_nodes=True, num_nodes=self.data.num_nodes
        )
        return NodeTask(self._part(nodes, edges, kept), places)

    def _part(self, nodes: Tensor, edges: Tensor, kept: Tensor) -> Data:
        """The subgraph of these nodes, with renumbered edges that were number ``kept``."""
        part = Data(x=self.data.x[nodes], edge_index=edges, y=self.data.y[nodes])
        for name in ("edge_weight", "edge_attr"):
            if self.data.get(name) is not None:
                part[name] = self.data[name][kept]
        return part

    @torch.no_grad()
    def validate(self, model: nn.Module) -> float | None:
        mask = self.data.get("val_mask")
        if mask is None or not mask.any():
            return None
        predicted = node_logits(model, self.data).argmax(-1)
        return float((predicted == self.data.y)[mask].float().mean())


# -- few-shot classification ------------------------------------------------------------------------------------------

_MADE_FOR_IT = "load one that was made for this graph"


@attrs.frozen
class EpisodeTask:
    """One episode on a graph."""

    graph: EpisodeGraph
    episode: Episode

    def losses(self, model: Any) -> Tensor:
        losses: Tensor = model.losses(self.graph, self.episode)
        return losses

    def row_losses(self, model: Any) -> Tensor:
        losses: Tensor = model.losses(self.graph.alone(self.episode.rows), self.episode.renumbered())
        return losses


class EpisodeObjective:
    """Episodes of the training classes; validation is the mean over episodes of the validation classes.

    Raises:
        ValueError: classes are too few, too small or in two splits; also of the validation and test classes, so
            that nothing is found out only after training.
    """

    def __init__(
        self,
        data: Data,
        device: torch.device,
        n_way: int,
        k_shot: int,
        n_query: int,
        num_val_tasks: int,
        val_generator: torch.Generator,
    ) -> None:
        self.graph, y = episode_graph(data, device), data.y
        shape = (n_way, k_shot, n_query)
        self.sampler = EpisodeSampler(y, data.train_classes, *shape, "training")
        validation = EpisodeSampler(y, data.val_classes, *shape, "validation")
        EpisodeSampler(y, data.test_classes, *shape, "test")
        highest = data.train_classes.sort().values[-n_way:]  # a head over all classes may have no output for these
        self.trial = EpisodeSampler(y, highest, *shape).draw(torch.Generator().manual_seed(0), device)
        self.device = device
        self.validation = [validation.draw(val_generator, device) for _ in range(num_val_tasks)]

    @torch.no_grad()
    def check(self, model: EpisodeModel) -> None:
        """Try the model on an episode, before the work starts; it is left as it was.

        Raises:
            ValueError: it has no weights yet (lazy layers), or does not fit the graph's features or the episodes.
        """
        with _one_sentence(model, self.graph.x, _MADE_FOR_IT):
            EpisodeTask(self.graph, self.trial).losses(copy.deepcopy(model).to(self.device).eval())

    def draw(self, generator: torch.Generator) -> EpisodeTask:
        return EpisodeTask(self.graph, self.sampler.draw(generator, self.device))

    def validate(self, model: nn.Module) -> float | None:
        return sum(episode_accuracies(model, self.graph, self.validation)) / len(self.validation)


def episode_graph(data: Data, device: torch.device) -> EpisodeGraph:
    """The graph as few-shot models see it, after a check of its class split."""
    check_graph(data)
    splits = [data.get(name) for name in CLASSES]
    if any(classes is None for classes in splits):
        raise ValueError("the graph has no split of its classes; draw one with transform class-split")
    for name, classes in zip(CLASSES, splits, strict=True):
        if not isinstance(classes, Tensor) or classes.dtype != torch.long or classes.dim() != 1:
            raise ValueError(f"{name} must be whole numbers (int64) of shape [classes]")
    classes, count = torch.unique(torch.cat(splits), return_counts=True)
    twice = classes[count > 1]
    if len(twice):
        raise ValueError(f"class {int(twice[0])} is in two splits of classes, or twice in one; they must be disjoint")
    return EpisodeGraph.of(features(data).to(device), data.edge_index.to(device))


def episode_accuracies(model: Any, graph: EpisodeGraph, episodes: list[Episode]) -> list[float]:
    """Share of queries classified correctly in each episode."""
    if not isinstance(model, EpisodeModel):
        raise ValueError(
            f"the model is a {type(model).__name__}, which does not answer episodes; use gpn, meta-gcn or tent"
        )
    with _one_sentence(model, graph.x, _MADE_FOR_IT):
        logits = model.answers(graph, episodes)
    return [float((z.argmax(-1) == e.labels).float().mean()) for z, e in zip(logits, episodes, strict=True)]
