"""The rule: hand-computed rounds, equivalences, clip scopes, stability, containers."""

import importlib
import sys
from typing import ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
from plait_dfedcata.baselines import oledfl_rule
from plait_dfedcata.dfedcata import dfedcata, rule, split_prox_step
from plait_dfedcata.stability import growth, largest_beta, stability, sweep_matrix
from plait_federated.rounds import Gossip, ModelColumns, dfedavg, sequential_round, synchronous_round
from plait_federated.steps import Local, prox_step
from plait_federated.topology import Graph

HALF = torch.full((2, 2), 0.5)
TARGETS = torch.tensor([[0.0], [4.0]])


def two_steps(method):
    """Train two full-gradient steps on ½(w − a_i)², lr 0.1, no clip."""

    def train(clients, start):
        w, local = start, Local(start, 0.1, 0.0, None)
        for _ in range(2):
            w = method.step(w, lambda at: at - TARGETS[clients], local)
        return w

    return train


@pytest.mark.parametrize(
    ("round_of", "anchor", "expected"),
    [
        (synchronous_round, "own_previous", [2.0375, 1.9625]),
        (sequential_round, "own_previous", [2.0375, 2.596671875]),
        (synchronous_round, "mixed_previous", [1.956, 2.044]),
    ],
)
@pytest.mark.parametrize("clip_scope", ["split", "joint"])
def test_two_clients_by_hand(round_of, anchor, expected, clip_scope):
    method = rule(0.5, 0.5, anchor, clip_scope)
    state = {"local": torch.tensor([[1.0], [3.0]])}
    if method.keeps_mixed:
        state["mixed"] = torch.tensor([[1.2], [2.8]])
    after = round_of(method, state, HALF, ModelColumns(1), two_steps(method))
    assert after["local"].flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_the_clip_takes_half_of_the_proximal_term():
    w, s = torch.tensor([2.0]), torch.zeros(1)
    for step, direction in ((split_prox_step, 11.0), (prox_step, 10.0)):
        stepped = step(w, lambda at: torch.tensor([30.0]), Local(s, 0.1, 0.0, 10.0), prox_lambda=0.5)
        assert (w - stepped).item() / 0.1 == pytest.approx(direction, abs=1e-4)


def test_without_an_active_clip_a_step_is_the_gradient_of_the_penalised_loss():
    generator = torch.Generator().manual_seed(0)
    w, s = torch.randn(2, 6, generator=generator).unbind(0)
    v = w.clone().requires_grad_()
    loss = v.sin().sum() + 0.35 * (v - s).square().sum() + 0.005 * v.square().sum()
    (expected,) = torch.autograd.grad(loss, v)
    stepped = split_prox_step(w, torch.cos, Local(s, 0.1, 0.01, 1e6), prox_lambda=0.7)
    torch.testing.assert_close((w - stepped) / 0.1, expected, atol=1e-5, rtol=0)


def test_a_stiff_proximal_term_holds_on_to_its_centre():
    s = torch.randn(6, generator=torch.Generator().manual_seed(0))
    for stiffness in (1e2, 1e4):
        w, local = s + 1, Local(s, 1 / stiffness, 0.0, None)
        for _ in range(3):
            w = split_prox_step(w, torch.cos, local, prox_lambda=stiffness)
        assert (w - s).abs().max() <= 2 / stiffness


def training_of(method, make_training, **options):
    return make_training(method, **options).run().state["local"]


@pytest.mark.parametrize("anchor", ["own_previous", "mixed_previous"])
def test_no_extrapolation_and_no_prox_is_dfedavg_bitwise(make_training, anchor):
    ours = training_of(rule(0.0, 0.0, anchor, "split"), make_training, folder="ours")
    assert torch.equal(ours, training_of(dfedavg(), make_training, folder="dfedavg"))


def test_oledfl_is_dfedcata_without_prox(make_training):
    options = {"update_order": "sequential"}
    ours = training_of(rule(0.4, 0.0, "own_previous", "split"), make_training, folder="ours", **options)
    assert torch.equal(ours, training_of(oledfl_rule(0.4, 0.0), make_training, folder="oledfl", **options))
    assert not torch.equal(ours, training_of(oledfl_rule(0.4, 0.1), make_training, folder="sam", **options))


def test_synchronous_own_previous_is_only_another_mixing_matrix(make_training):
    beta, graph = 0.4, Graph(name="ring", num_clients=6)
    ours = training_of(rule(beta, 0.1, "own_previous", "split"), make_training, graph=graph, folder="ours")
    mixing = (1 + beta) * graph.mixing(0) - beta * np.eye(6)  # has negative weights, so no Graph takes it
    other = make_training(rule(0.0, 0.1, "own_previous", "split"), graph=graph, folder="other")
    object.__setattr__(other, "graph", Fixed(mixing))
    torch.testing.assert_close(ours, other.run().state["local"], atol=1e-5, rtol=0)


