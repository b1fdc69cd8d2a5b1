"""The kit's methods: graphs, splits, models, plain training, accuracy."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
import torch
from plait import PlaitError, Report, Run, hookimpl
from plait.fields import doc, in_range, one_of
from plait.report import Image, Panel, png
from torch import nn
from torch_geometric.data import Data

from plait_graph import datasets, fewshot, models, splits, tasks, tent, training
from plait_graph.episodes import EpisodeSampler

__plait_api__ = "0.1"


@contextmanager
def told_as_plait_error() -> Iterator[None]:
    """What the algorithm modules raise for a user's mistake, in the form that users are shown."""
    try:
        yield
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        raise PlaitError(str(error)) from error


@contextmanager
def warnings_told(run: Run) -> Iterator[None]:
    """Libraries' warnings go to ``run.warn``, each once; those of deprecation, for programmers, go where they went."""
    told: set[str] = set()
    elsewhere = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        sentence = " ".join(str(message).split())
        if issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
            elsewhere(message, category, *where)
        elif sentence not in told:
            told.add(sentence)
            run.warn(sentence)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


# -- load-data ----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class DigitsGraph:
    """1,797 handwritten digits joined to their nearest neighbours, on request with random edges as noise."""

    num_neighbors: int = attrs.field(default=6, validator=in_range(1, 100), metadata=doc("neighbours in pixel space"))
    random_edges: float = attrs.field(
        default=0.0, validator=in_range(0, 100), metadata=doc("random edges, as noise, for each edge to a neighbour")
    )

    @hookimpl
    def load_data(self, run: Run) -> Data:
        return datasets.digits_graph(self.num_neighbors, self.random_edges, run.numpy_generator())


@attrs.frozen(kw_only=True)
class CsbmGraph:
    """Contextual stochastic block model: a drawn graph with homophily as a dial."""

    num_nodes: int = attrs.field(default=2000, validator=in_range(4), metadata=doc("nodes"))
    num_classes: int = attrs.field(default=5, validator=in_range(2), metadata=doc("classes, of equal size"))
    num_features: int = attrs.field(default=64, validator=in_range(1), metadata=doc("features a node"))
    degree: float = attrs.field(default=8.0, validator=in_range(0), metadata=doc("mean number of neighbours"))
    homophily: float = attrs.field(default=0.3, validator=in_range(0, 1), metadata=doc("share of edges within a class"))
    signal: float = attrs.field(
        default=1.5, validator=in_range(0), metadata=doc("length of the class means, in standard deviations")
    )

    @hookimpl
    def load_data(self, run: Run) -> Data:
        if self.num_nodes < 2 * self.num_classes:
            raise PlaitError(
                f"num_nodes is {self.num_nodes}; give at least 2 nodes for each of {self.num_classes} classes"
            )
        return datasets.csbm_graph(
            self.num_nodes, self.num_classes, self.num_features, self.degree, self.homophily, self.signal,
            run.numpy_generator(),
        )  # fmt: skip


@attrs.frozen(kw_only=True)
class PygGraph:
    """A data set of PyTorch Geometric or OGB, from a local folder or downloaded."""

    name: str = attrs.field(validator=one_of(*datasets.NAMES), metadata=doc("its name"))
    root: Path | None = attrs.field(default=None, metadata=doc("folder with the raw files; none downloads them"))
    normalize_features: bool = attrs.field(default=False, metadata=doc("divide each row of x by its sum"))
    undirected: bool = attrs.field(default=True, metadata=doc("add the other direction of every edge"))

    @hookimpl
    def load_data(self, run: Run) -> Data:
        with told_as_plait_error():
            data = datasets.pyg_graph(self.name, self.root, run.folder / "pyg")
            return _prepared(data, self.normalize_features, self.undirected)


