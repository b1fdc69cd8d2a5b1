"""Graphs, splits and episodes."""

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait import Run
from plait_graph import datasets, splits
from plait_graph.accuracy import interval95
from plait_graph.episodes import EpisodeSampler
from plait_graph.plugin import ClassSplit, CsbmGraph, DigitsGraph, GraphFile, NodeSplit, PygGraph
from torch_geometric.data import Data


def small(n=30, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Data(
        x=torch.randn(n, 5, generator=generator),
        edge_index=torch.randint(n, (2, 4 * n), generator=generator),
        y=torch.arange(n) % classes,
    )


def test_digits_graph_and_its_noise():
    clean, noisy = (datasets.digits_graph(6, edges, np.random.default_rng(0)) for edges in (0, 3.0))
    assert clean.x.shape == (1797, 64)
    assert clean.x.mean(0).abs().max() < 1e-6
    assert datasets.edge_homophily(clean) == pytest.approx(0.97, abs=0.01)
    assert datasets.edge_homophily(noisy) == pytest.approx(0.26, abs=0.01)
    for graph in (clean, noisy):
        source, target = graph.edge_index
        assert not (source == target).any()
        assert graph.is_undirected()
        assert torch.unique(graph.edge_index, dim=1).shape == graph.edge_index.shape


@settings(max_examples=15, deadline=None)
@given(homophily=st.floats(0, 1), classes=st.integers(2, 7), nodes=st.integers(300, 500))
def test_csbm_has_the_homophily_it_is_asked_for(homophily, classes, nodes):
    graph = datasets.csbm_graph(nodes, classes, 4, 12.0, homophily, 1.0, np.random.default_rng(1))
    assert graph.edge_index.max() < nodes
    assert datasets.edge_homophily(graph) == pytest.approx(homophily, abs=0.08)


def test_csbm_signal_is_the_length_of_the_class_means():
    graph = datasets.csbm_graph(40_000, 2, 50, 1.0, 0.5, 3.0, np.random.default_rng(0))
    means = torch.stack([graph.x[graph.y == c].mean(0) for c in (0, 1)])
    assert means.norm(dim=1).tolist() == pytest.approx([3.0, 3.0], rel=0.25)


def test_same_seed_same_graph():
    a, b, c = (CsbmGraph(num_nodes=100).load_data(Run(seed=s)) for s in (1, 1, 2))
    assert torch.equal(a.edge_index, b.edge_index)
    assert not torch.equal(a.x, c.x)


def test_split_per_class():
    data = NodeSplit(per_class=4, num_val=6).transform(small(), Run())
    assert torch.bincount(data.y[data.train_mask]).tolist() == [4, 4, 4]
    assert int(data.val_mask.sum()) == 6
    assert (data.train_mask.int() + data.val_mask.int() + data.test_mask.int() == 1).all()
    assert "train_mask" not in small()


def test_split_by_share_and_by_number():
    data = NodeSplit(train_share=0.5, val_share=0.2).transform(small(), Run())
    assert [int(data[m].sum()) for m in splits.MASKS] == [15, 6, 9]
    data = small()
    for name in splits.MASKS:
        data[name] = torch.rand(30, 4) < 0.5
    assert torch.equal(NodeSplit(number=2).transform(data, Run()).val_mask, data.val_mask[:, 2])
    assert torch.equal(NodeSplit().transform(data, Run(seed=7)).val_mask, data.val_mask[:, 3])


def test_nodes_without_a_label_are_in_no_split():
    data = small()
    data.y[::4] = -1
    for split in (NodeSplit(per_class=3, num_val=5), NodeSplit(train_share=0.5, val_share=0.2)):
        drawn = split.transform(data, Run())
        masks = torch.stack([drawn[name] for name in splits.MASKS])
        assert torch.equal(masks.sum(0) == 1, data.y >= 0)


def test_both_directions_of_an_edge_average_its_values(tmp_path):
    data = small()
    data.edge_index = torch.tensor([[0, 1, 1, 2, 3], [1, 0, 2, 2, 4]])  # 2 -> 2 is a loop
    data.edge_weight = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])
    data.edge_attr = torch.arange(10.0).view(5, 2)
    torch.save(data, tmp_path / "graph.pt")
    read = GraphFile(path=tmp_path / "graph.pt").load_data(Run())
    assert read.edge_index.tolist() == [[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]]
    assert read.edge_weight.tolist() == [2, 2, 5, 5, 9, 9]
    assert read.edge_attr.tolist() == [[1, 2], [1, 2], [4, 5], [4, 5], [8, 9], [8, 9]]
    as_it_is = GraphFile(path=tmp_path / "graph.pt", undirected=False).load_data(Run())
    assert torch.equal(as_it_is.edge_weight, data.edge_weight)


