"""Figures on record: the numbers of a run as a CSV to be committed, and whether another run gives them again."""

from __future__ import annotations

import csv
import io
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from plait.errors import PlaitError, nearest
from plait.report.tables import Number, Table
from plait.run_folder import command_of, read_provenance
from plait.runs import PastRun
from plait.versions import LIBRARIES

FIRST_LINE = "# figures of a run of plait"
PLACES = ("--out", "--store", "--jobs")
COLUMNS = ("table", "row", "metric", "text", "mean", "std", "seeds", "values")


@attrs.frozen
class Figure:
    """One recorded number: of a metric, in a row, of a table."""

    table: str
    row: str
    metric: str
    text: str
    mean: float
    std: float | None
    seeds: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def place(self) -> tuple[str, str, str]:
        """Where it stands."""
        return self.table, self.row, self.metric


@attrs.frozen
class Record:
    """Figures, and what they come from: command, date, versions, hardware, seeds."""

    facts: Mapping[str, str]
    figures: Sequence[Figure]

    @property
    def command(self) -> list[str]:
        """The arguments of ``plait run`` that gave them.

        Raises:
            PlaitError: they come from elsewhere.
        """
        program, *arguments = shlex.split(self.facts.get("command", "")) or [""]
        if program != "plait" or arguments[:1] != ["run"]:
            raise PlaitError("the record names no command plait run …; record a run of the command line")
        return arguments[1:]


def figures_of(tables: Sequence[Table]) -> list[Figure]:
    """All numbers of the main tables."""
    return [
        _figure(table.title, texts, metric, number)
        for table in tables
        if table.main
        for texts, numbers in table.rows
        for metric, number in zip(table.metrics, numbers, strict=True)
        if number is not None
    ]


def _figure(title: str, texts: Sequence[str], metric: str, number: Number) -> Figure:
    row = ", ".join(texts)
    return Figure(title, row, metric, number.text, number.mean, number.std, tuple(number.seeds), tuple(number.values))


def record_of(run: PastRun) -> Record:
    """What a run found, to be put on record."""
    provenance = read_provenance(run.folder)
    versions = provenance.get("distributions", {})
    facts = {
        "command": _without_places(command_of(provenance)),
        "date": f"{run.started:%Y-%m-%d}",
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("plait", *LIBRARIES) if name in versions),
        "hardware": str(run.results.get("hardware", "")),
        "seeds": ", ".join(map(str, sorted({step["seed"] for step in provenance["steps"]}))),
        "packages": ", ".join(sorted({step.get("package") or "none" for step in provenance["steps"]} - {"none"})),
    }
    return Record(facts, figures_of(run.tables))


def _without_places(command: str) -> str:
    """A command without the options that make no result: where it writes, and how it shows itself."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        if word in PLACES:
            next(words, None)
        elif word != "--quiet" and not word.startswith(tuple(f"{place}=" for place in PLACES)):
            kept.append(word)
    return shlex.join(kept)


def to_text(record: Record) -> str:
    """The file of a record: facts as comments, a line for each figure."""
    buffer = io.StringIO()
    buffer.write(f"{FIRST_LINE}\n")
    for name, text in record.facts.items():
        buffer.write(f"# {name}: {' '.join(text.split())}\n")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for f in record.figures:
        std = "" if f.std is None else repr(f.std)
        writer.writerow(
            [f.table, f.row, f.metric, f.text, repr(f.mean), std, " ".join(f.seeds), " ".join(map(repr, f.values))]
        )
    return buffer.getvalue()


def read_record(file: Path) -> Record:
    """The record in a file.

    Raises:
        PlaitError: it cannot be read, or is none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlaitError(f"{file} cannot be read: {error}") from error
    if lines[:1] != [FIRST_LINE]:
        raise PlaitError(f"{file} is no record of figures; plait record RUN {file} writes one")
    comments = [line[2:] for line in lines[1:] if line.startswith("# ")]
    facts = {name: text for name, _, text in (line.partition(": ") for line in comments)}
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return Record(facts, [_read_figure(row) for row in rows])


def records_named(name: str, folder: Path) -> list[Path]:
    """The records that a user means: a file, all files of a folder, or those in ``folder`` that a package had a part in.

    Args:
        name: a path, or a package with or without ``plait-``.

    Raises:
        PlaitError: there is nothing of that name.
    """
    if os.path.isfile(name):
        return [Path(name)]
    if os.path.isdir(name):
        return sorted(Path(name).glob("*.csv"))
    packages = {file: read_record(file).facts.get("packages", "").split(", ") for file in sorted(folder.glob("*.csv"))}
    found = [file for file, names in packages.items() if {name, f"plait-{name}"} & set(names)]
    if not found:
        known = {one for names in packages.values() for one in names if one}
        has = f"those in {folder} are of {', '.join(sorted(known))}" if known else f"there are none in {folder}"
        raise PlaitError(f"{name!r} is neither a record of figures nor a package with one{nearest(name, known)}; {has}")
    return found


def _read_figure(row: Mapping[str, str]) -> Figure:
    values = tuple(map(float, row["values"].split()))
    seeds = tuple(row["seeds"].split()) or ("",) * len(values)
    std = float(row["std"]) if row["std"] else None
    return Figure(row["table"], row["row"], row["metric"], row["text"], float(row["mean"]), std, seeds, values)


@attrs.frozen
class Again:
    """A recorded figure and what another run gives for it; ``value`` is ``None`` where the run lacks it."""

    figure: Figure
    expected: float
    value: float | None
    within: bool


def again(record: Record, tables: Sequence[Table]) -> list[Again]:
    """Whether each recorded figure lies within the recorded spread in another run.

    Means are compared over the seeds that both have, so that a run of one seed is compared with that seed's value. Where
    a figure never varies (or is of one seed), it has to come again to six digits.
    """
    new = {figure.place: figure for figure in figures_of(tables)}
    found = []
    for old in record.figures:
        other = new.get(old.place)
        if other is None:
            found.append(Again(old, old.mean, None, False))
            continue
        shared = [seed for seed in old.seeds if seed in other.seeds]
        expected, value = (_mean(figure, shared) for figure in (old, other))
        allowed = max(old.std or 0.0, 1e-6 * abs(expected))
        same = (math.isnan(expected) and math.isnan(value)) or expected == value
        found.append(Again(old, expected, value, same or abs(value - expected) <= allowed))
    return found


def _mean(figure: Figure, seeds: Sequence[str]) -> float:
    values = [value for seed, value in zip(figure.seeds, figure.values, strict=True) if seed in seeds]
    return math.fsum(values) / len(values) if values else figure.mean
