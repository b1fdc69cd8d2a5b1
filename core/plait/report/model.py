"""The parts of a report: rows of a table, curves, panels of images, notes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import attrs

from plait.optional import require

Cell = str | bool | int | float | None
Spread = Literal["std", "standard error", "95 %"]


def _rows(rows: Sequence[Mapping[str, Cell]]) -> tuple[dict[str, Cell], ...]:
    return tuple(dict(row) for row in rows)


def _problem_of_cell(value: Any) -> str | None:
    """What is wrong with a value of a row, if anything."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return "the text holds half of a character (a lone surrogate)"
        return None
    if value is None or isinstance(value, (bool, float)):
        return None
    if isinstance(value, int):
        try:
            float(value)
        except OverflowError:
            return "the number is beyond what a float can hold"
        return None
    return f"the value is a {type(value).__module__}.{type(value).__qualname__}; a text, a bool or a number is needed, e.g. float(…)"


def _numbers(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _one_kind(spread: Spread | Mapping[str, Spread]) -> Spread:
    """What stands behind ±, once for the table.

    Raises:
        ValueError: it is unknown, or columns ask for several kinds.
    """
    named = dict(spread) if isinstance(spread, Mapping) else {"": spread}
    for column, kind in named.items():
        if kind not in get_args(Spread):
            allowed = ", ".join(map(repr, get_args(Spread)))
            raise ValueError(f"spread{column and f' of column {column!r}'} is {kind!r}; allowed is one of {allowed}")
    if len(set(named.values())) > 1:
        kinds = " and ".join(f"{kind!r} for {column}" for column, kind in named.items())
        raise ValueError(f"spread is {kinds}; a table has one kind of ±: give one, e.g. spread='std'")
    return next(iter(named.values()), "std")


def _grid(rows: Iterable[Iterable[Image]]) -> tuple[tuple[Image, ...], ...]:
    return tuple(tuple(row) for row in rows)


@attrs.frozen(kw_only=True)
class Image:
    """One picture of a panel: PNG bytes with a caption."""

    caption: str
    data: bytes = attrs.field(repr=lambda data: f"<{len(data)} bytes>")

    @data.validator
    def _is_png(self, attribute: attrs.Attribute[bytes], value: bytes) -> None:
        if not value.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"picture {self.caption!r} of a panel is not PNG data; make it with plait.report.png")


@attrs.frozen(kw_only=True)
class Panel:
    """A grid of pictures under one title, row by row. A single figure is a panel of one picture."""

    title: str
    images: Sequence[Sequence[Image]] = attrs.field(converter=_grid)


@attrs.frozen(kw_only=True)
class Curve:
    """Values ``y`` over ``x``; ``x_label`` and ``y_label`` with units."""

    name: str
    x: Sequence[float] = attrs.field(converter=_numbers)
    y: Sequence[float] = attrs.field(converter=_numbers)
    x_label: str = "step"
    y_label: str = "value"

    def __attrs_post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"curve {self.name!r} has {len(self.x)} x values and {len(self.y)} y values; give as many")


@attrs.frozen(kw_only=True, repr=False)
class Report:
    """What an evaluation found.

    Attributes:
        rows: a table. Columns whose values are text or bool say what the row is about (method, task);
            columns of numbers are metrics, averaged over seeds (mean ± std) by the run's report.
            A single result is one row: ``Report(rows=[{"accuracy": 0.93}])``.
        title: of the table; the step's name stands in where it is empty.
        better: metric column → ``"higher"`` or ``"lower"``; the value that leads every other by more than the
            spread is marked as the best, leading ones within it as ties.
        formats: metric column → format specification, e.g. ``{"PSNR": ".2f"}``; default ``.4g``.
        spread: what stands behind every ± of the table where there are several seeds: ``"std"`` (default),
            ``"standard error"`` of the mean (std / √seeds) or ``"95 %"``, the half width of Student's
            interval of the mean, from three seeds on (needs scipy). A mapping column → kind may say it too,
            with one kind for all.
        curves, panels: pictures; notes: sentences for the reader (what was excluded, warnings).
    """

    rows: tuple[dict[str, Cell], ...] = attrs.field(default=(), converter=_rows)
    title: str = ""
    better: Mapping[str, Literal["higher", "lower"]] = attrs.field(factory=dict)
    formats: Mapping[str, str] = attrs.field(factory=dict)
    spread: Spread = attrs.field(default="std", converter=_one_kind)
    curves: Sequence[Curve] = attrs.field(default=(), converter=tuple[Curve, ...])
    panels: Sequence[Panel] = attrs.field(default=(), converter=tuple[Panel, ...])
    notes: Sequence[str] = attrs.field(default=(), converter=tuple[str, ...])

    @rows.validator
    def _hold_cells(self, attribute: attrs.Attribute[Any], rows: Sequence[Mapping[str, Any]]) -> None:
        for number, row in enumerate(rows):
            for column, value in row.items():
                if problem := _problem_of_cell(column) or _problem_of_cell(value):
                    raise ValueError(f"row {number} of the report, column {column!r}: {problem}")

    @better.validator
    def _is_a_direction(self, attribute: attrs.Attribute[Any], value: Mapping[str, str]) -> None:
        for column, direction in value.items():
            if direction not in ("higher", "lower"):
                raise ValueError(f"better of column {column!r} is {direction!r}; allowed is 'higher' or 'lower'")

    @formats.validator
    def _is_a_format(self, attribute: attrs.Attribute[Any], value: Mapping[str, str]) -> None:
        for column, specification in value.items():
            try:
                format(1.5, specification)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"format of column {column!r} is {specification!r}; allowed is a format of numbers such as '.2f'"
                ) from error

    def value(self, column: str, **index: Cell) -> float:
        """The number in ``column`` of the one row whose other columns equal ``index``."""
        found = [row for row in self.rows if all(row.get(name) == value for name, value in index.items())]
        if len(found) != 1 or column not in found[0]:
            raise ValueError(f"{len(found)} rows of the report match {index}, and one with column {column!r} is needed")
        number = found[0][column]
        return math.nan if number is None else float(number)

    def __repr__(self) -> str:
        parts = [f"{len(self.rows)} rows", f"{len(self.curves)} curves", f"{len(self.panels)} panels"]
        title = f"{self.title!r}: " if self.title else ""
        return f"Report({title}{', '.join(part for part in parts if not part.startswith('0 ')) or 'empty'})"

    def _repr_html_(self) -> str:
        from plait.report.html import fragment_of_report

        return fragment_of_report(self)


def png(pixels: Any) -> bytes:
    """Encode pixels as PNG.

    Args:
        pixels: numpy ``[H, W]`` or ``[H, W, 3]`` uint8, or a float tensor ``[3, H, W]`` / ``[1, H, W]``
            in [0, 1], a PIL image, or a matplotlib ``Figure``.
    """
    buffer = io.BytesIO()
    if hasattr(pixels, "savefig"):
        pixels.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
        return buffer.getvalue()
    if hasattr(pixels, "detach"):
        array = pixels.detach().float().clamp(0, 1).mul(255).round().byte().cpu().numpy()
        pixels = array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)
    picture = pixels if hasattr(pixels, "save") else require("PIL.Image").fromarray(pixels)
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
