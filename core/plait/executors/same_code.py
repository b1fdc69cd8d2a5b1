"""Whether another machine would compute the same: it sees the same store, and has the same code of every method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs

from plait.errors import PlaitError
from plait.methods import find
from plait.plan import Plan
from plait.versions import code_of


@attrs.frozen
class Look:
    """What to look for on another machine.

    Attributes:
        probe: a file in the store that holds its own name.
        folder: that of the pipeline.
        methods: (hook, method) → the code that it is made of here.
    """

    probe: Path
    folder: Path
    methods: Mapping[tuple[str, str], Mapping[str, str]]

    @classmethod
    def at(cls, plan: Plan, probe: Path) -> Look:
        """For the methods of a plan."""
        methods = {
            (task.step.hook, task.step.method.full_name): code_of(type(task.step.instance)) for task in plan.tasks
        }
        return cls(probe, plan.pipeline.folder, methods)


@attrs.frozen
class Differences:
    """What differs on the machine that looked; ``code`` holds a few words each."""

    sees_store: bool
    code: tuple[str, ...]


def look_around(look: Look) -> Differences:
    """Compare this machine with the one that made ``look``."""
    try:
        sees_store = look.probe.read_text(encoding="utf-8") == look.probe.name
    except OSError:
        sees_store = False
    found: dict[str, None] = {}
    for (hook, method), code in look.methods.items():
        try:
            here = code_of(find(hook, method, look.folder).cls)
        except PlaitError as error:
            found[str(error)] = None
            continue
        for name in {**code, **here}:
            if here.get(name) != code.get(name):
                found[f"{name} is {here.get(name, 'missing')} there and {code.get(name, 'missing')} here"] = None
    return Differences(sees_store, tuple(found))
