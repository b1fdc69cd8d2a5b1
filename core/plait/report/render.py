"""A run's report: Markdown, CSV and one self-contained HTML file.

Rows of one evaluate step in all matrix cells make one table. Its text columns and the matrix axes say
what a row is about; its numbers are means over the axis ``seed``, with the sample standard deviation, the
standard error or the 95 % interval of the mean, as the evaluation asks.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from plait.configuration import plain_fields
from plait.optional import require
from plait.plan import Plan, Task
from plait.report.model import Curve, Panel, Report, Spread


@attrs.frozen
class Number:
    """Mean over seeds, standard deviation (``None`` for one seed), how many, as text, and whether it is the best."""

    mean: float
    std: float | None
    count: int
    text: str
    best: bool = False


@attrs.frozen
class Table:
    """One table: ``index`` and ``metrics`` are column names, a row holds texts, then :class:`Number` or ``None``.

    ``main`` tables are the results of ``evaluate`` steps; the others are what steps add beside their results.
    """

    title: str
    index: Sequence[str]
    metrics: Sequence[str]
    rows: Sequence[tuple[Sequence[str], Sequence[Number | None]]]
    better: Mapping[str, str]
    main: bool = True
    spread: Mapping[str, Spread] = attrs.field(factory=dict)

    def value(self, metric: str, **index: str) -> Number:
        """The number of one metric in the one row whose columns equal ``index``."""
        found = [
            numbers[self.metrics.index(metric)]
            for texts, numbers in self.rows
            if all(texts[self.index.index(name)] == str(value) for name, value in index.items())
        ]
        if len(found) != 1 or found[0] is None:
            raise KeyError(f"{len(found)} rows of table {self.title!r} match {index}")
        return found[0]


@attrs.frozen
class RunReport:
    """Everything that the report shows."""

    name: str
    description: str
    tables: Sequence[Table]
    curves: Sequence[tuple[str, Sequence[Curve]]]
    panels: Sequence[tuple[str, Panel]]
    notes: Sequence[str]
    steps: Sequence[tuple[str, str, str, str]]
    failed: Mapping[str, str]
    not_run: Mapping[str, str]


def collect(
    plan: Plan,
    reports: Sequence[tuple[Task, Sequence[Report]]],
    failed: Mapping[str, str],
    not_run: Mapping[str, str],
    warnings: Mapping[str, Sequence[str]],
) -> RunReport:
    """Gather all steps' reports into one document."""
    groups: dict[tuple[str, str, bool], list[tuple[Task, Report]]] = {}
    notes: list[str] = []
    curves: dict[str, list[Curve]] = {}
    panels: list[tuple[str, Panel]] = []
    seeds = [task.axes["seed"] for task, _ in reports if "seed" in task.axes]
    shown_seed = seeds[0] if seeds else None  # the pictures of one seed say what those of all would
    for task, parts in sorted(reports, key=lambda item: item[0].step.hook != "evaluate"):
        for number, part in enumerate(parts):
            if part.rows:
                main = number == 0 and task.step.hook == "evaluate"
                groups.setdefault((task.step.family, part.title, main), []).append((task, part))
            for curve in part.curves:
                curves.setdefault(f"{task.step.name}: {curve.y_label}", []).append(
                    attrs.evolve(curve, name=_curve_name(task, curve))
                )
            if task.axes.get("seed", shown_seed) == shown_seed:
                panels += [(task.label, panel) for panel in part.panels]
            notes += [f"{task.step.name}: {note}" for note in part.notes]
        notes += [f"{task.step.name}: warning: {message}" for message in warnings.get(task.label, ())]
    ordered = sorted(groups.items(), key=lambda item: not item[0][2])  # the main tables first
    tables = [_table(": ".join(filter(None, (step, title))), group, main) for (step, title, main), group in ordered]
    steps = [(t.label, t.step.hook.replace("_", "-"), t.step.method.name, _fields(t)) for t in plan.tasks]
    description = str(plan.pipeline.data.get("description") or "").strip()
    return RunReport(
        plan.pipeline.name,
        description,
        tables,
        list(curves.items()),
        panels,
        list(dict.fromkeys(notes)),
        steps,
        failed,
        not_run,
    )


def _fields(task: Task) -> str:
    return ", ".join(f"{name}={value}" for name, value in plain_fields(task.step.instance).items())


def _curve_name(task: Task, curve: Curve) -> str:
    axes = ",".join(f"{axis}={value}" for axis, value in task.axes.items())
    same = curve.name == curve.y_label
    return axes or curve.name if same else " ".join(filter(None, (axes, curve.name)))


