"""Graphs, mixing weights, spectra, levels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_federated.topology import (
    Graph,
    column_sums,
    lazy_weights,
    levels,
    metropolis_weights,
    second_eigenvalue,
    smallest_eigenvalue,
    uniform_weights,
)

PATH = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=bool)


@pytest.mark.parametrize(
    ("name", "psi", "smallest"),
    [
        ("ring", 0.99868, -1 / 3),
        ("grid9", 0.93694, -0.6),
        ("torus", 0.92361, -0.6),
        ("exp", 0.75, -0.2212),
        ("full", 0.0, 0.0),
    ],
)
def test_spectra_of_100_peers(name, psi, smallest):
    mixing = Graph(name=name, num_clients=100).mixing(0)
    assert second_eigenvalue(mixing) == pytest.approx(psi, abs=5e-6)
    assert smallest_eigenvalue(mixing) == pytest.approx(smallest, abs=5e-5 if name == "exp" else 5e-6)


def test_metropolis_weights_of_a_path():
    expected = np.array([[2, 1, 0], [1, 1, 1], [0, 1, 2]]) / 3
    np.testing.assert_allclose(metropolis_weights(PATH), expected, atol=1e-12)
    np.testing.assert_allclose(uniform_weights(PATH)[1], [1 / 3] * 3)
    np.testing.assert_allclose(uniform_weights(PATH)[0], [1 / 2, 1 / 2, 0])


@given(n=st.integers(3, 30), seed=st.integers(0, 10_000), weights=st.sampled_from(["metropolis", "lazy", "uniform"]))
@settings(max_examples=40, deadline=None)
def test_mixing_matrices_of_random_graphs(n, seed, weights):
    graph = Graph(name="random", num_clients=n, active_ratio=1.0, seed=seed, weights=weights)
    mixing = graph.mixing(0)
    np.testing.assert_allclose(mixing.sum(1), 1)
    assert (mixing >= -1e-12).all()
    if weights != "uniform":
        np.testing.assert_allclose(mixing, mixing.T)
        np.testing.assert_allclose(column_sums(mixing), 1)
    if weights == "lazy":
        assert smallest_eigenvalue(mixing) > -1e-9


def test_random_graphs_follow_their_draws():
    graph = Graph(name="random", num_clients=20, active_ratio=0.2, seed=7)
    adjacency = graph.adjacency(3)
    assert (adjacency == adjacency.T).all()
    assert not adjacency.diagonal().any()
    assert (adjacency == graph.adjacency(3)).all()
    assert (adjacency != graph.adjacency(4)).any()
    random = np.random.RandomState(7 + 3)
    for peer in range(20):
        drawn = random.choice(20, 3, replace=False)
        assert (adjacency[peer, peer + 1 :] == np.isin(np.arange(peer + 1, 20), drawn)).all()


def test_mean_degree_of_random_graphs():
    graph = Graph(name="random", num_clients=100, active_ratio=0.1)
    degree = np.mean([graph.adjacency(index).sum(1).mean() for index in range(50)])
    assert degree == pytest.approx(9 * 99 / 100, rel=0.03)


def test_uniform_weights_on_an_irregular_graph_do_not_keep_the_average():
    low, high = column_sums(Graph(name="random", num_clients=100, active_ratio=0.1).mixing(0))
    assert low < 0.8 < 1.2 < high


def test_lattices_and_small_exponential_graphs():
    assert set(Graph(name="torus", num_clients=12, rows=3).adjacency(0).sum(1)) == {4}
    assert sorted(Graph(name="mesh", num_clients=9).adjacency(0).sum(1)) == [2] * 4 + [3] * 4 + [4]
    assert np.flatnonzero(Graph(name="exp", num_clients=5).adjacency(0)[0]).tolist() == [1, 2, 4]
    assert Graph(name="ring", num_clients=2).mixing(0).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert (Graph(name="ws", num_clients=20).adjacency(0) == Graph(name="ws", num_clients=20).adjacency(5)).all()
    er = Graph(name="er", num_clients=20, active_ratio=0.3)
    assert (er.adjacency(0) != er.adjacency(1)).any()


def test_custom_graphs():
    path = Graph(name="custom", num_clients=3, edges=((0, 1), (1, 2)), weights="metropolis")
    np.testing.assert_allclose(path.mixing(0), metropolis_weights(PATH))
    matrix = np.array([[0.5, 0.5], [0.25, 0.75]])
    np.testing.assert_allclose(Graph(name="custom", num_clients=2, matrix=matrix).mixing(0), matrix)
    halved = Graph(name="custom", num_clients=2, matrix=matrix, weights="lazy").mixing(0)
    np.testing.assert_allclose(halved, lazy_weights(matrix))


def test_levels():
    assert [level.tolist() for level in levels(Graph(name="ring", num_clients=6).mixing(0))] == [
        [0],
        [1],
        [2],
        [3],
        [4],
        [5],
    ]
    assert len(levels(Graph(name="grid9", num_clients=100).mixing(0))) == 100
    assert len(levels(Graph(name="exp", num_clients=100).mixing(0))) == 3
    depth = [len(levels(Graph(name="random", num_clients=100, active_ratio=0.1).mixing(t))) for t in range(30)]
    assert np.mean(depth) == pytest.approx(16.4, abs=1.5)
    assert [level.tolist() for level in levels(np.eye(3))] == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "ring", "num_clients": 1}, "at least 2"),
        ({"name": "random", "num_clients": 10, "active_ratio": 0.1}, "nobody would have a neighbour"),
        ({"name": "custom", "num_clients": 4, "edges": ((0, 1), (2, 3))}, "falls into 2 parts"),
        ({"name": "custom", "num_clients": 3, "edges": ((0, 1),)}, "peer 2 .* has no neighbour"),
        ({"name": "custom", "num_clients": 3, "edges": ((0, 3),)}, "edge"),
        ({"name": "custom", "num_clients": 2, "matrix": np.eye(3)}, "shape"),
        ({"name": "custom", "num_clients": 2, "matrix": np.array([[1.5, -0.5], [0, 1]])}, "negative"),
        ({"name": "custom", "num_clients": 2, "matrix": np.array([[0.5, 0.4], [0.5, 0.5]])}, "row 0"),
        ({"name": "torus", "num_clients": 10, "rows": 3}, "does not divide"),
        ({"name": "ws", "num_clients": 8}, "8 others"),
        ({"name": "star", "num_clients": 8}, "star"),
    ],
)
def test_bad_graphs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Graph(**fields).mixing(0)


def test_metropolis_weights_need_an_undirected_graph():
    with pytest.raises(ValueError, match="directed"):
        Graph(name="exp", num_clients=10, weights="metropolis").mixing(0)
