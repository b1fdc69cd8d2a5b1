"""What steps take and give, followed through a pipeline before anything runs: kinds, columns and splits.

Methods declare it (see :mod:`plait.hookspecs`). What is not declared is not known, and what is not known is not checked.
"""

from __future__ import annotations

import itertools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from plait.document import MERGE
from plait.errors import nearest
from plait.hookspecs import HOOKS, hook_arguments, kinds_of

if typing.TYPE_CHECKING:
    from plait.pipeline import Reference, Step

# What a part of a result of some kind is: a split of a dataset or of features, one of several clients.
PARTS = {"dataset": "dataset", "clients": "dataset", "feature-set": "feature-set"}
# Hooks whose result is what they were given, but for what they do to it.
LIKE = {"defend": "model", "optimize": "model", "attack": "data", "restore": "data"}
SHOWN = {"model": "a model", "data": "data"}


@attrs.frozen
class Declared:
    """What a configured method says of itself.

    Attributes:
        takes: argument → the kinds that it accepts.
        gives: kind of the result, or the argument that it is like; ``None``: not known.
        columns_needed: argument → columns that the method reads.
        columns_made: what the result has besides the columns of the argument that it is like.
        columns_kept: of the columns of that argument, the ones that are kept; ``None``: all.
        splits: the names of the parts of the result; ``None``: not known.
    """

    takes: Mapping[str, tuple[str, ...]]
    gives: str | None
    columns_needed: Mapping[str, tuple[str, ...]]
    columns_made: tuple[str, ...] | None
    columns_kept: tuple[str, ...] | None
    splits: tuple[str, ...] | None


def declared(method: Any, hook: str) -> Declared:
    """What a configured method says of one of its hooks; of a class, what no field decides."""
    arguments = hook_arguments(hook)
    needed = _said(method, "columns_needed") or {}
    if not isinstance(needed, Mapping):
        needed = {"data" if "data" in arguments else arguments[0]: needed} if arguments else {}
    return Declared(
        {name: _names(kinds) for name, kinds in (_said(method, "takes") or {}).items() if name in arguments},
        _of_hook(_said(method, "gives"), hook) or LIKE.get(hook),
        {name: _names(columns) for name, columns in needed.items() if name in arguments},
        *(_optional(_of_hook(_said(method, name), hook)) for name in ("columns_made", "columns_kept", "splits")),
    )


def _said(method: Any, name: str) -> Any:
    said = getattr(method, name, None)
    # Of a class, a property and a field of that name say nothing.
    return None if isinstance(said, (property, types.MemberDescriptorType)) else said


