"""Rounds, engines, checkpoints: the same answer however it is computed."""

from functools import partial

import numpy as np
import pytest
import torch
from plait_federated import rounds
from plait_federated.checkpoint import load_latest, save_part
from plait_federated.engines import LoopEngine, StackedEngine, fastest_engine
from plait_federated.evaluation import (
    check_dispersion,
    check_finite,
    check_growth,
    check_history,
    consensus_distance,
    diverging,
    rounds_to_target,
)
from plait_federated.layout import Layout
from plait_federated.rounds import Gossip, ModelColumns, dfedavg, synchronous_round
from plait_federated.shards import Augmentation
from plait_federated.steps import Local, sgd_step
from plait_federated.topology import Graph, second_eigenvalue
from torch import nn

METHODS = {
    "dfedavg": dfedavg(),
    "momentum": rounds.dfedavgm(0.9),
    "sam": rounds.dfedsam(0.05, 2),
    "prox": rounds.dfedprox(0.1),
    "scaffold": rounds.scaffold(0.5, 1.0),
    "fedavg": rounds.fedavg(0.5, 0.7),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sizes", [(9,) * 6, (4, 1, 13, 8, 3, 9)], ids=["equal", "unequal"])
def test_stacked_equals_loop(make_training, make_shards, name, sizes):
    order = "sequential" if name in ("dfedavg", "sam") else "synchronous"
    make = partial(make_training, METHODS[name], update_order=order, shards=make_shards(sizes))
    loop = make(folder="loop").run()
    for chunk in (None, 4):
        stacked = make(folder=f"stacked{chunk}", engine="stacked", chunk_size=chunk).run()
        for table in loop.state:
            torch.testing.assert_close(stacked.state[table], loop.state[table], atol=1e-5, rtol=0)
    assert not torch.allclose(loop.reported, make(folder="x").layout.vector(make(folder="x").model))


def test_identity_mixing_is_independent_sgd(make_training, make_shards, model):
    """Every client ends where plain PyTorch SGD on its own batches ends."""
    shards = make_shards()
    training = make_training(shards=shards, rounds=2, weight_decay=0.01, learning_rate_decay=0.9)
    state = dfedavg().initial_state(training.layout.vector(training.model), 6)
    engine = LoopEngine(model, shards)
    for index in range(2):
        prepare = partial(training.settings.local, training.settings.learning_rate_of(index))

        def train(clients, start, index=index, prepare=prepare):
            return engine.train(clients.tolist(), start, sgd_step, prepare, index)

        state = synchronous_round(dfedavg(), state, torch.eye(6), ModelColumns(training.layout.num_parameters), train)
    for client in range(6):
        network = training.model_from(training.layout.vector(training.model))
        for index in range(2):
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1 * 0.9**index)
            for rows in shards.batches(client, index).index:
                x, y = shards.batch(rows[rows >= 0], None, None)
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(x), y).backward()
                nn.utils.clip_grad_norm_(network.parameters(), 10)
                for parameter in network.parameters():
                    parameter.grad.add_(0.01 * parameter.detach())
                optimizer.step()
        torch.testing.assert_close(state["local"][client], training.layout.vector(network), atol=1e-6, rtol=1e-5)


def test_without_training_a_round_is_gossip():
    z = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    mixing = Graph(name="ring", num_clients=10, weights="metropolis").mixing(0)
    after = synchronous_round(
        dfedavg(),
        {"local": z},
        torch.tensor(mixing, dtype=torch.float32),
        ModelColumns(4),
        lambda clients, start: start,
    )["local"]
    torch.testing.assert_close(after, torch.tensor(mixing, dtype=torch.float32) @ z)
    torch.testing.assert_close(after.mean(0), z.mean(0), atol=1e-6, rtol=0)
    assert consensus_distance(after) <= second_eigenvalue(mixing) ** 2 * consensus_distance(z) + 1e-6


def test_sequential_by_levels_equals_client_by_client():
    z = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    for name in ("random", "exp", "torus"):  # one fresh, one directed, one deep graph
        mixing = torch.tensor(Graph(name=name, num_clients=12, active_ratio=0.4).mixing(0), dtype=torch.float32)
        halve = Gossip(sgd_step, rounds.mixed_start)
        after = rounds.sequential_round(halve, {"local": z}, mixing, ModelColumns(3), lambda clients, start: start / 2)
        live = z.clone()
        for client in range(12):
            live[client] = mixing[client] @ live / 2
        torch.testing.assert_close(after["local"], live)


