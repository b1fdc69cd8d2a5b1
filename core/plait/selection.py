"""Parts of a plan: what leads to a step, what failed, or the first rows of every source."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import attrs

from plait.errors import PipelineError, nearest
from plait.pipeline import Cell, Pipeline, Step
from plait.plan import Plan, Task


def up_to(plan: Plan, steps: Collection[str]) -> Plan:
    """The steps of these names (or labels), and all that they need.

    Raises:
        PipelineError: there is no such step.
    """
    for step in steps:
        names = dict.fromkeys(name for task in plan.tasks for name in _names(task))
        if step not in names:
            known = dict.fromkeys(task.step.family for task in plan.tasks)
            raise PipelineError(
                [f"there is no step {step!r}{nearest(step, names) or '; the steps are ' + ', '.join(known)}"]
            )
    return _with_what_they_need(plan, {task.key for task in plan.tasks if set(_names(task)) & set(steps)})


def _names(task: Task) -> tuple[str, str, str]:
    return task.step.family, task.step.name, task.label


def only_failed(plan: Plan, failed: Collection[str]) -> Plan:
    """The steps of these labels, all that they need, and all that waits for them."""
    wanted = {task.key for task in plan.tasks if task.label in failed}
    for task in plan.tasks:  # each stands after those that it needs
        if wanted & set(task.needs):
            wanted.add(task.key)
    return _with_what_they_need(plan, wanted)


def _with_what_they_need(plan: Plan, keys: set[str]) -> Plan:
    wanted = set(keys)
    for task in reversed(plan.tasks):
        if task.key in wanted:
            wanted |= set(task.needs)
    return attrs.evolve(plan, tasks=[task for task in plan.tasks if task.key in wanted])


def limited(pipeline: Pipeline, rows: int) -> Pipeline:
    """The pipeline on the first ``rows`` rows of every split of every source; its results have keys of their own."""
    made: dict[int, Step] = {}

    def of(step: Step) -> Step:
        if step.hook != "load_data":
            return step
        return made.setdefault(id(step), attrs.evolve(step, limit=rows))  # cells share the steps that are the same

    cells = [Cell(cell.values, {name: of(step) for name, step in cell.steps.items()}) for cell in pipeline.cells]
    return attrs.evolve(pipeline, cells=cells)


def first_rows(value: Any, rows: int, warn: Callable[[str], Any]) -> Any:
    """The first rows of a dataset, of a list, or of each part of a mapping; what has no rows stays whole, with a warning."""
    if isinstance(value, Mapping):
        return {name: first_rows(part, rows, warn) for name, part in value.items()}
    if hasattr(value, "select") and hasattr(value, "column_names"):
        return value.select(range(min(rows, len(value))))
    if isinstance(value, list):
        return value[:rows]
    warn(f"a {type(value).__name__} has no rows to be limited; it stays whole")
    return value
