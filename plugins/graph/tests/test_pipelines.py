"""The kit's methods as a pipeline runs them: one sentence for a mistake, an input that changes, fields by old names."""

import numpy as np
import plait
import pytest
import torch
from plait import PlaitError
from plait_graph.conformance_examples import graph
from scipy.io import savemat


def pipeline(folder, steps):
    file = folder / "pipeline.yaml"
    file.write_text("plait: 1\nname: graphs\nsteps:\n" + "".join(f"  {step}\n" for step in steps))
    return file


def run(folder, steps):
    return plait.run(pipeline(folder, steps), store=folder / "store", out=folder / "runs")


def write_edge_list(folder, value):
    for name, index in (("train", [0, 1, 2]), ("test", [3, 4])):
        table = {"Index": index, "Label": np.array(index) % 2, "Attributes": np.full((len(index), 2), value)}
        savemat(folder / f"web_{name}.mat", table)
    (folder / "web_network").write_text("0 1\n2 3\n")


def test_an_edge_list_is_read_again_when_a_file_beside_it_changes(tmp_path):
    steps = ["web: {load-data: graph-file, with: {path: web_network}}"]
    for value in (1.0, 2.0):
        write_edge_list(tmp_path, value)
        assert (run(tmp_path, steps)["web"].x == value).all()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("web: {load-data: graph-file, with: {path: nowhere.pt}}", "path is .*nowhere.pt', and there is no such file"),
        ("web: {load-data: pyg-graph, with: {name: Texas, root: nowhere}}", "root is .* and there is no such file"),
        ("web: {optimize: graph-adam, from: {model: a, data: b}, with: {lr: 1}}", "did you mean 'learning_rate'"),
        ("web: {optimize: graph-sgd, from: {model: a, data: b}, with: {num_updates: 1}}", "did you mean 'num_steps'"),
        ("web: {transform: node-split, from: {data: b}, with: {per_class: 1, number: 1}}", "exclude each other"),
        ("web: {load-model: gnn, from: {data: b}, with: {architecture: gnc}}", "allowed is one of gcn, sage"),
    ],
)
def test_mistakes_are_found_before_the_run(step, message, tmp_path):
    with pytest.raises(PlaitError, match=message):
        run(tmp_path, [step])


def test_a_wrong_graph_ends_in_its_sentence(tmp_path):
    torch.save(graph(), tmp_path / "graph.pt")
    steps = [
        "graph: {load-data: graph-file, with: {path: graph.pt}}",
        "split: {transform: node-split, from: {data: graph}, with: {per_class: 99}}",
    ]
    failed = run(tmp_path, steps).failed
    assert failed["split"] == "class 0 has 10 nodes, fewer than per_class = 99"