def test_values_of_edges_without_a_mean_are_refused(tmp_path):
    data = small()
    data.edge_type = torch.arange(data.edge_index.shape[1])
    torch.save(data, tmp_path / "graph.pt")
    with pytest.raises(ValueError, match="edge_type has a value for each edge"):
        GraphFile(path=tmp_path / "graph.pt").load_data(Run())
    assert "edge_type" in GraphFile(path=tmp_path / "graph.pt", undirected=False).load_data(Run())


def test_class_split_is_disjoint():
    data = ClassSplit(train=3, val=2, test=2).transform(small(70, 7), Run(seed=3))
    classes = torch.cat([data[name] for name in splits.CLASSES])
    assert sorted(classes.tolist()) == list(range(7))


def test_class_split_draws_only_classes_with_nodes():
    data = small(70, 7)
    data.y[data.y == 2] = 11
    data.y[data.y == 4] = -1
    split = ClassSplit(train=2, val=2, test=2).transform(data, Run())
    assert sorted(torch.cat([split[name] for name in splits.CLASSES]).tolist()) == [0, 1, 3, 5, 6, 11]


def test_classes_can_be_listed():
    data = ClassSplit(train=(5, 0, 3), val=2, test=(1, 6)).transform(small(70, 7), Run())
    assert data.train_classes.tolist() == [5, 0, 3]
    assert sorted(data.val_classes.tolist()) == [2, 4]
    assert data.test_classes.tolist() == [1, 6]


def test_classes_listed_twice_are_refused_before_there_is_a_graph():
    with pytest.raises(ValueError, match="class 1 is listed twice; the parts must be disjoint"):
        ClassSplit(train=(0, 1), test=(1, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": (0, 7)}, "class 7 is asked for, but no node has it; the graph has 7 classes"),
        ({"train": (0, 1), "val": 5, "test": 2}, r"2 \+ 5 \+ 2 classes are asked for, but the graph has 7"),
        ({"train": (0,)}, r"train is \(0,\); allowed is two classes or more"),
        ({"val": 1}, "val is 1; allowed is two classes or more, such as 4"),
        ({"test": (0, -1)}, r"test is \(0, -1\)"),
        ({"test": 2.0}, r"test is 2\.0"),
    ],
)
def test_impossible_class_splits_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ClassSplit(**({"train": 2, "val": 2, "test": 2} | fields)).transform(small(70, 7), Run())


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 100))
def test_episodes(n_way, k_shot, n_query, seed):
    y = torch.arange(60) % 6
    sampler = EpisodeSampler(y, torch.tensor([0, 2, 3, 5]), n_way, k_shot, n_query)
    episode = sampler.draw(torch.Generator().manual_seed(seed))
    assert episode.support.shape == (n_way, k_shot)
    rows = episode.rows
    assert len(torch.unique(rows)) == len(rows) == n_way * (k_shot + n_query)
    classes = y[episode.support[:, 0]]
    assert set(classes.tolist()) <= {0, 2, 3, 5}
    assert len(set(classes.tolist())) == n_way
    assert (y[episode.support] == classes[:, None]).all()
    assert torch.equal(y[episode.query], classes[episode.labels])
    local = episode.renumbered()
    assert torch.equal(rows[local.support], episode.support)
    assert torch.equal(rows[local.query], episode.query)


def test_interval95_of_three_numbers():
    mean, half = interval95(np.array([1.0, 2.0, 3.0]))
    assert mean == 2
    assert half == pytest.approx(4.30265 / 3**0.5, rel=1e-4)


# -- files -------------------------------------------------------------------------------------------------------


