"""Carry out a plan: run folder, events, failures, report."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import pluggy
from markupsafe import escape

from plait.calling import wrappers
from plait.configuration import plain
from plait.displays import display_for_python
from plait.document import Document
from plait.errors import PlaitError, located, nearest, sentence_of
from plait.executors import Executor
from plait.executors.choice import Execution
from plait.facts import lost_outputs
from plait.hookspecs import RunEvents
from plait.interrupts import Interrupts, interrupts
from plait.listeners import JSONLog
from plait.pipeline import Pipeline, check, load_pipeline, parse_pipeline, pipeline_of
from plait.plan import Input, Plan, Task, make_plan
from plait.report.document import RunReport, collect
from plait.report.files import write
from plait.report.html import fragment, fragment_of_steps
from plait.report.model import Report
from plait.run_folder import make_folder, read_provenance, repeat_of, write_provenance
from plait.said import errors_kept
from plait.scheduling import Progress
from plait.selection import limited, up_to
from plait.store import Store
from plait.work import Emit, Outcome, load_extras, load_result, make_job

ONE_PROCESS = Execution()


@attrs.frozen
class Output:
    """The result of one step in the cells in which it is the same; ``load()`` reads it from the store.

    Attributes:
        step: name of the step.
        axes: the matrix axes that it depends on, with their values as they are shown.
    """

    label: str
    step: str
    axes: Mapping[str, str]
    load: Callable[[], Any] = attrs.field(repr=False, eq=False)


@attrs.frozen(repr=False)
class Result:
    """What a run left: tasks by label, their results on demand, and the folder with the report.

    ``failed`` and ``not_run`` say of a label why it has no result; ``result.tables`` holds the tables of the report.
    ``result.output("fused", seed=0)`` loads a step's result, ``result["fused[seed=0]"]`` the same by its label.
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
        return [task.label for task in self._finished()]

    def _finished(self) -> list[Task]:
        return [task for task in self.plan.tasks if task.label not in self.failed and task.label not in self.not_run]

    def outputs(self, step: str | None = None, **axes: Any) -> list[Output]:
        """The finished results of a step, or of all, in the cells where ``axes`` have these values.

        Raises:
            KeyError: the pipeline has no such step, or the step does not depend on such an axis.
        """
        finished = self._finished()
        if step is not None:
            names = dict.fromkeys(name for task in self.plan.tasks for name in (task.step.name, task.step.family))
            if step not in names:
                raise KeyError(f"there is no step {step!r}{nearest(step, names) or '; there are ' + ', '.join(names)}")
            finished = [task for task in finished if step in (task.step.name, task.step.family)]
        for axis in axes:
            known = dict.fromkeys(name for task in finished for name in task.axes)
            if finished and axis not in known:
                what = f"step {step}" if step else "no step"
                depends = f"depends on {', '.join(known)}" if known else "is the same in all cells"
                raise KeyError(f"{what} does not depend on {axis!r}{nearest(axis, known)}; it {depends}")
        wanted = {axis: _as_shown(value) for axis, value in axes.items()}
        return [
            Output(task.label, task.step.name, task.axes, functools.partial(self._load, task))
            for task in finished
            if all(task.axes.get(axis) == text for axis, text in wanted.items())
        ]

    def output(self, step: str, **axes: Any) -> Any:
        """The result of a step, where ``axes`` leave only one.

        Raises:
            KeyError: there is none, or there are several.
        """
        found = self.outputs(step, **axes)
        if len(found) != 1:
            labels = ", ".join(one.label for one in found[:8]) or "none has finished"
            raise KeyError(f"{len(found)} results of step {step!r} match {axes}; name one by its axes ({labels})")
        return found[0].load()

    def _load(self, task: Task) -> Any:
        return load_result(Input(task.key, (), task.label), self.store)

    def __getitem__(self, label: str) -> Any:
        for task in self._finished():
            if task.label == label:
                return self._load(task)
        raise KeyError(f"{label!r} is not a finished step; there are {', '.join(self.labels)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.labels)

    def __repr__(self) -> str:
        parts = [f"{len(self.labels)} of {len(self.plan.tasks)} steps finished"]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"tables {', '.join(map(repr, self.tables))}"] if self.tables else []
        return f"Result({self.plan.pipeline.name}: {', '.join(parts)}; {self.folder / 'report.html'})"

    def _repr_html_(self) -> str:
        tables = [fragment(table) for table in self.tables.values() if table.main]
        failed = [["failed", label, message] for label, message in self.failed.items()]
        failed += [["not run", label, message] for label, message in self.not_run.items()]
        steps = [fragment_of_steps("", ("", "step", "why"), failed)] if failed else []
        return "".join([str(escape(repr(self))), *steps, *tables])


def _as_shown(value: Any) -> str:
    """A value of an axis as labels have it."""
    return (
        value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str)
    )


