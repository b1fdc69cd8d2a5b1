"""The steps of a pipeline as a picture: boxes in columns, each to the right of what it needs."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import attrs

from plait.pipeline import Pipeline

BOX, GAP, ROW, HIGH, MARGIN = 190, 60, 66, 46, 16
LONGEST = 26  # characters in a box
STYLE = (
    ".b{fill:#f6f8fa;stroke:#8c959f}.e{fill:none;stroke:#8c959f;marker-end:url(#a)}text{font:13px system-ui,sans-serif;fill:#1b1f24}"
    ".s{font-size:11px;fill:#5b6570}.evaluate .b{fill:#d7f0de}.load-data .b,.load-model .b{fill:#ddeeff}"
    "@media(prefers-color-scheme:dark){.b{fill:#161b22}.evaluate .b{fill:#12361f}.load-data .b,.load-model .b{fill:#12233f}"
    "text{fill:#e6edf3}.s{fill:#9aa4af}}"
)


@attrs.frozen
class Box:
    """A step of the file: what it is called, its hook and methods in all cells, and the steps that it needs."""

    name: str
    hook: str
    methods: Sequence[str]
    needs: Sequence[str]
    column: int


def boxes(pipeline: Pipeline) -> list[Box]:
    """The steps of a pipeline's file in the order in which they run; members of a step with ``each`` are one."""
    hooks: dict[str, str] = {}
    methods: dict[str, dict[str, None]] = {}
    needs: dict[str, dict[str, None]] = {}
    for cell in pipeline.cells:
        families = {step.name: step.family for step in cell.steps.values()}
        for step in cell.steps.values():
            hooks.setdefault(step.family, step.hook.replace("_", "-"))
            methods.setdefault(step.family, {})[step.method.name.rpartition("/")[2]] = None
            needed = needs.setdefault(step.family, {})
            needed |= dict.fromkeys(families[reference.step] for reference in step.references())
    columns: dict[str, int] = {}
    for name in hooks:
        _place(name, needs, columns)
    return [Box(name, hooks[name], list(methods[name]), list(needs[name]), columns[name]) for name in hooks]


def _place(name: str, needs: Mapping[str, Mapping[str, None]], columns: dict[str, int]) -> int:
    if name not in columns:
        columns[name] = 0  # cells may name one another in turn
        columns[name] = max((_place(needed, needs, columns) + 1 for needed in needs[name] if needed != name), default=0)
    return columns[name]


def as_lines(pipeline: Pipeline) -> list[str]:
    """For a terminal: one line a step, further to the right the later it runs."""
    found = boxes(pipeline)
    lines = []
    for box in found:
        arrow = f"  ← {', '.join(box.needs)}" if box.needs else ""
        lines.append(f"{'  ' * box.column}{box.name}  {box.hook}: {_methods(box, 60)}{arrow}")
    return lines


def as_svg(pipeline: Pipeline) -> str:
    """An SVG picture."""
    found = boxes(pipeline)
    rows = _rows(found)
    places = {b.name: (MARGIN + b.column * (BOX + GAP), MARGIN + rows[b.name] * ROW) for b in found}
    width = max(x for x, _ in places.values()) + BOX + MARGIN
    height = max(y for _, y in places.values()) + HIGH + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f"<title>{html.escape(pipeline.name)}</title><style>{STYLE}</style>"
        '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0,0L8,4L0,8z" fill="#8c959f"/></marker></defs>'
    ]
    for box in found:
        x, y = places[box.name]
        for needed in box.needs:
            from_x, from_y = places[needed][0] + BOX, places[needed][1] + HIGH / 2
            bend = max(20.0, (x - from_x) / 2)
            parts.append(
                f'<path class="e" d="M{from_x},{from_y} C{from_x + bend},{from_y} {x - bend},{y + HIGH / 2} {x},{y + HIGH / 2}"/>'
            )
    for box in found:
        x, y = places[box.name]
        title = f"{box.hook}: {', '.join(box.methods)}"
        parts.append(
            f'<g class="{box.hook}"><title>{html.escape(title)}</title><rect class="b" x="{x}" y="{y}" width="{BOX}" height="{HIGH}" rx="6"/>'
            f'<text x="{x + 10}" y="{y + 19}">{html.escape(_short(box.name, LONGEST))}</text>'
            f'<text class="s" x="{x + 10}" y="{y + 36}">{html.escape(_short(f"{box.hook}: {_methods(box, LONGEST)}", LONGEST + 4))}</text></g>'
        )
    return "".join([*parts, "</svg>\n"])


def _rows(found: Sequence[Box]) -> dict[str, int]:
    """A row for each box: near those that it needs, each place taken once."""
    rows: dict[str, int] = {}
    for column in range(max(box.column for box in found) + 1):
        here = [box for box in found if box.column == column]
        wanted = {
            b.name: sum(rows.get(n, 0) for n in b.needs) / len(b.needs) if b.needs else i for i, b in enumerate(here)
        }
        following = 0
        for box in sorted(here, key=lambda box: wanted[box.name]):
            rows[box.name] = max(following, round(wanted[box.name]))
            following = rows[box.name] + 1
    return rows


def _methods(box: Box, most: int) -> str:
    text = ", ".join(box.methods)
    return text if len(text) <= most or len(box.methods) == 1 else f"{len(box.methods)} methods"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
