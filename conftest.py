"""For all tests of the repository: an empty home, no files but the machine's own, and examples that take their time.

Tests must find the same things on every machine: what pip installed into the environment, and nothing that someone else
installed or a library once downloaded. Home and data folders are empty for the tests and their subprocesses. In
continuous integration (``CI`` is set), also every file that Python opens and every program that it starts is checked;
what compiled libraries open by themselves is not seen.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

EMPTY_FOLDERS = (
    "HOME",
    "HF_HOME",
    "NLTK_DATA",
    "TORCH_HOME",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_DIRS",
    "XDG_CONFIG_HOME",
    "XDG_DATA_DIRS",
    "XDG_DATA_HOME",
    "XDG_STATE_HOME",
)
# They would name other folders.
UNSET = (
    "HF_ASSETS_CACHE",
    "HF_DATASETS_CACHE",
    "HF_HUB_CACHE",
    "HF_MODULES_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "MPLCONFIGDIR",
    "PLAIT_STORE",
    "TRANSFORMERS_CACHE",
    "WNHOME",
    "WNSEARCHDIR",
)
SYSTEM_FOLDERS = ("/dev", "/etc", "/proc", "/sys", "/usr/share/zoneinfo")
# git and make are what a clone and its tests start with.
SYSTEM_PROGRAMS = ("git", "ldconfig", "make", "sh", "uname")


class NotHermeticError(FileNotFoundError):
    """A test uses what another machine may lack; to libraries that can do without, it is not there."""


class Hermetic:
    """An audit hook that refuses files and programs of other places than those that every machine has.

    These are the repository, the environment, Python's own library without its packages, temporary folders, and a few
    folders and programs of the system.
    """

    def __init__(self, repository: Path) -> None:
        paths = sysconfig.get_paths()
        library = {os.path.realpath(paths[name]) for name in ("stdlib", "platstdlib")}
        packages = {os.path.realpath(paths[name]) for name in ("purelib", "platlib")}
        environment = {sys.prefix} if sys.prefix != sys.base_prefix else packages
        zipped = {f"{os.path.dirname(place)}/python{sys.version_info[0]}{sys.version_info[1]}.zip" for place in library}
        temporary = {tempfile.gettempdir(), "/tmp", "/var/tmp"}
        roots = {str(repository), sys.executable, *library, *zipped, *environment, *temporary, *SYSTEM_FOLDERS}
        self.allowed = _prefixes({*roots, *map(os.path.realpath, roots)})
        # Packages of the Python that the environment was made with are not the environment's.
        kinds = ("site-packages", "dist-packages")
        self.refused = _prefixes({f"{place}/{kind}" for place in library for kind in kinds} - packages)
        found = (shutil.which(name, path="/bin:/sbin:/usr/bin:/usr/sbin") for name in SYSTEM_PROGRAMS)
        self.programs = {os.path.realpath(sys.executable), *(os.path.realpath(path) for path in found if path)}

    def allows(self, path: str) -> bool:
        """Whether the tests may read or write the file or folder at ``path``; links count as what they point to."""
        real = os.path.realpath(path) + os.sep
        return real.startswith(self.allowed) and not real.startswith(self.refused)

    def allows_program(self, program: str, folders: str) -> bool:
        """Whether the tests may start ``program``, searched for in ``folders`` (as in ``PATH``)."""
        found = shutil.which(program, path=folders)
        return found is None or os.path.realpath(found) in self.programs or self.allows(found)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path = arguments[0]
            if isinstance(path, str | bytes) and not self.allows(os.fsdecode(path)):
                raise NotHermeticError(f"{os.fsdecode(path)} is opened, which another machine may lack")
        elif event == "subprocess.Popen":
            program, _, _, environment = arguments
            folders = (environment or os.environ).get("PATH", os.defpath)
            if not self.allows_program(os.fsdecode(program), folders):
                raise NotHermeticError(f"{os.fsdecode(program)} is started, which another machine may lack")


def _prefixes(folders: set[str]) -> tuple[str, ...]:
    return tuple(folder.rstrip(os.sep) + os.sep for folder in sorted(folders))


def empty_home() -> tempfile.TemporaryDirectory[str]:
    """Point home and data folders to empty ones in a new temporary folder, which goes with the returned object."""
    folder = tempfile.TemporaryDirectory(prefix="plait-tests-")
    for name in EMPTY_FOLDERS:
        os.environ[name] = str(Path(folder.name) / name.lower())
        Path(os.environ[name]).mkdir()
    for name in UNSET:
        os.environ.pop(name, None)
    return folder


# Tests compare with tensors of the CPU; the checks of the conformance kit compute on a GPU too, where PLAIT_DEVICE says so.
os.environ.setdefault("PLAIT_DEVICE", "cpu")
if os.environ["PLAIT_DEVICE"].startswith("cuda"):
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # convolutions in full single precision, as on the CPU

# Before any library is imported. Workers of pytest-xdist inherit the folders of the process that started them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _home = empty_home()
if os.environ.get("CI"):
    sys.addaudithook(Hermetic(Path(__file__).parent))

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# Machines are shared: how long an example takes says nothing about the code.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

# Checks of the conformance kit that call a method again and again; make test-fast runs the others.
REPEATED = ("repeatable", "inputs_untouched", "batch_sizes", "goes_on", "resume")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        check = getattr(item, "callspec", None) and item.callspec.params.get("check")
        if getattr(check, "__name__", "").removeprefix("check_") in REPEATED:
            item.add_marker(pytest.mark.slow)
