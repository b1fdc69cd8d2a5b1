"""Every template makes a package that installs, keeps every promise, passes its own tests and runs."""

import json

import pytest
from plait.hookspecs import HOOKS
from plait.testing import CHECKS

# One process for the whole life of all packages: importing torch is most of the time.
LIFE = """
import contextlib, io, json, sys, traceback
import plait
assert "site-packages" in plait.__file__
import pytest
from plait.cli import main

def live(name):
    main(["check", name], standalone_mode=False)
    main(["run", f"{name}/pipelines/demo.yaml", "matrix.seed=[0,1]"], standalone_mode=False)
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={name}"]
    assert pytest.main([*options, f"{name}/tests", "--deselect", f"{name}/tests/test_conformance.py"]) == 0

told = {}
for name in sys.argv[2:]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            live(name)
        except BaseException:
            traceback.print_exc(file=said)
    told[name] = said.getvalue()
with open(sys.argv[1], "w") as file:
    json.dump(told, file)
"""
TEMPLATES = [[hook] for hook in HOOKS] + [["attack", "defend"]]


@pytest.fixture
def with_core(environment, wheels):
    environment.install(next(wheels.glob("plait-0*.whl")))
    return environment


@pytest.mark.slow
def test_new_packages_work_at_once(with_core):
    names = {"my-" + "-".join(hooks).replace("_", "-"): hooks for hooks in TEMPLATES}
    for name, hooks in names.items():
        with_core.run("plait", "new", name, *(word for hook in hooks for word in ("--hook", hook)))
    with_core.install(*(word for name in names for word in ("-e", with_core.work / name)))
    with_core.run("python", "-c", LIFE, "told.json", *names)
    told = json.loads((with_core.work / "told.json").read_text())
    assert list(told) == list(names)
    for name, text in told.items():
        assert text.count("all checks passed") == 1, f"{name}\n{text}"
        assert "report: " in text, f"{name}\n{text}"
        assert " passed" in text.rpartition("report: ")[2], f"{name}\n{text}"


@pytest.mark.slow
def test_the_generated_conformance_test_runs_the_checks(with_core):
    with_core.run("plait", "new", "mine", "--hook", "transform")
    with_core.install("-e", with_core.work / "mine")
    done = with_core.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "mine/tests").stdout
    assert f"{len(CHECKS) + 1} passed" in done


@pytest.mark.slow
def test_names_that_are_taken_or_not_allowed(with_core):
    with_core.run("plait", "new", "two", "--hook", "transform")
    with_core.install("-e", with_core.work / "two")
    for name, part in {
        "two": "taken by two",
        "ensir": "has a package",
        "A b": "cannot be",
        "torch": "would hide",
        "fgsam": "has a package",
    }.items():
        refused = with_core.run("plait", "new", name, "--hook", "transform", "--in", "elsewhere", ok=False)
        assert refused.returncode == 1
        assert part in refused.stderr
