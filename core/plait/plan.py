"""Pipeline → tasks with keys: what has to run, in which order, and what is in the store already."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from plait.facts import facts_of, lost_outputs
from plait.pipeline import Cell, Pipeline, Reference, Step
from plait.store import Entry, Store
from plait.versions import library_versions

COMPARED = 8  # stored results of one kind that a task is compared with
LONG = 48  # characters of an axis's value in a label


@attrs.frozen
class Input:
    """A stored result, or a part of it, that a task takes."""

    key: str
    part: tuple[str, ...]
    label: str


@attrs.frozen
class Task:
    """One step of the matrix cells in which it comes to the same.

    Attributes:
        label: ``step`` or ``step[axis=value,…]``, naming only the axes that its key depends on.
        key: digest of ``facts``.
        facts: all that makes the result, as JSON-like data; stored with it.
        axes: the axes that it depends on, with their values as they are shown.
        inputs: argument → :class:`Input`, list or mapping of them.
        values: the matrix values of the first cell that has it.
    """

    step: Step
    label: str
    key: str
    facts: Mapping[str, Any]
    axes: Mapping[str, str]
    inputs: Mapping[str, Any]
    values: Mapping[str, Any]

    @property
    def needs(self) -> list[str]:
        """Keys of the tasks before it."""
        return list(dict.fromkeys(item.key for value in self.inputs.values() for item in flatten(value)))


@attrs.frozen(repr=False)
class Plan:
    """All tasks of a pipeline, each after those that it needs."""

    pipeline: Pipeline
    tasks: Sequence[Task]

    def __repr__(self) -> str:
        return f"Plan({self.pipeline.name}: {len(self.tasks)} steps, {len(self.pipeline.cells)} cells)"

    def _repr_html_(self) -> str:
        from plait.report.html import fragment_of_steps

        head = ("step", "hook", "method", "from")
        return fragment_of_steps(repr(self), head, [self._row(task) for task in self.tasks])

    def _row(self, task: Task) -> list[str]:
        inputs = [f"{a}={'+'.join(i.label for i in flatten(value))}" for a, value in task.inputs.items()]
        return [task.label, task.step.hook.replace("_", "-"), task.step.method.name, ", ".join(inputs)]


def flatten(value: Any) -> list[Input]:
    """All inputs inside a list or mapping of inputs."""
    if isinstance(value, Input):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [found for item in value for found in flatten(item)]


def make_plan(pipeline: Pipeline) -> Plan:
    """Compute every task's key. A step of two cells is one task exactly when its key is the same."""
    facts_of_steps: dict[int, Mapping[str, Any]] = {}
    found: dict[str, dict[str, Task]] = {}
    cells_of: dict[str, list[tuple[Mapping[str, Any], str]]] = {}
    order: list[tuple[str, str]] = []
    for cell in pipeline.cells:
        made: dict[str, Task] = {}
        wanted = _wanted(cell, pipeline)
        for name, step in cell.steps.items():
            if name not in wanted:
                continue
            if id(step) not in facts_of_steps:  # cells share the steps that resolve to the same
                facts_of_steps[id(step)] = facts_of(step, pipeline.folder)
            inputs = {argument: _inputs(value, made) for argument, value in step.inputs.items()}
            plain = {argument: _plain_inputs(value) for argument, value in inputs.items()}
            facts = {**facts_of_steps[id(step)], "inputs": plain}
            key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
            made[name] = Task(step, "", key, facts, {}, inputs, cell.values)
            cells_of.setdefault(name, []).append((cell.values, key))
            if key not in found.setdefault(name, {}):
                found[name][key] = made[name]
                order.append((name, key))
    shown = _shown_values(pipeline)
    transitive = _transitive_axes(pipeline)
    axes = {
        name: _axes_that_matter(cells, transitive.get(name, frozenset()), pipeline) for name, cells in cells_of.items()
    }
    tasks = []
    for name, key in order:
        task = found[name][key]
        texts = {axis: shown[axis][_text_key(task.values[axis])] for axis in axes[name]}
        tasks.append(attrs.evolve(task, label=_label(name, texts), axes=texts))
    return Plan(pipeline, tasks)


