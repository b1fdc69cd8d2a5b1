"""Every step starts from the same global state, and gives it back."""

import locale
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import plait
import pytest
import torch
from plait.surroundings import same_surroundings

LEAKS = """
import locale, os, random, sys, warnings
import attrs
from plait import hookimpl

@attrs.frozen
class Leak:
    what: str = "none"
    @hookimpl
    def load_data(self, run):
        import numpy, torch
        found = {
            "dtype": str(torch.get_default_dtype()), "grad": torch.is_grad_enabled(), "matmul": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(), "benchmark": torch.backends.cudnn.benchmark,
            "cwd": os.getcwd(), "recursion": sys.getrecursionlimit(), "variable": os.environ.get("PLAIT_TEST_LEAK"),
            "locale": locale.setlocale(locale.LC_ALL), "filters": len(warnings.filters), "numpy errors": numpy.geterr()["divide"],
            "draws": [random.random(), float(numpy.random.rand()), float(torch.rand(()))],
        }
        {"none": lambda: None,
         "dtype": lambda: torch.set_default_dtype(torch.float64),
         "grad": lambda: torch.set_grad_enabled(False),
         "matmul": lambda: torch.set_float32_matmul_precision("medium"),
         "deterministic": lambda: torch.use_deterministic_algorithms(True),
         "benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
         "cwd": lambda: os.chdir("/"),
         "recursion": lambda: sys.setrecursionlimit(5000),
         "variable": lambda: os.environ.__setitem__("PLAIT_TEST_LEAK", "1"),
         "locale": lambda: locale.setlocale(locale.LC_ALL, "C"),
         "filters": lambda: warnings.simplefilter("error"),
         "numpy errors": lambda: numpy.seterr(all="raise"),
         "draws": lambda: (random.seed(1), numpy.random.seed(1), torch.manual_seed(1)),
        }[self.what]()
        return found
"""
WHAT = [
    "dtype",
    "grad",
    "matmul",
    "deterministic",
    "benchmark",
    "cwd",
    "recursion",
    "variable",
    "locale",
    "filters",
    "numpy errors",
    "draws",
]


def state():
    return (
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, os.getcwd(), sys.getrecursionlimit(),
        os.environ.get("PLAIT_TEST_LEAK"), locale.setlocale(locale.LC_ALL), list(warnings.filters), np.geterr(),
        random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
    )  # fmt: skip


@pytest.fixture
def leaks(workplace):
    Path("m.py").write_text(LEAKS)
    steps = [f"  after-{what.replace(' ', '-')}: {{load-data: './m.py:Leak'}}" for what in WHAT]
    steps = [
        line
        for what, after in zip(WHAT, steps, strict=True)
        for line in (f"  {what.replace(' ', '-')}: {{load-data: './m.py:Leak', with: {{what: '{what}'}}}}", after)
    ]
    Path("p.yaml").write_text("plait: 1\nname: leaks\nsteps:\n" + "\n".join(steps) + "\n")
    return workplace


def found(result):
    return {label: result[label] for label in result}


@pytest.mark.slow
def test_whatever_leaks_is_undone_and_the_same_in_every_process(leaks):
    before = state()
    warm = found(plait.run("p.yaml"))
    assert state() == before
    for label, facts in warm.items():
        assert (facts["dtype"], facts["grad"], facts["matmul"]) == ("torch.float32", True, "highest"), label
        assert not facts["deterministic"], label
        assert not facts["benchmark"], label
        assert facts["variable"] is None, label
        assert facts["cwd"] == str(leaks), label
    assert len({tuple(facts["draws"]) for facts in warm.values()}) == len(warm)
    shared = {name: value for name, value in warm["dtype"].items() if name != "draws"}
    assert all({**shared, "draws": facts["draws"]} == facts for facts in warm.values())
    done = subprocess.run(
        [sys.executable, "-m", "plait.cli", "run", "p.yaml", "--jobs", "4", "--store", "fresh", "--quiet"],
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    fresh = found(plait.run("p.yaml", store="fresh"))
    assert {label: facts["draws"] for label, facts in fresh.items()} == {
        label: facts["draws"] for label, facts in warm.items()
    }
    assert {facts["dtype"] for facts in fresh.values()} == {"torch.float32"}


@pytest.mark.slow
def test_a_library_that_is_imported_in_the_step_is_seeded_too_and_keeps_no_cache(workplace):
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk("mine")
    files = sorted(Path("mine").iterdir())
    Path("m.py").write_text("""
import attrs
from plait import hookimpl
@attrs.frozen
class Draw:
    @hookimpl
    def load_data(self, run):
        import datasets, numpy, torch
        datasets.load_from_disk("mine").map(lambda row: {"b": row["a"] + 1})
        return [float(numpy.random.rand()), float(torch.rand(()))]
""")
    Path("p.yaml").write_text("plait: 1\nsteps: {a: {load-data: './m.py:Draw'}}\n")
    warm = plait.run("p.yaml")["a"]
    command = "import sys, plait; r = plait.run('p.yaml', store='fresh'); print(r['a'])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(warm)
    assert sorted(Path("mine").iterdir()) == files


def flags():
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def test_deterministic_kernels_are_for_gpus_and_for_whoever_asks(monkeypatch):
    with same_surroundings(0, deterministic=True):
        assert flags() == (torch.cuda.is_available(),) * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for wanted in (False, True):
        with same_surroundings(0, deterministic=wanted):
            assert flags() == (wanted, wanted)
            assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == wanted
        assert flags() == (False, False)
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_every_step_of_a_run_hears_that_it_is_to_be_deterministic(leaks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for wanted in (True, False):
        result = plait.run("p.yaml", to=["grad", "after-grad"], deterministic=wanted, store=f"store-{wanted}")
        assert [facts["deterministic"] for facts in found(result).values()] == [wanted, wanted]