def _table(title: str, group: Sequence[tuple[Task, Report]], main: bool) -> Table:
    about = [{**task.axes, **task.step.each} for task, _ in group]
    axes = list(dict.fromkeys(axis for one in about for axis in one if axis != "seed"))
    columns = list(dict.fromkeys(column for _, report in group for row in report.rows for column in row))
    metrics = [c for c in columns if any(_is_number(row.get(c)) for _, report in group for row in report.rows)]
    index = [*axes, *(c for c in columns if c not in metrics and c not in axes)]
    better = {c: direction for _, report in group for c, direction in report.better.items()}
    formats = {c: form for _, report in group for c, form in report.formats.items()}
    spread: dict[str, Spread] = {c: kind for _, report in group for c, kind in report.spread.items()}
    values: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for one, (_, report) in zip(about, group, strict=True):
        for row in report.rows:
            texts = tuple(_text({**one, **row}.get(column)) for column in index)
            cells = values.setdefault(texts, {})
            for metric in metrics:
                number = row.get(metric)
                if _is_number(number):
                    cells.setdefault(metric, []).append(float(number))  # type: ignore[arg-type]
    rows = [
        (texts, [_number(cells.get(m), formats.get(m, ".4g"), spread.get(m, "std")) for m in metrics])
        for texts, cells in values.items()
    ]
    return _mark_best(Table(title, index, metrics, rows, better, main, spread))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _number(values: Sequence[float] | None, form: str, spread: Spread) -> Number | None:
    if not values:
        return None
    mean = statistics.fmean(values)
    std = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    text = format(mean, form)
    if std:  # what never varies needs no spread
        shown = std * _width(spread, len(values))
        text += f" ± {format(shown, form.replace('+', '') if form.endswith('f') else '.2g')}"
    return Number(mean, std, len(values), text)


def _width(spread: Spread, count: int) -> float:
    """What stands behind ±, in sample standard deviations of ``count`` values."""
    if spread == "std":
        return 1.0
    standard_error = 1 / math.sqrt(count)
    if spread == "standard error":
        return standard_error
    return standard_error * float(require("scipy.stats").t.ppf(0.975, count - 1))


def _mark_best(table: Table) -> Table:
    if len(table.rows) < 2:
        return table
    rows = [(texts, list(numbers)) for texts, numbers in table.rows]
    for column, metric in enumerate(table.metrics):
        direction = table.better.get(metric)
        means = [n.mean for _, numbers in rows if (n := numbers[column]) is not None and math.isfinite(n.mean)]
        if direction is None or not means:
            continue
        best = max(means) if direction == "higher" else min(means)
        for _, numbers in rows:
            number = numbers[column]
            if number is not None and number.mean == best:
                numbers[column] = attrs.evolve(number, best=True)
    return attrs.evolve(table, rows=rows)


def write(document: RunReport, folder: Path) -> None:
    """Write ``report.md``, ``report.html`` and one CSV a table into the run's folder."""
    _write_text(folder / "report.md", markdown(document))
    _write_text(folder / "report.html", to_html(document))
    used: set[str] = set()
    for table in document.tables:
        stem = base = _file_name(table.title)
        number = 2
        while stem in used:
            stem, number = f"{base}-{number}", number + 1
        used.add(stem)
        _write_text(folder / f"{stem}.csv", to_csv(table))


def _file_name(title: str) -> str:
    plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in title)
    return plain.encode("utf-8", "ignore")[:150].decode("utf-8", "ignore") or "table"  # file systems count bytes


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")


def to_csv(table: Table) -> str:
    """One line a row; each metric as mean, std and number of seeds, unrounded."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(
        [*table.index, *(f"{metric}{suffix}" for metric in table.metrics for suffix in ("", " std", " seeds"))]
    )
    for texts, numbers in table.rows:
        cells: list[Any] = [_as_text_cell(text) for text in texts]
        for number in numbers:
            cells += (
                ["", "", 0] if number is None else [number.mean, "" if number.std is None else number.std, number.count]
            )
        writer.writerow(cells)
    return buffer.getvalue()


def _as_text_cell(text: str) -> str:
    # A spreadsheet would execute it.
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def column_title(table: Table, metric: str) -> str:
    """The metric's name, what stands behind ± where that is not the standard deviation, and which way is better."""
    direction = {"higher": " ↑", "lower": " ↓"}.get(table.better.get(metric, ""), "")
    kind = table.spread.get(metric, "std")
    column = table.metrics.index(metric)
    several = any(number.std for _, numbers in table.rows if (number := numbers[column]) is not None)
    return metric + (f" (± {kind})" if several and kind != "std" else "") + direction