def test_relabelled_clients_give_relabelled_models_in_synchronous_order():
    generator = torch.Generator().manual_seed(0)
    z, targets = torch.randn(8, 3, generator=generator), torch.randn(8, 3, generator=generator)
    mixing = torch.tensor(Graph(name="random", num_clients=8, active_ratio=0.5).mixing(0), dtype=torch.float32)
    order = torch.randperm(8, generator=generator)

    def play(round_of, z, mixing, targets):
        train = lambda clients, start: start + 0.3 * (targets[clients] - start)  # noqa: E731
        return round_of(dfedavg(), {"local": z}, mixing, ModelColumns(3), train)["local"]

    relabelled = z[order], mixing[order][:, order], targets[order]
    synchronous = play(rounds.synchronous_round, z, mixing, targets)
    torch.testing.assert_close(play(rounds.synchronous_round, *relabelled), synchronous[order])
    sequential = play(rounds.sequential_round, z, mixing, targets)
    assert not torch.allclose(play(rounds.sequential_round, *relabelled), sequential[order], atol=1e-3)


@pytest.mark.slow
def test_gossip_steps_apply_the_matrix_several_times(make_training):
    graph = Graph(name="ring", num_clients=6)
    once = make_training(rounds.dfedsam(0.0, 3), graph=graph, folder="thrice").run()
    cubed = Graph(name="custom", num_clients=6, matrix=np.linalg.matrix_power(graph.mixing(0), 3))
    again = make_training(dfedavg(), graph=cubed, folder="cubed").run()
    torch.testing.assert_close(once.state["local"], again.state["local"], atol=1e-5, rtol=0)
    assert once.history[0]["bytes"] == 3 * 12 * 4 * (8 * 5 + 5 + 5 * 3 + 3)


def test_scaffold_by_hand():
    """Two clients, one active; a constant gradient of 1, two steps of lr 0.5."""
    method = rounds.scaffold(0.5, 1.0)
    state = method.initial_state(torch.zeros(1), 2) | {"server_control": torch.tensor([[0.25]])}

    def train(clients, start, offset):
        w = start
        for _ in range(2):
            w = method.step(w, torch.ones_like, Local(start, 0.5, 0.0, None, offset=offset))
        return w

    after = rounds.scaffold_round(method, state, np.array([1]), train, torch.tensor([2.0]), 0.5)
    assert after["server"].item() == pytest.approx(-1.25)  # two steps of 0.5 · (1 + 0.25)
    assert after["control"].flatten().tolist() == pytest.approx([0, -0.25 + 1.25 / (2 * 0.5)])
    assert after["server_control"].item() == pytest.approx(0.25 + 1.0 / 2)


def test_clients_weigh_by_size_or_all_alike():
    """Clients of 1, 2 and 5 samples end at 1, 2 and 3; only the last two are active."""
    active, sizes, server = np.array([1, 2]), torch.tensor([1, 2, 5]), torch.tensor([[0.5]])
    ends = torch.tensor([[1.0], [2.0], [3.0]])

    def train(clients, start, offset=None):
        return ends[clients]

    method = rounds.fedavg(0.5, 2.0)
    state = {"server": server, "local": torch.zeros(3, 1)}
    plain = rounds.fedavg_round(method, state, active, train)["server"]
    assert plain.item() == pytest.approx(0.5 + 2 * (1.5 + 2.5) / 2)
    by_size = rounds.fedavg_round(method, state, active, train, sizes)["server"]
    assert by_size.item() == pytest.approx(0.5 + 2 * (2 * 1.5 + 5 * 2.5) / 7)
    state |= {"server_control": torch.zeros(1, 1), "control": torch.zeros(3, 1)}
    after = rounds.scaffold_round(rounds.scaffold(0.5, 2.0), state, active, train, torch.ones(2), 1.0, sizes)
    assert after["server"].item() == by_size.item()
    assert after["server_control"].item() == pytest.approx(-(2 * 1.5 + 5 * 2.5) / 8)


