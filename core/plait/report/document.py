"""All that a report shows: the tables, curves and pictures of a run's steps, and how to repeat it.

Rows of one evaluate step in all matrix cells make one table. Its text columns and the matrix axes say
what a row is about; its numbers are means over the axis ``seed``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from plait.configuration import plain_fields
from plait.plan import Plan, Task
from plait.report.model import Curve, Panel, Report, Spread
from plait.report.tables import NO_SEED, Number, Table, marked, number_of, shown, with_counts


@attrs.frozen
class Repeat:
    """How to repeat a run.

    Attributes:
        command: the command line, or the program that called ``plait.run``.
        facts: name → text: command, seeds, versions of plait and Python, system, hardware, commit.
        versions: distribution → version, of all that were installed.
        seconds: label of a step → how long it took when its result was made.
    """

    command: str
    facts: Sequence[tuple[str, str]]
    versions: Mapping[str, str]
    seconds: Mapping[str, float]


@attrs.frozen
class StepFacts:
    """A step as the report lists it."""

    label: str
    hook: str
    method: str
    fields: str


@attrs.frozen
class RunReport:
    """Everything that the report shows."""

    name: str
    description: str
    tables: Sequence[Table]
    curves: Sequence[tuple[str, Sequence[Curve]]]
    panels: Sequence[tuple[str, Panel]]
    notes: Sequence[str]
    steps: Sequence[StepFacts]
    failed: Mapping[str, str]
    not_run: Mapping[str, str]
    repeat: Repeat | None = None


def collect(
    plan: Plan,
    reports: Sequence[tuple[Task, Sequence[Report]]],
    failed: Mapping[str, str],
    not_run: Mapping[str, str],
    warnings: Mapping[str, Sequence[str]],
    repeat: Repeat | None = None,
) -> RunReport:
    """Gather all steps' reports into one document."""
    groups: dict[tuple[str, str, bool], list[tuple[Task, Report]]] = {}
    notes: list[str] = []
    curves: dict[str, list[Curve]] = {}
    panels: list[tuple[str, Panel]] = []
    seeds = [task.axes["seed"] for task, _ in reports if "seed" in task.axes]
    shown_seed = seeds[0] if seeds else None  # the pictures of one seed say what those of all would
    for task, parts in sorted(reports, key=lambda item: item[0].step.hook != "evaluate"):
        for number, part in enumerate(parts):
            if part.rows:
                main = number == 0 and task.step.hook == "evaluate"
                groups.setdefault((task.step.family, part.title, main), []).append((task, part))
            for curve in part.curves:
                curves.setdefault(f"{task.step.name}: {curve.y_label}", []).append(
                    attrs.evolve(curve, name=_curve_name(task, curve))
                )
            if task.axes.get("seed", shown_seed) == shown_seed:
                panels += [(task.label, panel) for panel in part.panels]
            notes += [f"{task.step.name}: {note}" for note in part.notes]
        notes += [f"{task.step.name}: warning: {message}" for message in warnings.get(task.label, ())]
    ordered = sorted(groups.items(), key=lambda item: not item[0][2])  # the main tables first
    tables = [_table(": ".join(filter(None, (step, title))), group, main) for (step, title, main), group in ordered]
    steps = [StepFacts(t.label, t.step.hook.replace("_", "-"), t.step.method.name, _fields(t)) for t in plan.tasks]
    description = str(plan.pipeline.data.get("description") or "").strip()
    notes = list(dict.fromkeys(notes))
    return RunReport(
        plan.pipeline.name, description, tables, list(curves.items()), panels, notes, steps, failed, not_run, repeat
    )


def _fields(task: Task) -> str:
    return ", ".join(f"{name}={value}" for name, value in plain_fields(task.step.instance).items())


def _curve_name(task: Task, curve: Curve) -> str:
    axes = ",".join(f"{axis}={value}" for axis, value in task.axes.items())
    same = curve.name == curve.y_label
    return axes or curve.name if same else " ".join(filter(None, (axes, curve.name)))


def _table(title: str, group: Sequence[tuple[Task, Report]], main: bool) -> Table:
    about = [{**task.axes, **task.step.each} for task, _ in group]
    axes = list(dict.fromkeys(axis for one in about for axis in one if axis != "seed"))
    columns = list(dict.fromkeys(column for _, report in group for row in report.rows for column in row))
    metrics = [c for c in columns if any(_is_number(row.get(c)) for _, report in group for row in report.rows)]
    index = [*axes, *(c for c in columns if c not in metrics and c not in axes)]
    better = {c: direction for _, report in group for c, direction in report.better.items()}
    formats = {c: form for _, report in group for c, form in report.formats.items()}
    spread: Spread = group[-1][1].spread
    values: dict[tuple[str, ...], dict[str, list[tuple[str, float]]]] = {}
    for one, (_, report) in zip(about, group, strict=True):
        for row in report.rows:
            texts = tuple(shown({**one, **row}.get(column)) for column in index)
            cells = values.setdefault(texts, {})
            for metric in metrics:
                number = row.get(metric)
                if _is_number(number):
                    cells.setdefault(metric, []).append((one.get("seed", NO_SEED), float(number)))  # type: ignore[arg-type]
    rows = []
    for texts, cells in values.items():
        numbers = []
        for metric in metrics:
            seeds, found = zip(*cells[metric], strict=True) if metric in cells else ((), ())
            numbers.append(number_of(found, seeds, formats.get(metric, ".4g"), spread) if found else None)
        rows.append((texts, numbers))
    return marked(with_counts(Table(title, index, metrics, rows, better, main, spread, formats)))


def table_of(report: Report) -> Table:
    """The table of one report, as it came from its evaluation."""
    columns = list(dict.fromkeys(column for row in report.rows for column in row))
    metrics = [column for column in columns if any(_is_number(row.get(column)) for row in report.rows)]
    index = [column for column in columns if column not in metrics]
    rows = []
    for row in report.rows:
        numbers = [_single(row.get(metric), report.formats.get(metric, ".4g")) for metric in metrics]
        rows.append(([shown(row.get(column)) for column in index], numbers))
    return Table(report.title, index, metrics, rows, report.better, formats=report.formats)


def _single(value: Any, form: str) -> Number | None:
    return number_of([float(value)], [NO_SEED], form, "std") if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