def test_saved_data(tmp_path):
    torch.save(small(), tmp_path / "graph.pt")
    data = GraphFile(path=tmp_path / "graph.pt", undirected=False).load_data(Run())
    assert torch.equal(data.x, small().x)
    assert torch.equal(data.edge_index, small().edge_index)


def attributes(nodes=8):
    return scipy.sparse.random(nodes, 100, density=0.05, format="csr", random_state=0, dtype=np.float32)


@pytest.mark.parametrize("edges", ["edge_index", "adjacency"])
def test_numpy_file_with_sparse_features(tmp_path, edges):
    a = attributes(40)
    arrays = {"attr_data": a.data, "attr_indices": a.indices, "attr_indptr": a.indptr, "attr_shape": np.array(a.shape)}
    arrays["labels"] = np.arange(40) % 2
    pairs = np.array([[0, 1, 2, 2], [1, 0, 3, 2]])
    if edges == "edge_index":
        arrays["edge_index"] = pairs
    else:
        adjacency = scipy.sparse.csr_matrix((np.ones(4), pairs), shape=(40, 40))
        arrays |= {"adj_indices": adjacency.indices, "adj_indptr": adjacency.indptr, "adj_shape": np.array([40, 40])}
    np.savez(tmp_path / "graph.npz", **arrays)
    data = GraphFile(path=tmp_path / "graph.npz").load_data(Run())
    used = np.flatnonzero(a.getnnz(axis=0))
    assert data.get("x") is None
    np.testing.assert_allclose(datasets.features(data).to_dense().numpy(), a.toarray()[:, used])
    assert sorted(map(tuple, data.edge_index.T.tolist())) == [(0, 1), (1, 0), (2, 3), (3, 2)]
    assert data.num_nodes == 40
    normalized = datasets.features(datasets.row_normalized(data)).to_dense().sum(1)
    assert normalized.tolist() == pytest.approx([1.0 if row.nnz else 0.0 for row in a], abs=1e-6)


