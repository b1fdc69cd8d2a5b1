"""Graphs as PyG ``Data`` (x, edge_index, y): two that need no download, and readers of the usual files.

Features with few non-zeros are kept as the three arrays of a CSR matrix (``x_crow``, ``x_col``, ``x_value``,
``x_columns``) in place of ``x``; :func:`features` gives either form.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import remove_self_loops, to_undirected

from plait_graph import planetoid
from plait_graph.splits import MASKS

SPARSE_BELOW = 0.1  # share of non-zeros
EDGE_VALUES = ("edge_weight", "edge_attr")
CSR = ("x_crow", "x_col", "x_value", "x_columns")


# -- graphs that ship with pip packages or are drawn ---------------------------------------------------------------


def digits_graph(num_neighbors: int, random_edges: float, generator: np.random.Generator) -> Data:
    """scikit-learn's 1,797 digits, joined to their nearest neighbours in pixel space, plus random edges.

    Args:
        num_neighbors: of the symmetrised k-nearest-neighbour graph, >= 1.
        random_edges: how many random directed edges for each directed edge of a node's own choice
            (num_nodes * num_neighbors of them); 0 leaves the clean graph.

    Returns:
        ``Data`` with x [1797, 64] (pixels / 16, mean removed), y in 0 ... 9, undirected edges.
    """
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    pixels, labels = load_digits(return_X_y=True)
    neighbours = torch.from_numpy(np.stack(kneighbors_graph(pixels, num_neighbors).nonzero())).long()
    drawn = round(random_edges * neighbours.shape[1])
    noise = torch.from_numpy(generator.integers(len(pixels), size=(2, drawn)))
    edges, _ = remove_self_loops(torch.cat([neighbours, noise], dim=1))
    x = torch.from_numpy(pixels / 16).float()
    return Data(x=x - x.mean(0), edge_index=to_undirected(edges, num_nodes=len(x)), y=torch.from_numpy(labels).long())


def csbm_graph(
    num_nodes: int,
    num_classes: int,
    num_features: int,
    degree: float,
    homophily: float,
    signal: float,
    generator: np.random.Generator,
) -> Data:
    """Contextual stochastic block model (Deshpande et al., NeurIPS 2018) with homophily as a dial.

    Classes have equal sizes; a class mean is drawn from N(0, signal^2 / d) a feature, features are the mean plus
    N(0, 1) noise. num_nodes * degree / 2 undirected edges are drawn: both ends in one class with probability
    ``homophily``, else in two different classes.

    Args:
        degree: mean degree, before the few duplicate edges are removed.
        homophily: expected share of edges within a class, in [0, 1]; 1 / num_classes is no information.
        signal: length of the class means; 0 is no information.

    Raises:
        ValueError: a class would have fewer than two nodes.
    """
    if num_nodes < 2 * num_classes:
        raise ValueError(f"num_nodes is {num_nodes}; give at least 2 nodes for each of {num_classes} classes")
    y = np.arange(num_nodes) % num_classes
    means = generator.normal(0, signal / np.sqrt(num_features), (num_classes, num_features))
    x = means[y] + generator.normal(size=(num_nodes, num_features))
    drawn = round(num_nodes * degree / 2)
    source = generator.integers(num_nodes, size=drawn)
    other = (y[source] + generator.integers(1, num_classes, size=drawn)) % num_classes
    wanted = np.where(generator.random(drawn) < homophily, y[source], other)
    members = (num_nodes - wanted + num_classes - 1) // num_classes  # nodes of a class are wanted, wanted + C, ...
    target = wanted + num_classes * (generator.random(drawn) * members).astype(int)
    edges, _ = remove_self_loops(torch.from_numpy(np.stack([source, target])))
    return Data(
        x=torch.from_numpy(x).float(),
        edge_index=to_undirected(edges, num_nodes=num_nodes),
        y=torch.from_numpy(y).long(),
    )


# -- PyG's data sets ---------------------------------------------------------------------------------------------

PLANETOID = ("Cora", "Citeseer", "Pubmed")
WEBKB = ("Cornell", "Texas", "Wisconsin")
WIKIPEDIA = ("Chameleon", "Squirrel")
AMAZON = ("Computers", "Photo")
OGBN = ("ogbn-arxiv", "ogbn-products")
NAMES = (*PLANETOID, *WEBKB, *WIKIPEDIA, "Actor", *AMAZON, "CoraFull", *OGBN)


def pyg_graph(name: str, root: Path | None, scratch: Path) -> Data:
    """A data set of PyTorch Geometric or of the Open Graph Benchmark.

    Args:
        name: one of :data:`NAMES`.
        root: folder with the raw files, searched in ``root/<name>`` and below; it is not written to.
            ``None`` downloads them.
        scratch: folder for what is downloaded, and for what PyG processes.

    Raises:
        FileNotFoundError: ``root`` lacks raw files; ValueError: they cannot be read; ConnectionError: they cannot be
            downloaded.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    if root is None:
        root = _downloaded_ogb(name, scratch) if name in OGBN else _downloaded(name, scratch)
    with _readable(f"the raw files of {name} in {root}"):
        return _ogb_graph(name, root) if name in OGBN else _local_graph(name, root, scratch)