class Fixed:
    facts: ClassVar = {}

    def __init__(self, matrix):
        self.matrix = matrix

    def mixing(self, round_index):
        return self.matrix


def gossip(method, state, mixing, train=lambda clients, start: start):
    """A synchronous round in which ``train`` is all of local training."""
    return synchronous_round(method, state, mixing, ModelColumns(state["local"].shape[1]), train)


def test_doubly_stochastic_mixing_keeps_the_average_of_own_previous_starts():
    z = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixing = torch.tensor(Graph(name="random", num_clients=10, active_ratio=0.5, weights="metropolis").mixing(0))
    start = gossip(rule(0.9, 0.0, "own_previous", "split"), {"local": z}, mixing)["local"]
    torch.testing.assert_close(start.mean(0), z.mean(0))


def test_full_averaging_gives_all_clients_one_start():
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    mixing, method = torch.full((5, 5), 0.2), rule(0.9, 0.0, "mixed_previous", "split")

    def spread(clients, start):
        torch.testing.assert_close(start, start[:1].expand(5, -1))
        return start + torch.arange(5.0)[:, None]

    state = {"local": z, "mixed": z.mean(0).expand(5, -1)}
    for _ in range(3):
        state = gossip(method, state, mixing, spread)
    state = method.initial_state(torch.ones(3), 5)
    for _ in range(4):
        state = gossip(method, state, mixing)
    torch.testing.assert_close(state["local"], torch.ones(5, 3))


@pytest.mark.slow
@pytest.mark.parametrize("anchor", ["own_previous", "mixed_previous"])
def test_all_engines_and_resuming_agree(make_training, anchor):
    method = rule(0.4, 0.05, anchor, "split")
    for order in ("synchronous", "sequential"):
        loop = make_training(method, folder=f"loop-{order}", update_order=order, rounds=4).run()
        stacked = make_training(method, folder=f"stacked-{order}", update_order=order, rounds=4, engine="stacked").run()
        make_training(method, folder=f"parts-{order}", update_order=order, rounds=2).run()
        resumed = make_training(method, folder=f"parts-{order}", update_order=order, rounds=4).run()
        for name, table in loop.state.items():
            torch.testing.assert_close(stacked.state[name], table, atol=1e-5, rtol=0)
            assert torch.equal(resumed.state[name], table)


@pytest.mark.slow
def test_peers_agree_with_the_loop(make_training):
    method = rule(0.9, 0.05, "mixed_previous", "split")
    graph = Graph(name="random", num_clients=6, active_ratio=0.5, weights="metropolis")
    loop = make_training(method, graph=graph, folder="loop").run()
    peers = make_training(method, graph=graph, folder="peers", engine="peers", ranks=2).run()
    for name in ("local", "mixed"):
        torch.testing.assert_close(peers.state[name], loop.state[name], atol=1e-5, rtol=0)


# Stability --------------------------------------------------------------------------------------------------------

RADII = {
    ("synchronous", "own_previous"): {"ring": 1.533, "grid9": 2.040, "torus": 2.040, "exp": 1.410, "full": 0.900},
    ("sequential", "own_previous"): {"ring": 0.993, "grid9": 0.756, "torus": 0.742, "exp": 1.656, "full": 0.882},
    ("synchronous", "mixed_previous"): {"ring": 0.985, "grid9": 1.500, "torus": 1.500, "exp": 1.168, "full": 0.000},
}


@pytest.mark.parametrize(("order", "anchor"), RADII)
def test_radii_of_100_peers(order, anchor):
    for name, expected in RADII[order, anchor].items():
        mixing = Graph(name=name, num_clients=100).mixing(0)
        assert stability(mixing, 0.9, anchor, order) == pytest.approx(expected, abs=6e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "ratio", "order", "anchor", "expected"),
    [
        (100, 0.1, "synchronous", "own_previous", [0.31, 0.56, 0.91]),
        (100, 0.1, "sequential", "own_previous", [0.23, 0.41, 0.77]),
        (100, 0.1, "synchronous", "mixed_previous", [0.31, 0.50, 0.65]),
        (20, 0.2, "synchronous", "own_previous", [0.50, 0.65, 0.89]),
        (20, 0.2, "sequential", "own_previous", [0.49, 0.43, 0.63]),
        (20, 0.2, "synchronous", "mixed_previous", [0.50, 0.67, 0.87]),
    ],
)
def test_growth_on_fresh_random_graphs(n, ratio, order, anchor, expected):
    graph = Graph(name="random", num_clients=n, active_ratio=ratio)
    found = [growth(graph.mixing, beta, anchor, order) for beta in (0.0, 0.5, 0.9)]
    assert found == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("anchor", ["own_previous", "mixed_previous"])
