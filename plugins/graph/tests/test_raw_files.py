"""``pyg-graph`` on tiny graphs written in the raw formats of its data sets; nothing is downloaded."""

import collections
import os
import pickle

import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
from plait import Run
from plait_graph.conformance_examples import graph, write_webkb
from plait_graph.datasets import pyg_graph
from plait_graph.plugin import GraphFile, NodeSplit, PygGraph
from plait_graph.splits import MASKS


def load(name, root, **fields):
    return PygGraph(name=name, root=root, **fields).load_data(Run())


def write_planetoid(raw, name, order, protocol=4):
    raw.mkdir(parents=True)
    features = np.arange(3 * 513, dtype=np.float32).reshape(513, 3)
    labels = np.eye(2, dtype=np.int32)[np.arange(513) // 2 % 2]
    sparse = scipy.sparse.csr_matrix(features)
    parts = {"x": sparse[:2], "allx": sparse[:510], "tx": sparse[510:]}
    parts |= {"y": labels[:2], "ally": np.asfortranarray(labels[:510]), "ty": labels[510:]}
    neighbours = collections.defaultdict(list)
    neighbours.update({0: [1, 5], 1: [0, 0], 5: [0], 2: [2], 3: order[:1]})
    for part, value in (parts | {"graph": neighbours}).items():
        (raw / f"ind.{name.lower()}.{part}").write_bytes(pickle.dumps(value, protocol))
    (raw / f"ind.{name.lower()}.test.index").write_text("".join(f"{node}\n" for node in order))
    return features, labels


def pairs(data):
    return sorted(map(tuple, data.edge_index.T.tolist()))


@pytest.mark.parametrize("name", ["Cornell", "Texas", "Wisconsin", "Chameleon", "Squirrel"])
def test_graphs_with_features_and_labels_as_text(name, tmp_path):
    written = graph()
    write_webkb(tmp_path, name.lower(), written)
    before = sorted(tmp_path.rglob("*"))
    data = load(name, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before  # the folder is left alone
    torch.testing.assert_close(data.x, written.x)
    assert torch.equal(data.y, written.y)
    assert pairs(data) == pairs(written)
    assert [data[mask].shape for mask in MASKS] == [(60, 10)] * 3
    split = NodeSplit().transform(data, Run(seed=11))
    with np.load(tmp_path / name.lower() / "splits" / f"{name.lower()}_split_0.6_0.2_1.npz") as masks:
        assert all(torch.equal(split[mask], torch.from_numpy(masks[mask]).bool()) for mask in MASKS)


def test_actor_lists_the_features_that_are_one(tmp_path):
    write_webkb(tmp_path, "film", graph())
    rows = [f"{i}\t{i % 4},{4 + i % 3}\t{i % 5}" for i in reversed(range(60))]
    (tmp_path / "film" / "raw" / "out1_node_feature_label.txt").write_text("\n".join(["id\tfeature\tlabel", *rows, ""]))
    data = load("Actor", tmp_path, normalize_features=True)
    assert data.x.shape == (60, 7)
    assert data.x[9].tolist() == [0, 0.5, 0, 0, 0.5, 0, 0]
    assert data.y.tolist() == [i % 5 for i in range(60)]


@pytest.mark.parametrize(
    ("name", "order"), [("Cora", [512, 510, 511]), ("Citeseer", [513, 510, 511]), ("Pubmed", [510, 511, 512])]
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_planetoid(name, order, protocol, tmp_path):
    """Test nodes come in the order of their own index, in which Citeseer leaves some out (here 512)."""
    features, labels = write_planetoid(tmp_path / name / "raw", name, order, protocol)
    data = load(name, tmp_path)
    np.testing.assert_array_equal(data.x[order].numpy(), features[510:])
    np.testing.assert_array_equal(data.y[order].numpy(), labels[510:].argmax(1))
    np.testing.assert_array_equal(data.x[:510].numpy(), features[:510])
    assert torch.nonzero(data.train_mask).flatten().tolist() == [0, 1]
    assert torch.nonzero(data.val_mask).flatten().tolist() == list(range(2, 502))
    assert torch.nonzero(data.test_mask).flatten().tolist() == sorted(order)
    assert pairs(data) == [(0, 1), (0, 5), (1, 0), (3, order[0]), (5, 0), (order[0], 3)]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Computers", "amazon_electronics_computers.npz"),
        ("Photo", "amazon_electronics_photo.npz"),
        ("CoraFull", "cora.npz"),
    ],
)
def test_sparse_arrays(name, file, tmp_path):
    features = scipy.sparse.random(12, 9, 0.3, "csr", np.float32, random_state=0)
    adjacency = scipy.sparse.csr_matrix((np.ones(4, np.float32), ([0, 1, 2, 5], [1, 2, 2, 0])), shape=(12, 12))
    arrays = {"labels": np.arange(12) % 3}
    for short, matrix in (("attr", features), ("adj", adjacency)):
        arrays |= {f"{short}_{part}": getattr(matrix, part) for part in ("data", "indices", "indptr", "shape")}
    (tmp_path / name.lower()).mkdir()
    np.savez(tmp_path / name.lower() / file, **arrays)
    data = load(name, tmp_path)
    np.testing.assert_array_equal(data.x.numpy(), features.toarray() > 0)
    assert pairs(data) == [(0, 1), (0, 5), (1, 0), (1, 2), (2, 1), (5, 0)]
    assert data.y.tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize(
    ("name", "folder", "by"),
    [("ogbn-arxiv", "ogbn_arxiv", "time"), ("ogbn-arxiv", ".", "time"), ("ogbn-products", "products", "sales_ranking")],
)
def test_open_graph_benchmark(name, folder, by, tmp_path):
    tables = {
        "raw/node-feat": np.arange(10).reshape(5, 2) / 4,
        "raw/node-label": np.array([[2], [0], [1], [1], [0]]),
        "raw/edge": np.array([[0, 3], [4, 1], [1, 4]]),
        f"split/{by}/train": np.array([[3], [0]]),
        f"split/{by}/valid": np.array([[1]]),
        f"split/{by}/test": np.array([[2], [4]]),
    }
    for path, table in tables.items():
        target = tmp_path / folder / f"{path}.csv.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame(table).to_csv(target, header=False, index=False)
    data = load(name, tmp_path)
    np.testing.assert_array_equal(data.x.numpy(), tables["raw/node-feat"].astype(np.float32))
    assert data.y.tolist() == [2, 0, 1, 1, 0]
    assert pairs(data) == [(0, 3), (1, 4), (3, 0), (4, 1)]
    assert [torch.nonzero(data[mask]).flatten().tolist() for mask in MASKS] == [[0, 3], [1], [2, 4]]
    assert pairs(load(name, tmp_path, undirected=False)) == [(0, 3), (1, 4), (4, 1)]


@pytest.mark.parametrize("name", ["Cora", "ogbn-arxiv"])
def test_a_download_that_fails_says_what_to_give(name, monkeypatch):
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(
        ConnectionError, match=f"{name} cannot be downloaded .*; give root, a folder with its raw files"
    ):
        PygGraph(name=name).load_data(Run())


def test_every_root_is_read_anew(tmp_path):
    run, written = Run(), graph()
    for name, shift in (("a", 0), ("b", 5)):
        written.x = written.x + shift
        write_webkb(tmp_path / name, "texas", written)
        torch.testing.assert_close(PygGraph(name="Texas", root=tmp_path / name).load_data(run).x, written.x)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("raw/out1_graph_edges.txt", "a\tb\n1\t999", "the raw files of Texas in .* cannot be read"),
        ("raw/out1_node_feature_label.txt", "nothing", "x is torch.float32 of shape"),
        ("splits/texas_split_0.6_0.2_3.npz", "nothing", "the raw files of Texas in .* cannot be read"),
    ],
)
def test_damaged_raw_files_are_refused(file, content, message, tmp_path):
    write_webkb(tmp_path, "texas", graph())
    (tmp_path / "texas" / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load("Texas", tmp_path)


def test_missing_files_are_named_and_not_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load("Cora", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no files"):
        load("Cora", tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"holds no arxiv/raw/edge\.csv\.gz"):
        load("ogbn-arxiv", tmp_path / "empty")
    (tmp_path / "arxiv" / "raw").mkdir(parents=True)
    (tmp_path / "arxiv" / "raw" / "edge.csv.gz").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"node-feat\.csv\.gz is missing; give the folder of the whole unpacked"
    ):
        load("ogbn-arxiv", tmp_path)
    write_webkb(tmp_path, "texas", graph())
    with pytest.raises(FileNotFoundError, match="holds no files"):  # and not those of Texas
        load("Chameleon", tmp_path)
    (tmp_path / "texas" / "splits" / "texas_split_0.6_0.2_4.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks texas_split_0\.6_0\.2_4\.npz"):
        load("Texas", tmp_path)


# -- files that would run something ---------------------------------------------------------------------------------


@pytest.fixture
def trap(tmp_path):
    """An object whose unpickling makes a folder, and whether it has."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    yield Trap()
    assert not (tmp_path / "sprung").exists()


PLANETOID_PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph")


@pytest.mark.parametrize("part", PLANETOID_PARTS)
@pytest.mark.parametrize("inside", ["alone", "in an array", "as an attribute", "under a numpy name"])
def test_pickles_of_planetoid_run_nothing(part, inside, trap, tmp_path):
    write_planetoid(tmp_path / "Cora" / "raw", "Cora", [512, 510, 511])
    value = trap
    if inside == "in an array":
        value = np.array([trap], dtype=object)
    elif inside == "as an attribute":
        value = scipy.sparse.csr_matrix(np.eye(2))
        value.extra = trap
    content = pickle.dumps(value, 0)
    if inside == "under a numpy name":
        content = b"cnumpy.testing\nrundocs\n(S'/nowhere.py'\ntR."
    (tmp_path / "Cora" / "raw" / f"ind.cora.{part}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"the raw files of Cora in .* cannot be read \(ind\.cora\.{part} names "):
        load("Cora", tmp_path)


def test_what_is_downloaded_runs_nothing_either(trap, tmp_path):
    raw = tmp_path / "scratch" / "Cora" / "raw"  # where PyG finds it downloaded
    write_planetoid(raw, "Cora", [512, 510, 511])
    assert pyg_graph("Cora", None, tmp_path / "scratch").y.shape == (513,)
    (raw / "ind.cora.graph").write_bytes(pickle.dumps(trap))
    with pytest.raises(ValueError, match=r"ind\.cora\.graph names "):
        pyg_graph("Cora", None, tmp_path / "scratch")


def test_what_another_program_has_processed_is_not_loaded(trap, tmp_path):
    write_planetoid(tmp_path / "Cora" / "raw", "Cora", [512, 510, 511])
    for folder in (tmp_path / "Cora", tmp_path):
        (folder / "processed").mkdir()
        for file in ("data.pt", "pre_transform.pt", "pre_filter.pt"):
            torch.save(trap, folder / "processed" / file)
    assert load("Cora", tmp_path).y.shape == (513,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], r"ind\.cora\.y holds a list; expected numbers"),
        ({0: [1.5]}, r"ind\.cora\.y holds a dict; expected numbers"),
        (np.array(["a", "b"]), r"ind\.cora\.y holds an array of type U1; expected numbers"),
        (np.array([None]), r"ind\.cora\.y holds an array of type O8; expected numbers"),
        (scipy.sparse.coo_matrix(np.eye(2)), r"ind\.cora\.y names scipy\.sparse\._coo\.coo_matrix"),
        (None, r"ind\.cora\.y is not a whole pickle of numbers"),
    ],
)
def test_pickles_of_other_things_are_refused(value, message, tmp_path):
    write_planetoid(tmp_path / "Cora" / "raw", "Cora", [512, 510, 511])
    content = b"\x80\x04no pickle" if value is None else pickle.dumps(value)
    (tmp_path / "Cora" / "raw" / "ind.cora.y").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load("Cora", tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Computers", "computers/amazon_electronics_computers.npz"),
        ("Photo", "photo/amazon_electronics_photo.npz"),
        ("CoraFull", "corafull/cora.npz"),
        ("Texas", "texas/splits/texas_split_0.6_0.2_0.npz"),
        ("Chameleon", "chameleon/splits/chameleon_split_0.6_0.2_0.npz"),
        ("Actor", "film/splits/film_split_0.6_0.2_0.npz"),
        ("Texas", "texas/raw/out1_graph_edges.txt"),
        ("ogbn-arxiv", "arxiv/raw/edge.csv.gz"),
    ],
)
def test_raw_files_of_no_kind_run_anything(name, file, trap, tmp_path):
    for folder in ("texas", "chameleon", "film"):
        write_webkb(tmp_path, folder, graph())
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_trap(path, trap)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name} in .* cannot be read|is missing"):
        load(name, tmp_path)


@pytest.mark.parametrize("file", ["graph.pt", "graph.npz", "graph_network", "graph_train.mat"])
def test_graph_files_run_nothing(file, trap, tmp_path):
    for part in ("graph_network", "graph_train.mat", "graph_test.mat"):
        (tmp_path / part).write_text("0 1")
    write_trap(tmp_path / file, trap)
    path = tmp_path / (file if not file.endswith(".mat") else "graph_network")
    with pytest.raises(ValueError, match="cannot be read"):
        GraphFile(path=path).load_data(Run())


def write_trap(path, trap):
    if path.suffix == ".npz":
        names = ("attr_data", "attr_indices", "attr_indptr", "attr_shape", "adj_data", "labels", *MASKS)
        np.savez(path, **{name: np.array([trap], dtype=object) for name in names})
    elif path.suffix == ".pt":
        torch.save(trap, path)
    else:
        path.write_bytes(pickle.dumps(trap))