def _axes_that_matter(
    cells: Sequence[tuple[Mapping[str, Any], str]], candidates: frozenset[str], pipeline: Pipeline
) -> list[str]:
    """The axes, in the order of the matrix, that a step's key depends on: their values tell its keys apart."""
    matrix = pipeline.data.get("matrix") or {}
    chosen = [axis for axis in matrix if axis in candidates and (len(matrix[axis]) == 1 or _changes_key(cells, axis))]
    # Where cells lack the step, no two may differ in one axis alone.
    for axis in matrix:
        if _tells_apart(cells, chosen):
            break
        if axis not in chosen:
            chosen.append(axis)
    return [axis for axis in matrix if axis in chosen]


def _changes_key(cells: Sequence[tuple[Mapping[str, Any], str]], axis: str) -> bool:
    by_others: dict[str, str] = {}
    for values, key in cells:
        others = _text_key({other: value for other, value in values.items() if other != axis})
        if by_others.setdefault(others, key) != key:
            return True
    return False


def _tells_apart(cells: Sequence[tuple[Mapping[str, Any], str]], axes: Iterable[str]) -> bool:
    by_axes: dict[str, str] = {}
    return all(by_axes.setdefault(_text_key([values[axis] for axis in axes]), key) == key for values, key in cells)


def _transitive_axes(pipeline: Pipeline) -> dict[str, frozenset[str]]:
    """Step → the axes of its own text and of that of all steps before it, in any cell."""
    found = {name: set(axes) for name, axes in pipeline.axes.items()}
    for cell in pipeline.cells:
        for name, step in cell.steps.items():  # in an order in which they can run
            for reference in step.references():
                found[name] |= found[reference.step]
    return {name: frozenset(axes) for name, axes in found.items()}


def _shown_values(pipeline: Pipeline) -> dict[str, dict[str, str]]:
    """Axis → value → how it is shown: short, and different for different values."""
    return {axis: _short_texts(values) for axis, values in (pipeline.data.get("matrix") or {}).items()}


def _short_texts(values: Sequence[Any]) -> dict[str, str]:
    plain = {_text_key(value): value if isinstance(value, str) else _text_key(value) for value in values}
    if len(set(plain.values())) < len(plain):  # 1 and "1"
        plain = {key: key for key in plain}
    for key, text in plain.items():
        if len(text) > LONG:
            plain[key] = f"{text[: LONG - 8]}…{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"
    return plain


def _text_key(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str)


def _label(name: str, axes: Mapping[str, str]) -> str:
    return name + (f"[{','.join(f'{axis}={text}' for axis, text in axes.items())}]" if axes else "")


def _wanted(cell: Cell, pipeline: Pipeline) -> set[str]:
    """The steps of a cell that are to run.

    Where the matrix chooses what a step takes (``from: {model: "${matrix.defense}"}``), the steps that were
    not chosen lead nowhere: only what an evaluation needs is run.
    """
    every = set(cell.steps)
    ends = [name for name, step in cell.steps.items() if step.hook == "evaluate"]
    bodies = [body for body in pipeline.data["steps"].values() if isinstance(body, dict)]
    chosen = any("${" in str(body.get("from")).replace("${each.", "") for body in bodies)
    if not ends or not chosen:
        return every
    wanted, todo = set(ends), list(ends)
    while todo:
        for reference in cell.steps[todo.pop()].references():
            if reference.step not in wanted:
                wanted.add(reference.step)
                todo.append(reference.step)
    return wanted


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


def is_done(task: Task, store: Store) -> bool:
    """Whether a task's result, and what it writes beside it, is there."""
    return store.has(task.key) and not lost_outputs(task.step.instance)


