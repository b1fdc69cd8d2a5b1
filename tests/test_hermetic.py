"""The check that tests use nothing but what every machine has."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The conftest of the repository alone, as a run of the tests loads it first.
CHECKED = f"""
import os, pathlib, runpy, subprocess, sys
runpy.run_path({str(ROOT / "conftest.py")!r})
"""


def checked(code, **environment):
    """Run code under the check."""
    bare = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_XDIST_WORKER")}
    return subprocess.run(
        [sys.executable, "-c", CHECKED + code], env=bare | environment, capture_output=True, text=True, timeout=120
    )


LACKING = (
    "open('/bin/sh', 'rb')",
    "pathlib.Path('/usr/share/wordnet/index.noun').read_text()",
    "os.symlink('/usr', 'link'); open('link/share/words')",
    "subprocess.run(['/bin/cat', '/dev/null'])",
    "subprocess.run(['cat', '/dev/null'])",
)


def test_what_another_machine_may_lack_is_refused(tmp_path):
    code = f"""
for number, code in enumerate({LACKING!r}):
    folder = pathlib.Path({str(tmp_path)!r}, os.environ.get("CI", "") + str(number))
    folder.mkdir()
    os.chdir(folder)
    try:
        exec(code)
    except OSError as error:
        print(type(error).__name__, error)
    else:
        print("allowed")
"""
    refused = checked(code, CI="true").stdout.splitlines()
    assert len(refused) == len(LACKING)
    for line in refused:
        assert line.startswith("NotHermeticError ")
        assert line.endswith("which another machine may lack")
    unchecked = checked(code).stdout.splitlines()
    assert len(unchecked) == len(LACKING)
    assert not [line for line in unchecked if "NotHermeticError" in line]


def test_what_every_machine_has_is_allowed():
    code = """
import importlib.metadata, json, tempfile, zoneinfo
import attrs
open("/proc/self/status").close()
open(sys.executable, "rb").close()
tempfile.TemporaryFile().close()
subprocess.run([sys.executable, "-c", "0"], check=True)
subprocess.run("exit 0", shell=True, check=True)
"""
    done = checked(code, CI="true")
    assert done.returncode == 0, done.stderr


def test_packages_of_the_python_below_the_environment_are_refused():
    code = """
import sysconfig
below = pathlib.Path(os.path.realpath(sysconfig.get_path("stdlib"))) / "site-packages" / "pip" / "__init__.py"
open(below)
"""
    if sys.prefix == sys.base_prefix:
        return  # then they are the environment's
    assert "NotHermeticError" in checked(code, CI="true").stderr


def test_home_and_data_folders_are_empty_and_go_with_the_tests():
    code = """
for name in ("HOME", "NLTK_DATA", "HF_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
    assert os.listdir(os.environ[name]) == [], name
assert "WNSEARCHDIR" not in os.environ
print(subprocess.run([sys.executable, "-c", "import os; print(os.environ['HOME'])"], capture_output=True, text=True).stdout)
"""
    done = checked(code, WNSEARCHDIR="/usr/share/wordnet")
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).exists()
