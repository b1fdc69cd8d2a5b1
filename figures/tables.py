"""Writes the figures on record into the tables of pages: ``python figures/tables.py``.

A table takes part if a comment above it names its records: ``<!-- figures: figures/a.csv figures/b.csv -->``.
``tables.tsv`` says where each of its numbers is on record. ``python figures/tables.py --find`` looks for numbers that it
does not know yet, by their values and by what else stands in their row and column; read what it adds.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
from plait.recording import Figure, read_record

ROOT = Path(__file__).parents[1]
PLACES = Path(__file__).with_suffix(".tsv")
PAGES = [
    ROOT / "README.md",
    *(
        page
        for of in ("plugins/*/README.md", "plugins/*/src/**/*.md", "docs/**/*.md")
        for page in sorted(ROOT.glob(of))
    ),
]
TABLE = re.compile(r"<!-- figures: ([^>]+?) -->\n+((?:\|.*\n)+)")
NUMBER = re.compile(r"(?<![\w.`])[-−+]?(?:\d+(?:\.\d+)?|\.\d+)(?:e-?\d+)?(?: ± [\d.]+(?:e-?\d+)?)?(?![\w`])")
CODE = re.compile(r"`[^`]*`")
AND = " & "


@attrs.frozen
class Cell:
    """Where a number stands on a page: in the table with a head, in a row, in a column, and there in which place."""

    page: str
    table: str
    row: str
    column: int
    number: int


@attrs.frozen
class Origin:
    """Where a number is on record, and how it is shown.

    Attributes:
        record: the file.
        table: of the record.
        row: of that table; several, joined by ``&``, are averaged seed by seed.
        metric: of that row; several are averaged, too.
        minus: rows whose numbers are taken off, seed by seed; empty for none.
        seed: whose number it is; empty for the mean over all seeds.
        show: ``text`` as the record has it; ``.2`` or ``.2 ± .2`` for so many decimals. Before it, ``+`` shows every
            sign, ``0`` leaves out a zero before the point, ``%`` counts in hundredths and ``M`` in millions.
    """

    record: str
    table: str
    row: str
    metric: str
    minus: str = ""
    seed: str = ""
    show: str = "text"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Writes the figures on record into the tables of pages.")
    parser.add_argument("--find", action="store_true", help="look for numbers that tables.tsv does not know")
    origins = read_origins()
    if parser.parse_args().find:
        origins = find(origins)
        write_origins(origins)
    for page in PAGES:
        if (text := filled(page, origins)) != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(f"{name_of(page)}: written anew")


def name_of(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def filled(page: Path, origins: Mapping[Cell, Origin]) -> str:
    """The text of a page, every number that is on record as it is there."""

    def anew(match: re.Match[str]) -> str:
        start = match[0].index("|")
        return match[0][:start] + _filled_table(match[2], name_of(page), origins)

    return TABLE.sub(anew, page.read_text(encoding="utf-8"))


def _filled_table(table: str, page: str, origins: Mapping[Cell, Origin]) -> str:
    lines = table.splitlines(keepends=True)
    for at, (row, cells) in enumerate(_rows(table), 2):
        for column, text in enumerate(cells):
            for number, match in reversed([*enumerate(_numbers(text, column), 1)]):
                if origin := origins.get(Cell(page, _head(table), row, column, number)):
                    cells[column] = f"{cells[column][: match.start()]}{shown(origin)}{cells[column][match.end() :]}"
        lines[at] = f"|{'|'.join(cells)}|\n"
    return "".join(lines)


def tables_of(page: Path) -> list[tuple[list[str], dict[Cell, str]]]:
    """The marked tables of a page: their records, and the numbers that they show.

    Raises:
        ValueError: two of them have the same head, by which they are told apart.
    """
    tables = TABLE.findall(page.read_text(encoding="utf-8"))
    head, times = Counter(_head(table) for _, table in tables).most_common(1)[0] if tables else ("", 1)
    if times > 1:
        raise ValueError(f"{times} tables of {name_of(page)} have the head {head}; name a column of one differently")
    return [(names.split(), dict(_shown_in(table, name_of(page)))) for names, table in tables]


def _head(table: str) -> str:
    return table.partition("\n")[0].strip()


def _shown_in(table: str, page: str) -> Iterator[tuple[Cell, str]]:
    for row, cells in _rows(table):
        for column, text in enumerate(cells):
            for number, match in enumerate(_numbers(text, column), 1):
                yield Cell(page, _head(table), row, column, number), match[0]


def _rows(table: str) -> Iterator[tuple[str, list[str]]]:
    """The name of each row below the head, counted where it comes again, and its cells."""
    seen = Counter[str]()
    for line in table.splitlines()[2:]:
        cells = line.split("|")[1:-1]
        name = "" if "±" in cells[0] else cells[0].strip().replace("**", "")
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})", cells


def _numbers(text: str, column: int) -> list[re.Match[str]]:
    """The numbers in a cell, but for those in code and in the name of a row."""
    if column == 0 and "±" not in text:
        return []
    return [*NUMBER.finditer(CODE.sub(lambda code: "`" * len(code[0]), text))]


def shown(origin: Origin) -> str:
    """A number as its table shows it.

    Raises:
        ValueError: it is not on record.
    """
    flags, show = re.fullmatch(r"([+0%M]*)(.*)", origin.show).groups()  # type: ignore[union-attr]
    if show == "text":
        figure = _figure(origin.record, origin.table, origin.row, origin.metric)
        return _signed(figure.text.removeprefix("+"), figure.mean, flags)
    values = values_of(origin)
    decimals, *spread = show.split(" ± ")
    text = _signed(f"{statistics.fmean(values):{decimals}f}", statistics.fmean(values), flags)
    return f"{text} ± {statistics.stdev(values):{spread[0]}f}" if spread else text


def _signed(text: str, value: float, flags: str) -> str:
    if "0" in flags:
        text = re.sub(r"^(-?)0\.", r"\1.", text)
    return ("+" if "+" in flags and value >= 0 else "") + text.replace("-", "−", text.startswith("-"))


def values_of(origin: Origin) -> list[float]:
    """What a number is the mean of, seed by seed.

    Raises:
        ValueError: it is not on record.
    """
    seeds = [origin.seed] if origin.seed else _averaged(origin, origin.row)[0].seeds
    unit = 1e6 if "M" in origin.show else 0.01 if "%" in origin.show else 1.0
    off = _averaged(origin, origin.minus) if origin.minus else []
    return [(_at(_averaged(origin, origin.row), seed) - (_at(off, seed) if off else 0.0)) / unit for seed in seeds]


def _averaged(origin: Origin, rows: str) -> list[Figure]:
    places = itertools.product(rows.split(AND), origin.metric.split(AND))
    return [_figure(origin.record, origin.table, row, metric) for row, metric in places]


def _at(figures: Sequence[Figure], seed: str) -> float:
    return statistics.fmean(figure.values[figure.seeds.index(seed)] for figure in figures)


def _figure(record: str, table: str, row: str, metric: str) -> Figure:
    if (found := _figures(record).get((table, row, metric))) is None:
        raise ValueError(
            f"{record} has no {metric!r} of {row!r} in its table {table!r}, which figures/tables.tsv asks for"
        )
    return found


@functools.cache
def _figures(record: str) -> dict[tuple[str, str, str], Figure]:
    return {figure.place: figure for figure in read_record(ROOT / record).figures}


def read_origins() -> dict[Cell, Origin]:
    """What ``tables.tsv`` says."""
    with PLACES.open(encoding="utf-8", newline="") as file:
        lines = [*csv.reader(file, "excel-tab")][1:]
    return {
        Cell(page, table, row, int(column), int(number)): Origin(*more)
        for page, table, row, column, number, *more in lines
    }


def write_origins(origins: Mapping[Cell, Origin]) -> None:
    """Writes ``tables.tsv``."""
    with PLACES.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, "excel-tab", lineterminator="\n")
        writer.writerow(
            ["page", "table", "row", "column", "number", "record", "of", "its row", "metric", "minus", "seed", "show"]
        )
        writer.writerows([*attrs.astuple(cell), *attrs.astuple(origin)] for cell, origin in origins.items())


def find(known: Mapping[Cell, Origin], pages: Sequence[Path] = tuple(PAGES)) -> dict[Cell, Origin]:
    """The origins of all numbers on pages: those known, and what is found for others.

    Said is what was a guess, and which mean ± spread was not found. A number without a spread is taken only where
    its row or column of the record is that of a neighbour.
    """
    origins: dict[Cell, Origin] = {}
    for page in pages:
        for records, numbers in tables_of(page):
            sure = {cell: known[cell] for cell in numbers if cell in known}
            for spread in (True, False):
                options = {
                    cell: [one for one in _options(cell, numbers, records) if spread or _related(cell, one, sure)]
                    for cell, text in numbers.items()
                    if cell not in sure and ("±" in text) == spread
                }
                anchors = sure | {cell: some[0] for cell, some in options.items() if len(some) == 1}
                for cell, some in options.items():
                    fits = [_fit(cell, one, anchors) for one in some]
                    if fits:
                        sure[cell] = some[fits.index(max(fits))]
                        if fits.count(max(fits)) > 1:
                            print(f"guessed: {numbers[cell]} in {cell}: {sure[cell]}")
                    elif spread:
                        print(f"not on record: {numbers[cell]} in {cell}")
            origins |= {cell: sure[cell] for cell in numbers if cell in sure}
    return origins


def _options(cell: Cell, numbers: Mapping[Cell, str], records: Sequence[str]) -> list[Origin]:
    """All figures that would be shown as a number is; of a row of numbers, the values of seeds."""
    text = numbers[cell]
    signed = text[0] in "+−" and any(numbers[other].startswith("+") for other in numbers if other.column == cell.column)
    show = "text" if "±" in text else f".{len(text.partition('.')[2])}"
    show = "+" * signed + "0" * text.lstrip("-−+").startswith(".") + show
    beside = sum(attrs.evolve(other, number=cell.number) == cell for other in numbers)
    found = []
    for record in records:
        for (table, row, metric), figure in _figures(record).items():
            seeds = ["", *(figure.seeds[cell.number - 1 : cell.number] if beside == len(figure.seeds) else ())]
            found += [Origin(record, table, row, metric, "", seed, show) for seed in seeds if "." in text]
    return [origin for origin in found if shown(origin) == text]


def _related(cell: Cell, origin: Origin, others: Mapping[Cell, Origin]) -> bool:
    return any(
        (at.row == cell.row and other.row == origin.row)
        or (at.column == cell.column and (other.table, other.metric) == (origin.table, origin.metric))
        for at, other in others.items()
    )


def _fit(cell: Cell, origin: Origin, others: Mapping[Cell, Origin]) -> float:
    """How much an origin has in common with those of its neighbours, on average."""
    row = [_shared(origin, other) for at, other in others.items() if at.row == cell.row]
    column = [_shared(origin, other) for at, other in others.items() if at.column == cell.column]
    return sum(statistics.fmean(some) for some in (row, column) if some)


def _shared(one: Origin, other: Origin) -> float:
    words, others = {*one.row.split(", ")}, {*other.row.split(", ")}
    return len(words & others) / len(words | others) + (one.table == other.table) + (one.metric == other.metric) / 2


if __name__ == "__main__":
    main()
