"""Pipeline → tasks with keys: what has to run, in which order, and what is in the store already."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from plait.configuration import fields_of, plain
from plait.fields import HOOK, OUTPUT
from plait.methods import _digest, wrappers_of
from plait.pipeline import Cell, Pipeline, Reference, Step
from plait.store import Store

KEY_FORMAT = 1
MAX_LISTED_FILES = 200_000


@attrs.frozen
class Input:
    """A stored result, or a part of it, that a task takes."""

    key: str
    part: tuple[str, ...]
    label: str


@attrs.frozen
class Task:
    """One step of the matrix cells that share it.

    Attributes:
        label: ``step`` or ``step[axis=value,…]``, naming only the axes that the step depends on.
        key: digest of all that makes the result.
        axes: the axes that it depends on, with their values.
        inputs: argument → :class:`Input`, list or mapping of them.
    """

    step: Step
    label: str
    key: str
    axes: Mapping[str, Any]
    inputs: Mapping[str, Any]

    @property
    def needs(self) -> list[str]:
        """Keys of the tasks before it."""
        return [item.key for value in self.inputs.values() for item in flatten(value)]


@attrs.frozen
class Plan:
    """All tasks of a pipeline, each after those that it needs."""

    pipeline: Pipeline
    tasks: Sequence[Task]


def flatten(value: Any) -> list[Input]:
    """All inputs inside a list or mapping of inputs."""
    if isinstance(value, Input):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [found for item in value for found in flatten(item)]


def make_plan(pipeline: Pipeline) -> Plan:
    """Compute every task's key; steps that do not depend on a matrix axis become one task for all cells."""
    tasks: dict[str, Task] = {}
    for cell in pipeline.cells:
        made: dict[str, Task] = {}
        wanted = _wanted(cell, pipeline)
        for name, step in cell.steps.items():
            if name not in wanted:
                continue
            axes = {axis: value for axis, value in cell.values.items() if axis in step.axes}
            inputs = {argument: _inputs(value, made) for argument, value in step.inputs.items()}
            key = _key(step, inputs)
            task = Task(step, _label(name, axes), key, axes, inputs)
            made[name] = task
            # Two values of an axis may come to the same thing; the first one stands for both.
            tasks.setdefault(f"{task.label}", task)
    return Plan(pipeline, list(tasks.values()))


def _wanted(cell: Cell, pipeline: Pipeline) -> set[str]:
    """The steps of a cell that are to run.

    Where the matrix chooses what a step takes (``from: {model: "${matrix.defense}"}``), the steps that were
    not chosen lead nowhere: only what an evaluation needs is run.
    """
    every = set(cell.steps)
    ends = [name for name, step in cell.steps.items() if step.hook == "evaluate"]
    chosen = any("${" in str(body.get("from")) for body in pipeline.data["steps"].values() if isinstance(body, dict))
    if not ends or not chosen:
        return every
    wanted, todo = set(ends), list(ends)
    while todo:
        for reference in cell.steps[todo.pop()].references():
            if reference.step not in wanted:
                wanted.add(reference.step)
                todo.append(reference.step)
    return wanted


def _label(name: str, axes: Mapping[str, Any]) -> str:
    return name + (f"[{','.join(f'{axis}={_short(value)}' for axis, value in axes.items())}]" if axes else "")


def _short(value: Any) -> str:
    return str(value) if not isinstance(value, (dict, list)) else json.dumps(value, separators=(",", ":"))


def _inputs(value: Any, made: Mapping[str, Task]) -> Any:
    if isinstance(value, Reference):
        return Input(made[value.step].key, value.part, str(value))
    if isinstance(value, Mapping):
        return {name: _inputs(item, made) for name, item in value.items()}
    return [_inputs(item, made) for item in value]


def _plain_inputs(value: Any) -> Any:
    if isinstance(value, Input):
        return [value.key, *value.part]
    if isinstance(value, Mapping):
        return {name: _plain_inputs(item) for name, item in value.items()}
    return [_plain_inputs(item) for item in value]


def facts_of(step: Step) -> dict[str, Any]:
    """All of a step, but for its inputs, that its result depends on."""
    method = step.method
    return {
        "format": KEY_FORMAT,
        "step": step.name,
        "hook": step.hook,
        "method": f"{method.package or 'path'}:{method.cls.__module__ if method.package else ''}:{method.cls.__qualname__}",
        "version": method.version,
        "kits": _kit_versions(method.package),
        "wrappers": wrappers_of(step.hook),
        "config": plain(step.instance),
        "nested": _nested_versions(step.instance),
        "local files": _local_files(step.instance),
        "seed": step.seed,
    }


