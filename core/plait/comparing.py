"""Runs beside each other: what differs in what they were made of, and in what they found."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from plait.errors import PlaitError
from plait.report.document import RunReport
from plait.report.tables import Number, Table, column_title, difference
from plait.run_folder import command_of, read_provenance
from plait.runs import open_run

NOTE = (
    "Differences are paired by seed where both have the same seeds. ▲ ▼: larger than the spread,"
    " its own and that of both values; ≈: within it; no sign: no spread is known."
)
UNIMPORTANT = ("description",)


def compare(folders: Sequence[Path]) -> RunReport:
    """A report of several runs: a table of what differs in configuration, then their tables with differences.

    Raises:
        PlaitError: one is not a run folder, or has no results.
    """
    runs = [open_run(folder) for folder in folders]
    names = _names(folders)
    titled = [f"{name}: {f.resolve().parent.name} {f.resolve().name}" for name, f in zip(names, folders, strict=True)]
    found = [{table.title: table for table in run.tables} for run in runs]
    facts = [_facts(folder) for folder in folders]
    titles = list(dict.fromkeys(title for tables in found for title in tables))
    tables, notes = [], []
    for title in titles:
        here = [(name, tables_of[title]) for name, tables_of in zip(names, found, strict=True) if title in tables_of]
        if len(here) < len(runs):
            notes.append(f"table {title} is only in {', '.join(name for name, _ in here)}")
        elif len({tuple(sorted(table.index)) for _, table in here}) > 1:
            notes.append(
                f"table {title} has other columns in each run: {'; '.join(', '.join(t.index) for _, t in here)}"
            )
        else:
            tables.append(beside(title, here))
    keys = [{step["label"]: step["key"] for step in read_provenance(folder)["steps"]} for folder in folders]
    same = sum(all(other.get(label) == key for other in keys[1:]) for label, key in keys[0].items())
    description = f"{same} of {len(keys[0])} steps of A are the same in all of these runs."
    return RunReport(
        " and ".join(titled), description, [_what_differs(titled, facts), *tables], (), (), notes, (), {}, {}
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """A, B, …: short names for the columns; the table of what differs says whose they are."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise PlaitError("a run is named twice; name different ones")
    if len(folders) > len(string.ascii_uppercase):
        raise PlaitError(f"{len(folders)} runs are too many to be put beside each other; name at most 26")
    return list(string.ascii_uppercase[: len(folders)])


def _facts(folder: Path) -> dict[str, str]:
    """All that a run was made of, flat: path of a key of the pipeline, version, … → text."""
    provenance = read_provenance(folder)
    try:
        pipeline = json.loads((folder / "resolved.json").read_text(encoding="utf-8"))["pipeline"]
    except (OSError, ValueError, KeyError) as error:
        raise PlaitError(f"{folder} is not a run folder: it has no resolved.json that can be read") from error
    facts = {path: text for path, text in _flat(pipeline) if path not in UNIMPORTANT}
    methods = {f"code of {step['method'].rpartition(':')[2]}": str(step["version"]) for step in provenance["steps"]}
    versions = {f"version of {name}": version for name, version in provenance.get("distributions", {}).items()}
    more = {
        "command": command_of(provenance),
        "Python": str(provenance.get("python", "")).partition(" ")[0],
        "system": str(provenance.get("platform")),
        "commit": str(provenance.get("git commit")),
    }
    return {**facts, **methods, **versions, **more}


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [item for key, inner in value.items() for item in _flat(inner, f"{path}.{key}" if path else str(key))]
    return [(path, json.dumps(value, ensure_ascii=False))]


def _what_differs(names: Sequence[str], facts: Sequence[Mapping[str, str]]) -> Table:
    every = list(dict.fromkeys(key for one in facts for key in one))
    alike: dict[tuple[str, ...], list[str]] = {}
    for key in every:
        texts = tuple(one.get(key, "–") for one in facts)
        if len(set(texts)) > 1:
            alike.setdefault(texts, []).append(key)
    rows = [
        ((", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else ""), *texts), ())
        for texts, keys in alike.items()
    ]
    note = "" if rows else "Nothing differs: pipeline, code, versions and system are the same."
    return Table("What differs", ["what", *names], [], rows, note=note)


def beside(title: str, tables: Sequence[tuple[str, Table]]) -> Table:
    """Tables of one step in several runs as one: every metric of each run, and its difference to the first.

    Args:
        tables: (name of the run, its table) each; with the same index columns.
    """
    first = tables[0][1]
    index = list(first.index)
    rows: dict[tuple[str, ...], list[dict[str, Number | None]]] = {}
    for position, (_, table) in enumerate(tables):
        order = [table.index.index(name) for name in index]
        for texts, numbers in table.rows:
            row = rows.setdefault(tuple(texts[i] for i in order), [{} for _ in tables])
            row[position] = dict(zip(table.metrics, numbers, strict=True))
    metrics = list(dict.fromkeys(metric for _, table in tables for metric in table.metrics))
    head: list[str] = []
    made: dict[tuple[str, ...], list[Number | None]] = {texts: [] for texts in rows}
    for metric in metrics:
        titled = column_title(first, metric)
        for position, (name, _) in enumerate(tables):
            head.append(f"{titled} · {name}")
            for texts, row in rows.items():
                number = row[position].get(metric)
                made[texts].append(None if number is None else attrs.evolve(number, mark=""))
            if position:
                head.append(f"{titled} · {name} − {tables[0][0]}")
                for texts, row in rows.items():
                    made[texts].append(_difference(row[position].get(metric), row[0].get(metric), first, metric))
    return Table(title, index, head, list(made.items()), main=first.main, spread=first.spread, note=NOTE)


def _difference(one: Number | None, other: Number | None, table: Table, metric: str) -> Number | None:
    if one is None or other is None:
        return None
    gap = difference(one, other, table, metric)
    sign = "" if gap.exceeds is None else "≈ " if not gap.exceeds else "▲ " if gap.mean > 0 else "▼ "
    return Number(gap.mean, None, f"{sign}{gap.text}", gap.gaps or (gap.mean,), ("",) * max(gap.count, 1), gap.spread)