@pytest.mark.slow
@pytest.mark.parametrize("make", [rounds.fedavg, rounds.scaffold])
def test_clients_of_one_size_weigh_alike(make_training, make_shards, make):
    results = {}
    for sizes in ((9,) * 6, (4, 1, 13, 8, 3, 9)):
        for weights in ("uniform", "size"):
            training = make_training(make(0.7, 1.0, weights), shards=make_shards(sizes), folder=f"{weights}{sizes}")
            results[weights, sizes[0]] = training.run().reported
    torch.testing.assert_close(results["size", 9], results["uniform", 9], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(results["size", 4], results["uniform", 4], atol=1e-4)


def test_active_clients_are_drawn_again_until_there_is_one():
    method = rounds.fedavg(0.01, 1.0)
    assert all(len(method.active(5, 0, index)) >= 1 for index in range(20))
    assert (method.active(5, 0, 3) == method.active(5, 0, 3)).all()


def test_batches_are_a_function_of_seed_round_and_client(make_shards):
    shards = make_shards()
    index = shards.batches(2, 5).index
    assert (index == make_shards().batches(2, 5).index).all()
    assert (index != shards.batches(2, 6).index).any()
    assert index.shape == (2 * 3, 4)
    for epoch in index.view(2, -1):  # each epoch is one permutation of the client's rows
        assert sorted(epoch[epoch >= 0].tolist()) == list(range(18, 27))
    assert make_shards(local_steps=1).batches(2, 5).index.tolist() == index[:1].tolist()


def test_resuming_equals_never_stopping(make_training):
    whole = make_training(METHODS["scaffold"], rounds=5, folder="whole").run()
    make_training(METHODS["scaffold"], rounds=3, folder="parts").run()
    seen = []
    resumed = make_training(METHODS["scaffold"], rounds=5, folder="parts").run(seen.append)
    for name, table in whole.state.items():
        assert torch.equal(resumed.state[name], table)
    assert [record["round"] for record in seen] == [1, 2, 3, 4, 5]
    assert [record["gradient_steps"] for record in resumed.history] == [
        record["gradient_steps"] for record in whole.history
    ]


def test_an_incomplete_round_is_passed_over(tmp_path):
    state = {"local": torch.ones(2, 3)}
    for part in range(2):
        save_part(tmp_path, 1, state, [{"round": 1}], "id", part, 2)
    save_part(tmp_path, 2, {"local": torch.zeros(2, 3)}, [], "id", 0, 2)
    done, found, history = load_latest(tmp_path, "id")
    assert (done, history) == (1, [{"round": 1}])
    assert torch.equal(found["local"], torch.ones(4, 3))
    assert load_latest(tmp_path / "nothing", "id") is None


def test_a_checkpoint_of_another_training_is_refused(make_training):
    make_training(rounds=1).run()
    with pytest.raises(ValueError, match="another training"):
        make_training(rounds=1, learning_rate=0.2).run()


def test_buffers_are_refused_averaged_or_kept(make_training, make_shards):
    make = partial(make_training, shards=make_shards(batch_size=9))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"module 1 has the buffer 1\.running_mean"):
        make(network=network)
    kept = make(network=network, buffers="local", folder="kept", engine="auto").run()
    mixed = make(network=network, buffers="average", folder="mixed").run()
    columns = slice(Layout(network).num_parameters, None)
    assert kept.engine == "loop"
    assert kept.state["local"][:, columns].std(0).mean() > mixed.state["local"][:, columns].std(0).mean() > 0
    with pytest.raises(ValueError, match="stacked engine cannot"):
        make(network=network, buffers="average", engine="stacked", folder="s").run()
    with pytest.raises(ValueError, match="SCAFFOLD"):
        make(METHODS["scaffold"], network=network, buffers="average")


def test_frozen_parameters_stay_and_are_not_sent(make_training, model):
    model[0].requires_grad_(False)
    training = make_training(network=model)
    outcome = training.run()
    assert outcome.history[0]["bytes"] == 12 * 4 * (5 * 3 + 3)
    trained = training.model_from(outcome.reported)
    assert torch.equal(trained[0].weight, model[0].weight)
    assert not torch.equal(trained[2].weight, model[2].weight)


