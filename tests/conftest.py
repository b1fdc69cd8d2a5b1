"""Fresh environments outside the checkout, with packages from wheels."""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import attrs
import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]


# The backends that the packages name, all in one process: starting one for each costs more than the wheels.
BUILD = """
import importlib, os, sys, tomllib
folder, *packages = sys.argv[1:]
for package in packages:
    os.chdir(package)
    with open("pyproject.toml", "rb") as file:
        backend = tomllib.load(file)["build-system"]["build-backend"]
    importlib.import_module(backend).build_wheel(folder)
"""
# Several commands in one process: what they import takes most of the time.
COMMANDS = """
import json, sys
from click.testing import CliRunner
from plait.cli import main
done = [CliRunner().invoke(main, words) for words in json.loads(sys.argv[1])]
with open(sys.argv[2], "w") as file:
    json.dump([[one.exit_code, one.output] for one in done], file)
"""


@attrs.frozen
class Environment:
    """A virtual environment of its own, and a folder to work in that is no checkout."""

    folder: Path
    work: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, *packages: Path, editable: Path | None = None) -> None:
        """Install wheels, and wheels built of folders, with pip; it fetches nothing of what they require.

        Links offer that, from the first run on.
        """
        folders = [package for package in packages if package.is_dir()]
        built = self.folder / "built"
        if folders:
            build(folders, built)
        wheels = [*(package for package in packages if package not in folders), *built.glob("*.whl")]
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "--quiet"]
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile"]
        command = [*pip, "install", *options, *wheels, *(["--editable", editable] if editable else [])]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)

    def run(self, *command: str | Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment in the working folder."""
        self._link_libraries()
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PLAIT_STORE", "VIRTUAL_ENV")}
        environment["PATH"] = f"{self.folder / 'bin'}:{environment['PATH']}"
        done = subprocess.run(
            [str(self.folder / "bin" / str(command[0])), *map(str, command[1:])],
            capture_output=True,
            text=True,
            cwd=self.work,
            env=environment,
            timeout=540,
        )
        assert not ok or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def commands(self, *lines: str, then: str = "") -> list[tuple[int, str]]:
        """Exit code and output of several ``plait`` commands in one process, and of the code ``then`` at its end."""
        file = self.work / "commands.json"
        words = json.dumps([shlex.split(line)[1:] for line in lines])
        done = self.run("python", "-c", COMMANDS + then, words, file, ok=False)
        assert file.exists(), done.stderr
        told = [(code, output) for code, output in json.loads(file.read_text())]
        file.unlink()
        return [*told, (done.returncode, done.stdout + done.stderr)]

    def _link_libraries(self) -> None:
        # Not before pip installs: it reads the metadata of every library that is there.
        own = next(self.folder.glob("lib/python*/site-packages"))
        for library in Path(sysconfig.get_path("purelib")).iterdir():
            link = own / library.name
            if not re.match(r"_?plait|__pycache__|pip|.*\.pth$|__editable__", library.name) and not link.is_symlink():
                link.symlink_to(library)


def build(packages: list[Path], folder: Path) -> None:
    """Build wheels."""
    command = [sys.executable, "-P", "-c", BUILD, str(folder), *map(str, packages)]
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """A folder with the wheels of the core and of every plugin; the workers of one run of the tests share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "dist"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            build([ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))], base / "new")
            (base / "new").rename(folder)
    return folder


@pytest.fixture
def environment(tmp_path):
    """An environment without any plait package; third-party libraries are links to those of this one."""
    folder, work = tmp_path / "env", tmp_path / "work"
    work.mkdir()
    venv.create(folder, with_pip=False, symlinks=True)
    return Environment(folder, work)