def markdown(document: RunReport) -> str:
    """The report without pictures."""
    lines = [f"# {_md(document.name)}", ""]
    if document.description:
        lines += [_md(document.description), ""]
    for table in document.tables:
        head = [*table.index, *(column_title(table, metric) for metric in table.metrics)]
        lines += [
            f"## {_md(table.title)}",
            "",
            "| " + " | ".join(map(_md, head)) + " |",
            "| " + " | ".join([*["---"] * len(table.index), *["---:"] * len(table.metrics)]) + " |",
        ]
        for texts, numbers in table.rows:
            shown = ["" if n is None else f"**{_md(n.text)}**" if n.best else _md(n.text) for n in numbers]
            lines.append("| " + " | ".join([*map(_md, texts), *shown]) + " |")
        lines.append("")
    if document.failed:
        lines += [
            "## Failed steps",
            "",
            *_md_reasons(document.failed),
            "",
        ]
    if document.not_run:
        lines += ["## Steps that were not run", "", *_md_reasons(document.not_run), ""]
    if document.notes:
        lines += ["## Notes", "", *(f"- {_md(note)}" for note in document.notes), ""]
    return "\n".join(lines)


def _md_reasons(reasons: Mapping[str, str]) -> list[str]:
    return [f"- {_md(step)}: {_md(message)}" for step, message in reasons.items()]


def _md(text: str) -> str:
    escaped = html.escape(text, quote=False).replace("\\", "\\\\")
    for character in "|`*_[]":
        escaped = escaped.replace(character, "\\" + character)
    return " ".join(escaped.split())


STYLE = """
:root{--ink:#1b1f24;--soft:#5b6570;--line:#d8dee4;--best:#e6f4ea;--accent:#1f6feb;--bg:#fff;--card:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--line:#30363d;--best:#12361f;--accent:#58a6ff;--bg:#0d1117;--card:#161b22}}
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--bg);max-width:1180px;margin:0 auto;padding:24px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:34px 0 10px}h3{font-size:15px;margin:18px 0 6px}
p.lead{color:var(--soft);margin:0 0 8px;white-space:pre-line}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:5px 12px;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}
th{font-weight:600;border-bottom-width:2px}td.n,th.n{text-align:right}td.best{background:var(--best);font-weight:600}tbody tr:hover{background:var(--card)}
.failed{border-left:4px solid #d1242f;background:var(--card);padding:8px 14px}.notes li{color:var(--soft)}
.panel{display:grid;gap:8px;margin:0 0 14px;overflow-x:auto}figure{margin:0;min-width:0}figure img{width:100%;display:block;border-radius:4px;background:var(--card)}
figure.pixels img{image-rendering:pixelated}
figcaption{font-size:12px;color:var(--soft);padding:2px 0 0;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(360px,1fr));gap:16px}svg{width:100%;height:auto;background:var(--card);border-radius:6px}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}details summary{cursor:pointer;color:var(--accent)}details td{white-space:normal;overflow-wrap:anywhere;vertical-align:top}
"""
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#0b7285", "#57606a")
MAX_LINES = 24


