"""Fresh environments outside the checkout, with packages from wheels."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import attrs
import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]


@attrs.frozen
class Environment:
    """A virtual environment of its own, and a folder to work in that is no checkout."""

    folder: Path
    work: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, *arguments: str | Path) -> None:
        """Install with pip, without fetching what the packages require: a path file offers that."""
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
        ]
        subprocess.run([*command, *map(str, arguments)], check=True, capture_output=True, text=True)

    def run(self, *command: str | Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment in the working folder."""
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


def build(packages: list[Path], folder: Path) -> None:
    """Build wheels."""
    for package in packages:
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(package)]
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
    own = next(folder.glob("lib/python*/site-packages"))
    for library in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.match(r"_?plait|__pycache__|pip|.*\.pth$|__editable__", library.name):
            (own / library.name).symlink_to(library)
    return Environment(folder, work)