@attrs.frozen(kw_only=True)
class GraphFile:
    """A graph from a file: a saved PyG Data (.pt), arrays (.npz), or an edge list with .mat files."""

    path: Path = attrs.field(metadata=doc("a .pt, .npz or <name>_network file"))
    normalize_features: bool = attrs.field(default=False, metadata=doc("divide each row of x by its sum"))
    undirected: bool = attrs.field(default=True, metadata=doc("add the other direction of every edge"))

    @hookimpl
    def load_data(self, run: Run) -> Data:
        with told_as_plait_error():
            data = datasets.read_graph(self.path)
            return _prepared(data, self.normalize_features, self.undirected)


def _prepared(data: Data, normalize: bool, undirected: bool) -> Data:
    datasets.check_graph(data)
    data = datasets.row_normalized(data) if normalize else data
    return datasets.undirected(data) if undirected else data


# -- transform ----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class NodeSplit:
    """Training, validation and test nodes: so many a class, random shares, or one of the graph's own splits."""

    per_class: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("labelled nodes of each class; or use train_share or number")
    )
    num_val: int = attrs.field(default=300, validator=in_range(0), metadata=doc("validation nodes, with per_class"))
    train_share: float | None = attrs.field(
        default=None, validator=in_range(0, 1, low_open=True, high_open=True), metadata=doc("share of nodes to train")
    )
    val_share: float = attrs.field(default=0.2, validator=in_range(0, 1), metadata=doc("share of nodes to validate"))
    number: int | None = attrs.field(
        default=None, validator=in_range(0), metadata=doc("which of the graph's own splits, from 0; none: the seed's")
    )

    def __attrs_post_init__(self) -> None:
        if sum(value is not None for value in (self.per_class, self.train_share, self.number)) > 1:
            raise PlaitError("per_class, train_share and number exclude each other; give one of them")

    @hookimpl
    def transform(self, data: Any, run: Run) -> Data:
        with told_as_plait_error():
            datasets.check_graph(data)
            if self.per_class is not None:
                masks = splits.split_per_class(data.y, self.per_class, self.num_val, run.generator())
            elif self.train_share is not None:
                masks = splits.split_by_share(data.y, self.train_share, self.val_share, run.generator())
            else:
                number = run.seed % splits.count_splits(data) if self.number is None else self.number
                masks = splits.chosen_split(data, number)
        copy = data.clone()
        for name, mask in zip(splits.MASKS, masks, strict=True):
            copy[name] = mask
        return copy


