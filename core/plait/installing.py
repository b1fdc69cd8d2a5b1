"""``plait install``: pip, in the running environment, with what the catalogue knows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from plait.catalogue import catalogue
from plait.errors import PlaitError, nearest
from plait.hookspecs import HOOKS


def requirement_of(name: str) -> str:
    """The requirement for a package, a method or a paper's short name.

    Raises:
        PlaitError: it is not in the catalogue, or planned only.
    """
    packages = catalogue()
    found = name if name in packages else f"plait-{name}" if f"plait-{name}" in packages else None
    if found is None:
        owners = [
            p for p, entry in packages.items() if any(name in entry.get("methods", {}).get(hook, ()) for hook in HOOKS)
        ]
        if len(owners) > 1:
            raise PlaitError(f"{name!r} is a method of {' and '.join(owners)}; name the package")
        found = owners[0] if owners else None
    if found is None:
        known = [*packages, *(m for e in packages.values() for ms in e.get("methods", {}).values() for m in ms)]
        raise PlaitError(
            f"the catalogue has no {name!r}{nearest(name, known) or '; plait list --all shows what there is'}"
        )
    if packages[found].get("status") == "planned":
        raise PlaitError(f"{found} is planned and not released yet")
    return str(packages[found].get("requirement") or found)


def install(names: list[str], folder: Path | None) -> None:
    """Install packages with pip; from wheels in ``folder`` where one is named.

    Raises:
        PlaitError: unknown names, a folder without such a wheel, or pip failed (its output is shown).
    """
    requirements = [requirement_of(name) for name in names]
    command = [sys.executable, "-m", "pip", "install"]
    if folder is not None:
        command += [str(wheel) for requirement in requirements for wheel in _wheels(requirement, folder)]
    else:
        command += requirements
    if subprocess.run(command).returncode:
        raise PlaitError(f"pip could not install {', '.join(requirements)}; its messages are above")


def _wheels(requirement: str, folder: Path, seen: frozenset[str] = frozenset()) -> list[Path]:
    """The wheel of a package and, from the same folder, of the plait packages that it requires."""
    name = re.split(r"[ ;<>=!~\[]", requirement, maxsplit=1)[0]
    wheels = sorted(folder.glob(f"{name.replace('-', '_')}-[0-9]*.whl"))
    if not wheels:
        if seen:
            return []  # a requirement that pip finds elsewhere, or has already
        raise PlaitError(f"{folder} has no wheel of {name}; make wheels builds them")
    from zipfile import ZipFile

    with ZipFile(wheels[-1]) as wheel:
        metadata = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        lines = wheel.read(metadata).decode().splitlines()
    needed = [
        line.removeprefix("Requires-Dist: ")
        for line in lines
        if line.startswith("Requires-Dist: plait") and "extra ==" not in line
    ]
    found = [wheels[-1]]
    for other in needed:
        if re.split(r"[ ;<>=!~\[]", other, maxsplit=1)[0] not in seen:
            found += [w for w in _wheels(other, folder, seen | {name}) if w not in found]
    return found