def run(
    pipeline: Path | str | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    store: Path | str | None = None,
    out: Path | str = "runs",
    jobs: int | Literal["auto"] = 1,
    device: str | None = None,
    deterministic: bool = False,
    listeners: Sequence[Any] = (),
    progress: bool | None = None,
    to: Sequence[str] = (),
    limit: int | None = None,
    execution: Execution | None = None,
) -> Result:
    """Run a pipeline; steps whose results are in the store are not run again.

    Args:
        pipeline: a YAML file, YAML text (of more than one line), or what such a text says as a mapping.
        overrides: ``path.to.field=value`` each.
        store: folder of the store; default ``PLAIT_STORE``, else ``.plait``.
        out: where the run's folder is made.
        jobs: number of processes over independent steps, or ``auto``.
        device: a torch device; default CUDA where there is one.
        deterministic: on a GPU, only kernels that give the same sums, to the last bit, whenever they run; they are slower.
        listeners: objects with run events (:class:`plait.hookspecs.RunEvents`).
        progress: whether to show how far it is; default on a terminal (bars) and in a notebook (one line).
        to: run only these steps, and what they need.
        limit: take only the first so many rows of every split of every source; results are kept apart.
        execution: another executor than processes of this machine, see :class:`plait.executors.choice.Execution`.

    Raises:
        PipelineError: the pipeline is wrong; nothing has been run.
        PlaitError: the store or the run folder cannot be written.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is finished is kept, and in the report.
    """
    with errors_kept():
        checked = load_any(pipeline, overrides)
    checked = checked if limit is None else limited(checked, limit)
    display: Any = display_for_python(progress)
    shown = [*listeners, *([display] if display is not None else [])]
    place = Store(Path(store).absolute() if store else None)
    try:
        select = functools.partial(up_to, steps=to) if to else None
        how = execution or Execution(jobs=jobs)
        return run_pipeline(checked, place, Path(out), how, device, shown, select, deterministic=deterministic)
    finally:
        if hasattr(display, "close"):
            display.close()


def load_any(pipeline: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()) -> Pipeline:
    """A checked pipeline from a YAML file, YAML text (of more than one line) or a mapping.

    Raises:
        PipelineError: everything that is wrong with it.
    """
    if isinstance(pipeline, Mapping):
        return pipeline_of(pipeline, overrides)
    if isinstance(pipeline, str) and "\n" in pipeline.strip():
        return parse_pipeline(pipeline, overrides)
    return load_pipeline(pipeline, overrides)


def run_pipeline(
    pipeline: Pipeline,
    store: Store,
    out: Path,
    execution: Execution = ONE_PROCESS,
    device: str | None = None,
    listeners: Sequence[Any] = (),
    select: Callable[[Plan], Plan] | None = None,
    *,
    deterministic: bool = False,
) -> Result:
    """As :func:`run`, for a checked pipeline; ``select`` leaves a part of its plan."""
    plan = make_plan(pipeline)
    plan = plan if select is None else select(plan)
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
    with interrupts() as asked, store.needed(f"{folder.name}-{os.getpid()}", [task.key for task in plan.tasks]):

        def emit_and_heed(name: str, **facts: Any) -> None:
            asked.check()
            emit(name, **facts)

        emit("run_started", folder=folder, pipeline=plain(pipeline.data), steps=[task.label for task in plan.tasks])
        progress = _progress(plan, store, emit)
        executor = execution.start(emit_and_heed, asked, plan, store, folder)
        ended_by: KeyboardInterrupt | None = None
        try:
            _carry_out_all(progress, pipeline, store, executor, emit_and_heed, asked, device, deterministic)
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
        PlaitError: ``folder`` is not a run folder, or none of its results are left.
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
    tasks = [attrs.evolve(task, key=keys[task.label]) for task in plan.tasks if task.label in keys]
    plan = attrs.evolve(plan, tasks=tasks)
    missing = {task.label: "it is not in the store" for task in plan.tasks if not store.has(task.key)}
    if tasks and len(missing) == len(tasks):
        raise PlaitError(
            f"none of the results of {folder} are in the store {store.root} any more; its report stays as it is"
        )
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
    repeat = repeat_of(folder, done, store)
    document = collect(plan, reports, failed, not_run, warnings, repeat)
    facts = {
        "cells": len(plan.pipeline.cells),
        "steps": len(plan.tasks),
        "hardware": dict(repeat.facts).get("hardware", ""),
    }
    write(document, folder, facts, full)
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
    progress: Progress, pipeline: Pipeline, store: Store, executor: Executor, emit: Emit, asked: Interrupts,
    device: str | None,
    deterministic: bool,
) -> None:  # fmt: skip
    """Run every task as soon as those that it needs are done."""
    for task in progress.settled:
        store.touch(task.key)
        emit("step_cached", step=task.label, key=task.key)
    for task in progress.no_longer_needed:
        store.drop(task.key)
    running = 0

    while not progress.is_over:
        asked.check()
        while (ready := progress.next_ready(executor.has_room_for)) is not None:
            executor.submit(make_job(ready, pipeline.folder, store, device, deterministic))
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
    for used_up in progress.used_up_by(task):
        store.drop(used_up.key)
    if outcome.cached:
        emit("step_cached", step=task.label, key=task.key)
        return
    report = load_result(Input(task.key, (), task.label), store) if task.step.hook == "evaluate" else None
    emit("step_finished", step=task.label, key=task.key, seconds=outcome.seconds, report=report)


def _reports_of(task: Task, store: Store) -> list[Report]:
    if store.entry(task.key) is None:
        return []
    own = [load_result(Input(task.key, (), task.label), store)] if task.step.hook == "evaluate" else []
    return [*own, *load_extras(task.key, store)]


def _warnings_of(task: Task, store: Store) -> list[str]:
    entry = store.entry(task.key)
    return list(entry.meta.get("warnings", [])) if entry else []
