"""Curves as SVG, with their values beside for the page's script."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence

import attrs

from plait.report.model import Curve

COLOURS = 8
MAX_LINES = 24
MAX_POINTS = 400
WIDTH, HEIGHT, LEFT, RIGHT, TOP = 440, 230, 66, 14, 12
BOTTOM = HEIGHT - 34


@attrs.frozen
class Chart:
    """One drawing: SVG with the values of its lines, and the names of its colours."""

    svg: str
    legend: Sequence[tuple[int, str]]
    note: str


def chart(curves: Sequence[Curve]) -> Chart:
    """Draw curves over one x axis; of the same name but for the seed in one colour."""
    points = [(x, y) for curve in curves for x, y in zip(curve.x, curve.y, strict=True) if _can_be_drawn(x, y)]
    if not points:
        return Chart('<svg viewBox="0 0 440 60" role="img"><text x="10" y="34">no finite values</text></svg>', (), "")
    shown = curves[:MAX_LINES]
    colours = {name: number % COLOURS for number, name in enumerate(dict.fromkeys(map(_without_seed, shown)))}
    x_low, x_high = _bounds([x for x, _ in points])
    y_low, y_high = _bounds([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), BOTTOM - up * (BOTTOM - TOP)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for fraction in (0, 0.5, 1):
        value = y_low + fraction * (y_high - y_low)
        y = place(x_low, value)[1]
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
        value = x_low + fraction * (x_high - x_low)
        anchor = {0: "start", 0.5: "middle", 1: "end"}[fraction]
        parts.append(
            f'<text x="{place(value, y_low)[0]:.1f}" y="{BOTTOM + 15}" text-anchor="{anchor}">{value:.4g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{BOTTOM + 29}" text-anchor="middle">{html.escape(curves[0].x_label)}</text>'
    )
    thinned = False
    for curve in shown:
        drawn = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if _can_be_drawn(x, y)]
        thinned |= len(drawn) > MAX_POINTS
        drawn = _thinned(drawn)
        placed = [place(x, y) for x, y in drawn]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        values = html.escape(
            json.dumps([[float(f"{x:.6g}"), float(f"{y:.6g}")] for x, y in drawn], separators=(",", ":"))
        )
        name, colour = html.escape(curve.name), colours[_without_seed(curve)]
        parts.append(
            f'<polyline class="line k{colour}" points="{path}" data-name="{name}" data-values="{values}"><title>{name}</title></polyline>'
        )
        if len(placed) == 1:
            parts.append(f'<circle class="dot k{colour}" cx="{placed[0][0]:.1f}" cy="{placed[0][1]:.1f}" r="3"/>')
    parts.append(f'<line class="hair" x1="0" x2="0" y1="{TOP}" y2="{BOTTOM}"/></svg>')
    notes = []
    if len(curves) > MAX_LINES:
        notes.append(f"{MAX_LINES} of {len(curves)} lines are drawn")
    if thinned:
        notes.append(f"lines are drawn through {MAX_POINTS} of their points")
    legend = [(colour, name) for name, colour in colours.items()] if len(shown) > 1 else []
    return Chart("".join(parts), legend, "; ".join(notes))


def _without_seed(curve: Curve) -> str:
    """Lines of several seeds are one thing."""
    axes, _, rest = curve.name.partition(" ")
    kept = ",".join(part for part in axes.split(",") if not part.startswith("seed="))
    return " ".join(filter(None, (kept, rest))) if "seed=" in axes else curve.name


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS, with the lowest and the highest of every stretch."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        low, high = min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])
        kept += [points[i] for i in sorted({low, high})]
    return kept


def _can_be_drawn(x: float, y: float) -> bool:
    # Differences of larger numbers overflow.
    return abs(x) < 1e300 and abs(y) < 1e300


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.05 or 1.0
        return low - margin, high + margin
    return low, high