def _reader(name: str) -> tuple[type, tuple[str, ...], str]:
    """PyG's class, its arguments, and the folder in which it keeps the raw files."""
    import torch_geometric.datasets as pyg

    low = name.lower()
    return {
        **dict.fromkeys(PLANETOID, (pyg.Planetoid, (name,), name)),
        **dict.fromkeys(WEBKB, (pyg.WebKB, (low,), low)),
        **dict.fromkeys(WIKIPEDIA, (pyg.WikipediaNetwork, (low,), f"{low}/geom_gcn")),
        **dict.fromkeys(AMAZON, (pyg.Amazon, (low,), name)),
        "Actor": (pyg.Actor, (), ""),
        "CoraFull": (pyg.CoraFull, (), "cora"),
    }[name]


def _local_graph(name: str, root: Path, scratch: Path) -> Data:
    reader, arguments, folder = _reader(name)
    # Nothing stays in scratch: PyG would take what it once processed for the files of any other root.
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        known_as = ("film", "actor") if name == "Actor" else (name, name.lower())
        raw = Path(own, folder, "raw")
        _link_raw_files(root, known_as, raw)
        if name in PLANETOID:
            _replace_pickles(raw, name.lower())
        with _silent():
            return _without_download(reader, root)(own, *arguments)[0]


def _replace_pickles(raw: Path, name: str) -> None:
    """PyG unpickles these, which runs what they name: it is given files that were written here, of their numbers."""
    for path in (raw / f"ind.{name}.{part}" for part in planetoid.PICKLED):
        if path.exists():
            numbers = planetoid.read_numbers(path)
            path.unlink()
            path.write_bytes(pickle.dumps(numbers))


class _DownloadedError(Exception):
    """Ends a PyG reader where it would go on to read what it has downloaded."""


