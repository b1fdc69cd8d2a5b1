"""The kit's methods: graphs, splits, models, plain training, accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import attrs
import torch
from plait import Report, Run, hookimpl
from plait.errors import ConfigurationError
from plait.fields import REQUIRED, field, in_range, one_of
from torch import nn
from torch_geometric.data import Data

from plait_graph import datasets, fewshot, models, splits, tasks, tent
from plait_graph.accuracy import compare, episode_scores, node_scores
from plait_graph.episodes import EpisodeSampler
from plait_graph.graph_training import GRAPHS, GraphTraining, betas_field
from plait_graph.library_warnings import library_warnings_to
from plait_graph.training_loop import PlainUpdate, Update

# -- load-data ----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class DigitsGraph:
    """1,797 handwritten digits joined to their nearest neighbours, on request with random edges as noise."""

    gives = "graph"

    num_neighbors: int = field(6, "neighbours in pixel space", in_range(1, 100))
    random_edges: float = field(0.0, "random edges, as noise, for each edge to a neighbour", in_range(0, 100))

    @hookimpl
    def load_data(self, run: Run) -> Data:
        return datasets.digits_graph(self.num_neighbors, self.random_edges, run.numpy_generator())


@attrs.frozen(kw_only=True)
class CsbmGraph:
    """Contextual stochastic block model: a drawn graph with homophily as a dial."""

    gives = "graph"

    num_nodes: int = field(2000, "nodes", in_range(4))
    num_classes: int = field(5, "classes, of equal size", in_range(2))
    num_features: int = field(64, "features a node", in_range(1))
    degree: float = field(8.0, "mean number of neighbours", in_range(0))
    homophily: float = field(0.3, "share of edges within a class", in_range(0, 1))
    signal: float = field(1.5, "length of the class means, in standard deviations", in_range(0))

    @hookimpl
    def load_data(self, run: Run) -> Data:
        return datasets.csbm_graph(**attrs.asdict(self), generator=run.numpy_generator())


@attrs.frozen(kw_only=True)
class _ReadGraph:
    """What the sources share that read a graph."""

    normalize_features: bool = field(False, "divide each row of x by its sum")
    undirected: bool = field(True, "add the other direction of every edge")

    def prepared(self, data: Data) -> Data:
        datasets.check_graph(data)
        data = datasets.row_normalized(data) if self.normalize_features else data
        return datasets.undirected(data) if self.undirected else data


@attrs.frozen(kw_only=True)
class PygGraph(_ReadGraph):
    """A data set of PyTorch Geometric or OGB, from a local folder or downloaded."""

    gives = "graph"

    name: str = field(REQUIRED, "its name", one_of(*datasets.NAMES))
    root: Path | None = field(None, "folder with the raw files; none: they are downloaded, for this step only")

    @hookimpl
    def load_data(self, run: Run) -> Data:
        return self.prepared(datasets.pyg_graph(self.name, self.root, run.folder / "pyg"))


@attrs.frozen(kw_only=True)
class GraphFile(_ReadGraph):
    """A graph from a file: a saved PyG Data (.pt), arrays (.npz), or an edge list with .mat files."""

    path: Path = field(REQUIRED, "a .pt, .npz or <name>_network file")

    @property
    def gives(self) -> str | None:
        """A saved ``Data`` may have its classes split already."""
        return None if self.path.suffix == ".pt" else "graph"

    def input_files(self) -> Iterable[Path]:
        return datasets.files_beside(self.path)

    @hookimpl
    def load_data(self, run: Run) -> Data:
        return self.prepared(datasets.read_graph(self.path))


# -- transform ----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class NodeSplit:
    """Training, validation and test nodes: so many a class, random shares, or one of the graph's own splits."""

    takes = {"data": GRAPHS}
    gives = "data"

    per_class: int | None = field(None, "labelled nodes of each class; or use train_share or number", in_range(1))
    num_val: int = field(300, "validation nodes, with per_class", in_range(0))
    train_share: float | None = field(None, "share of nodes to train", in_range(0, 1, low_open=True, high_open=True))
    val_share: float = field(0.2, "share of nodes to validate", in_range(0, 1))
    number: int | None = field(None, "which of the graph's own splits, from 0; none: the seed's", in_range(0))

    def __attrs_post_init__(self) -> None:
        if sum(value is not None for value in (self.per_class, self.train_share, self.number)) > 1:
            raise ValueError("per_class, train_share and number exclude each other; give one of them")

    @hookimpl
    def transform(self, data: Any, run: Run) -> Data:
        datasets.check_graph(data)
        if self.per_class is not None:
            masks = splits.split_per_class(data.y, self.per_class, self.num_val, run.generator())
        elif self.train_share is not None:
            masks = splits.split_by_share(data.y, self.train_share, self.val_share, run.generator())
        else:
            number = run.seed % splits.count_splits(data) if self.number is None else self.number
            masks = splits.chosen_split(data, number)
        return _with(data, splits.MASKS, masks)


