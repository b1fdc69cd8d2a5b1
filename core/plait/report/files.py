"""The files of a report in a run's folder: Markdown, HTML, one CSV a table, and the tables as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.report.document import RunReport
from plait.report.html import to_html
from plait.report.tables import Table, from_data, to_data
from plait.report.text import markdown

DATA = "results.json"


def write(document: RunReport, folder: Path, facts: Mapping[str, Any], full: bool = False) -> None:
    """Write ``report.md``, ``report.html``, ``results.json`` and one CSV a table into the run's folder.

    Args:
        facts: what ``results.json`` says of the run beside its tables, as JSON-like data.
        full: the page holds all pictures as they are.
    """
    _write_text(folder / "report.md", markdown(document))
    _write_text(folder / "report.html", to_html(document, full))
    used: set[str] = set()
    for table in document.tables:
        stem = base = _file_name(table.title)
        number = 2
        while stem in used:
            stem, number = f"{base}-{number}", number + 1
        used.add(stem)
        _write_text(folder / f"{stem}.csv", table.to_csv())
    data = {
        **facts,
        "name": document.name,
        "failed": dict(document.failed),
        "not run": dict(document.not_run),
        "tables": [to_data(table) for table in document.tables],
    }
    _write_text(folder / DATA, json.dumps(data, indent=1))


def read_tables(data: Mapping[str, Any]) -> list[Table]:
    """The tables of a run from what is in its ``results.json``."""
    return [from_data(table) for table in data["tables"]]


def _file_name(title: str) -> str:
    plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in title)
    return plain.encode("utf-8", "ignore")[:150].decode("utf-8", "ignore") or "table"  # file systems count bytes


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")
