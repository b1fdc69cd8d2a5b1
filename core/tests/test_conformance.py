"""The checks pass a good method, and each one fails the method that breaks its promise."""

from pathlib import Path

import attrs
import pytest
from plait.methods import find
from plait.testing import CHECKS, Example, Subject, conformance, run_checks
from plait.testing.examples import example_for

FILE = Path(__file__).with_name("broken.py")


def example(name="Good"):
    made = example_for(find("restore", f"{FILE}:{name}"))
    return attrs.evolve(made, random=True, device=True, budget=0.06)


def results(name):
    subject = Subject(find("restore", f"{FILE}:{name}"), example(name))
    return {check: (sentence, passed) for check, sentence, passed in run_checks(subject)}


test_a_good_method_passes = conformance(f"{FILE}:Good", example=example)


def test_nothing_is_passed_over_for_the_good_method():
    # Images are restored, so there is no model to go on with.
    assert {check for check, (sentence, passed) in results("Good").items() if sentence or not passed} == {"goes_on"}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("GivesFrozen", "the model comes back frozen: give back requires_grad as it came in"),
        ("FreezesSome", "layers.1.bias comes back frozen, and it was not"),
        ("NeedsThawed", "a model whose weights are frozen ends in RuntimeError: element 0"),
        ("SkipsFrozen", "a model whose weights are frozen gives another result"),
    ],
)
def test_models_that_cannot_go_on(name, sentence):
    method = find("optimize", f"{FILE}:{name}")
    found = {check: said for check, said, passed in run_checks(Subject(method, example_for(method))) if not passed}
    assert sentence in found["goes_on"]


def test_a_model_that_is_moved_to_another_device():
    method = find("optimize", f"{FILE}:MovesItsModel")
    found = {check: said for check, said, passed in run_checks(Subject(method, example_for(method))) if not passed}
    assert "model is moved to meta: move a copy: copy.deepcopy(model).to(run.device)" in found["inputs_untouched"]


@pytest.mark.slow
@pytest.mark.parametrize("check", sorted({check.__name__.removeprefix("check_") for check in CHECKS} - {"goes_on"}))
def test_every_check_can_fail(check):
    broken = "".join(part.capitalize() for part in check.split("_"))
    found = results(broken)
    sentence, passed = found[check]
    assert not passed
    assert sentence


def test_a_method_that_is_not_random_though_it_says_so(tmp_path):
    subject = Subject(
        find("load_data", "plait.demo.methods:Digits"), Example(arguments={}, random=True, progress=False)
    )
    assert "another seed gives the same result" in {n: s for n, s, _ in run_checks(subject)}["repeatable"]


@pytest.mark.parametrize("name", ["Digits", "Noise", "SmallClassifier", "Training", "Accuracy", "Error"])
def test_the_tiny_world_keeps_its_promises(name):
    from plait.testing.checks import subjects

    for subject in subjects(f"plait.demo.methods:{name}"):
        assert [(check, sentence) for check, sentence, passed in run_checks(subject) if not passed] == []
