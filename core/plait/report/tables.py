"""Tables of numbers over seeds: means with one kind of ±, what leads by more than it, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from plait.optional import require
from plait.report.model import Spread

if TYPE_CHECKING:
    import pandas

Mark = Literal["", "best", "tie"]
NO_SEED = ""


@attrs.frozen
class Number:
    """One metric of one row: a value for each seed.

    Attributes:
        mean: of the values.
        std: their sample standard deviation; ``None`` for one value, or where one is not finite.
        text: as it is shown, ``26.82 ± 0.10``.
        values: what it is the mean of.
        seeds: the seed of each value; empty texts where the matrix has no axis ``seed``.
        spread: what stands behind ± in the text, ``None`` where nothing can.
        mark: ``best`` where it leads every other row by more than the spread, ``tie`` for the leading
            rows that lie within it.
    """

    mean: float
    std: float | None
    text: str
    values: tuple[float, ...]
    seeds: tuple[str, ...]
    spread: float | None = None
    mark: Mark = ""

    @property
    def count(self) -> int:
        """How many values it is the mean of."""
        return len(self.values)

    @property
    def best(self) -> bool:
        """Whether it leads every other row by more than the spread."""
        return self.mark == "best"

    def __repr__(self) -> str:
        return f"Number({self.text}, n={self.count})"


@attrs.frozen
class Difference:
    """How far one number lies above another.

    Attributes:
        mean: of the differences.
        spread: from seed to seed where both have the same seeds, else of two independent means; ``None`` for
            single values.
        count: how many pairs; 0 where the seeds are not the same.
        gaps: the difference of each pair.
        exceeds: whether it is larger than its own spread and than that of either number; ``None`` where no
            spread is known.
        text: with its sign, ``+0.05 ± 0.08``.
    """

    mean: float
    spread: float | None
    count: int
    exceeds: bool | None
    text: str
    gaps: tuple[float, ...] = ()


@attrs.frozen(repr=False)
class Table:
    """A table: ``index`` and ``metrics`` are column names, a row holds texts, then :class:`Number` or ``None``.

    Attributes:
        better: metric → ``"higher"`` or ``"lower"``.
        main: whether it is the result of an ``evaluate`` step; the others are what steps add beside their results.
        spread: what stands behind every ± of the table.
        formats: metric → format specification.
        note: how to read it, where :func:`caption` cannot tell.
    """

    title: str
    index: Sequence[str]
    metrics: Sequence[str]
    rows: Sequence[tuple[Sequence[str], Sequence[Number | None]]]
    better: Mapping[str, str] = attrs.field(factory=dict)
    main: bool = True
    spread: Spread = "std"
    formats: Mapping[str, str] = attrs.field(factory=dict)
    note: str = ""

    def value(self, metric: str, **index: Any) -> Number:
        """The number of one metric in the one row whose columns equal ``index``.

        Raises:
            KeyError: there is no such metric or column, or not exactly one such row.
        """
        for name, known in ((metric, self.metrics), *((name, self.index) for name in index)):
            if name not in known:
                raise KeyError(f"table {self.title!r} has no column {name!r}; it has {', '.join(known) or 'none'}")
        found = [
            numbers[self.metrics.index(metric)]
            for texts, numbers in self.rows
            if all(texts[self.index.index(name)] == shown(value) for name, value in index.items())
        ]
        if len(found) != 1 or found[0] is None:
            raise KeyError(f"{len(found)} rows of table {self.title!r} match {index}")
        return found[0]

    def to_pandas(self) -> pandas.DataFrame:
        """A data frame: the index columns, then of every metric its mean, its ``std`` and ``n``, unrounded."""
        rows = []
        for texts, numbers in self.rows:
            row: dict[str, Any] = dict(zip(self.index, texts, strict=True))
            for metric, number in zip(self.metrics, numbers, strict=True):
                row[metric] = math.nan if number is None else number.mean
                row[f"{metric} std"] = math.nan if number is None or number.std is None else number.std
                row[f"{metric} n"] = 0 if number is None else number.count
            rows.append(row)
        columns = [*self.index, *(f"{metric}{more}" for metric in self.metrics for more in ("", " std", " n"))]
        return require("pandas").DataFrame(rows, columns=columns)

    def to_markdown(self) -> str:
        """A Markdown table."""
        from plait.report.text import table_as

        return table_as("Markdown", self)

    def to_latex(self) -> str:
        """A LaTeX ``tabular`` with the rules of ``booktabs``."""
        from plait.report.text import table_as

        return table_as("LaTeX", self)

    def to_csv(self) -> str:
        """One line a row; each metric as mean, std and number of values, unrounded."""
        from plait.report.text import table_as

        return table_as("CSV", self)

    def __repr__(self) -> str:
        from plait.report.text import plain_table

        return plain_table(self)

    def _repr_html_(self) -> str:
        from plait.report.html import fragment

        return fragment(self)


def shown(value: Any) -> str:
    """A value of a text column, as the table holds it."""
    if value is None:
        return ""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def number_of(values: Sequence[float], seeds: Sequence[str], form: str, kind: Spread) -> Number:
    """A number of a table from its values."""
    mean = statistics.fmean(values)
    std = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    spread = None if std is None else _spread(std, len(values), kind)
    text = format(mean, form)
    if spread:  # what never varies needs no ±
        text += f" ± {_of_spread(spread, form)}"
    return Number(mean, std, text, tuple(values), tuple(seeds), spread)


def _of_spread(spread: float, form: str) -> str:
    return format(spread, form.replace("+", "") if form.endswith("f") else ".2g")


def _spread(std: float, count: int, kind: Spread) -> float | None:
    """What stands behind ±; ``None`` where so few values say nothing about it."""
    if kind == "std":
        return std
    if kind == "standard error":
        return std / math.sqrt(count)
    if count < 3:  # Student's factor of two values is 12.7
        return None
    return std / math.sqrt(count) * float(require("scipy.stats").t.ppf(0.975, count - 1))


def marked(table: Table) -> Table:
    """The table with the best number of each metric marked, or the leading ones that tie.

    A number is the best only where it leads every other row by more than the spread. With single values no
    spread is known, and nothing is marked; nor where all rows tie.
    """
    rows = [(texts, list(numbers)) for texts, numbers in table.rows]
    for column, metric in enumerate(table.metrics):
        direction = table.better.get(metric)
        here = [(row, n) for row, (_, numbers) in enumerate(rows) if (n := numbers[column]) and math.isfinite(n.mean)]
        if direction is None or len(here) < 2:
            continue
        leader_row, leader = (max if direction == "higher" else min)(here, key=lambda item: item[1].mean)
        others = {row: difference(leader, other, table, metric).exceeds for row, other in here if row != leader_row}
        ties = [row for row, exceeds in others.items() if exceeds is False]
        if None in others.values() or len(ties) == len(others) > 1:
            continue
        for row in [leader_row, *ties]:
            rows[row][1][column] = attrs.evolve(here_of(rows, row, column), mark="tie" if ties else "best")
    return attrs.evolve(table, rows=rows)


def here_of(rows: Sequence[tuple[Any, Sequence[Number | None]]], row: int, column: int) -> Number:
    """The number that is known to stand in a cell."""
    number = rows[row][1][column]
    assert number is not None
    return number


def difference(one: Number, other: Number, table: Table, metric: str) -> Difference:
    """``one`` − ``other``, seed by seed where both have the same seeds."""
    form = "+" + table.formats.get(metric, ".4g").replace("+", "")
    by_seed = _by_seed(one), _by_seed(other)
    pairs = [(by_seed[0][seed], by_seed[1][seed]) for seed in by_seed[0] if seed in by_seed[1]]
    spread: float | None
    gaps: list[float] = []
    if len(pairs) > 1 and len(pairs) == one.count == other.count:
        gaps = [a - b for a, b in pairs]
        mean = statistics.fmean(gaps)
        std = statistics.stdev(gaps) if all(map(math.isfinite, gaps)) else None
        spread = None if std is None else _spread(std, len(gaps), table.spread) or std
    else:
        mean, pairs = one.mean - other.mean, []
        own = [n.spread if n.spread is not None else n.std for n in (one, other)]
        spread = None if None in own else math.hypot(*(s for s in own if s is not None))
    if spread is not None and spread <= 1e-9 * max(abs(one.mean), abs(other.mean)):
        spread = 0.0  # the noise of the arithmetic
    text = format(mean, form) + (f" ± {_of_spread(spread, form)}" if spread else "")
    return Difference(mean, spread, len(pairs), _exceeds(mean, spread, one, other), text, tuple(gaps))


def _by_seed(number: Number) -> dict[str, float]:
    """Seed → value; empty where there are no seeds, or a seed has several values."""
    found = dict(zip(number.seeds, number.values, strict=True))
    return found if len(found) == number.count and NO_SEED not in found else {}


def _exceeds(mean: float, spread: float | None, one: Number, other: Number) -> bool | None:
    own = [number.spread if number.spread is not None else number.std for number in (one, other)]
    if spread is None or None in own or not math.isfinite(mean):
        return None
    noise = 1e-9 * max(abs(one.mean), abs(other.mean))  # of the arithmetic
    return abs(mean) > max(spread, *(s for s in own if s is not None), noise)


def with_counts(table: Table) -> Table:
    """Where the numbers of a table are means of differently many values, each says of how many."""
    if len(counts_of(table)) < 2:
        return table
    rows = [
        (texts, [None if n is None else attrs.evolve(n, text=f"{n.text} (n = {n.count})") for n in numbers])
        for texts, numbers in table.rows
    ]
    return attrs.evolve(table, rows=rows)


def counts_of(table: Table) -> set[int]:
    """Of how many values the numbers of a table are means."""
    return {number.count for _, numbers in table.rows for number in numbers if number is not None}


def caption(table: Table) -> str:
    """How to read a table, in a sentence or two: n, what ± is, what is marked."""
    if table.note:
        return table.note
    counts = counts_of(table)
    if counts <= {1}:
        ranked = any(metric in table.better for metric in table.metrics) and len(table.rows) > 1
        return "Single values (n = 1): no spread is known, so none is marked as the best." if ranked else ""
    seeded = all(_by_seed(n) for _, numbers in table.rows for n in numbers if n is not None and n.count > 1)
    what = "seeds" if seeded else "values"
    several = f"n = {max(counts)} {what}" if len(counts) == 1 else f"n {what}, n beside each"
    kind = {"std": "sample standard deviation", "standard error": "standard error of the mean"}
    meaning = kind.get(table.spread, "half the width of the 95 % interval of the mean, from three values on")
    sentences = [f"Mean ± {meaning} over {several}."]
    marks = {number.mark for _, numbers in table.rows for number in numbers if number is not None}
    if "best" in marks:
        sentences.append(
            "Best: leads every other row by more than the spread, its own and that of the paired differences."
        )
    if "tie" in marks:
        sentences.append("≈ ties: leads, but by no more than the spread.")
    return " ".join(sentences)


def column_title(table: Table, metric: str) -> str:
    """The metric's name, and which way is better."""
    return metric + {"higher": " ↑", "lower": " ↓"}.get(table.better.get(metric, ""), "")