def _downloaded(name: str, scratch: Path) -> Path:
    """The folder of the raw files, which PyG has downloaded and not read."""
    reader, arguments, folder = _reader(name)

    def process(self: Any) -> None:
        raise _DownloadedError

    with _silent(), _offline_in_a_sentence(name), contextlib.suppress(_DownloadedError):
        type(reader.__name__, (reader,), {"process": process})(str(scratch), *arguments)
    return scratch / folder / "raw"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """PyG prints "Processing..." and warns of the pickle that it just wrote."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _offline_in_a_sentence(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # urllib's, fsspec's or aiohttp's, whichever PyG downloads with
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ConnectionError(f"{name} cannot be downloaded ({why}); give root, a folder with its raw files") from error


def _without_download(reader: type, root: Path) -> type:
    """The reader, which names a missing raw file in place of downloading it."""

    def download(self: Any) -> None:
        missing = next(path for path in self.raw_paths if not os.path.exists(path))
        raise FileNotFoundError(f"{root} lacks {os.path.basename(missing)}; give the folder with all raw files")

    return type(reader.__name__, (reader,), {"download": download})


def _downloaded_ogb(name: str, scratch: Path) -> Path:
    from torch_geometric.data import download_url, extract_zip

    url = f"https://snap.stanford.edu/ogb/data/nodeproppred/{name.removeprefix('ogbn-')}.zip"
    with _offline_in_a_sentence(name):
        extract_zip(download_url(url, str(scratch), log=False), str(scratch), log=False)
    return scratch


def _ogb_graph(name: str, root: Path) -> Data:
    """An Open Graph Benchmark node data set from the tables of its archive (``raw`` and ``split``)."""
    import pandas

    short = name.removeprefix("ogbn-")
    tried = [root / folder for folder in (name.replace("-", "_"), name, short)] + [root]
    folder = next((path for path in tried if (path / "raw" / "edge.csv.gz").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"{root} holds no {short}/raw/edge.csv.gz; give the folder of the unpacked {short}.zip")

    def table(path: Path, dtype: Any) -> Tensor:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; give the folder of the whole unpacked {short}.zip")
        return torch.from_numpy(pandas.read_csv(path, header=None, dtype=dtype).to_numpy(copy=True))

    data = Data(
        x=table(folder / "raw" / "node-feat.csv.gz", np.float32),
        edge_index=table(folder / "raw" / "edge.csv.gz", np.int64).t().contiguous(),
        y=table(folder / "raw" / "node-label.csv.gz", np.int64).squeeze(1),
    )
    by = {"ogbn-arxiv": "time", "ogbn-products": "sales_ranking"}[name]
    for split, mask in (("train", "train_mask"), ("valid", "val_mask"), ("test", "test_mask")):
        nodes = table(folder / "split" / by / f"{split}.csv.gz", np.int64).squeeze(1)
        data[mask] = torch.zeros(len(data.y), dtype=torch.bool).index_fill_(0, nodes, True)
    return data


def _link_raw_files(root: Path, names: tuple[str, ...], raw: Path) -> None:
    """Links, side by side in ``raw``, to all files below ``root/<one of names>``; else to those of ``root`` itself."""
    if not root.is_dir():
        raise FileNotFoundError(f"root is {str(root)!r}, which is not a folder; give the folder with the raw files")
    source = next((root / name for name in names if (root / name).is_dir()), None)
    if source is not None:
        files = [path for path in source.rglob("*") if path.is_file() and "processed" not in path.parts]
    else:  # not deeper: other data sets have files of the same names
        files = [path for part in (".", "raw", "splits") for path in (root / part).glob("*") if path.is_file()]
    if not files:
        raise FileNotFoundError(f"{source or root} holds no files; give the folder with the raw files of {names[0]}")
    raw.mkdir(parents=True, exist_ok=True)
    for path in files:
        link = raw / path.name
        if not link.exists():
            link.symlink_to(path.resolve())


# -- files -------------------------------------------------------------------------------------------------------


def read_graph(path: Path) -> Data:
    """A graph from a file.

    * ``.pt``: a saved PyG ``Data``;
    * ``.npz``: CSR parts ``attr_*`` and ``adj_*`` (gnn-benchmark) or ``edge_index``, and ``labels``;
    * ``<name>_network``: an edge list beside ``<name>_train.mat`` and ``<name>_test.mat`` with ``Index``, ``Label``
      and ``Attributes`` (few-shot benchmarks).

    Raises:
        FileNotFoundError: there is no such file; ValueError: its kind or content is not one of these.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path is {str(path)!r}, which is not a file; give a .pt, .npz or <name>_network file")
    readers = {".pt": _saved_data, ".npz": _numpy_graph}
    reader = _mat_graph if path.name.endswith("_network") else readers.get(path.suffix)
    if reader is None:
        raise ValueError(f"path is {str(path)!r}; allowed is a .pt, .npz or <name>_network file")
    with _readable(path):
        return reader(path)


def files_beside(path: Path) -> list[Path]:
    """The files that :func:`read_graph` reads beside ``path``: the ``.mat`` files of an edge list, else none."""
    if not path.name.endswith("_network"):
        return []
    stem = path.name.removesuffix("_network")
    return [path.with_name(f"{stem}_{half}.mat") for half in ("train", "test")]


