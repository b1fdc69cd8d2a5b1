"""Carrying out one task: inputs from the store, the hook, the result into the store."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from plait import codecs
from plait.calling import hook_caller
from plait.configuration import configure, plain_fields
from plait.context import Run
from plait.document import MERGE, merged_in_place
from plait.errors import PlaitError, located, sentence_of, unwritable
from plait.hardware import hardware
from plait.hookspecs import hook_arguments
from plait.importing import FILE_ATTRIBUTE, local_sources
from plait.methods import find
from plait.plan import Input, Task
from plait.report.model import Curve, Report
from plait.resources import Resources
from plait.said import errors_kept
from plait.selection import first_rows
from plait.store import ARTIFACT, Store
from plait.surroundings import same_surroundings
from plait.versions import library_versions, plait_modules

Emit = Callable[..., None]
EXTRAS = "extras"  # beside the artifact: what the step added to the report


@attrs.frozen
class Job:
    """A task in a form that another process can carry out."""

    label: str
    key: str
    step: str
    hook: str
    method: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    seed: int
    facts: Mapping[str, Any]
    folder: Path
    store: Path
    device: str | None
    resources: Resources
    limit: int | None = None
    deterministic: bool = False


@attrs.frozen
class Outcome:
    """How a job ended: ``error`` is ``None`` when its result is in the store."""

    key: str
    cached: bool
    seconds: float
    error: str | None = None
    details: str = ""


def make_job(task: Task, folder: Path, store: Store, device: str | None, deterministic: bool) -> Job:
    """Everything that :func:`carry_out` needs to know about a task."""
    step = task.step
    return Job(
        task.label,
        task.key,
        step.name,
        step.hook,
        step.method.full_name,
        step.config,
        task.inputs,
        step.seed,
        task.facts,
        folder,
        store.root,
        device,
        step.resources,
        step.limit,
        deterministic,
    )


def carry_out(job: Job, emit: Emit) -> Outcome:
    """Run one job, or find that another process has finished it meanwhile.

    A mistake of the user's or of the method comes back as the outcome's ``error``; an interrupt is raised.
    """
    store = Store(job.store)
    start = time.monotonic()
    try:
        with store.lock(
            job.key,
            lambda: emit(
                "step_warned", step=job.label, message="another process is computing this step; waiting for it"
            ),
        ):
            if store.has(job.key):
                return Outcome(job.key, True, 0.0)
            _run(job, store, emit)
    except (Exception, SystemExit) as error:
        return Outcome(job.key, False, time.monotonic() - start, _sentence(error, job), traceback.format_exc())
    return Outcome(job.key, False, time.monotonic() - start)


def _sentence(error: BaseException, job: Job) -> str:
    if isinstance(error, SystemExit):  # research code ends the program where a library would raise
        return (
            f"the method called sys.exit({'' if error.code is None else repr(error.code)}); it has to return or raise"
        )
    if isinstance(error, MemoryError):
        return f"out of memory ({located(error)}); smaller batches or fewer --jobs may help"
    sentence = sentence_of(error, {*plait_modules(), *_modules_of(job)})
    if sentence is None and (reason := unwritable(error)) is not None:
        return f"a file cannot be written ({reason}; {located(error)})"
    return sentence or located(error)


def _modules_of(job: Job) -> set[str]:
    """Top-level modules of a method that belongs to no package: its file, and the local ones beside it."""
    if ":" not in job.method:
        return set()
    try:
        module = sys.modules[find(job.hook, job.method, job.folder).cls.__module__]
    except PlaitError:  # it is what failed
        return set()
    file = getattr(module, FILE_ATTRIBUTE, None)
    beside = {source.stem for source in local_sources(Path(file))} if file else set()
    return {module.__name__.partition(".")[0], *beside}


def _run(job: Job, store: Store, emit: Emit) -> None:
    instance = configure(find(job.hook, job.method, job.folder), job.config, job.folder)
    arguments = dict.fromkeys(hook_arguments(job.hook))
    arguments.update({argument: load_input(value, store) for argument, value in job.inputs.items()})
    emit("step_started", step=job.label, hook=job.hook, method=job.method, config=plain_fields(instance))
    scratch = store.scratch(job.key)
    journal = _Journal(scratch / "log.jsonl", job, emit)
    run = Run(
        seed=job.seed,
        step=job.step,
        requested_device=job.device,
        folder=scratch / "work",
        on_progress=lambda description, done, total: emit(
            "step_progress", step=job.label, description=description, done=done, total=total
        ),
        on_log=journal.log,
        on_warning=journal.warn,
    )
    started = time.monotonic()
    said = errors_kept(lambda text: emit("step_said", step=job.label, text=text))
    with said, same_surroundings(run.derived_seed("global"), job.deterministic):
        result = hook_caller(job.hook, instance)(run=run, **arguments)
    if result is None:
        raise PlaitError(f"method {job.method!r} returned nothing; a hook has to return its result")
    if job.hook == "evaluate" and not isinstance(result, Report):
        raise PlaitError(
            f"method {job.method!r} returned a {type(result).__name__}; evaluate has to return a plait.Report"
        )
    made = {"seconds": round(time.monotonic() - started, 3), "hardware": hardware()}
    if job.limit is not None:
        result = first_rows(result, job.limit, run.warn)
    extras = [*run.reports, *journal.report()]

    def write(folder: Path) -> None:
        codecs.save(result, folder / ARTIFACT)
        if extras:
            codecs.save(extras, folder / EXTRAS)

    facts = {"label": job.label, "method": job.method, "facts": job.facts, "libraries": library_versions()}
    store.put(job.key, write, {**facts, **made, "warnings": journal.warnings})


def load_input(value: Any, store: Store) -> Any:
    """The stored results behind an argument: one, a list or a mapping."""
    if isinstance(value, Mapping):
        named = {name: None if name == MERGE else load_input(item, store) for name, item in value.items()}
        whole = [_parts(item, store) for item in value.get(MERGE, ())]
        return merged_in_place(named, {name: part for parts in whole for name, part in parts.items()})
    if isinstance(value, list):
        return [load_input(item, store) for item in value]
    return load_result(value, store)


def _parts(wanted: Input, store: Store) -> Mapping[str, Any]:
    parts = load_result(wanted, store)
    if not isinstance(parts, Mapping):
        raise PlaitError(
            f"<<: {wanted.label} is one whole; << takes the parts of a result that has some, or steps with each"
        )
    return parts


def load_result(wanted: Input, store: Store) -> Any:
    """One stored result, or a part of it."""
    store.touch(wanted.key)
    try:
        store.check(wanted.key)
        return codecs.load(store.folder(wanted.key) / ARTIFACT, wanted.part)
    except PlaitError as error:
        raise PlaitError(f"{wanted.label}: {error}") from error


def load_extras(key: str, store: Store) -> list[Report]:
    """What a step added to the report besides its result."""
    folder = store.folder(key) / EXTRAS
    extras: list[Report] = codecs.load(folder) if folder.exists() else []
    return extras


class _Journal:
    """Logged values and warnings of a step, kept over a kill beside its scratch folder."""

    def __init__(self, file: Path, job: Job, emit: Emit) -> None:
        self._file, self._job, self._emit = file, job, emit
        self.points: dict[str, dict[int, float]] = {}
        self.warnings: list[str] = []
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # the line that was being written when the process was killed
                    continue
                self._keep(entry)

    def log(self, values: Mapping[str, float], at: int | None) -> None:
        at = max((max(points) for points in self.points.values() if points), default=-1) + 1 if at is None else at
        self._append({"values": dict(values), "at": at})
        self._emit("step_logged", step=self._job.label, values=dict(values), at=at)

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self._append({"warning": message})
            self._emit("step_warned", step=self._job.label, message=message)

    def _append(self, entry: dict[str, Any]) -> None:
        self._keep(entry)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + os.linesep)

    def _keep(self, entry: Mapping[str, Any]) -> None:
        if "warning" in entry:
            self.warnings.append(entry["warning"])
        for name, value in entry.get("values", {}).items():
            self.points.setdefault(name, {})[entry["at"]] = value

    def report(self) -> list[Report]:
        curves = [
            Curve(name=name, x=sorted(points), y=[points[at] for at in sorted(points)], y_label=name)
            for name, points in self.points.items()
        ]
        return [Report(curves=curves)] if curves else []