def leaders(table: Table) -> dict[str, tuple[Sequence[str], Number]]:
    """Metric with a direction → the texts of its leading row and its number there, marked or not."""
    found = {}
    for column, metric in enumerate(table.metrics):
        here = [(texts, n) for texts, numbers in table.rows if (n := numbers[column]) and math.isfinite(n.mean)]
        if metric in table.better and here:
            found[metric] = (max if table.better[metric] == "higher" else min)(here, key=lambda item: item[1].mean)
    return found


def headline(table: Table) -> str:
    """The figure that a table is about, ``PSNR 26.82 ± 0.10 (ensir)``: its first metric where it leads."""
    lead = leaders(table)
    if lead:
        metric, (texts, number) = next(iter(lead.items()))
    elif table.rows and table.rows[0][1] and table.rows[0][1][0] is not None:
        metric, texts, number = table.metrics[0], table.rows[0][0], table.rows[0][1][0]
    else:
        return ""
    where = ", ".join(text for text in texts if text) if len(table.rows) > 1 else ""
    return f"{metric} {number.text}{where and f' ({where})'}"


def to_data(table: Table) -> dict[str, Any]:
    """A table as JSON-like data, unrounded."""
    rows = [
        {
            "texts": list(texts),
            "numbers": [
                None if n is None else {"values": list(map(_json_number, n.values)), "seeds": list(n.seeds)}
                for n in numbers
            ],
        }
        for texts, numbers in table.rows
    ]
    facts = attrs.asdict(table, recurse=False)
    return {**facts, "better": dict(table.better), "formats": dict(table.formats), "rows": rows}


def from_data(data: Mapping[str, Any]) -> Table:
    """The table that :func:`to_data` was given."""
    kind, formats = data["spread"], data["formats"]
    rows = [
        (
            row["texts"],
            [
                None
                if n is None
                else number_of([*map(float, n["values"])], n["seeds"], formats.get(metric, ".4g"), kind)
                for metric, n in zip(data["metrics"], row["numbers"], strict=True)
            ],
        )
        for row in data["rows"]
    ]
    return marked(with_counts(Table(**{**data, "rows": rows})))


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