class UnreadableError(ValueError):
    """A file is not what it should be; the message names it."""


@contextlib.contextmanager
def _readable(name: object) -> Iterator[None]:
    """Whatever goes wrong within, each library having its own errors for a damaged file, names the file."""
    try:
        yield
    except (FileNotFoundError, UnreadableError, MemoryError):  # the first two name it already
        raise
    except Exception as error:
        why = re.split(r"\n|\. ", str(error))[0] or type(error).__name__
        raise UnreadableError(f"{name} cannot be read ({why}); damaged, or of another kind: replace it") from error


def _saved_data(path: Path) -> Data:
    from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    with torch.serialization.safe_globals([Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]):
        try:
            data = torch.load(path, weights_only=True)
        except pickle.UnpicklingError as error:  # whose text offers to run what the file holds
            raise ValueError("not written by torch.save, or it holds more than a Data of tensors") from error
    if not isinstance(data, Data):
        raise ValueError(f"it holds a {type(data).__name__}, not a torch_geometric.data.Data")
    return data


def _numpy_graph(path: Path) -> Data:
    with np.load(path, allow_pickle=False) as arrays:
        missing = {"attr_data", "attr_indices", "attr_indptr", "attr_shape", "labels"} - set(arrays.files)
        if missing or not {"edge_index", "adj_indices"} & set(arrays.files):
            raise ValueError(f"it lacks {', '.join(sorted(missing)) or 'edge_index or adj_*'}")
        attributes = _csr(arrays["attr_data"], arrays["attr_indices"], arrays["attr_indptr"], arrays["attr_shape"])
        if "edge_index" in arrays.files:
            edges = _whole("edge_index", arrays["edge_index"])
        else:
            ones = np.ones(len(arrays["adj_indices"]))
            edges = np.stack(_csr(ones, arrays["adj_indices"], arrays["adj_indptr"], arrays["adj_shape"]).nonzero())
        return _assembled(attributes, edges.astype(np.int64), _whole("labels", arrays["labels"]))


def _csr(values: np.ndarray, columns: np.ndarray, pointers: np.ndarray, shape: np.ndarray) -> scipy.sparse.csr_matrix:
    matrix = scipy.sparse.csr_matrix((values, columns, pointers), shape=shape)
    matrix.check_format(full_check=True)
    return matrix


def _whole(name: str, numbers: np.ndarray) -> np.ndarray:
    """These numbers as int64, none of them rounded."""
    if numbers.dtype.kind not in "iufb" or not np.array_equal(numbers, np.rint(numbers)):  # NaN equals nothing
        raise ValueError(f"{name} must be whole numbers")
    return numbers.astype(np.int64)


def _mat_graph(path: Path) -> Data:
    from scipy.io import loadmat

    parts = files_beside(path)
    for part in parts:
        if not part.is_file():
            raise FileNotFoundError(f"{part} is missing beside {path.name}")
    tables = []
    for part in parts:
        with _readable(part):
            table = loadmat(part)
            missing = {"Index", "Label", "Attributes"} - set(table)
            if missing:
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            table["Index"] = _whole("Index", table["Index"].ravel())
            tables.append(table)
    index = np.concatenate([table["Index"] for table in tables])
    if index.min() < 0 or len(np.unique(index)) < len(index):
        raise ValueError("Index in the .mat files beside it must be numbers >= 0, each node's own")
    labels = np.concatenate([table["Label"].ravel() for table in tables])
    attributes = scipy.sparse.vstack([scipy.sparse.csr_matrix(table["Attributes"]) for table in tables]).tocsr()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "loadtxt: input contained no data")
        pairs = np.loadtxt(path, dtype=np.int64, ndmin=2, usecols=(0, 1))
    if not len(pairs):
        raise ValueError("it has no edges")
    position = np.full(index.max() + 1, -1)
    position[index] = np.arange(len(index))
    if not 0 <= pairs.min() <= pairs.max() < len(position):
        wrong = pairs.min() if pairs.min() < 0 else pairs.max()
        raise ValueError(f"it names node {wrong}, but the .mat files beside it end at {len(position) - 1}")
    edges = position[pairs.T]
    return _assembled(attributes, edges[:, (edges >= 0).all(0)], np.unique(labels, return_inverse=True)[1])