def to_html(document: RunReport) -> str:
    """One HTML file with everything in it; all text from data is escaped, and there are no scripts."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(column_title=column_title)
    return environment.from_string(TEMPLATE).render(
        document=document,
        style=STYLE,
        more=[table for table in document.tables if not table.main],
        charts=[(title, _chart(lines)) for title, lines in document.curves],
        panels=[
            (label, panel.title, [[_figure(picture) for picture in row] for row in panel.images])
            for label, panel in document.panels
        ],
    )


def _figure(picture: Any) -> dict[str, Any]:
    width, height = (int.from_bytes(picture.data[start : start + 4], "big") for start in (16, 20))
    # Small pictures are data: their pixels are to be seen as they are.
    return {
        "caption": picture.caption,
        "url": "data:image/png;base64," + base64.b64encode(picture.data).decode(),
        "pixels": max(width, height) <= 96,
        "width": width,
    }


TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ document.name }} – plait</title><style>{{ style|safe }}</style></head><body>
<h1>{{ document.name }}</h1>
{% if document.description %}<p class="lead">{{ document.description }}</p>{% endif %}
{% if document.failed %}
<h2>Failed steps</h2>
<div class="failed">{% for step, message in document.failed.items() %}<div><b>{{ step }}</b>: {{ message }}</div>{% endfor %}</div>
{% endif %}
{% if document.not_run %}
<h2>Steps that were not run</h2>
<div class="failed">{% for step, message in document.not_run.items() %}<div><b>{{ step }}</b>: {{ message }}</div>{% endfor %}</div>
{% endif %}
{% macro show(table) %}
<div class="scroll"><table><thead><tr>
{% for name in table.index %}<th>{{ name }}</th>{% endfor %}
{% for metric in table.metrics %}<th class="n">{{ column_title(table, metric) }}</th>{% endfor %}
</tr></thead><tbody>
{% for texts, numbers in table.rows %}
<tr>{% for text in texts %}<td>{{ text }}</td>{% endfor %}
{% for number in numbers %}{% if number is none %}<td class="n">–</td>{% else %}
<td class="n{{ ' best' if number.best }}" title="{{ number.mean }}{{ ', ' ~ number.count ~ ' seeds' if number.count > 1 }}">{{ number.text }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% for table in document.tables if table.main %}<h2>{{ table.title }}</h2>{{ show(table) }}{% endfor %}
{% if panels %}<h2>Pictures</h2>{% endif %}
{% for label, title, rows in panels %}
<h3>{{ title }} <span style="font-weight:400;color:var(--soft)">{{ label }}</span></h3>
{% for row in rows %}
<div class="panel" style="grid-template-columns:repeat({{ row|length }},minmax(0,{{ '1fr' if row|length > 1 else '900px' }}))">
{% for figure in row %}<figure{{ ' class=pixels' if figure.pixels }}><img src="{{ figure.url }}" alt="{{ figure.caption }}" loading="lazy"><figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}</div>
{% endfor %}
{% endfor %}
{% if more %}<h2>More tables</h2>{% endif %}
{% for table in more %}<h3>{{ table.title }}</h3>{{ show(table) }}{% endfor %}
{% if charts %}<h2>Curves</h2><div class="charts">
{% for title, chart in charts %}<figure>{{ chart|safe }}<figcaption>{{ title }}</figcaption></figure>
{% endfor %}</div>{% endif %}
{% if document.notes %}<h2>Notes</h2><ul class="notes">{% for note in document.notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
<h2>Steps</h2>
<details><summary>{{ document.steps|length }} steps with their fields</summary>
<div class="scroll"><table><thead><tr><th>step</th><th>hook</th><th>method</th><th>fields</th></tr></thead><tbody>
{% for label, hook, method, fields in document.steps %}<tr><td>{{ label }}</td><td>{{ hook }}</td><td>{{ method }}</td><td>{{ fields }}</td></tr>
{% endfor %}</tbody></table></div></details>
</body></html>
"""


def _chart(curves: Sequence[Curve]) -> str:
    points = [(x, y) for curve in curves for x, y in zip(curve.x, curve.y, strict=True) if _can_be_drawn(x, y)]
    if not points:
        return '<svg viewBox="0 0 420 60"><text x="10" y="34">no finite values</text></svg>'
    shown = curves[:MAX_LINES]
    legend = [curve.name for curve in shown] if len(shown) > 1 else []
    width, height, left, top = 420, 220, 52, 12
    bottom = height - 34
    x_low, x_high = _bounds([x for x, _ in points])
    y_low, y_high = _bounds([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x_low) / (x_high - x_low) * (width - left - 12), bottom - (y - y_low) / (y_high - y_low) * (
            bottom - top
        )

    parts = [f'<svg viewBox="0 0 {width} {height + 14 * ((len(legend) + 1) // 2)}" role="img">']
    for fraction in (0, 0.5, 1):
        value = y_low + fraction * (y_high - y_low)
        y = place(x_low, value)[1]
        parts.append(
            f'<line x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/><text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
        value = x_low + fraction * (x_high - x_low)
        anchor = {0: "start", 0.5: "middle", 1: "end"}[fraction]
        parts.append(
            f'<text x="{place(value, y_low)[0]:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{value:.4g}</text>'
        )
    parts.append(
        f'<text x="{(left + width - 12) / 2:.0f}" y="{bottom + 29}" text-anchor="middle">{html.escape(curves[0].x_label)}</text>'
    )
    for number, curve in enumerate(shown):
        path = " ".join(
            f"{place(x, y)[0]:.1f},{place(x, y)[1]:.1f}"
            for x, y in zip(curve.x, curve.y, strict=True)
            if _can_be_drawn(x, y)
        )
        colour = COLOURS[number % len(COLOURS)]
        name = html.escape(curve.name)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"><title>{name}</title></polyline>'
        )
        if len(curve.x) == 1:
            x, y = place(curve.x[0], curve.y[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        if legend:
            x, y = left + 180 * (number % 2), height + 14 * (number // 2)
            parts.append(
                f'<rect x="{x}" y="{y - 8}" width="10" height="3" fill="{colour}"/><text x="{x + 14}" y="{y - 3}">{name[:40]}</text>'
            )
    parts.append("</svg>")
    return "".join(parts)


def _can_be_drawn(x: float, y: float) -> bool:
    # Differences of larger numbers overflow.
    return abs(x) < 1e300 and abs(y) < 1e300


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.05 or 1.0
        return low - margin, high + margin
    return low, high