def _of_hook(said: Any, hook: str) -> Any:
    # A field named splits may be a mapping, too: of names, not of hooks.
    return said.get(hook) if isinstance(said, Mapping) and said.keys() <= set(HOOKS) else said


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _optional(names: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return None if names is None else _names(names)


@attrs.frozen
class Given:
    """What is known of a result: its kind, its columns, its splits; ``None`` where it is not."""

    kind: str | None = None
    columns: frozenset[str] | None = None
    splits: tuple[str, ...] | None = None

    def part(self) -> Given:
        """What is known of one of its parts."""
        return Given(PARTS.get(self.kind or ""), self.columns)


def misfits(steps: Mapping[str, Step]) -> Iterator[tuple[Step, str, str]]:
    """What does not fit in the steps of a cell: step, argument, sentence."""
    known = _Known(steps)
    for step in steps.values():
        says = declared(step.instance, step.hook)
        for argument, value in step.inputs.items():
            if argument not in kinds_of(step.hook):
                continue
            for reference in step.references_in(value):
                source = steps.get(reference.step)
                if source is None:
                    continue
                for sentence in _misfits(step, says, argument, reference, source, known):
                    yield step, argument, sentence


def _misfits(
    step: Step, says: Declared, argument: str, reference: Reference, source: Step, known: _Known
) -> Iterator[str]:
    wanted, given = kinds_of(step.hook)[argument].name, kinds_of(source.hook)["return"].name
    whole, found = known.step(source.name), known.reference(reference)
    if given == "report":
        yield f"{reference} is a report, which no step takes"
        return
    if reference.part and whole.splits is not None and reference.part[0] not in whole.splits:
        yield f"{source.name} has no split {reference.part[0]!r}{nearest(reference.part[0], whole.splits)}; it has {', '.join(whole.splits)}"
        return
    # A part of a result may be of either kind.
    if not reference.part and "any" not in (wanted, given) and wanted != given:
        yield f"{argument!r} wants {SHOWN[wanted]}, and {reference} is {SHOWN[given]} ({_article(source.hook.replace('_', '-'))} step)"
        return
    accepted = says.takes.get(argument)
    if accepted and found.kind and found.kind not in accepted:
        yield f"{argument!r} of {step.method.name} takes {_one_of(accepted)}, and {reference} is {_article(found.kind)}"
        return
    if found.columns is not None:
        for column in says.columns_needed.get(argument, ()):
            if column not in found.columns:
                has = ", ".join(sorted(found.columns)) or "none"
                yield f"{step.method.name} needs the column {column!r} of {argument!r}, and {reference} lacks it{nearest(column, found.columns)}; it has {has}"


def _one_of(kinds: Sequence[str]) -> str:
    *first, last = (_article(kind) for kind in kinds)
    return f"{', '.join(first)} or {last}" if first else last


def _article(kind: str) -> str:
    if kind == "clients":
        return "the data of clients"
    if kind == "graph-tasks":
        return "tasks on a graph"
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


class _Known:
    """What is known of every step's result, found once."""

    def __init__(self, steps: Mapping[str, Step]) -> None:
        self._steps = steps
        self._found: dict[str, Given] = {}

    def step(self, name: str) -> Given:
        """Of a step; of one that waits for itself, nothing."""
        if name not in self._found:
            self._found[name] = Given()
            if name in self._steps:
                self._found[name] = self._of(self._steps[name])
        return self._found[name]

    def reference(self, reference: Reference) -> Given:
        """Of a step's result, or of a part of it."""
        found = self.step(reference.step)
        for _ in reference.part:
            found = found.part()
        return found

    def _of(self, step: Step) -> Given:
        says = declared(step.instance, step.hook)
        if says.gives not in hook_arguments(step.hook):
            made = None if says.columns_made is None or step.hook == "transform" else frozenset(says.columns_made)
            return Given(says.gives, made, says.splits)
        like = self._value(step.inputs.get(says.gives))
        columns = like.columns
        if columns is not None:
            kept = columns if says.columns_kept is None else columns & set(says.columns_kept)
            columns = kept | set(says.columns_made or ())
        return Given(like.kind, columns, like.splits if says.splits is None else says.splits)

    def _value(self, value: Any) -> Given:
        """Of what an argument is given: one result, or several, whose names are then the splits."""
        if value is None:
            return Given()
        if isinstance(value, list):
            return _together([self._value(one) for one in value])
        if not isinstance(value, Mapping):
            return self.reference(value)
        whole = [self.reference(one) for one in value.get(MERGE, ())]
        named = {name: self._value(one) for name, one in value.items() if name != MERGE}
        splits = [*(one.splits for one in whole), tuple(named)]
        together = _together([*(one.part() for one in whole), *named.values()])
        return attrs.evolve(
            together, splits=None if None in splits else tuple(dict.fromkeys(itertools.chain(*filter(None, splits))))
        )


def _together(several: Sequence[Given]) -> Given:
    """What several results have in common."""
    kinds, columns = {one.kind for one in several}, [one.columns for one in several]
    known = [names for names in columns if names is not None]
    return Given(
        kinds.pop() if len(kinds) == 1 else None,
        frozenset.intersection(*known) if known and len(known) == len(columns) else None,
    )
