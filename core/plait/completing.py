"""What the shell completes: methods, steps, fields and runs. Nothing heavy is imported, and nothing fails aloud."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _quietly(complete: Callable[[click.Context, str], Iterable[str]]) -> Complete:
    def completed(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            return [CompletionItem(text) for text in complete(context, incomplete) if text.startswith(incomplete)]
        except Exception:  # a shell has no place for messages
            return []

    return completed


def _methods(context: click.Context, incomplete: str) -> Iterable[str]:
    from plait.catalogue import offers
    from plait.hookspecs import HOOKS

    return sorted({offer.name for hook in HOOKS for offer in offers(hook)})


def _runs(context: click.Context, incomplete: str) -> Iterable[str]:
    from plait.runs import LAST, past_runs

    found = past_runs(context.params.get("out") or Path("runs"))
    return [LAST, *dict.fromkeys(run.pipeline for run in found), *(run.folder.name for run in found)]


def _methods_and_runs(context: click.Context, incomplete: str) -> Iterable[str]:
    return [*_methods(context, incomplete), *_runs(context, incomplete)]


def _pipeline(context: click.Context) -> Path:
    """The pipeline file on the line; click has not read it yet where an option's value is still to come."""
    if context.params.get("pipeline"):
        return Path(context.params["pipeline"])
    words = shlex.split(os.environ.get("COMP_WORDS", ""))
    return next(Path(word) for word in words if word.endswith((".yaml", ".yml")))


def _document(context: click.Context) -> dict[str, Any]:
    from plait.document import read

    data = read(_pipeline(context)).data
    return data if isinstance(data, dict) else {}


def _steps(context: click.Context, incomplete: str) -> Iterable[str]:
    return list(_document(context).get("steps") or {})


def _steps_of_run(context: click.Context, incomplete: str) -> Iterable[str]:
    from plait.run_folder import read_provenance
    from plait.runs import find_run

    steps = read_provenance(find_run(context.params["run"], context.params.get("out") or Path("runs")))["steps"]
    return [step["label"] for step in steps]


def _overrides(context: click.Context, incomplete: str) -> Iterable[str]:
    """``matrix.seed=``, ``steps.fused.with.bin_width=``: fields of a step once the step is written."""
    from plait.configuration import fields_of
    from plait.hookspecs import HOOKS
    from plait.methods import find

    data = _document(context)
    found = ["seed=", *(f"matrix.{axis}=" for axis in data.get("matrix") or {})]
    for name, step in (data.get("steps") or {}).items():
        start = f"steps.{name}.with."
        found.append(start)
        if not incomplete.startswith(start):
            continue
        key, method = next((key, value) for key, value in step.items() if key.replace("-", "_") in HOOKS)
        cls = find(key.replace("-", "_"), method, _pipeline(context).resolve().parent).cls
        found += [f"{start}{field}=" for field in fields_of(cls)]
    return found


methods, runs, methods_and_runs = map(_quietly, (_methods, _runs, _methods_and_runs))
steps, steps_of_run, overrides = map(_quietly, (_steps, _steps_of_run, _overrides))
