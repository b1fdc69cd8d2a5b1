"""Names, arguments, budgets, and attacks that do attack."""

import numpy as np
import plait
import pytest
import torch
from plait.demo.pictures import digits
from plait.testing.examples import classifier as toy
from plait_torchattacks.library import NAMES, budget, parameters
from plait_torchattacks.plugin import Torchattacks
from plait_vision.recognition import Accuracy, ClassifierTraining
from torch import nn

# Small, and enough to change an image.
QUICK = {
    "OnePixel": {"steps": 1, "popsize": 2}, "Pixle": {"restarts": 2, "max_iterations": 2}, "Square": {"n_queries": 20},
    "SparseFool": {"steps": 2}, "DeepFool": {"steps": 3}, "PGDRS": {"noise_batch_size": 2, "steps": 2},
    "PGDRSL2": {"noise_batch_size": 2, "steps": 2}, "TIFGSM": {"steps": 2, "len_kernel": 3}, "FAB": {"steps": 3},
    "CW": {"steps": 30, "lr": 0.1, "c": 10},
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return digits(60)


@pytest.fixture(scope="module")
def trained(data):
    method = ClassifierTraining(num_epochs=40, batch_size=30, learning_rate=0.02)
    return method.optimize(model=toy(), data=data, run=plait.Run())


def accuracy(model, data, **fields):
    return Accuracy(**fields).evaluate(model=model, data=data, run=plait.Run())


def change(data, moved):
    before, after = (np.stack([np.asarray(image, dtype=int) for image in part["image"]]) for part in (data, moved))
    return (after - before).reshape(len(data), -1) / 255


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("AutoAttack", "VANILA")])
def test_every_attack_runs_and_holds_its_budget(name, data, trained):
    few = data.select(range(12))
    known = parameters(name)
    arguments = QUICK.get(name, {"steps": 2} if "steps" in known else {})
    method = Torchattacks(name=name, arguments=arguments, batch_size=5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    moved = method.attack(model=trained, data=few, run=plait.Run(on_warning=lambda message: None))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    difference = change(few, moved)
    epsilon, norm = budget(name, arguments)
    if epsilon is not None:
        size = np.abs(difference).max(1) if norm == "linf" else np.sqrt((difference**2).sum(1))
        assert size.max() <= epsilon + 1e-9
    if name not in (
        "APGD",
        "APGDT",
        "FAB",
        "OnePixel",
        "Pixle",
        "SparseFool",
        "Square",
    ):  # those leave what they cannot fool
        assert np.abs(difference).max() > 0


@pytest.mark.slow
def test_autoattack_is_the_strongest(data, trained):
    few = data.select(range(8))
    run = plait.Run(on_warning=lambda message: None)
    fields = {"arguments": {"eps": "24/255"}}
    clean = accuracy(trained, few).value("accuracy")
    weak, strong = (
        accuracy(trained, Torchattacks(name=name, **fields).attack(model=trained, data=few, run=run)).value("accuracy")
        for name in ("FGSM", "AutoAttack")
    )
    assert strong <= weak < clean


def test_attacks_know_how_many_classes_there_are(data):
    few = data.select([row for row in range(30) if data[row]["label"] < 5])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    run = plait.Run(on_warning=lambda message: None)
    moved = Torchattacks(name="APGDT", arguments={"eps": 1 / 4}).attack(model=model, data=few, run=run)
    assert accuracy(model, moved).value("accuracy") <= accuracy(model, few).value("accuracy")


def test_a_target_is_led_to(data, trained):
    moved = Torchattacks(name="PGD", arguments={"eps": 0.3, "alpha": 0.05}, target="7").attack(
        model=trained, data=data, run=plait.Run(on_warning=lambda message: None)
    )
    assert accuracy(trained, moved, target="7").value("ASR") > accuracy(trained, data, target="7").value("ASR") + 0.3
    with pytest.raises(ValueError, match="has no targeted mode"):
        Torchattacks(name="DeepFool", target="7").attack(model=trained, data=data, run=plait.Run())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "pdg"}, "did you mean 'PGD'"),
        ({"name": "MultiAttack"}, "made of other attacks"),
        ({"name": "PGD", "arguments": {"epsilon": 0.1}}, "did you mean 'eps'"),
        ({"name": "PGD", "arguments": {"eps": "much"}}, "a number is needed"),
        ({"name": "PGD", "arguments": {"random_start": 1}}, "a value such as True"),
        ({"name": "PGD", "arguments": {"eps": 0.001}}, "below one 8-bit level"),
        ({"name": "FAB", "arguments": {"norm": "L1"}}, "norm of FAB is 'L1'"),
    ],
)
def test_mistakes_are_told_before_the_run(fields, message):
    with pytest.raises(ValueError, match=message):
        Torchattacks(**fields)


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = toy()

    def forward(self, images):
        with torch.no_grad():
            return self.inner(images)


def test_a_model_without_gradient_is_attacked_by_answers_or_refused(data):
    few = data.select(range(4))
    run = plait.Run(on_warning=lambda message: None)
    with pytest.raises(ValueError, match="no gradient"):
        Torchattacks(name="PGD").attack(model=Rounded(), data=few, run=run)
    Torchattacks(name="Square", arguments={"n_queries": 5}).attack(model=Rounded(), data=few, run=run)


def test_what_the_library_refuses_is_one_sentence(data):
    with pytest.raises(
        ValueError, match="AutoAttack of torchattacks refuses its arguments: ValueError: Not valid version"
    ):
        Torchattacks(name="AutoAttack", arguments={"version": "new"}).attack(model=toy(), data=data, run=plait.Run())
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    two = data.select([row for row in range(60) if data[row]["label"] < 2])
    for fields, needed in (({"name": "AutoAttack"}, 4), ({"name": "APGD", "arguments": {"loss": "dlr"}}, 3)):
        with pytest.raises(ValueError, match=f"needs {needed} classes, and the model tells 2 apart"):
            Torchattacks(**fields).attack(model=model, data=two, run=plait.Run())