def test_edge_list_with_mat_files(tmp_path):
    from scipy.io import savemat

    a = attributes()
    for name, rows in (("train", slice(0, 5)), ("test", slice(5, 8))):
        index = np.arange(8)[rows] * 10
        savemat(tmp_path / f"web_{name}.mat", {"Index": index, "Label": index // 40 + 3, "Attributes": a[rows]})
    (tmp_path / "web_network").write_text("0\t10\n70\t0\n5\t10\n")
    data = GraphFile(path=tmp_path / "web_network").load_data(Run())
    assert data.y.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert sorted(map(tuple, data.edge_index.T.tolist())) == [(0, 1), (0, 7), (1, 0), (7, 0)]


def test_files_beside_an_edge_list_are_inputs_too(tmp_path):
    network = GraphFile(path=tmp_path / "web_network")
    assert [file.name for file in network.input_files()] == ["web_train.mat", "web_test.mat"]
    assert not list(GraphFile(path=tmp_path / "graph.pt").input_files())


def test_graphs_survive_the_store(tmp_path):
    from plait import codecs

    data = ClassSplit(train=2, val=2, test=2).transform(small(60, 6), Run())
    codecs.save(data, tmp_path / "graph")
    again = codecs.load(tmp_path / "graph")
    assert set(again.keys()) == set(data.keys())
    assert all(torch.equal(again[key], data[key]) for key in data.keys())  # noqa: SIM118


# -- bad input -----------------------------------------------------------------------------------------------------


def broken(**changes):
    data = small()
    for name, value in changes.items():
        data[name] = value
    return data


def sparse(**changes):
    csr = scipy.sparse.csr_matrix(small().x.numpy())
    pointers, columns = (torch.from_numpy(part.astype(np.int64)) for part in (csr.indptr, csr.indices))
    parts = {"x_crow": pointers, "x_col": columns, "x_value": torch.from_numpy(csr.data), "x_columns": 5}
    return broken(x=None, num_nodes=30, **(parts | changes))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (broken(x=None), "no features x"),
        (broken(x=np.ones((30, 5))), "x is a ndarray"),
        (broken(x=torch.ones(30, 5, dtype=torch.complex64)), r"x is torch.complex64 .* floating-point numbers"),
        (broken(x=torch.ones(30, 0)), "no columns"),
        (broken(num_nodes=31), "num_nodes is 31, but x has 30 rows"),
        (sparse(x_crow=None), "no features x"),
        (sparse(x_columns=3), "are not a CSR matrix"),
        (sparse(x_crow=torch.zeros(31)), "are not a CSR matrix"),
        (sparse(x_col=[0]), "are not a CSR matrix"),
        (sparse(x_value=torch.ones(150, dtype=torch.long)), "x is torch.int64"),
        (broken(x=torch.full((30, 5), torch.nan)), "NaN or infinite"),
        (broken(edge_index=torch.tensor([[0], [30]])), "outside 0 ... 29"),
        (broken(edge_index=torch.zeros(3, 2, dtype=torch.long)), r"\[2, edges\]"),
        (broken(edge_index=torch.tensor([[0], [-1]])), "edge_index names node -1, outside 0 ... 29"),
        (
            broken(edge_index=torch.zeros(2, 3)),
            r"edge_index is torch.float32 of shape \(2, 3\); it must be whole numbers \(int64\)",
        ),
        (broken(edge_index=[[0], [1]]), "edge_index is a list"),
        (broken(edge_index=None), "edge_index is missing"),
        (broken(y=torch.zeros(30)), r"y is torch.float32 of shape \(30,\); it must be whole numbers"),
        (broken(y=[0] * 30), "y is a list"),
        (broken(y=None), "y is missing"),
        (broken(y=torch.zeros(7, dtype=torch.long)), r"shape \[30\]"),
        (broken(y=torch.full((30,), -1)), "no node has a label"),
        (broken(x=torch.ones(30, 5, dtype=torch.long)), r"x is torch.int64 of shape \(30, 5\)"),
        (broken(x=torch.ones(30)), r"shape \(30,\)"),
        (broken(x=torch.eye(30).to_sparse()), "torch.sparse_coo"),
        (broken(edge_weight=torch.ones(7)), "edge_weight is .* each of the 120 edges"),
        (broken(edge_weight=torch.full((120,), torch.inf)), "edge_weight holds NaN or infinite values"),
        (broken(edge_attr=[1.0]), "edge_attr is a list; it must be a tensor"),
        (broken(train_mask=torch.arange(5)), r"train_mask is torch.int64 of shape \(5,\); it must be bool"),
        (broken(val_mask=torch.ones(29, dtype=torch.bool)), r"val_mask is torch.bool of shape \(29,\)"),
        (broken(test_mask=[True] * 30), "test_mask is a list"),
        (
            broken(y=torch.arange(30) - 1, train_mask=torch.ones(30, dtype=torch.bool)),
            "train_mask has nodes with label -1",
        ),
        ({"train": 1}, "data is a dict"),
    ],
)
def test_graphs_that_cannot_be_used_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        NodeSplit(per_class=2, num_val=3).transform(data, Run())


def with_masks(count):
    shape = (30,) if count is None else (30, count)
    return broken(**{name: torch.zeros(shape, dtype=torch.bool) for name in splits.MASKS})


def unequal_masks():
    data = with_masks(4)
    data.val_mask = data.val_mask[:, :2]
    return data


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NodeSplit(per_class=11).transform(small(), Run()), "class 0 has 10 nodes, fewer than per_class = 11"),
        (lambda: NodeSplit(per_class=9, num_val=3).transform(small(), Run()), "only 3 nodes are left"),
        (lambda: NodeSplit(train_share=0.9, val_share=0.1).transform(small(), Run()), "leave no node"),
        (lambda: NodeSplit().transform(small(), Run()), "no train_mask"),
        (lambda: NodeSplit(per_class=3, number=1), "exclude each other"),
        (lambda: NodeSplit(number=4).transform(with_masks(4), Run()), "number is 4, but the graph has 4 splits"),
        (lambda: NodeSplit(number=1).transform(with_masks(None), Run()), "number is 1, but the graph has 1 split,"),
        (lambda: NodeSplit().transform(unequal_masks(), Run()), "masks hold 2 and 4 splits"),
        (lambda: ClassSplit(train=2, val=2, test=2).transform(small(), Run()), r"2 \+ 2 \+ 2 classes"),
        (lambda: EpisodeSampler(small().y, torch.arange(3), 4, 1, 1), "n_way is 4, but there are only 3"),
        (lambda: EpisodeSampler(small().y, torch.arange(3), 2, 6, 5), "class 0 has 10 nodes, fewer than .* = 11"),
        (lambda: CsbmGraph(num_nodes=5, num_classes=4).load_data(Run()), "at least 2 nodes for each"),
        (lambda: DigitsGraph(num_neighbors=0), "num_neighbors is 0"),
        (lambda: PygGraph(name="Kora"), "name is 'Kora'"),
    ],
)
def test_impossible_requests_are_refused(call, message):
    with pytest.raises((ValueError, ValueError), match=message):
        call()


