"""The folder of a run: what was asked for, what ran it, and how to write its report again."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from plait.configuration import plain
from plait.errors import PlaitError
from plait.pipeline import Pipeline, Step
from plait.plan import Plan
from plait.store import Store


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


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PlaitError(
            f"the run folder {folder} cannot be written ({error.strerror}); name another place with --out"
        ) from error


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