def _classes(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    listed = isinstance(value, (list, tuple))
    numbers = value if listed else [value]
    ok = all(isinstance(n, int) and not isinstance(n, bool) and n >= (0 if listed else 2) for n in numbers)
    if not ok or (listed and len(value) < 2):
        raise PlaitError(f"{attribute.name} is {value!r}; allowed is {_classes.allowed}")


_classes.allowed = "two classes or more, such as 4 or [0, 3]"  # type: ignore[attr-defined]


@attrs.frozen(kw_only=True)
class ClassSplit:
    """Disjoint classes for few-shot training, validation and test: so many random ones, or those that are listed."""

    train: int | tuple[int, ...] = attrs.field(
        default=4, validator=_classes, metadata=doc("training classes: how many, or which")
    )
    val: int | tuple[int, ...] = attrs.field(
        default=3, validator=_classes, metadata=doc("validation classes: how many, or which")
    )
    test: int | tuple[int, ...] = attrs.field(
        default=3, validator=_classes, metadata=doc("test classes: how many, or which")
    )

    def __attrs_post_init__(self) -> None:
        with told_as_plait_error():
            splits.listed_classes((self.train, self.val, self.test))

    @hookimpl
    def transform(self, data: Any, run: Run) -> Data:
        with told_as_plait_error():
            datasets.check_graph(data)
            classes = splits.split_classes(data.y, (self.train, self.val, self.test), run.generator())
        copy = data.clone()
        for name, part in zip(splits.CLASSES, classes, strict=True):
            copy[name] = part
        return copy


# -- load-model ---------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Gnn:
    """A graph network with fresh weights: GCN, GraphSAGE, GAT, GIN, SGC and others."""

    architecture: Literal["gcn", "sage", "gat", "gatv2", "gin", "graphconv", "transformer", "sgc"] = attrs.field(
        default="gcn", validator=one_of(*models.ARCHITECTURES), metadata=doc("kind of its layers")
    )
    hidden_channels: int = attrs.field(default=32, validator=in_range(1), metadata=doc("features of a hidden layer"))
    num_layers: int = attrs.field(default=2, validator=in_range(1), metadata=doc("layers (propagations of sgc)"))
    dropout: float = attrs.field(
        default=0.5, validator=in_range(0, 1, high_open=True), metadata=doc("share of features dropped before a layer")
    )
    heads: int = attrs.field(default=1, validator=in_range(1), metadata=doc("heads of attention layers"))

    @hookimpl
    def load_model(self, data: Any, run: Run) -> models.GNN:
        with told_as_plait_error():
            datasets.check_graph(data)
        sizes = {"in_channels": datasets.num_features(data), "num_classes": datasets.num_classes(data)}
        return models.seeded(run.derived_seed(), lambda: models.GNN(**sizes, **attrs.asdict(self)))


@attrs.frozen(kw_only=True)
class Gpn:
    """Graph prototypical network for few-shot node classification (Ding et al., CIKM 2020)."""

    hidden_channels: int = attrs.field(default=16, validator=in_range(1), metadata=doc("size of an embedding"))
    dropout: float = attrs.field(
        default=0.2, validator=in_range(0, 1, high_open=True), metadata=doc("share of hidden features dropped")
    )
    weighting: Literal["softmax", "sum"] = attrs.field(
        default="softmax", validator=one_of("softmax", "sum"), metadata=doc("of the support nodes; sum is the original")
    )
    distance: Literal["euclidean", "squared"] = attrs.field(
        default="euclidean", validator=one_of("euclidean", "squared"), metadata=doc("squared is the original")
    )

    @hookimpl
    def load_model(self, data: Any, run: Run) -> fewshot.GPN:
        with told_as_plait_error():
            datasets.check_graph(data)
        width = datasets.num_features(data)
        return models.seeded(run.derived_seed(), lambda: fewshot.GPN(in_channels=width, **attrs.asdict(self)))


@attrs.frozen(kw_only=True)
class MetaGcn:
    """GCN adapted to each episode by gradient steps, first-order MAML."""

    n_way: int = attrs.field(default=5, validator=in_range(2), metadata=doc("classes of an episode"))
    hidden_channels: int = attrs.field(default=16, validator=in_range(1), metadata=doc("features of a hidden layer"))
    dropout: float = attrs.field(
        default=0.5, validator=in_range(0, 1, high_open=True), metadata=doc("share of hidden features dropped")
    )
    inner_steps: int = attrs.field(default=10, validator=in_range(0), metadata=doc("gradient steps of the adaptation"))
    inner_lr: float = attrs.field(default=0.1, validator=in_range(0, low_open=True), metadata=doc("their rate"))

    @hookimpl
    def load_model(self, data: Any, run: Run) -> fewshot.MetaGCN:
        with told_as_plait_error():
            datasets.check_graph(data)
        width = datasets.num_features(data)
        return models.seeded(run.derived_seed(), lambda: fewshot.MetaGCN(in_channels=width, **attrs.asdict(self)))


@attrs.frozen(kw_only=True)
class Tent:
    """Task-adaptive few-shot node classification: networks adapted to each class (Wang et al., KDD 2022)."""

    hidden_channels: int = attrs.field(default=16, validator=in_range(1), metadata=doc("size of an embedding"))
    dropout: float = attrs.field(
        default=0.5, validator=in_range(0, 1, high_open=True), metadata=doc("share of hidden features dropped")
    )
    base_weight: float = attrs.field(
        default=1.0, validator=in_range(0), metadata=doc("weight of the loss over all training classes")
    )

    @hookimpl
    def load_model(self, data: Any, run: Run) -> tent.TENT:
        with told_as_plait_error():
            datasets.check_graph(data)
        sizes = {"in_channels": datasets.num_features(data), "num_classes": datasets.num_classes(data)}
        return models.seeded(run.derived_seed(), lambda: tent.TENT(**sizes, **attrs.asdict(self)))


# -- optimize -----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class GraphTraining:
    """What all trainings on graphs share; a subclass says how a model is updated."""

    lr: float = attrs.field(default=0.01, validator=in_range(0, low_open=True), metadata=doc("learning rate"))
    weight_decay: float = attrs.field(default=5e-4, validator=in_range(0), metadata=doc("of the base optimizer"))
    num_updates: int = attrs.field(default=200, validator=in_range(1), metadata=doc("updates (episodes), at most"))
    eval_every: int = attrs.field(default=5, validator=in_range(1), metadata=doc("updates between validations"))
    patience: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("stop after so many validations without a gain")
    )
    select: Literal["best", "last"] = attrs.field(
        default="best", validator=one_of("best", "last"), metadata=doc("weights kept: best validation, or last")
    )
    checkpoint_every: int = attrs.field(default=100, validator=in_range(1), metadata=doc("updates between checkpoints"))
    batch_size: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("labelled nodes an update; none: all")
    )
    num_hops: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("compute only this neighbourhood of the targets; none: all")
    )
    num_neighbors: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("random neighbours a node and hop, with num_hops; none: all")
    )
    n_way: int = attrs.field(default=5, validator=in_range(2), metadata=doc("classes of an episode (few-shot)"))
    k_shot: int = attrs.field(default=3, validator=in_range(1), metadata=doc("support nodes a class (few-shot)"))
    n_query: int = attrs.field(default=10, validator=in_range(1), metadata=doc("query nodes a class (few-shot)"))
    num_val_tasks: int = attrs.field(default=20, validator=in_range(1), metadata=doc("validation episodes (few-shot)"))

    def make_update(self, model: nn.Module, seed: int) -> training.Update:
        """The optimizer on ``model``; ``seed`` is for draws of its own."""
        raise NotImplementedError

    @hookimpl
    def optimize(self, model: Any, data: Any, run: Run) -> nn.Module:
        if not isinstance(model, nn.Module):
            raise PlaitError(f"model is a {type(model).__name__}; a torch.nn.Module on graphs is needed")
        if not any(p.requires_grad for p in model.parameters()):
            raise PlaitError("no tensor of the model requires a gradient; unfreeze what is to be trained")
        # The seed is the same for every optimizer and step, so that gains over a baseline are paired.
        surroundings = Run(seed=run.seed)
        seed = surroundings.derived_seed("training")
        settings = training.Settings(
            num_updates=self.num_updates,
            eval_every=self.eval_every,
            patience=self.patience,
            select=self.select,
            checkpoint_every=self.checkpoint_every,
        )
        with told_as_plait_error(), warnings_told(run):
            objective = self._objective(model, data, run, surroundings.generator("validation"))
            return training.train(
                model,
                objective,
                lambda copy: self.make_update(copy, seed),
                settings,
                seed=seed,
                device=run.device,
                folder=run.folder,
                made_by=training.fingerprint(f"{self!r} seed {run.seed}", model, data),
                track=run.track,
                log=run.log,
            )

    def _objective(self, model: nn.Module, data: Any, run: Run, generator: torch.Generator) -> tasks.Objective:
        if isinstance(model, fewshot.EpisodeModel):
            if any(size is not None for size in (self.batch_size, self.num_hops, self.num_neighbors)):
                raise PlaitError(
                    "batch_size, num_hops and num_neighbors do not apply to episodes; leave them out with few-shot models"
                )
            shape = (self.n_way, self.k_shot, self.n_query)
            episodes = tasks.EpisodeObjective(data, run.device, *shape, self.num_val_tasks, generator)
            episodes.check(model)
            return episodes
        objective = tasks.NodeObjective(data, run.device, self.batch_size, self.num_hops, self.num_neighbors)
        objective.check(model)
        unseen = data.get("val_mask") is None or not data.val_mask.any()
        if unseen and self.select == "best":
            run.warn("there are no validation nodes, so the last weights are kept")
        if unseen and self.patience is not None:
            run.warn("there are no validation nodes, so patience does not stop the training")
        return objective


