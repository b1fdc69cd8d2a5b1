"""Every template makes a package that installs, keeps every promise, passes its own tests and runs."""

import pytest
from plait.hookspecs import HOOKS
from plait.testing import CHECKS

NAMES = {
    "my-" + "-".join(hooks).replace("_", "-"): hooks for hooks in ([[hook] for hook in HOOKS] + [["attack", "defend"]])
}
# The packages' own tests. Conformance tests run what plait check has run already: those of one package are enough.
TESTS = """
import pathlib, pytest
assert "site-packages" in sys.modules["plait"].__file__
tests = sorted(map(str, pathlib.Path().glob("*/tests")))
left_out = [f"--deselect={folder}/test_conformance.py" for folder in tests if folder != "my-transform/tests"]
sys.exit(pytest.main(["-v", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir=.", *left_out, *tests]))
"""


@pytest.mark.slow
def test_new_packages_work_at_once(environment, wheels):
    environment.install(next(wheels.glob("plait-0*.whl")))
    made = environment.commands(
        *(f"plait new {name} {' '.join(f'--hook {hook}' for hook in hooks)}" for name, hooks in NAMES.items())
    )
    assert [code for code, _ in made] == [0] * len(made), made
    *others, last = (environment.work / name for name in NAMES)
    environment.install(*others, editable=last)

    checks = [f"plait check {name}" for name in NAMES]
    runs = [
        f"plait run {name}/pipelines/demo.yaml matrix.seed={'[0,1]' if len(hooks) > 1 else '[0]'}"
        for name, hooks in NAMES.items()
    ]
    *told, (failed, tested) = environment.commands(*checks, *runs, then=TESTS)
    for command, (code, output) in zip([*checks, *runs], told, strict=True):
        assert code == 0, f"{command}\n{output}"
        assert ("all checks passed" if command in checks else "report: ") in output, f"{command}\n{output}"
    assert not failed, tested
    for name in NAMES:
        assert f"\n{name}/tests/" in tested, tested
    assert tested.count("\nmy-transform/tests/test_conformance.py::") == len(CHECKS)


@pytest.mark.slow
def test_names_that_are_taken_or_not_allowed(environment, wheels):
    environment.install(next(wheels.glob("plait-0*.whl")))
    environment.commands("plait new two --hook transform")
    environment.install(environment.work / "two")
    parts = {
        "two": "taken by two",
        "ensir": "has a package",
        "A b": "cannot be",
        "torch": "would hide",
        "fgsam": "has a package",
    }
    refused = environment.commands(*(f"plait new '{name}' --hook transform --in elsewhere" for name in parts))
    for (code, output), part in zip(refused[:-1], parts.values(), strict=True):
        assert code == 1
        assert part in output
