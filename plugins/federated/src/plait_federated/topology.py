"""Who listens to whom: graphs of peers, and the weights with which models are mixed.

An adjacency is a boolean ``[n, n]`` array, ``[i, j]`` true where peer i reads the model of peer j. A mixing
matrix W is float64 ``[n, n]``, rows sum to 1, ``W[i, j] = 0`` unless j is i or is read by i.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

# Late where it is used: processes of peers are given a graph that was checked, and of most graphs nothing else needs it.
if TYPE_CHECKING:
    import networkx

FIXED = ("ring", "grid9", "torus", "mesh", "exp", "full", "ws", "custom")
PER_ROUND = ("random", "er")
Topology = Literal["random", "ring", "grid9", "torus", "mesh", "exp", "full", "er", "ws", "custom"]
MixingWeights = Literal["uniform", "metropolis", "lazy"]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A rule for the graph of every round.

    Attributes:
        name: ``random`` (fresh each round: every peer draws int(n·active_ratio) − 1 others, an edge stays where
            the drawn index is the larger), ``er`` (Erdős–Rényi with probability active_ratio, fresh each round),
            ``ws`` (Watts–Strogatz, 8 neighbours, 0.1 rewired), ``ring``, ``torus`` and ``mesh`` (``rows`` × n/rows
            peers, with and without wrapping), ``grid9`` (i±1, i±9 on a circle), ``exp`` (directed: i + 1, 2, 4, … < n),
            ``full``, ``custom`` (``edges`` or ``matrix``).
        weights: ``uniform`` over the closed neighbourhood; ``metropolis`` W_ij = 1/max(d_i, d_j), d counting the peer
            itself (doubly stochastic); ``lazy`` (I + metropolis)/2. A custom matrix is taken as it is (or halved
            with the identity for ``lazy``).
        rows: of torus and mesh; ``None`` takes the most square shape.
    """

    name: str
    num_clients: int
    weights: MixingWeights = "uniform"
    seed: int = 0
    active_ratio: float = 0.1
    rows: int | None = None
    edges: tuple[tuple[int, int], ...] | None = None
    matrix: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.num_clients < 2:
            raise ValueError(f"there are {self.num_clients} clients; at least 2 are needed")
        if self.name == "random" and not 2 <= int(self.num_clients * self.active_ratio) <= self.num_clients:
            raise ValueError(
                f"int(clients · active_ratio) = int({self.num_clients} · {self.active_ratio}) is "
                f"{int(self.num_clients * self.active_ratio)}, so nobody would have a neighbour; "
                f"active_ratio from {2 / self.num_clients:g} to 1 is allowed"
            )
        if self.matrix is not None:
            _check_matrix(self.matrix, self.num_clients)
        if self.name in FIXED:
            _check_connected(self.adjacency(0), self.name)

    @property
    def fresh_each_round(self) -> bool:
        return self.name in PER_ROUND

    @cached_property
    def facts(self) -> dict[str, float]:
        """The spectral gap 1 − ψ of a graph that stays; nothing of one that is drawn every round."""
        return {} if self.fresh_each_round else {"spectral_gap": 1 - second_eigenvalue(self.mixing(0))}

    def adjacency(self, round_index: int) -> np.ndarray:
        """The neighbours in one round, without the peers themselves."""
        n = self.num_clients
        if self.name == "random":
            return _random(n, int(n * self.active_ratio), self.seed + round_index)
        if self.name == "er":
            import networkx

            state = np.random.RandomState(self.seed + round_index)
            return _adjacency(networkx.fast_gnp_random_graph(n, self.active_ratio, seed=state))
        if self.name == "ws":
            if n <= 8:
                raise ValueError(f"topology ws joins each peer to 8 others, and there are {n} peers; take ring or full")
            import networkx

            state = np.random.RandomState(self.seed)
            return _adjacency(networkx.watts_strogatz_graph(n, 8, 0.1, seed=state))
        if self.name == "ring":
            return _circulant(n, (1, -1))
        if self.name == "grid9":
            return _circulant(n, (1, -1, 9, -9))
        if self.name == "exp":
            return _circulant(n, tuple(2**p for p in range(n.bit_length()) if 2**p < n))
        if self.name == "full":
            return ~np.eye(n, dtype=bool)
        if self.name in ("torus", "mesh"):
            return _lattice(n, self.rows, periodic=self.name == "torus")
        if self.matrix is not None:
            return (self.matrix > 0) & ~np.eye(n, dtype=bool)
        if self.edges is not None:
            return _from_edges(n, self.edges)
        raise ValueError(
            f"topology {self.name!r} needs edges or a matrix; known without: {', '.join(FIXED[:-1] + PER_ROUND)}"
        )

    def mixing(self, round_index: int) -> np.ndarray:
        """W of one round."""
        if self.matrix is not None:
            return lazy_weights(self.matrix) if self.weights == "lazy" else self.matrix
        adjacency = self.adjacency(round_index)
        if self.weights == "uniform":
            return uniform_weights(adjacency)
        metropolis = metropolis_weights(adjacency)
        return lazy_weights(metropolis) if self.weights == "lazy" else metropolis