def are_two(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Refuse what is no pair of numbers, for the fields ``betas``."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise PlaitError(f"{attribute.name} is {value!r}; give two numbers, such as [0.9, 0.999]")


@attrs.frozen(kw_only=True)
class AdamTraining(GraphTraining):
    """Plain training with Adam, or AdamW, on a graph or on episodes."""

    betas: tuple[float, float] = attrs.field(
        default=(0.9, 0.999), validator=in_range(0, 1, high_open=True), metadata=doc("decay of the two running means")
    )
    decoupled: bool = attrs.field(default=False, metadata=doc("decoupled weight decay (AdamW)"))

    betas.validator(are_two)

    def make_update(self, model: nn.Module, seed: int) -> training.Update:
        kind = torch.optim.AdamW if self.decoupled else torch.optim.Adam
        optimizer = kind(model.parameters(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        return training.PlainUpdate(model, optimizer)


@attrs.frozen(kw_only=True)
class SGDTraining(GraphTraining):
    """Plain training with SGD on a graph or on episodes."""

    lr: float = attrs.field(default=0.1, validator=in_range(0, low_open=True), metadata=doc("learning rate"))
    momentum: float = attrs.field(default=0.9, validator=in_range(0, 1, high_open=True), metadata=doc("momentum"))

    def make_update(self, model: nn.Module, seed: int) -> training.Update:
        rates = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        return training.PlainUpdate(model, torch.optim.SGD(model.parameters(), **rates))


# -- evaluate -----------------------------------------------------------------------------------------------------

BETTER = {"accuracy": "higher", "macro-F1": "higher", "gain": "higher", "time": "lower", "GNN passes": "lower"}
FORMATS = dict.fromkeys(
    ("accuracy", "± 95 % of one seed", "macro-F1", "gain", "ms/update", "time", "GNN passes"), ".2f"
)

SPREAD = {"accuracy": "95 %", "gain": "standard error"}


@attrs.frozen(kw_only=True)
class NodeAccuracy:
    """Accuracy and macro-F1 on test nodes, gain and time an update relative to a reference model."""

    split: Literal["train", "val", "test"] = attrs.field(
        default="test", validator=one_of("train", "val", "test"), metadata=doc("which nodes")
    )

    @hookimpl
    def evaluate(self, model: Any, data: Any, reference: Any | None, run: Run) -> Report:
        with told_as_plait_error():
            datasets.check_graph(data)
        mask = data.get(f"{self.split}_mask")
        if mask is None or mask.dim() != 1 or not mask.any():
            raise PlaitError(f"the graph has no {self.split}_mask of shape [n] with nodes; use transform node-split")

        def measured(candidate: nn.Module) -> dict[str, float]:
            with told_as_plait_error(), warnings_told(run):
                return _node_scores(candidate, data, mask, run.device)

        return _compared(model, reference, measured)


def _node_scores(model: nn.Module, data: Data, mask: torch.Tensor, device: torch.device) -> dict[str, float]:
    from sklearn.metrics import f1_score

    model = model.to(device).eval()
    placed = data.clone()
    placed.x = datasets.features(data).to_dense() if data.get("x") is None else data.x
    placed = placed.to(device)
    with torch.no_grad():
        predicted = tasks.node_logits(model, placed).argmax(-1).cpu()[mask]
    truth = data.y[mask]
    accuracy = float((predicted == truth).float().mean())
    return {
        "accuracy": 100 * accuracy,
        "± 95 % of one seed": 196 * math.sqrt(accuracy * (1 - accuracy) / len(truth)),
        "macro-F1": 100 * f1_score(truth.numpy(), predicted.numpy(), average="macro"),
    }


@attrs.frozen(kw_only=True)
class EpisodeAccuracy:
    """Few-shot accuracy over test episodes with its 95 % interval, gain and time relative to a reference."""

    n_way: int = attrs.field(default=5, validator=in_range(2), metadata=doc("classes of an episode"))
    k_shot: int = attrs.field(default=3, validator=in_range(1), metadata=doc("support nodes a class"))
    n_query: int = attrs.field(default=10, validator=in_range(1), metadata=doc("query nodes a class"))
    num_tasks: int = attrs.field(default=100, validator=in_range(2), metadata=doc("test episodes"))

    @hookimpl
    def evaluate(self, model: Any, data: Any, reference: Any | None, run: Run) -> Report:
        with told_as_plait_error():
            graph = tasks.episode_graph(data, run.device)
            sampler = EpisodeSampler(data.y, data.test_classes, self.n_way, self.k_shot, self.n_query, "test")
        generator = Run(seed=run.seed).generator("test episodes")  # the same episodes for every model
        episodes = [sampler.draw(generator, run.device) for _ in range(self.num_tasks)]

        def measured(candidate: nn.Module) -> dict[str, float]:
            with told_as_plait_error(), warnings_told(run):
                shares = tasks.episode_accuracies(candidate.to(run.device).eval(), graph, episodes)
            mean, half = interval95(100 * np.asarray(shares))
            return {"accuracy": mean, "± 95 % of one seed": half}

        return _compared(model, reference, measured)


def interval95(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t)."""
    from scipy.stats import t

    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(t.ppf(0.975, len(values) - 1) * error)


def _compared(model: Any, reference: Any, measured: Callable[[nn.Module], dict[str, float]]) -> Report:
    """One row a model; against the reference: ``gain`` in accuracy points, and ``time`` of an update as a ratio.

    ``GNN passes`` are those of an update with message passing. Several models with times give a picture.

    With models and reference of one seed the gain is paired; over several seeds the report shows its mean with the
    standard error, and the accuracy with its 95 % interval.
    """
    several = isinstance(model, dict)
    candidates = model if several else {"": model}
    for candidate in [*candidates.values(), *([] if reference is None else [reference])]:
        if not isinstance(candidate, nn.Module):
            raise PlaitError(f"a model is a {type(candidate).__name__}; a torch.nn.Module on graphs is needed")
    base = None if reference is None else measured(copy.deepcopy(reference))
    base_seconds = None if reference is None else training.seconds_per_update(reference)
    rows: list[dict[str, Any]] = []
    for name, candidate in candidates.items():
        row: dict[str, Any] = {"model": name} if several else {}
        row |= measured(copy.deepcopy(candidate))  # measuring moves it to the device and into eval mode
        if base is not None:
            row["gain"] = row["accuracy"] - base["accuracy"]
        seconds = training.seconds_per_update(candidate)
        if seconds is not None:
            row["ms/update"] = 1000 * seconds
        if seconds is not None and base_seconds:
            row["time"] = seconds / base_seconds
        passes = training.passes_per_update(candidate)
        if passes is not None:
            row["GNN passes"] = passes
        rows.append(row)
    panels = []
    if several and all("time" in row for row in rows):
        panels.append(Panel(title="Accuracy and time", images=[[Image(caption=_CAPTION, data=png(_figure(rows)))]]))
    return Report(rows=rows, better=BETTER, formats=FORMATS, spread=SPREAD, panels=panels)


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
