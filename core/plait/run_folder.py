"""The folder of a run: what was asked for, what ran it, and how to write its report again."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from plait.configuration import plain
from plait.errors import PlaitError, writing
from plait.pipeline import Pipeline, Step
from plait.plan import Plan, Task
from plait.report.document import Repeat
from plait.store import Store
from plait.versions import LIBRARIES


def make_folder(out: Path, pipeline: Pipeline) -> Path:
    """A new folder below ``out``, with a copy of the pipeline file.

    Raises:
        PlaitError: it cannot be written.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = out / pipeline.name / f"{stamp}-{uuid.uuid4().hex[:4]}"
    with _writing(folder):
        folder.mkdir(parents=True)
        if pipeline.source:
            shutil.copyfile(pipeline.source, folder / "pipeline.yaml")
    return folder


def _writing(folder: Path) -> contextlib.AbstractContextManager[None]:
    return writing(f"the run folder {folder}", "name another place with --out")


def write_provenance(folder: Path, pipeline: Pipeline, plan: Plan, store: Store) -> None:
    """Write ``provenance.json`` (command, versions, keys) and ``resolved.json`` (what every step resolved to).

    Raises:
        PlaitError: they cannot be written.
    """
    facts = {
        "command": sys.argv,
        "platform": platform.platform(),
        "python": sys.version,
        "git commit": _git_commit(pipeline.folder),
        "store": str(store.root),
        "folder": str(pipeline.folder),
        "distributions": _distributions(),
        "steps": [
            {
                "label": t.label,
                "key": t.key,
                "method": t.step.method.name,
                "package": t.step.method.package,
                "version": t.step.method.version,
                "seed": t.step.seed,
            }
            for t in plan.tasks
        ],
    }
    resolved = {"pipeline": pipeline.data, "steps": {task.label: _resolved(task.step) for task in plan.tasks}}
    with _writing(folder):
        (folder / "provenance.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        (folder / "resolved.json").write_text(json.dumps(plain(resolved), indent=1), encoding="utf-8")


def read_provenance(folder: Path) -> dict[str, Any]:
    """What :func:`write_provenance` wrote.

    Raises:
        PlaitError: ``folder`` is not a run folder.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlaitError(f"{folder} is not a run folder: it has no provenance.json that can be read") from error
    return facts


def store_of(folder: Path) -> Store:
    """The store that the run in ``folder`` used."""
    return Store(Path(read_provenance(folder)["store"]))


def command_of(provenance: Mapping[str, Any]) -> str:
    """The command line of a run, or the program that called ``plait.run``."""
    program, *arguments = provenance.get("command") or [""]
    name = Path(program).name
    if name == "plait" or (name in ("__main__.py", "cli.py") and Path(program).parent.name == "plait"):
        return shlex.join(["plait", *arguments])
    return (
        f"plait.run(…) in {name or 'Python'}" if not arguments else f"plait.run(…) in {shlex.join([name, *arguments])}"
    )


def repeat_of(folder: Path, tasks: Sequence[Task], store: Store) -> Repeat:
    """How to repeat the run in ``folder``, whose finished steps are ``tasks``."""
    facts = read_provenance(folder)
    metas = {task.label: entry.meta for task in tasks if (entry := store.entry(task.key)) is not None}
    seconds = {label: float(meta["seconds"]) for label, meta in metas.items() if "seconds" in meta}
    machines = sorted({meta["hardware"] for meta in metas.values() if meta.get("hardware")})
    versions = facts.get("distributions", {})
    libraries = [f"{name} {versions[name]}" for name in LIBRARIES if name in versions]
    seeds = sorted({step["seed"] for step in facts.get("steps", ())})
    command = command_of(facts)
    shown = {
        "command": command,
        "folder of the pipeline": facts.get("folder"),
        "seeds": ", ".join(map(str, seeds[:20])) + (" …" if len(seeds) > 20 else ""),
        "plait": versions.get("plait"),
        "libraries": ", ".join(libraries),
        "Python": str(facts.get("python", "")).partition(" ")[0],
        "system": facts.get("platform"),
        "hardware": "; ".join(machines),
        "commit": facts.get("git commit"),
        "run folder": folder.name,
    }
    return Repeat(command, [(name, str(text)) for name, text in shown.items() if text], versions, seconds)


@functools.cache
def _distributions() -> dict[str, str]:
    return dict(sorted((d.metadata["Name"], d.version) for d in metadata.distributions()))


def _resolved(step: Step) -> dict[str, Any]:
    inputs = {argument: _plain_references(value) for argument, value in step.inputs.items()}
    return {
        "hook": step.hook,
        "method": step.method.name,
        "with": plain(step.instance),
        "from": inputs,
        "seed": step.seed,
    }


def _plain_references(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain_references(item) for name, item in value.items()}
    return [_plain_references(item) for item in value] if isinstance(value, list) else str(value)


def _git_commit(folder: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