def read_graph(file: Path, num_clients: int) -> tuple[tuple[tuple[int, int], ...] | None, np.ndarray | None]:
    """Edges, or else the mixing matrix ``[n, n]``, from a .csv or .npy file: two columns are edges.

    Raises:
        ValueError: the file cannot be read, or holds neither.
    """
    try:
        table = (
            np.load(file, allow_pickle=False)
            if file.suffix == ".npy"
            else np.loadtxt(file, delimiter=",", ndmin=2, encoding="utf-8-sig")
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"graph_file {str(file)!r} cannot be read: {error}") from error
    if table.shape == (num_clients, num_clients):
        return None, table.astype(float)
    if table.ndim == 2 and table.shape[1] == 2 and (table == table.astype(int)).all():
        return tuple((int(first), int(second)) for first, second in table), None
    raise ValueError(
        f"graph_file {str(file)!r} holds an array {table.shape}; "
        f"expected ({num_clients}, {num_clients}), or two columns of edges"
    )


def describe_graph(graph: Graph) -> str:
    """Name, weights, and ψ where the graph stays."""
    spectrum = "drawn each round" if graph.fresh_each_round else f"ψ {second_eigenvalue(graph.mixing(0)):.4f}"
    return f"{graph.name} graph ({spectrum}), {graph.weights} weights"


def uniform_weights(adjacency: np.ndarray) -> np.ndarray:
    """W_ij = 1/|N_i ∪ {i}|: rows sum to 1, columns only on regular graphs."""
    closed = adjacency | np.eye(len(adjacency), dtype=bool)
    weights: np.ndarray = closed / closed.sum(axis=1, keepdims=True)
    return weights


def metropolis_weights(adjacency: np.ndarray) -> np.ndarray:
    """W_ij = 1/max(d_i, d_j) with d counting the peer itself, W_ii = 1 − Σ_j W_ij: symmetric, doubly stochastic."""
    if (adjacency != adjacency.T).any():
        raise ValueError("metropolis and lazy weights need an undirected graph, and this one is directed; use uniform")
    degree = adjacency.sum(axis=1) + 1
    weights: np.ndarray = adjacency / np.maximum.outer(degree, degree)
    weights += np.diag(1 - weights.sum(axis=1))
    return weights


def lazy_weights(mixing: np.ndarray) -> np.ndarray:
    """(I + W)/2: no negative eigenvalue on undirected graphs."""
    halved: np.ndarray = (np.eye(len(mixing)) + mixing) / 2
    return halved


def second_eigenvalue(mixing: np.ndarray) -> float:
    """ψ, the second-largest |eigenvalue| of W; the spectral gap is 1 − ψ."""
    return float(np.sort(np.abs(np.linalg.eigvals(mixing)))[-2])