def test_missing_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "graph.txt").write_text("0 1")
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pt")
    np.savez(tmp_path / "other.npz", labels=np.ones(3))
    for name in ("damaged.pt", "damaged.npz", "damaged_network", "damaged_train.mat", "damaged_test.mat"):
        (tmp_path / name).write_bytes(b"\x00\x01 no graph")
    (tmp_path / "far_network").write_text("0 3\n")
    (tmp_path / "text_network").write_text("zero one\n")
    (tmp_path / "column_network").write_text("0\n1\n")
    (tmp_path / "empty_network").write_text("")
    (tmp_path / "twice_network").write_text("0 0\n")
    for stem in ("far", "text", "column", "empty", "twice"):
        for half, index in (("train", [0]), ("test", [0 if stem == "twice" else 1])):
            table = {"Index": index, "Label": [half == "train"], "Attributes": [[1.0]]}
            scipy.io.savemat(tmp_path / f"{stem}_{half}.mat", table)
    for name, message in [
        ("none.npz", "is not a file"),
        ("graph.txt", "allowed is"),
        ("other.pt", "holds a dict"),
        ("other.npz", "lacks attr_data"),
        ("damaged.pt", r"damaged\.pt cannot be read"),
        ("damaged.npz", r"damaged\.npz cannot be read"),
        ("damaged_network", r"damaged_train\.mat cannot be read"),
        ("text_network", "text_network cannot be read"),
        ("column_network", "column_network cannot be read"),
        ("empty_network", r"empty_network cannot be read \(it has no edges\)"),
        ("twice_network", r"Index in the \.mat files beside it must be numbers >= 0, each node's own"),
        ("far_network", "names node 3, but the .mat files beside it end at 1"),
    ]:
        with pytest.raises(FileNotFoundError if name == "none.npz" else ValueError, match=message):
            GraphFile(path=tmp_path / name).load_data(Run())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attr_indptr": np.arange(3)}, "index pointer size"),
        ({"attr_indices": np.arange(4) + 9}, "indices must be < 4"),
        ({"labels": np.array([0.5, np.nan, 1, 1])}, "labels must be whole numbers"),
        ({"labels": np.array(["a", "b", "c", "d"])}, "labels must be whole numbers"),
        ({"labels": np.array([0, 1])}, r"it has 4 rows of attributes, but labels of shape \(2,\)"),
        ({"labels": np.array([0, None, 1, 1], dtype=object)}, "Object arrays cannot be loaded"),
        ({"edge_index": np.array([[0, 1], [1, 2], [2, 3]])}, r"edge_index has shape \(3, 2\)"),
        ({"edge_index": None, "adj_indices": np.array([0])}, "adj_indptr is not a file"),
    ],
)
def test_inconsistent_arrays_are_refused(changes, message, tmp_path):
    arrays = {
        "attr_data": np.ones(4, np.float32),
        "attr_indices": np.arange(4),
        "attr_indptr": np.arange(5),
        "attr_shape": np.array([4, 4]),
        "labels": np.array([0, 1, 0, 1]),
        "edge_index": np.array([[0, 1], [1, 2]]),
    } | changes
    np.savez(tmp_path / "graph.npz", **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=rf"graph\.npz cannot be read \(.*{message}"):
        GraphFile(path=tmp_path / "graph.npz").load_data(Run())
