"""Earlier runs: which there are, how to name one, and what they found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs

from plait.errors import PlaitError, nearest
from plait.report.files import DATA, read_tables
from plait.report.tables import Table, headline

LAST = "last"
STAMP = "20260101-120000"
PROVENANCE = "provenance.json"


@attrs.frozen
class PastRun:
    """A run folder and what its ``results.json`` says; ``results`` is empty where the run has no report (yet)."""

    folder: Path
    results: Mapping[str, Any]

    @property
    def pipeline(self) -> str:
        """The name of its pipeline."""
        return str(self.results.get("name") or self.folder.parent.name)

    @property
    def started(self) -> datetime:
        """When it began, as its folder's name says."""
        try:
            return datetime.strptime(self.folder.name[: len(STAMP)], "%Y%m%d-%H%M%S")
        except ValueError:
            return datetime.fromtimestamp(self.folder.stat().st_mtime)

    @property
    def tables(self) -> list[Table]:
        """The tables of its report.

        Raises:
            PlaitError: it has none.
        """
        if not self.results:
            raise PlaitError(
                f"{self.folder} has no results that can be read: the run has not ended, or an earlier plait made it;"
                f" plait report {self.folder} writes its report again"
            )
        return read_tables(self.results)

    @property
    def state(self) -> str:
        """How it ended, in a few words."""
        if not self.results:
            return "no report"
        failed, not_run = len(self.results["failed"]), len(self.results["not run"])
        parts = [f"{failed} failed"] if failed else []
        parts += [f"{not_run} not run"] if not_run else []
        return ", ".join(parts) or "fine"

    @property
    def headline(self) -> str:
        """The main figure of its first tables."""
        if not self.results:
            return ""
        figures = [f"{table.title}: {figure}" for table in self.tables if table.main and (figure := headline(table))]
        return "; ".join(figures[:2])


def open_run(folder: Path) -> PastRun:
    """The run in a folder."""
    try:
        results = json.loads((folder / DATA).read_text(encoding="utf-8"))
        read_tables(results)
    except (OSError, ValueError, KeyError, TypeError):
        results = {}
    return PastRun(folder, results)


def past_runs(out: Path) -> list[PastRun]:
    """All runs below ``out``, the latest first."""
    return [open_run(folder) for folder in reversed(_folders(out))]


def _folders(out: Path) -> list[Path]:
    """All run folders, the latest last; of those of one second, the one that was written last."""
    files = out.glob(f"*/*/{PROVENANCE}")
    found = [(file.parent.name[: len(STAMP)], file.stat().st_mtime_ns, file.parent) for file in files]
    return [folder for _, _, folder in sorted(found)]


def is_run(name: str, out: Path) -> bool:
    """Whether a name is that of a run: a folder, an id or its beginning, or ``last``."""
    return name == LAST or (Path(name) / PROVENANCE).is_file() or any(f.name.startswith(name) for f in _folders(out))


def find_run(name: str, out: Path) -> Path:
    """The folder of a run.

    Args:
        name: a run folder; an id such as ``20260101-120000-ab12``, or its beginning; the name of a pipeline, for its
            latest run; or ``last``.
        out: where runs are.

    Raises:
        PlaitError: there is no such run, or there are several.
    """
    if (Path(name) / PROVENANCE).is_file():
        return Path(name)
    folders = _folders(out)
    if name == LAST and folders:
        return folders[-1]
    of_pipeline = [folder for folder in folders if folder.parent.name == name]
    if of_pipeline:
        return of_pipeline[-1]
    found = [folder for folder in folders if folder.name.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise PlaitError(f"{len(found)} runs begin with {name!r}: {', '.join(folder.name for folder in found[:5])}")
    names = {folder.parent.name for folder in folders}
    raise PlaitError(f"there is no run {name!r} in {out}{nearest(name, names) or '; plait runs lists them'}")