@pytest.mark.slow
def test_bfloat16_passes_keep_float32_weights(make_training):
    exact = make_training(folder="fp32").run()
    rough = make_training(folder="bf16", precision="bf16").run()
    stacked = make_training(folder="stacked", precision="bf16", engine="stacked").run()
    assert rough.reported.dtype == torch.float32
    difference = (rough.reported - exact.reported).abs().max()
    assert 0 < difference < 0.02
    assert (stacked.reported - exact.reported).abs().max() < 0.02


@pytest.mark.slow
def test_dropout_does_not_touch_the_global_generator(make_training):
    network = nn.Sequential(nn.Linear(8, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    before = torch.get_rng_state()
    first = make_training(network=network, folder="a").run()
    again = make_training(network=network, folder="b").run()
    stacked = make_training(network=network, folder="c", engine="stacked").run()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.reported, again.reported)
    assert torch.isfinite(stacked.reported).all()


def test_auto_takes_the_loop_where_stacking_is_impossible(make_training, make_shards):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(8, 3)

        def forward(self, x):
            y = self.line(x)
            return -y if y.sum() > 0 else y  # depends on the data: vmap has no rule for it

    assert fastest_engine(Branching(), make_shards(), 6).name == "loop"
    assert make_training(engine="auto").run().engine in ("loop", "stacked")


def test_auto_tries_no_stack_that_does_not_fit(make_shards, model, monkeypatch):
    monkeypatch.setattr("plait_federated.engines._free_bytes", lambda device: 10_000)
    assert fastest_engine(model, make_shards(), 6).name == "loop"


def test_augmentation_shifts_and_flips():
    image = torch.arange(1.0, 10).view(1, 1, 3, 3)
    augmentation = Augmentation(padding=1, fill=(0.5,))
    same = augmentation.apply(image, torch.tensor([False]), torch.tensor([[1, 1]]))
    torch.testing.assert_close(same, image)
    flipped = augmentation.apply(image, torch.tensor([True]), torch.tensor([[1, 1]]))
    torch.testing.assert_close(flipped, image.flip(-1))
    shifted = augmentation.apply(image, torch.tensor([False]), torch.tensor([[0, 2]]))
    torch.testing.assert_close(shifted[0, 0], torch.tensor([[0.5, 0.5, 0.5], [2, 3, 0.5], [5, 6, 0.5]]))


@pytest.mark.slow
def test_augmented_images_are_the_same_in_both_engines(make_training, make_shards):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (54, 1, 6, 6), generator=generator, dtype=torch.uint8)
    shards = make_shards(augmentation=Augmentation(1, (0.3,)))
    shards = type(shards)(images, shards.labels, shards.members, 4, 4, 2, None, shards.augmentation)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    loop = make_training(network=network, shards=shards, folder="loop").run()
    stacked = make_training(network=network, shards=shards, folder="stacked", engine="stacked").run()
    torch.testing.assert_close(stacked.reported, loop.reported, atol=1e-5, rtol=0)
    index, flip = shards.batches(0, 0).index, shards.batches(0, 0).flip
    plain, _ = make_shards().batch(index, None, None)
    assert plain.shape[:2] == index.shape
    assert flip.any()
    assert not flip.all()


def test_test_accuracy_of_the_average_and_of_clients(make_training, make_shards):
    shards = make_shards()
    test = (shards.inputs, shards.labels)
    training = make_training(test=test, rounds=4, eval_clients_every=2)
    outcome = training.run()
    network = training.model_from(outcome.reported)
    expected = (network(test[0]).argmax(1) == test[1]).float().mean().item()
    assert outcome.history[-1]["accuracy"] == pytest.approx(expected)
    assert ["mean_client_accuracy" in record for record in outcome.history] == [False, True, False, True]
    assert outcome.history[-1]["worst_client_accuracy"] <= outcome.history[-1]["mean_client_accuracy"]
    local = outcome.state["local"]
    assert outcome.history[-1]["consensus_distance"] == pytest.approx(
        np.mean([(row - local.mean(0)).square().sum().item() for row in local]), rel=1e-4
    )


def test_rounds_to_target_and_divergence():
    assert rounds_to_target([0.1, 0.8, 0.7, 0.9], 0.8) == 2
    assert rounds_to_target([0.1], 0.8) is None
    assert diverging([1, 11, 200, 3000])
    assert not diverging([0, 11, 200, 3000])
    assert not diverging([11, 200, 3000])
    with pytest.raises(FloatingPointError, match="round 4"):
        check_dispersion([{"round": t + 1, "consensus_distance": 20.0**t} for t in range(4)])


