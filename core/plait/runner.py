"""Carry out a plan: run folder, events, failures, report."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import pluggy

from plait.calling import wrappers
from plait.configuration import plain
from plait.document import Document
from plait.errors import PlaitError
from plait.executors.local import InProcess, Processes
from plait.facts import lost_outputs
from plait.hookspecs import RunEvents
from plait.listeners import JSONLog
from plait.pipeline import Pipeline, Step, check, load_pipeline
from plait.plan import Input, Plan, Task, make_plan
from plait.report.model import Report
from plait.scheduling import Progress
from plait.store import Store
from plait.work import Outcome, load_extras, load_result, make_job


@attrs.frozen
class Result:
    """What a run left: tasks by label, their results on demand, and the folder with the report.

    ``result["fused[seed=0]"]`` loads a step's result; ``result.tables`` holds the tables of the report.
    """

    folder: Path
    plan: Plan
    store: Store
    failed: Mapping[str, str]
    tables: Mapping[str, Any]

    @property
    def labels(self) -> list[str]:
        """The labels of all finished steps."""
        return [task.label for task in self.plan.tasks if task.label not in self.failed]

    def __getitem__(self, label: str) -> Any:
        for task in self.plan.tasks:
            if task.label == label and label not in self.failed:
                return load_result(Input(task.key, (), label), self.store)
        raise KeyError(f"{label!r} is not a finished step; there are {', '.join(self.labels)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.labels)


def run(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    store: Path | str | None = None,
    out: Path | str = "runs",
    jobs: int = 1,
    device: str | None = None,
    listeners: Sequence[Any] = (),
) -> Result:
    """Run a pipeline file; steps whose results are in the store are not run again.

    Args:
        path: the YAML file.
        overrides: ``path.to.field=value`` each.
        store: folder of the store; default ``PLAIT_STORE``, else ``.plait``.
        out: where the run's folder is made.
        jobs: number of processes over independent steps.
        device: a torch device; default CUDA where there is one.
        listeners: objects with run events (:class:`plait.hookspecs.RunEvents`).

    Raises:
        PipelineError: the pipeline is wrong; nothing has been run.
        PlaitError: the store or the run folder cannot be written.
    """
    pipeline = load_pipeline(path, overrides)
    return run_pipeline(pipeline, Store(Path(store).absolute() if store else None), Path(out), jobs, device, listeners)


def run_pipeline(
    pipeline: Pipeline, store: Store, out: Path, jobs: int = 1, device: str | None = None, listeners: Sequence[Any] = ()
) -> Result:
    """As :func:`run`, for a checked pipeline."""
    plan = make_plan(pipeline)
    folder = _make_folder(out, pipeline)
    events = pluggy.PluginManager("plait")
    events.add_hookspecs(RunEvents)
    for name, _, plugin in wrappers():
        events.register(plugin, name)
    for listener in (JSONLog(folder / "log.jsonl"), *listeners):
        events.register(listener)

    def emit(name: str, **facts: Any) -> None:
        getattr(events.hook, name)(run_id=folder.name, **facts)

    started = time.monotonic()
    _write_provenance(folder, pipeline, plan, store)
    emit("run_started", folder=folder, pipeline=plain(pipeline.data), steps=[task.label for task in plan.tasks])
    executor = Processes(jobs, emit) if jobs > 1 else InProcess(emit)
    try:
        failed = _carry_out_all(plan, pipeline, store, executor, emit, device)
    finally:
        executor.close()
    document = _write_report(plan, store, failed, folder)
    emit("run_finished", folder=folder, failed=list(failed), seconds=time.monotonic() - started)
    return Result(folder, plan, store, failed, {table.title: table for table in document.tables})


def write_report_again(folder: Path, store: Store) -> None:
    """Write the report of an earlier run from what is in the store.

    Raises:
        PlaitError: ``folder`` is not a run folder.
    """
    try:
        data = json.loads((folder / "resolved.json").read_text(encoding="utf-8"))["pipeline"]
        provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        origin = Path(provenance["folder"])
    except (OSError, ValueError, KeyError) as error:
        raise PlaitError(f"{folder} is not a run folder: it lacks resolved.json and provenance.json") from error
    plan = make_plan(check(Document(data, {}, str(folder / "resolved.json")), (), origin))
    # Methods may have changed since: the results are those of the keys of then.
    keys = {step["label"]: step["key"] for step in provenance["steps"]}
    plan = attrs.evolve(plan, tasks=[attrs.evolve(task, key=keys.get(task.label, task.key)) for task in plan.tasks])
    failed = {task.label: "not in the store" for task in plan.tasks if not store.has(task.key)}
    _write_report(plan, store, failed, folder)


def _write_report(plan: Plan, store: Store, failed: Mapping[str, str], folder: Path) -> Any:
    from plait.report.render import collect, write

    reports = [(task, _reports_of(task, store)) for task in plan.tasks if task.label not in failed]
    document = collect(plan, reports, failed, {task.label: _warnings_of(task, store) for task, _ in reports})
    write(document, folder)
    return document


def _carry_out_all(
    plan: Plan, pipeline: Pipeline, store: Store, executor: InProcess | Processes, emit: Any, device: str | None
) -> dict[str, str]:
    """Run every task as soon as those that it needs are done; label → why, for all that failed."""
    lost = {task.key for task in plan.tasks if lost_outputs(task.step.instance)}
    for key in lost:
        store.remove(key)  # only a new run writes them again
    progress = Progress(plan, {task.key for task in plan.tasks if store.has(task.key)}, lost)
    for task in progress.not_needed_again():
        store.touch(task.key)
        emit("step_cached", step=task.label, key=task.key)
    running = 0
    while not progress.is_over:
        while executor.has_room() and (ready := progress.next_ready()) is not None:
            executor.submit(make_job(ready, pipeline.folder, store, device))
            running += 1
        if not running:
            raise PlaitError(f"nothing runs and nothing can start: {', '.join(progress.waiting)} wait for one another")
        outcome = executor.next_done()
        running -= 1
        _record(progress, outcome, store, emit)
    return progress.failed


def _record(progress: Progress, outcome: Outcome, store: Store, emit: Any) -> None:
    task = progress.task_of(outcome.key)
    if outcome.error is not None:
        emit("step_failed", step=task.label, message=outcome.error)
        for behind, message in progress.fail(task, outcome.error):
            emit("step_failed", step=behind.label, message=message)
        if os.environ.get("PLAIT_DEBUG"):
            sys.stderr.write(outcome.details)
        return
    progress.finish(task)
    if outcome.cached:
        emit("step_cached", step=task.label, key=task.key)
        return
    report = load_result(Input(task.key, (), task.label), store) if task.step.hook == "evaluate" else None
    emit("step_finished", step=task.label, key=task.key, seconds=outcome.seconds, report=report)


def _reports_of(task: Task, store: Store) -> list[Report]:
    if not store.has(task.key):
        return []
    own = [load_result(Input(task.key, (), task.label), store)] if task.step.hook == "evaluate" else []
    return [*own, *load_extras(task.key, store)]


def _warnings_of(task: Task, store: Store) -> list[str]:
    entry = store.entry(task.key)
    return list(entry.meta.get("warnings", [])) if entry else []


def _make_folder(out: Path, pipeline: Pipeline) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = out / pipeline.name / f"{stamp}-{uuid.uuid4().hex[:4]}"
    try:
        folder.mkdir(parents=True)
        if pipeline.source:
            shutil.copyfile(pipeline.source, folder / "pipeline.yaml")
    except OSError as error:
        raise PlaitError(
            f"the run folder {folder} cannot be written ({error.strerror}); name another place with --out"
        ) from error
    return folder


def _write_provenance(folder: Path, pipeline: Pipeline, plan: Plan, store: Store) -> None:
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
    (folder / "provenance.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    resolved = {"pipeline": pipeline.data, "steps": {task.label: _resolved(task.step) for task in plan.tasks}}
    (folder / "resolved.json").write_text(json.dumps(plain(resolved), indent=1), encoding="utf-8")


@functools.cache
def _distributions() -> dict[str, str]:
    return dict(sorted((d.metadata["Name"], d.version) for d in metadata.distributions()))


def _resolved(step: Step) -> dict[str, Any]:
    inputs = {argument: plain_references(value) for argument, value in step.inputs.items()}
    return {
        "hook": step.hook,
        "method": step.method.name,
        "with": plain(step.instance),
        "from": inputs,
        "seed": step.seed,
    }


def plain_references(value: Any) -> Any:
    """Inputs of a step as texts, lists and mappings of texts."""
    if isinstance(value, Mapping):
        return {name: plain_references(item) for name, item in value.items()}
    return [plain_references(item) for item in value] if isinstance(value, list) else str(value)


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