def _assembled(attributes: scipy.sparse.csr_matrix, edges: np.ndarray, labels: np.ndarray) -> Data:
    """Unused feature columns are dropped; edges become undirected, without loops and duplicates."""
    if labels.shape != attributes.shape[:1]:
        raise ValueError(f"it has {attributes.shape[0]} rows of attributes, but labels of shape {labels.shape}")
    if edges.ndim != 2 or len(edges) != 2:
        raise ValueError(f"edge_index has shape {edges.shape}; expected [2, edges]")
    attributes = attributes[:, np.flatnonzero(attributes.getnnz(axis=0))].astype(np.float32)
    attributes.sort_indices()
    edge_index, _ = remove_self_loops(torch.from_numpy(edges))
    data = Data(edge_index=to_undirected(edge_index, num_nodes=len(labels)), y=torch.from_numpy(labels))
    data.num_nodes = len(labels)
    if attributes.nnz >= SPARSE_BELOW * np.prod(attributes.shape):
        data.x = torch.from_numpy(attributes.toarray())
        return data
    data.x_crow = torch.from_numpy(attributes.indptr.astype(np.int64))
    data.x_col = torch.from_numpy(attributes.indices.astype(np.int64))
    data.x_value = torch.from_numpy(attributes.data)
    data.x_columns = attributes.shape[1]
    return data


# -- access ------------------------------------------------------------------------------------------------------


def features(data: Data, check_invariants: bool = False) -> Tensor:
    """Features [n, d]: dense, or a sparse CSR tensor where they are stored so (on request checked to be one)."""
    x: Tensor | None = data.get("x")
    if x is not None:
        return x
    if any(data.get(name) is None for name in CSR):
        raise ValueError("the graph has no features x; give some (one-hot node numbers would be memorised)")
    size = (len(data.x_crow) - 1, int(data.x_columns))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(data.x_crow, data.x_col, data.x_value, size, check_invariants=check_invariants)


def num_features(data: Data) -> int:
    return features(data).shape[1]


def num_classes(data: Data) -> int:
    return int(data.y.max()) + 1


def edge_homophily(data: Data) -> float:
    """Share of the edges between labelled nodes that join two nodes of one class."""
    ends = data.y[data.edge_index]
    ends = ends[:, (ends >= 0).all(0)]
    return float((ends[0] == ends[1]).float().mean())


def row_normalized(data: Data) -> Data:
    """A copy whose features sum to 1 in each row (rows of zeros stay)."""
    copy = data.clone()
    x = features(data)
    if x.layout == torch.sparse_csr:
        rows = torch.arange(x.shape[0]).repeat_interleave(data.x_crow.diff())
        sums = data.x_value.new_zeros(x.shape[0]).index_add_(0, rows, data.x_value)
        copy.x_value = data.x_value / sums.clamp_min(1e-12)[rows]
    else:
        copy.x = x / x.sum(1, keepdim=True).abs().clamp_min(1e-12)
    return copy


def undirected(data: Data) -> Data:
    """A copy with both directions of every edge, no duplicates, no self-loops.

    Weights and attributes of edges that become one are averaged.

    Raises:
        ValueError: the edges have other values, of which no mean is known.
    """
    other = [name for name in data.edge_attrs() if "edge" in name and name not in ("edge_index", *EDGE_VALUES)]
    if other:
        raise ValueError(
            f"{other[0]} has a value for each edge, not to be averaged; give undirected: false, or drop it"
        )
    copy = data.clone()
    keep = data.edge_index[0] != data.edge_index[1]
    names = [name for name in EDGE_VALUES if data.get(name) is not None]
    values = [data[name][keep] for name in names]
    copy.edge_index, values = to_undirected(data.edge_index[:, keep], values, num_nodes=data.num_nodes, reduce="mean")
    for name, value in zip(names, values, strict=True):
        copy[name] = value
    return copy