def test_growth_is_what_gossip_on_drawn_graphs_does(anchor):
    graph = Graph(name="random", num_clients=60, active_ratio=0.1)
    method = rule(0.9, 0.0, anchor, "split")
    z = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = {"local": z} | ({"mixed": z} if method.keeps_mixed else {})
    for index in range(50):
        mixing = torch.tensor(graph.mixing(index))
        state = synchronous_round(method, state, mixing, ModelColumns(4), lambda clients, start: start)
    shrunk = (state["local"] - state["local"].mean(0)).norm() / (z - z.mean(0)).norm()
    assert growth(graph.mixing, 0.9, anchor, "synchronous") == pytest.approx(shrunk.item() ** (1 / 50), abs=0.03)


@pytest.mark.parametrize(("beta", "stable"), [(0.49, True), (0.51, False)])
def test_the_verdict_on_a_ring_is_what_gossip_does(beta, stable):
    graph = Graph(name="ring", num_clients=20)
    assert (stability(graph.mixing(0), beta, "own_previous", "synchronous") < 1) == stable
    method = Gossip(None, rule(beta, 0.0, "own_previous", "split").start)
    mixing = torch.tensor(graph.mixing(0))
    z = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = {"local": z - z.mean(0)}
    sizes = []
    for _ in range(400):
        state = synchronous_round(method, state, mixing, ModelColumns(3), lambda clients, start: start)
        sizes.append(state["local"].norm().item())
    assert (sizes[-1] < sizes[-100]) == stable


@pytest.mark.parametrize("order", ["synchronous", "sequential"])
@pytest.mark.parametrize("anchor", ["own_previous", "mixed_previous"])
@pytest.mark.parametrize("name", ["ring", "exp"])
def test_the_matrix_of_a_round_is_the_round(order, anchor, name):
    mixing = Graph(name=name, num_clients=9).mixing(0)
    generator = torch.Generator().manual_seed(0)
    z, previous = torch.randn(2, 9, 2, generator=generator, dtype=torch.float64).unbind(0)
    method = rule(0.7, 0.0, anchor, "split")
    play = sequential_round if order == "sequential" else synchronous_round
    state = {"local": z} | ({"mixed": previous} if method.keeps_mixed else {})
    after = play(method, state, torch.tensor(mixing), ModelColumns(2), lambda clients, start: start)
    matrix = torch.tensor(sweep_matrix(mixing, 0.7, anchor, order))
    before = torch.cat([z, previous]) if method.keeps_mixed else z
    torch.testing.assert_close(torch.cat(list(after.values())), matrix @ before)


def test_lazy_weights_stabilise_undirected_graphs():
    for name in ("ring", "grid9", "torus", "mesh", "full"):
        mixing = Graph(name=name, num_clients=36, weights="lazy").mixing(0)
        for anchor, order in (
            ("own_previous", "synchronous"),
            ("own_previous", "sequential"),
            ("mixed_previous", "synchronous"),
        ):
            assert stability(mixing, 0.9, anchor, order) < 1


def test_the_largest_stable_beta():
    ring = Graph(name="ring", num_clients=100).mixing(0)
    assert largest_beta(lambda beta: stability(ring, beta, "own_previous", "synchronous")) == pytest.approx(0.49)
    assert largest_beta(lambda beta: 2.0) is None
    assert largest_beta(lambda beta: 0.5) == pytest.approx(0.99)


# All of it --------------------------------------------------------------------------------------------------------


def test_one_call_runs_the_method_and_needs_no_plait(make_training, tmp_path):
    parts = make_training(dfedavg(), rounds=4)  # for its model, shards, settings and graph
    seen, rounds = [], []
    options = {"graph": parts.graph, "beta": 0.4, "engine": "loop", "on_stability": seen.append}
    outcome = dfedcata(
        parts.model, parts.shards, parts.settings, folder=tmp_path / "own", on_round=rounds.append, **options
    )
    theirs = make_training(rule(0.4, 0.05, "own_previous", "split"), rounds=4, folder="theirs").run()
    assert torch.equal(outcome.reported, theirs.reported)
    assert torch.equal(outcome.reported, outcome.state["local"].mean(0))
    assert [record["round"] for record in rounds] == [1, 2, 3, 4]
    assert str(seen[0]).startswith("own_previous, synchronous order, beta 0.4, ring graph")
    with pytest.raises(ValueError, match=r"beta 0\.9, ring graph .* has stability radius 1\.\d+; .*; take beta: "):
        dfedcata(parts.model, parts.shards, parts.settings, folder=tmp_path / "no", **options | {"beta": 0.9})
    assert not seen[1].is_stable
    for wrong, message in (({"beta": 1.0}, "beta is 1.0"), ({"prox_lambda": 11.0}, "must be below 1")):
        with pytest.raises(ValueError, match=message):
            dfedcata(parts.model, parts.shards, parts.settings, folder=tmp_path / "no", **options | wrong)
    with patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.startswith("plait")]:
            del sys.modules[name]
        sys.modules["plait"] = None  # to import it is an error now
        for name in ("dfedcata", "baselines"):
            importlib.import_module(f"plait_dfedcata.{name}")