def smallest_eigenvalue(mixing: np.ndarray) -> float:
    """The smallest real part of an eigenvalue of W."""
    return float(np.linalg.eigvals(mixing).real.min())


def column_sums(mixing: np.ndarray) -> tuple[float, float]:
    """Smallest and largest column sum; both 1 where W keeps the average."""
    sums = mixing.sum(axis=0)
    return float(sums.min()), float(sums.max())


def levels(mixing: np.ndarray) -> list[np.ndarray]:
    """Peers that may train at the same time when each waits for its neighbours of smaller index."""
    level = np.zeros(len(mixing), dtype=int)
    for peer in range(1, len(mixing)):
        earlier = np.flatnonzero(mixing[peer, :peer])
        if len(earlier):
            level[peer] = 1 + level[earlier].max()
    return [np.flatnonzero(level == value) for value in range(level.max() + 1)]


def _adjacency(graph: networkx.Graph, nodes: list[tuple[int, int]] | None = None) -> np.ndarray:
    import networkx

    adjacency: np.ndarray = networkx.to_numpy_array(graph, nodelist=nodes) > 0
    return adjacency


def _random(n: int, k: int, seed: int) -> np.ndarray:
    state = np.random.RandomState(seed)
    upper = np.zeros((n, n), dtype=bool)
    for peer in range(n):
        drawn = state.choice(n, k - 1, replace=False)
        upper[peer, drawn[drawn > peer]] = True
    return upper | upper.T


def _circulant(n: int, offsets: tuple[int, ...]) -> np.ndarray:
    adjacency = np.zeros((n, n), dtype=bool)
    peers = np.arange(n)
    for offset in offsets:
        adjacency[peers, (peers + offset) % n] = True
    return adjacency & ~np.eye(n, dtype=bool)


def _lattice(n: int, rows: int | None, *, periodic: bool) -> np.ndarray:
    import networkx

    if rows is None:
        rows = max(divisor for divisor in range(1, int(n**0.5) + 1) if n % divisor == 0)
    if n % rows:
        raise ValueError(f"rows is {rows}, which does not divide the {n} clients")
    grid = networkx.grid_2d_graph(rows, n // rows, periodic=periodic)
    nodes = [(row, column) for row in range(rows) for column in range(n // rows)]
    return _adjacency(grid, nodes) & ~np.eye(n, dtype=bool)


def _from_edges(n: int, edges: tuple[tuple[int, int], ...]) -> np.ndarray:
    adjacency = np.zeros((n, n), dtype=bool)
    for first, second in edges:
        if not (0 <= first < n and 0 <= second < n and first != second):
            raise ValueError(f"edge ({first}, {second}) is not between two of the clients 0 … {n - 1}")
        adjacency[first, second] = adjacency[second, first] = True
    return adjacency


def _check_matrix(matrix: np.ndarray, n: int) -> None:
    if matrix.shape != (n, n):
        raise ValueError(f"the mixing matrix has shape {matrix.shape}; {n} clients need ({n}, {n})")
    if not np.isfinite(matrix).all() or (matrix < 0).any():
        raise ValueError("the mixing matrix has negative or non-finite weights; allowed are weights ≥ 0")
    error = np.abs(matrix.sum(axis=1) - 1)
    if error.max() > 1e-5:
        row = int(error.argmax())
        raise ValueError(f"row {row} of the mixing matrix sums to {matrix[row].sum():.6g}; every row must sum to 1")


def _check_connected(adjacency: np.ndarray, name: str) -> None:
    import networkx

    isolated = np.flatnonzero(~(adjacency.any(axis=0) | adjacency.any(axis=1)))
    if len(isolated):
        raise ValueError(f"peer {isolated[0]} of the {name} graph has no neighbour; connect every peer")
    parts = networkx.number_strongly_connected_components(networkx.DiGraph(adjacency))
    if parts > 1:
        raise ValueError(f"the {name} graph falls into {parts} parts that do not hear each other; connect them")
