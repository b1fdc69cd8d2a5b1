"""Every template makes a package that installs, keeps every promise, passes its own tests and runs."""

import pytest
from plait.hookspecs import HOOKS

# One process for the whole life of a package: importing torch is most of the time.
LIFE = """
import sys
import plait
assert "site-packages" in plait.__file__
from plait.cli import main
name = sys.argv[1]
main(["check", name], standalone_mode=False)
main(["run", f"{name}/pipelines/demo.yaml", "matrix.seed=[0,1]"], standalone_mode=False)
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"{name}/tests", "--deselect", f"{name}/tests/test_conformance.py"]))
"""


@pytest.fixture
def with_core(environment, wheels):
    environment.install(next(wheels.glob("plait-0*.whl")))
    return environment


@pytest.mark.slow
@pytest.mark.parametrize("hook", [[hook] for hook in HOOKS] + [["attack", "defend"]], ids="-".join)
def test_a_new_package_works_at_once(with_core, hook):
    name = "my-" + "-".join(hook).replace("_", "-")
    with_core.run("plait", "new", name, *(word for one in hook for word in ("--hook", one)))
    with_core.install("-e", with_core.work / name)
    done = with_core.run("python", "-c", LIFE, name).stdout
    assert done.count("all checks passed") == 1
    assert "report: " in done
    assert " passed" in done.rpartition("report: ")[2]


def test_the_generated_conformance_test_runs_the_checks(with_core):
    with_core.run("plait", "new", "mine", "--hook", "transform")
    with_core.install("-e", with_core.work / "mine")
    done = with_core.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "mine/tests").stdout
    assert "14 passed" in done


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