def _key(step: Step, inputs: Mapping[str, Any]) -> str:
    facts = {**facts_of(step), "inputs": {argument: _plain_inputs(value) for argument, value in inputs.items()}}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _kit_versions(package: str | None) -> list[str]:
    """Versions of the plait packages that a method's package requires."""
    if package is None:
        return []
    found = []
    for requirement in importlib.metadata.requires(package) or []:
        name = re.split(r"[ ;<>=!~\[]", requirement, maxsplit=1)[0]
        if name.startswith("plait-") and "extra ==" not in requirement:
            found.append(f"{name} {_version_with_sources(name)}")
    return sorted(found)


def _version_with_sources(package: str) -> str:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
    direct = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not direct.get("dir_info", {}).get("editable"):
        return distribution.version
    source = Path(direct["url"].removeprefix("file://"))
    return f"{distribution.version}+{_digest(sorted((source / 'src').rglob('*.py')))}"


def _nested_versions(instance: Any) -> list[str]:
    found = []
    for field in fields_of(type(instance)).values():
        if HOOK in field.metadata:
            value = getattr(instance, field.name)
            for method in value if isinstance(value, (list, tuple)) else [value]:
                if method is not None:
                    cls = type(method)
                    found.append(f"{cls.__qualname__} {_version_of_class(cls)}")
                    found += _nested_versions(method)
    return found


def _version_of_class(cls: type[Any]) -> str:
    import inspect

    file = Path(inspect.getfile(cls))
    return _digest([file]) if file.is_file() else "0"


def _local_files(value: Any) -> list[str]:
    """Size and time of every file that a field names, so that changed data is another input."""
    if attrs.has(type(value)):
        inputs = [field.name for field in attrs.fields(type(value)) if OUTPUT not in field.metadata]
        return [line for name in inputs for line in _local_files(getattr(value, name, None))]
    if isinstance(value, Mapping):
        return [line for item in value.values() for line in _local_files(item)]
    if isinstance(value, (list, tuple)):
        return [line for item in value for line in _local_files(item)]
    if isinstance(value, str) and ".py:" in value:
        value = value.rpartition(":")[0]  # a class in a file
    elif isinstance(value, str) and os.sep not in value:
        return []  # a name, not a path
    if not isinstance(value, (str, Path)):
        return []
    path = Path(value)
    try:
        if path.is_file():
            return [_stamp(path)]
        files = sorted(file for file in path.rglob("*") if file.is_file()) if value and path.is_dir() else []
        return [_stamp(file) for file in files[:MAX_LISTED_FILES]]
    except (OSError, ValueError):
        return []


def _stamp(path: Path) -> str:
    facts = path.stat()
    return f"{path} {facts.st_size} {facts.st_mtime_ns}"


def lost_outputs(step: Step) -> list[Path]:
    """Files and folders that the step is to write beside its result and that are not there."""
    fields = [field for field in fields_of(type(step.instance)).values() if OUTPUT in field.metadata]
    paths = [getattr(step.instance, field.name) for field in fields]
    return [Path(path) for path in paths if path is not None and not Path(path).exists()]


def is_done(task: Task, store: Store) -> bool:
    """Whether a task's result, and what it writes beside it, is there."""
    return store.has(task.key) and not lost_outputs(task.step)


def why_not_cached(task: Task, plan: Plan, store: Store) -> str:
    """Why a task has to run: what differs from the stored result of the same step that is nearest to it."""
    facts = json.loads(
        json.dumps({**facts_of(task.step), "inputs": {a: _plain_inputs(v) for a, v in task.inputs.items()}})
    )
    if store.has(task.key):
        return f"gone: {', '.join(map(str, lost_outputs(task.step)))}"
    best: list[str] | None = None
    for entry in store.entries():
        earlier = entry.meta.get("facts", {})
        if (earlier.get("step"), earlier.get("hook")) != (facts["step"], facts["hook"]):
            continue
        different = [name for name in facts if facts[name] != earlier.get(name)]
        if best is None or len(different) < len(best):
            best = different
    if best is None:
        return "never run"
    return "changed: " + ", ".join(best) if best else "its stored result is incomplete"
