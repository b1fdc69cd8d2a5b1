"""The set-up that `make demo` and `make test` begin with: quiet, and one sentence where it fails."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


# `make test` runs these tests: what it tells the makes below it would make them talk.
OUTER = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}


def set_up(folder, *settings, **environment):
    done = subprocess.run(
        ["make", f"VENV={folder}", *settings, f"{folder}/.ready"],
        cwd=ROOT,
        env={**OUTER, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    # The last line is make's own.
    return done.stdout.splitlines(), done.stderr.splitlines()[:-1]


@pytest.mark.slow
def test_a_failing_pip_is_one_sentence_and_its_log(tmp_path):
    folder = tmp_path / "env"
    nothing = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "nowhere"), "PIP_CONFIG_FILE": os.devnull}
    said, (problem,) = set_up(folder, **nothing)
    assert said == [f"setting up {folder}, which takes a few minutes"]
    assert problem.startswith(("set-up failed: ERROR: Cannot install", "set-up failed: ERROR: Could not find"))
    assert problem.endswith(f"; see {folder}/set-up.log")
    assert "nowhere" in (folder / "set-up.log").read_text()


def test_a_python_that_does_not_fit_is_one_sentence(tmp_path):
    said, (problem,) = set_up(tmp_path / "env", "PYTHON=no-such-python")
    assert said == []
    assert problem.startswith("set-up failed: no-such-python is not Python 3.11 or newer; name one that is")
    assert not (tmp_path / "env").exists()
