"""DFedCata as a method: as released or in parallel, the stability check, the small-scale claim on digits."""

import numpy as np
import plait
import pytest
from plait_dfedcata.plugin import DFedCata, OledFL
from plait_federated.evaluation import rounds_to_target
from plait_federated.plugin.data import Digits8x8, Partition
from plait_federated.plugin.models import FederatedModel
from plait_federated.plugin.training import DFedAvg

COMMON = {"batch_size": 16, "active_ratio": 0.2, "engine": "stacked", "output": "all", "checkpoint_every": 100}


@pytest.fixture(scope="module")
def digits():
    return Digits8x8(as_numbers=True).load_data(run=plait.Run())


def problem(digits, seed, num_clients=20):
    run = plait.Run(seed=seed)
    partition = Partition(num_clients=num_clients, scheme="pathological", coefficient=2, drop_remainder=True)
    clients = partition.transform(data=digits, run=run)
    model = FederatedModel(architecture="mlp", mean=(0.305,), std=(0.376,)).load_model(data=clients, run=run)
    return {"model": model, "clients": clients}


def test_as_released_and_what_goes_before_it():
    released, parallel = DFedCata().resolved(), DFedCata(as_released=False).resolved()
    assert (released.update_order, released.anchor, released.weights) == ("sequential", "own_previous", "uniform")
    assert (parallel.update_order, parallel.anchor, parallel.weights) == ("synchronous", "mixed_previous", "metropolis")
    assert (parallel.clip_scope, released.clip_scope) == ("split", "split")
    trap = DFedCata(update_order="synchronous", anchor="own_previous").resolved()
    assert (trap.update_order, trap.anchor) == ("synchronous", "own_previous")
    assert DFedCata(engine="peers").resolved().update_order == "synchronous"
    assert DFedCata(update_order="synchronous").resolved().anchor == "mixed_previous"
    assert DFedCata(as_released=False, topology="exp").resolved().weights == "uniform"


@pytest.mark.slow
def test_an_unstable_combination_is_refused_with_remedies_that_work(digits):
    given = problem(digits, seed=0)
    method = DFedCata(topology="ring", update_order="synchronous", anchor="own_previous", **COMMON)
    with pytest.raises(ValueError) as caught:
        method.aggregate(**given, run=plait.Run())
    message = str(caught.value)
    assert "stability radius 1.5" in message
    for remedy in ("beta: 0.49 or less", "weights: lazy", "anchor: mixed_previous", "update_order: sequential"):
        assert remedy in message
    with pytest.raises(ValueError, match="stability radius"):
        OledFL(topology="ring", update_order="synchronous").aggregate(**given, run=plait.Run())
    lazy = DFedCata(
        topology="ring", update_order="synchronous", anchor="own_previous", weights="lazy", rounds=1, **COMMON
    )
    assert lazy.aggregate(**given, run=plait.Run())["history"]


@pytest.mark.slow
def test_an_unstable_combination_runs_when_it_is_allowed(digits):
    warnings = []
    method = DFedCata(
        topology="ring", update_order="synchronous", anchor="own_previous", allow_unstable=True, rounds=6, **COMMON
    )
    run = plait.Run(on_warning=warnings.append)
    history = method.aggregate(**problem(digits, seed=0), run=run)["history"]
    assert any("stability radius" in warning for warning in warnings)
    distances = [record["consensus_distance"] for record in history]
    assert distances[-1] > 3 * distances[1]


@pytest.mark.slow
def test_models_that_run_away_are_no_result(digits):
    """Allowed to be unstable, on a ring of 20 peers: the weights grow 1.5-fold a round."""
    method = DFedCata(
        topology="ring", update_order="synchronous", anchor="own_previous", allow_unstable=True, rounds=120, **COMMON
    )
    seen = []
    run = plait.Run(on_log=lambda values, step: seen.append(step))
    with pytest.raises(FloatingPointError, match=r"the models are \S+ away from their start, .* they diverge; lower"):
        method.aggregate(**problem(digits, seed=0), run=run)
    assert 6 < len(seen) < 40


@pytest.mark.slow
def test_a_run_reports_its_radius(digits):
    run = plait.Run()
    DFedCata(rounds=1, **COMMON).aggregate(**problem(digits, seed=0), run=run)
    (note,) = [note for report in run.reports for note in report.notes]
    assert note.startswith("as released: own_previous, sequential order, beta 0.9, random graph")
    radius = float(note.rpartition(" ")[2])
    assert radius == pytest.approx(0.63, abs=0.06)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DFedCata(beta=1.0), "beta is 1.0"),
        (lambda: DFedCata(beta=-0.1), "beta is -0.1"),
        (lambda: DFedCata(prox_lambda=-1.0), "prox_lambda"),
        (lambda: DFedCata(learning_rate=0.0), "learning_rate"),
        (lambda: DFedCata(topology="custom"), "exactly one"),
    ],
)
def test_bad_fields_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_proximal_step_that_overshoots_is_refused():
    with pytest.raises(ValueError, match="must be below 1"):
        DFedCata(prox_lambda=10.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "rounds"), [({}, 14), ({"as_released": False, "weights": "uniform"}, 16)], ids=["released", "parallel"]
)
def test_the_claim_over_three_seeds(digits, fields, rounds):
    """20 clients with 2 classes each: rounds to 80 %, accuracy of the last 5, consensus distance.

    Against DFedAvg in the same order, which does not get to 80 % within the rounds.
    """
    ours, common = DFedCata(**fields).resolved(), {**COMMON, "rounds": rounds, "batch_size": 32}
    methods = DFedCata(**fields, **common), DFedAvg(update_order=ours.update_order, **common)
    found = []
    for seed in range(3):
        given = problem(digits, seed)
        histories = [method.aggregate(**given, run=plait.Run(seed=seed))["history"] for method in methods]
        accuracy = np.array([[record["accuracy"] for record in history] for history in histories])
        reached = [rounds_to_target(values, 0.8) or rounds + 1 for values in accuracy]
        found.append([reached, accuracy[:, -5:].mean(1), [history[-1]["consensus_distance"] for history in histories]])
    reached, accuracy, distance = np.mean(found, axis=0)
    assert reached[0] <= 0.65 * reached[1]
    assert accuracy[0] >= accuracy[1] + 0.05
    assert distance[0] <= distance[1]
