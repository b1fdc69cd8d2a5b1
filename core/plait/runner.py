"""Carry out a plan: run folder, events, failures, report."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pluggy

from plait.calling import wrappers
from plait.configuration import plain
from plait.document import Document
from plait.errors import PlaitError, located, sentence_of
from plait.executors.local import InProcess, Processes
from plait.facts import lost_outputs
from plait.hookspecs import RunEvents
from plait.interrupts import Interrupts, interrupts
from plait.listeners import JSONLog
from plait.pipeline import Pipeline, check, load_pipeline
from plait.plan import Input, Plan, Task, make_plan
from plait.report.document import RunReport, collect
from plait.report.files import write
from plait.report.model import Report
from plait.run_folder import make_folder, read_provenance, repeat_of, write_provenance
from plait.scheduling import Progress
from plait.store import Store
from plait.work import Emit, Outcome, load_extras, load_result, make_job


@attrs.frozen
class Result:
    """What a run left: tasks by label, their results on demand, and the folder with the report.

    ``failed`` and ``not_run`` say of a label why it has no result.
    ``result["fused[seed=0]"]`` loads a step's result; ``result.tables`` holds the tables of the report.
    """

    folder: Path
    plan: Plan
    store: Store
    failed: Mapping[str, str]
    not_run: Mapping[str, str]
    tables: Mapping[str, Any]

    @property
    def labels(self) -> list[str]:
        """The labels of all finished steps."""
        return [t.label for t in self.plan.tasks if t.label not in self.failed and t.label not in self.not_run]

    def __getitem__(self, label: str) -> Any:
        for task in self.plan.tasks:
            if task.label == label and label in self.labels:
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
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is finished is kept, and in the report.
    """
    pipeline = load_pipeline(path, overrides)
    return run_pipeline(pipeline, Store(Path(store).absolute() if store else None), Path(out), jobs, device, listeners)


def run_pipeline(
    pipeline: Pipeline, store: Store, out: Path, jobs: int = 1, device: str | None = None, listeners: Sequence[Any] = ()
) -> Result:
    """As :func:`run`, for a checked pipeline."""
    plan = make_plan(pipeline)
    folder = make_folder(out, pipeline)
    events = pluggy.PluginManager("plait")
    events.add_hookspecs(RunEvents)
    for name, _, plugin in wrappers():
        events.register(plugin, name)
    for listener in (JSONLog(folder / "log.jsonl"), *listeners):
        events.register(listener)

    def emit(name: str, **facts: Any) -> None:
        getattr(events.hook, name)(run_id=folder.name, **facts)

    started = time.monotonic()
    write_provenance(folder, pipeline, plan, store)
    with interrupts() as asked:

        def emit_and_heed(name: str, **facts: Any) -> None:
            asked.check()
            emit(name, **facts)

        executor = Processes(jobs, emit_and_heed) if jobs > 1 else InProcess(emit_and_heed)
        emit("run_started", folder=folder, pipeline=plain(pipeline.data), steps=[task.label for task in plan.tasks])
        progress = _progress(plan, store, emit)
        ended_by: KeyboardInterrupt | None = None
        try:
            _carry_out_all(progress, pipeline, store, executor, emit_and_heed, asked, device)
        except KeyboardInterrupt as error:
            ended_by = error
            asked.heeded()
        finally:
            executor.close()
        tables = _tables_of_report(plan, store, progress, folder)
        emit("run_finished", folder=folder, failed=list(progress.failed), seconds=time.monotonic() - started)
    if ended_by is not None:
        ended_by.add_note(str(folder / "report.html"))
        raise ended_by
    return Result(folder, plan, store, progress.failed, progress.not_run, tables)


def write_report_again(folder: Path, store: Store, full: bool = False) -> None:
    """Write the report of an earlier run from what is in the store.

    Args:
        full: the page holds all pictures as they are.

    Raises:
        PlaitError: ``folder`` is not a run folder.
    """
    provenance = read_provenance(folder)
    try:
        data = json.loads((folder / "resolved.json").read_text(encoding="utf-8"))["pipeline"]
        origin = Path(provenance["folder"])
    except (OSError, ValueError, KeyError) as error:
        raise PlaitError(f"{folder} is not a run folder: it lacks resolved.json and provenance.json") from error
    plan = make_plan(check(Document(data, {}, str(folder / "resolved.json")), (), origin))
    # Methods may have changed since: the results are those of the keys of then.
    keys = {step["label"]: step["key"] for step in provenance["steps"]}
    plan = attrs.evolve(plan, tasks=[attrs.evolve(task, key=keys.get(task.label, task.key)) for task in plan.tasks])
    missing = {task.label: "it is not in the store" for task in plan.tasks if not store.has(task.key)}
    _write_report(plan, store, {}, missing, folder, full)


def _tables_of_report(plan: Plan, store: Store, progress: Progress, folder: Path) -> Mapping[str, Any]:
    """Write the report. Where that fails the results are still there, and the user is told how to try again."""
    try:
        document = _write_report(plan, store, progress.failed, progress.not_run, folder)
    except Exception as error:
        reason = sentence_of(error, {"plait"}) or located(error)
        sys.stderr.write(f"warning: the report cannot be written: {reason}; plait report {folder} writes it again\n")
        return {}
    return {table.title: table for table in document.tables}


def _write_report(
    plan: Plan, store: Store, failed: Mapping[str, str], not_run: Mapping[str, str], folder: Path, full: bool = False
) -> RunReport:
    done = [task for task in plan.tasks if task.label not in failed and task.label not in not_run]
    reports = [(task, _reports_of(task, store)) for task in done]
    warnings = {task.label: _warnings_of(task, store) for task in done}
    document = collect(plan, reports, failed, not_run, warnings, repeat_of(folder, done, store))
    write(document, folder, {"cells": len(plan.pipeline.cells), "steps": len(plan.tasks)}, full)
    return document


def _progress(plan: Plan, store: Store, emit: Emit) -> Progress:
    lost = {task.key for task in plan.tasks if lost_outputs(task.step.instance)}
    for key in lost:
        store.remove(key)  # only a new run writes them again
    stored = {task.key for task in plan.tasks if store.has(task.key)}
    intact: set[str] = set()
    while True:
        progress = Progress(plan, stored, lost)
        unchecked = [task for task in progress.to_be_loaded if task.key not in intact]
        if not unchecked:
            return progress
        for task in unchecked:
            if changed := store.changed_files(task.key):
                emit(
                    "step_warned",
                    step=task.label,
                    message=f"its stored result is damaged ({', '.join(changed[:3])}); it is computed anew",
                )
                store.remove(task.key)
                stored.discard(task.key)
            intact.add(task.key)


def _carry_out_all(
    progress: Progress, pipeline: Pipeline, store: Store, executor: InProcess | Processes, emit: Emit, asked: Interrupts,
    device: str | None,
) -> None:  # fmt: skip
    """Run every task as soon as those that it needs are done."""
    for task in progress.settled:
        store.touch(task.key)
        emit("step_cached", step=task.label, key=task.key)
    running = 0
    while not progress.is_over:
        asked.check()
        while executor.has_room() and (ready := progress.next_ready()) is not None:
            executor.submit(make_job(ready, pipeline.folder, store, device))
            running += 1
        if not running:
            raise PlaitError(f"nothing runs and nothing can start: {', '.join(progress.waiting)} wait for one another")
        outcome = executor.next_done()
        running -= 1
        _record(progress, outcome, store, emit)


def _record(progress: Progress, outcome: Outcome, store: Store, emit: Emit) -> None:
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