def check_graph(data: Any) -> None:
    """Raise ``ValueError`` in one sentence for what no graph network can use."""
    if not isinstance(data, Data):
        raise ValueError(f"data is a {type(data).__name__}; expected a torch_geometric.data.Data")
    n = _checked_features(data)
    _check_edges(data, n)
    y = data.get("y")
    if not _is_tensor(y, torch.long, 1) or len(y) != n:
        raise ValueError(f"y is {_kind(y)}; it must be whole numbers (int64) of shape [{n}], one label a row of x")
    if int(y.max()) < 0:
        raise ValueError("no node has a label; y is negative everywhere")
    for name in MASKS:
        mask = data.get(name)
        if mask is not None:
            _check_mask(name, mask, y)


def _checked_features(data: Data) -> int:
    """The number of nodes."""
    x = data.get("x")
    if x is None:
        try:
            x = features(data, check_invariants=True)
        except (RuntimeError, TypeError) as error:
            why = str(error).partition("\n")[0]
            raise ValueError(f"{', '.join(CSR)} are not a CSR matrix ({why}); give them anew, or x") from error
    elif not _is_tensor(x) or x.layout != torch.strided:
        raise ValueError(f"x is {_kind(x)}; features must be a dense tensor of shape [nodes, features]")
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(
            f"x is {_kind(x)}; features must be floating-point numbers (x.float()) of shape [nodes, features]"
        )
    if not x.shape[0]:
        raise ValueError("the graph has no nodes; give a graph with rows in x")
    if not x.shape[1]:
        raise ValueError("features x have no columns; give at least one feature a node")
    if not torch.isfinite(x.values() if x.layout == torch.sparse_csr else x).all():
        raise ValueError("features x hold NaN or infinite values; clean them")
    if "num_nodes" in data and data.num_nodes != x.shape[0]:
        raise ValueError(f"num_nodes is {data.num_nodes}, but x has {x.shape[0]} rows; they must agree")
    return int(x.shape[0])


def _check_edges(data: Data, n: int) -> None:
    edges = data.get("edge_index")
    if not _is_tensor(edges, torch.long, 2) or edges.layout != torch.strided or edges.shape[0] != 2:
        raise ValueError(
            f"edge_index is {_kind(edges)}; it must be whole numbers (int64) of shape [2, edges], sources and targets"
        )
    for end in edges.aminmax() if edges.numel() else ():
        if not 0 <= int(end) < n:
            raise ValueError(f"edge_index names node {int(end)}, outside 0 ... {n - 1}, the rows of x")
    for name in EDGE_VALUES:
        value = data.get(name)
        if value is None:
            continue
        if not _is_tensor(value) or value.shape[:1] != edges.shape[1:]:
            raise ValueError(
                f"{name} is {_kind(value)}; it must be a tensor with one row for each of the {edges.shape[1]} edges"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} holds NaN or infinite values; clean it")


def _is_tensor(value: Any, dtype: torch.dtype | None = None, dim: int | None = None) -> bool:
    return isinstance(value, Tensor) and dtype in (None, value.dtype) and dim in (None, value.dim())


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    if value is None:
        return "missing"
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    layout = "" if value.layout == torch.strided else f", {value.layout}"
    return f"{value.dtype} of shape {tuple(value.shape)}{layout}"


def _check_mask(name: str, mask: Any, y: Tensor) -> None:
    n = len(y)
    if not (_is_tensor(mask, torch.bool) and mask.dim() in (1, 2) and len(mask) == n):
        raise ValueError(
            f"{name} is {_kind(mask)}; it must be bool of shape [{n}] or [{n}, splits], true for its nodes "
            "(not their numbers)"
        )
    inside = mask if mask.dim() == 1 else mask.any(1)
    if bool((y[inside] < 0).any()):
        raise ValueError(f"{name} has nodes with label {int(y[inside].min())}; leave unlabelled nodes out of the masks")