def _with(data: Data, names: Iterable[str], values: Iterable[torch.Tensor]) -> Data:
    copy = data.clone()
    for name, value in zip(names, values, strict=True):
        copy[name] = value
    return copy


def _classes(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    listed = isinstance(value, (list, tuple))
    numbers = value if listed else [value]
    ok = all(isinstance(n, int) and not isinstance(n, bool) and n >= (0 if listed else 2) for n in numbers)
    if not ok or (listed and len(value) < 2):
        raise ConfigurationError(f"{attribute.name} is {value!r}; allowed is {_ALLOWED_CLASSES}")


_ALLOWED_CLASSES = "two classes or more, such as 4 or [0, 3]"
_classes.allowed = _ALLOWED_CLASSES  # type: ignore[attr-defined]


@attrs.frozen(kw_only=True)
class ClassSplit:
    """Disjoint classes for few-shot training, validation and test: so many random ones, or those that are listed."""

    takes = {"data": GRAPHS}
    gives = "graph-tasks"

    train: int | tuple[int, ...] = field(4, "training classes: how many, or which", _classes)
    val: int | tuple[int, ...] = field(3, "validation classes: how many, or which", _classes)
    test: int | tuple[int, ...] = field(3, "test classes: how many, or which", _classes)

    def __attrs_post_init__(self) -> None:
        splits.listed_classes((self.train, self.val, self.test))

    @hookimpl
    def transform(self, data: Any, run: Run) -> Data:
        datasets.check_graph(data)
        classes = splits.split_classes(data.y, (self.train, self.val, self.test), run.generator())
        return _with(data, splits.CLASSES, classes)


# -- load-model ---------------------------------------------------------------------------------------------------

S = TypeVar("S", bound=models.SavedModule)
_DROPOUT = in_range(0, 1, high_open=True)


@attrs.frozen(kw_only=True)
class _FreshModel:
    """What the networks with fresh weights share; a subclass says which it is and whether it has a class head."""

    takes = {"data": GRAPHS}
    gives = "graph-network"

    def made(self, kind: type[S], data: Any, run: Run, *, with_classes: bool) -> S:
        datasets.check_graph(data)
        sizes = {"in_channels": datasets.num_features(data)}
        if with_classes:
            sizes["num_classes"] = datasets.num_classes(data)
        return models.seeded(run.derived_seed(), lambda: kind(**sizes, **attrs.asdict(self)))


@attrs.frozen(kw_only=True)
class Gnn(_FreshModel):
    """A graph network with fresh weights: GCN, GraphSAGE, GAT, GIN, SGC and others."""

    architecture: models.Architecture = field("gcn", "kind of its layers")
    hidden_channels: int = field(32, "features of a hidden layer", in_range(1))
    num_layers: int = field(2, "layers (propagations of sgc)", in_range(1))
    dropout: float = field(0.5, "share of features dropped before a layer", _DROPOUT)
    heads: int = field(1, "heads of attention layers", in_range(1))

    @hookimpl
    def load_model(self, data: Any, run: Run) -> models.GNN:
        return self.made(models.GNN, data, run, with_classes=True)


@attrs.frozen(kw_only=True)
class Gpn(_FreshModel):
    """Graph prototypical network for few-shot node classification (Ding et al., CIKM 2020)."""

    hidden_channels: int = field(16, "size of an embedding", in_range(1))
    dropout: float = field(0.2, "share of hidden features dropped", _DROPOUT)
    weighting: Literal["softmax", "sum"] = field("softmax", "of the support nodes; sum is the original")
    distance: Literal["euclidean", "squared"] = field("euclidean", "squared is the original")

    @hookimpl
    def load_model(self, data: Any, run: Run) -> fewshot.GPN:
        return self.made(fewshot.GPN, data, run, with_classes=False)


@attrs.frozen(kw_only=True)
class MetaGcn(_FreshModel):
    """GCN adapted to each episode by gradient steps, first-order MAML."""

    n_way: int = field(5, "classes of an episode", in_range(2))
    hidden_channels: int = field(16, "features of a hidden layer", in_range(1))
    dropout: float = field(0.5, "share of hidden features dropped", _DROPOUT)
    num_inner_steps: int = field(10, "gradient steps of the adaptation", in_range(0))
    inner_learning_rate: float = field(0.1, "their rate", in_range(0, low_open=True))

    renamed_fields: ClassVar[Mapping[str, str]] = {"inner_steps": "num_inner_steps", "inner_lr": "inner_learning_rate"}

    @hookimpl
    def load_model(self, data: Any, run: Run) -> fewshot.MetaGCN:
        return self.made(fewshot.MetaGCN, data, run, with_classes=False)


@attrs.frozen(kw_only=True)
class Tent(_FreshModel):
    """Task-adaptive few-shot node classification: networks adapted to each class (Wang et al., KDD 2022)."""

    hidden_channels: int = field(16, "size of an embedding", in_range(1))
    dropout: float = field(0.5, "share of hidden features dropped", _DROPOUT)
    base_weight: float = field(1.0, "weight of the loss over all training classes", in_range(0))

    @hookimpl
    def load_model(self, data: Any, run: Run) -> tent.TENT:
        return self.made(tent.TENT, data, run, with_classes=True)


# -- optimize -----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class AdamTraining(GraphTraining):
    """Plain training with Adam, or AdamW, on a graph or on episodes."""

    betas: tuple[float, float] = betas_field()
    decoupled: bool = field(False, "decoupled weight decay (AdamW)")

    def make_update(self, model: nn.Module, seed: int) -> Update:
        kind = torch.optim.AdamW if self.decoupled else torch.optim.Adam
        options: dict[str, Any] = {"lr": self.learning_rate, "betas": self.betas, "weight_decay": self.weight_decay}
        return PlainUpdate(model, kind(model.parameters(), **options))


@attrs.frozen(kw_only=True)
class SGDTraining(GraphTraining):
    """Plain training with SGD on a graph or on episodes."""

    learning_rate: float = field(0.1, "learning rate", in_range(0, low_open=True))
    momentum: float = field(0.9, "momentum", in_range(0, 1, high_open=True))

    def make_update(self, model: nn.Module, seed: int) -> Update:
        options: dict[str, Any] = {
            "lr": self.learning_rate,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
        }
        return PlainUpdate(model, torch.optim.SGD(model.parameters(), **options))


# -- evaluate -----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class NodeAccuracy:
    """Accuracy and macro-F1 on test nodes, gain and time an update relative to a reference model."""

    takes = {"model": "graph-network", "data": GRAPHS, "reference": "graph-network"}

    split: Literal["train", "val", "test"] = field("test", "which nodes")

    @hookimpl
    def evaluate(self, model: Any, data: Any, reference: Any | None, run: Run) -> Report:
        datasets.check_graph(data)
        mask = data.get(f"{self.split}_mask")
        if mask is None or mask.dim() != 1 or not mask.any():
            raise ValueError(f"the graph has no {self.split}_mask of shape [n] with nodes; use transform node-split")
        with library_warnings_to(run.warn):
            return compare(model, reference, lambda candidate: node_scores(candidate, data, mask, run.device))


@attrs.frozen(kw_only=True)
class EpisodeAccuracy:
    """Few-shot accuracy over test episodes with its 95 % interval, gain and time relative to a reference."""

    takes = {"model": "graph-network", "data": "graph-tasks", "reference": "graph-network"}

    n_way: int = field(5, "classes of an episode", in_range(2))
    k_shot: int = field(3, "support nodes a class", in_range(1))
    n_query: int = field(10, "query nodes a class", in_range(1))
    num_tasks: int = field(100, "test episodes", in_range(2))

    @hookimpl
    def evaluate(self, model: Any, data: Any, reference: Any | None, run: Run) -> Report:
        graph = tasks.episode_graph(data, run.device)
        sampler = EpisodeSampler(data.y, data.test_classes, self.n_way, self.k_shot, self.n_query, "test")
        generator = Run(seed=run.seed).generator("test episodes")  # the same episodes for every model
        episodes = [sampler.draw(generator, run.device) for _ in range(self.num_tasks)]

        def score(candidate: nn.Module) -> dict[str, float]:
            return episode_scores(tasks.episode_accuracies(candidate.to(run.device).eval(), graph, episodes))

        with library_warnings_to(run.warn):
            return compare(model, reference, score)
