"""One self-contained HTML file: no network, no scripts but its own, everything from data escaped."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from plait.report.charts import chart
from plait.report.document import RunReport, table_of
from plait.report.model import Report
from plait.report.pictures import Gallery, gallery
from plait.report.tables import Number, Table, caption, column_title, difference, leaders
from plait.report.text import FORMATS

LIMIT = 5_000_000  # bytes of a page, unless everything is asked for
ROOM = 200_000  # bytes for what is not a picture, at least


def to_html(document: RunReport, full: bool = False) -> str:
    """The page.

    Args:
        full: all pictures as they are, however large the page becomes.
    """
    bare = _page(document, gallery([], None))
    room = None if full else max(LIMIT - len(bare.encode()) - ROOM, ROOM)
    return _page(document, gallery(document.panels, room))


def _page(document: RunReport, pictures: Gallery) -> str:
    charts = [(title, chart(lines)) for title, lines in document.curves]
    seconds = document.repeat.seconds if document.repeat else {}
    page: str = _template().render(
        document=document,
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        policy=_policy(),
        tables=[(number, table) for number, table in enumerate(document.tables)],
        panels=pictures.panels,
        picture_note=pictures.note,
        charts=charts,
        seconds=seconds,
        total=sum(seconds.values()),
    )
    return page


@functools.cache
def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@functools.cache
def _template() -> Any:
    from jinja2 import Environment

    from plait.listeners import duration

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(table_element=table_element, caption=caption, texts_to_copy=_texts_to_copy)
    environment.filters["duration"] = duration
    return environment.from_string(_file("page.html.jinja"))


def _policy() -> str:
    """What the page may load: nothing, and run: its own script."""
    script, style = (_hash(_file(name)) for name in ("page.js", "page.css"))
    return f"default-src 'none'; img-src data:; script-src '{script}'; style-src '{style}'; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def table_element(table: Table) -> Markup:
    """A ``<table>`` with everything from data escaped."""
    lead = {metric: number for metric, (_, number) in leaders(table).items()}
    head = [Markup('<th scope="col">{}</th>').format(name) for name in table.index]
    head += [Markup('<th scope="col" class="n">{}</th>').format(column_title(table, name)) for name in table.metrics]
    rows = []
    for place, (texts, numbers) in enumerate(table.rows):
        cells = [Markup("<td>{}</td>").format(text) for text in texts]
        cells += [_cell(table, name, n, lead.get(name)) for name, n in zip(table.metrics, numbers, strict=True)]
        rows.append(Markup('<tr data-row="{}">{}</tr>\n').format(place, Markup("").join(cells)))
    return Markup("<table><thead><tr>{}</tr></thead><tbody>\n{}</tbody></table>").format(
        Markup("").join(head), Markup("").join(rows)
    )


def _cell(table: Table, metric: str, number: Number | None, leader: Number | None) -> Markup:
    if number is None:
        return Markup('<td class="n">–</td>')
    gap = difference(number, leader, table, metric) if leader is not None and leader is not number else None
    about = [f"{number.mean!r}", f"n = {number.count}"]
    if 1 < number.count <= 12:
        about.append(", ".join(f"{value:.6g}" for value in number.values))
    if gap is not None:
        paired = f", paired over {gap.count} seeds" if gap.count else ""
        about.append(f"{gap.text} to the leading value{paired}")
    return Markup('<td class="n{}" data-value="{}" data-gap="{}" title="{}">{}{}</td>').format(
        f" {number.mark}" if number.mark else "",
        repr(number.mean),
        gap.text if gap is not None else "",
        "; ".join(about),
        "≈ " if number.mark == "tie" else "",
        number.text,
    )


def _texts_to_copy(table: Table) -> Markup:
    """JSON for the page's script: the table in every format, row by row, to copy what is seen."""
    made = {name: make(table) for name, make in FORMATS.items()}
    data = {name: {"head": text.head, "rows": list(text.rows), "foot": text.foot} for name, text in made.items()}
    # Neither an end tag nor a comment may begin inside.
    return Markup(json.dumps(data, ensure_ascii=True).replace("<", "\\u003c"))


NOTEBOOK = (
    "<style>.plait td,.plait th{text-align:left;padding:2px 10px}.plait .n{text-align:right}"
    ".plait .best{font-weight:bold}.plait .tie{font-style:italic}</style>"
)


def fragment(table: Table) -> str:
    """A table for a notebook."""
    return str(
        Markup('{}<div class="plait"><b>{}</b>{}<small>{}</small></div>').format(
            Markup(NOTEBOOK), table.title, table_element(table), caption(table)
        )
    )


def fragment_of_report(report: Report) -> str:
    """A single report for a notebook: its table, curves, pictures and notes."""
    parts: list[Any] = []
    if report.rows:
        parts.append(Markup(fragment(table_of(report))))
    for curve in report.curves:
        parts.append(Markup("<div>{}{}</div>").format(curve.name, Markup(chart([curve]).svg)))
    for _, title, grid in gallery([("", panel) for panel in report.panels], LIMIT).panels:
        pictures = [picture for row in grid for picture in row]
        tags = [
            Markup('<img alt="{0}" title="{0}" height="160" src="{1}"> ').format(p.caption, p.url) for p in pictures
        ]
        parts.append(Markup("<div>{}<br>{}</div>").format(title, Markup("").join(tags)))
    parts += [Markup("<div>{}</div>").format(note) for note in report.notes]
    return str(Markup("").join(parts))


def fragment_of_steps(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A small table of texts for a notebook."""
    cells = [Markup("").join(Markup("<td>{}</td>").format(text) for text in row) for row in rows]
    lines = Markup("").join(Markup("<tr>{}</tr>").format(line) for line in cells)
    names = Markup("").join(Markup("<th>{}</th>").format(name) for name in head)
    return f'{NOTEBOOK}<div class="plait"><b>{escape(title)}</b><table><tr>{names}</tr>{lines}</table></div>'
