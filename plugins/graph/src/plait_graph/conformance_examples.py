"""Small inputs on which the conformance kit tries the methods on graphs."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from plait import Run
from plait.testing import Example
from torch_geometric.data import Data

from plait_graph.episodes import EpisodeSampler
from plait_graph.fewshot import EpisodeGraph
from plait_graph.plugin import ClassSplit, CsbmGraph, Gnn, Gpn, NodeSplit
from plait_graph.splits import MASKS, split_by_share

EPISODES = {"n_way": 2, "k_shot": 2, "n_query": 3}
TIMES = ("ms/update", "time")


def graph() -> Data:
    """60 nodes of 6 classes with both kinds of splits."""
    data = CsbmGraph(num_nodes=60, num_classes=6, num_features=8, homophily=0.8, signal=3.0).load_data(Run())
    data = NodeSplit(per_class=3, num_val=12).transform(data, Run())
    return ClassSplit(train=2, val=2, test=2).transform(data, Run())


def no_nodes() -> Data:
    empty = torch.zeros(0, dtype=torch.long)
    return Data(x=torch.zeros(0, 8), edge_index=torch.zeros(2, 0, dtype=torch.long), y=empty, num_nodes=0)


def broken() -> Data:
    """An edge to a node that is not there."""
    data = graph()
    data.edge_index = torch.tensor([[0], [60]])
    return data


def drawn() -> Example:
    return Example(arguments={}, random=True, progress=False, device=False)


def fixed() -> Example:
    return Example(arguments={}, progress=False, device=False)


def from_file() -> Example:
    path = Path(tempfile.mkdtemp(prefix="plait-graph-")) / "graph.pt"
    torch.save(graph(), path)
    return Example(arguments={}, fields={"path": str(path)}, progress=False, device=False)


def raw_files() -> Example:
    """A tiny graph in the raw format of the WebKB data sets."""
    root = Path(tempfile.mkdtemp(prefix="plait-graph-"))
    write_webkb(root, "texas", graph())
    return Example(arguments={}, fields={"name": "Texas", "root": str(root)}, progress=False, device=False)


def write_webkb(root: Path, name: str, data: Data) -> None:
    """Features, labels, edges and ten random 60/20/20 splits as text and ``.npz`` files below ``root/<name>``."""
    raw, splits = root / name / "raw", root / name / "splits"
    raw.mkdir(parents=True)
    splits.mkdir()
    rows = [
        f"{i}\t{','.join(map(str, x))}\t{y}"
        for i, (x, y) in enumerate(zip(data.x.tolist(), data.y.tolist(), strict=True))
    ]
    (raw / "out1_node_feature_label.txt").write_text("\n".join(["node_id\tfeature\tlabel", *rows, ""]))
    edges = [f"{source}\t{target}" for source, target in data.edge_index.T.tolist()]
    (raw / "out1_graph_edges.txt").write_text("\n".join(["node_id\tnode_id", *edges, ""]))
    for number in range(10):
        masks = split_by_share(data.y, 0.6, 0.2, torch.Generator().manual_seed(number))
        arrays: dict[str, Any] = {mask: part.long().numpy() for mask, part in zip(MASKS, masks, strict=True)}
        np.savez(splits / f"{name}_split_0.6_0.2_{number}.npz", **arrays)


def node_split() -> Example:
    return _on_graph({"per_class": 3, "num_val": 12})


def class_split() -> Example:
    return _on_graph({"train": 2, "val": 2, "test": 2})


def model() -> Example:
    return _on_graph({}, node_answers)


def episode_model() -> Example:
    return _on_graph({}, episode_answers)


def meta_gcn() -> Example:
    return _on_graph({"n_way": 2}, episode_answers)


@torch.no_grad()
def node_answers(model: Any) -> torch.Tensor:
    """Logits of a node classifier on the graph of :func:`graph`."""
    data = graph()
    logits: torch.Tensor = copy.deepcopy(model).eval()(data.x, data.edge_index)
    return logits


def episode_answers(model: Any) -> torch.Tensor:
    """Logits of a few-shot model on an episode of the graph of :func:`graph`."""
    data = graph()
    sampler = EpisodeSampler(data.y, data.train_classes, 2, 2, 3)
    episode = sampler.draw(torch.Generator().manual_seed(0))
    (logits,) = copy.deepcopy(model).eval().answers(EpisodeGraph.of(data.x, data.edge_index), [episode])
    answer: torch.Tensor = logits
    return answer


def _on_graph(fields: dict[str, int], outputs: Callable[[Any], Any] | None = None) -> Example:
    return Example(
        arguments={"data": graph()},
        outputs=outputs,
        fields=fields,
        random=True,
        progress=False,
        device=False,
        empty={"data": no_nodes()},
        wrong={"data": broken()},
    )


def training() -> Example:
    data = graph()
    return Example(
        arguments={"model": Gnn(hidden_channels=4).load_model(data, Run()), "data": data},
        fields={"num_steps": 8, "checkpoint_every": 3, "eval_every": 2},
        outputs=node_answers,
        random=True,
        empty={"data": no_nodes()},
        wrong={"data": broken(), "model": "gcn"},
    )


def training_without_draws() -> Example:
    """For a training in which nothing is random but the model it starts from."""
    return attrs.evolve(training(), random=False)


def node_evaluation() -> Example:
    data = graph()
    models = [Gnn(hidden_channels=4).load_model(data, Run(seed=seed)) for seed in (0, 1)]
    return Example(
        arguments={"model": models[0], "data": data, "reference": models[1]},
        progress=False,
        empty={"data": no_nodes()},
        wrong={"data": broken(), "model": "gcn"},
        ignore=TIMES,
    )


def episode_evaluation() -> Example:
    data = graph()
    return Example(
        arguments={"model": Gpn(hidden_channels=4).load_model(data, Run()), "data": data},
        fields={**EPISODES, "num_tasks": 5},
        random=True,
        progress=False,
        empty={"data": no_nodes()},
        wrong={"data": broken(), "model": "gpn"},
        ignore=TIMES,
    )