def explain(plan: Plan, store: Store) -> dict[str, str]:
    """Label → why the task has to run, or, for a stored result, what about it is worth knowing (else empty).

    The cause is what differs from the stored result of the same step that is nearest to it.
    """
    by_step: dict[tuple[str, str], _Earlier] = {}
    for entry in sorted(store.entries(), key=lambda entry: -entry.meta["created"]):
        facts = entry.meta.get("facts", {})
        by_step.setdefault((facts.get("step"), facts.get("hook")), _Earlier()).add(entry)
    changed: set[str] = set()
    reasons = {}
    label_of = {task.key: task.label for task in plan.tasks}
    for task in plan.tasks:
        if is_done(task, store):
            stored = store.entry(task.key)
            reasons[task.label] = _other_libraries(stored.meta.get("libraries", {})) if stored else ""
            continue
        dropped = store.entry(task.key)
        if dropped is not None and dropped.is_dropped:
            reasons[task.label] = "its result was not to be kept"
            continue
        changed.add(task.key)
        if lost := lost_outputs(task.step.instance) if store.has(task.key) else []:
            reasons[task.label] = f"gone: {', '.join(map(str, lost))}"
        else:
            facts = json.loads(json.dumps(task.facts))
            earlier = by_step.get((task.step.name, task.step.hook), _Earlier()).near(facts)
            reasons[task.label] = _why(facts, earlier, {label_of[key] for key in task.needs if key in changed})
    return reasons


class _Earlier:
    """The stored results of one step, found by what they have in common, so that their number costs nothing."""

    def __init__(self) -> None:
        self._found: dict[tuple[frozenset[str], int], list[Entry]] = {}
        self._latest: list[Entry] = []

    def add(self, entry: Entry) -> None:
        """The latest first."""
        for place in _all_but_one(entry.meta["facts"]):
            same = self._found.setdefault(place, [])
            if len(same) < COMPARED:
                same.append(entry)
        if len(self._latest) < COMPARED:
            self._latest.append(entry)

    def near(self, facts: Mapping[str, Any]) -> list[Entry]:
        """The results that differ in nothing, in one fact, or in the inputs and one more; else the latest."""
        places = sorted(_all_but_one(facts), key=lambda place: len(place[0]))
        return next((self._found[place] for place in places if place in self._found), self._latest)


def _all_but_one(facts: Mapping[str, Any]) -> list[tuple[frozenset[str], int]]:
    """(names that are left out, digest of all the other facts), for nothing, one, and the inputs and one."""
    digests = {}
    for name, value in facts.items():
        parts = value.items() if isinstance(value, Mapping) and name != "inputs" else [("", value)]
        for part, item in parts:
            digests[f"{name}/{part}"] = hash((name, part, json.dumps(item, sort_keys=True)))
    whole = functools.reduce(operator.xor, digests.values(), 0)
    inputs = digests.get("inputs/", 0)
    places = [(frozenset[str](), whole)]
    for name, digest in digests.items():
        places.append((frozenset({name}), whole ^ digest))
        if name != "inputs/":
            places.append((frozenset({name, "inputs/"}), whole ^ digest ^ inputs))
    return places


def _why(facts: Mapping[str, Any], earlier: Sequence[Entry], running: set[str]) -> str:
    causes = [_causes(facts, entry.meta["facts"], running) for entry in earlier]
    if not causes:
        return "never run"
    best = min(causes, key=len)
    return "changed: " + "; ".join(best) if best else "its stored result is gone or incomplete"


def _causes(now: Mapping[str, Any], then: Mapping[str, Any], running: set[str]) -> list[str]:
    """What of the facts differs, each as a few words."""
    found = []
    for name in [*now, *(name for name in then if name not in now)]:
        new, old = now.get(name), then.get(name)
        if new == old:
            continue
        if name == "inputs":
            found.append(f"its inputs ({', '.join(sorted(running))})" if running else "its inputs")
        elif name == "fields" and isinstance(new, dict) and isinstance(old, dict):
            found += [f"field {field} ({old.get(field)!r} → {new.get(field)!r})" for field in _differing(new, old)]
        elif name in ("code", "files", "libraries", "wrappers") and isinstance(new, dict) and isinstance(old, dict):
            words = {"code": "code of", "files": "file", "libraries": "version of", "wrappers": "wrapper"}
            found += [f"{words[name]} {item}" for item in _differing(new, old)]
        else:
            found.append(f"{name} ({old} → {new})")
    return found


def _differing(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys([*new, *old]) if new.get(name) != old.get(name)]


def _other_libraries(then: Mapping[str, str]) -> str:
    now = library_versions()
    other = [
        f"{name} {version}, now {now.get(name, 'not installed')}"
        for name, version in then.items()
        if now.get(name) != version
    ]
    return f"made with {'; '.join(other)}" if other else ""