def history_of(*distances):
    return [{"round": t + 1, "drift_from_init": distance**2} for t, distance in enumerate(distances)]


def test_growth_over_the_whole_run():
    steady = history_of(*(2.0 * t for t in range(1, 500)))
    creeping = history_of(*(1.1**t for t in range(1, 120)))
    for length in range(1, len(steady) + 1):
        check_growth(steady[:length], start_norm=3.0)
    check_growth(creeping[:60], start_norm=3.0)
    with pytest.raises(FloatingPointError, match="they diverge; lower learning_rate"):
        check_growth(creeping[:110], start_norm=3.0)
    with pytest.raises(FloatingPointError, match=r"after round 1, .* moved them by 5e\+05"):  # within one round
        check_growth(history_of(5e5), start_norm=3.0)
    check_growth(history_of(0.0, 0.0, 1e-3), start_norm=0.0)  # adapters start at zero


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dfedavg", "momentum", "sam", "prox", "scaffold", "fedavg", "server"])
@pytest.mark.parametrize("engine", ["loop", "stacked"])
def test_no_method_returns_models_that_ran_away(make_training, name, engine):
    """A rate at which weight decay alone makes weights grow 3-fold a step, or a server that overshoots."""
    method = METHODS.get(name) or rounds.fedavg(1.0, 80.0)
    wild = {"weight_decay": 0.1} if name == "server" else {"learning_rate": 4.0, "weight_decay": 1.0}
    training = make_training(method, rounds=40, engine=engine, folder=f"{name}-{engine}", **wild)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        training.run()


def test_nothing_that_is_not_finite_passes(make_training, model):
    states = {
        "the mixed model of client 2": {"local": torch.ones(3, 1), "mixed": torch.tensor([[1], [1], [float("inf")]])},
        "the model of client 1": {
            "server": torch.full((1, 1), float("nan")),
            "local": torch.tensor([[1], [np.nan], [1]]),
        },
        "the model of the server": {"server": torch.full((1, 1), float("inf")), "local": torch.ones(3, 1)},
        "the control variate of the server": {"local": torch.ones(3, 1), "server_control": torch.full((1, 1), np.nan)},
    }
    for named, state in states.items():
        with pytest.raises(FloatingPointError, match=f"{named} is not finite after round 8"):
            check_finite(state, range(3), 7)
    with pytest.raises(FloatingPointError, match="loss is inf after round 1"):
        check_history([{"round": 1, "loss": float("inf")}], 1.0)
    with torch.no_grad():
        model[2].bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"2\.bias of the model holds NaN"):
        make_training(network=model)


def test_trained_values_that_a_half_precision_model_cannot_hold_are_refused(model):
    layout = Layout(model)
    with pytest.raises(ValueError, match=r"0\.weight overflows float16"):
        layout.load(model.half(), torch.full((layout.num_parameters,), 1e5))


def test_models_that_explode_are_named(make_training):
    with pytest.raises(FloatingPointError, match="client 0 is not finite after round 1"):
        make_training(learning_rate=1e38, max_grad_norm=None, weight_decay=1.0).run()


def test_mismatched_parts_are_refused(make_training, make_shards, model):
    with pytest.raises(ValueError, match="graph is of 4 peers"):
        make_training(graph=Graph(name="ring", num_clients=4))
    with pytest.raises(ValueError, match="label 2 does not fit a model of 2 outputs"):
        make_training(network=nn.Linear(8, 2))
    shards = make_shards()
    shards.labels[3] = -1
    with pytest.raises(ValueError, match="label -1 does not fit a model of 3 outputs"):
        make_training(shards=shards)
    with pytest.raises(ValueError, match="no neighbours"):
        make_training(METHODS["fedavg"], engine="peers")
    with pytest.raises(ValueError, match="allow_wavefront"):
        make_training(engine="peers", update_order="sequential")
    with pytest.raises(ValueError, match="client 1 has no sample"):
        make_shards(sizes=(3, 0))
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_training(network=model.requires_grad_(False))
    with pytest.raises(ValueError, match="buffers"):
        StackedEngine(nn.BatchNorm1d(8), make_shards())
