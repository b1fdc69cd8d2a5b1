"""Tables and reports as text: Markdown, LaTeX, CSV, and plain for a terminal."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from plait.report.tables import Number, Table, caption, column_title

if TYPE_CHECKING:
    from plait.report.document import RunReport

Format = Literal["Markdown", "LaTeX", "CSV"]


@attrs.frozen
class TableText:
    """A table in one format: lines before, one text a row, lines after."""

    head: str
    rows: Sequence[str]
    foot: str = ""

    @property
    def whole(self) -> str:
        """All of it."""
        return self.head + "".join(self.rows) + self.foot


def table_as(format: Format, table: Table) -> str:
    """A whole table in a format."""
    return FORMATS[format](table).whole


def in_markdown(table: Table) -> TableText:
    """A pipe table; the best number is bold, ties have an ≈."""
    head = [*table.index, *(column_title(table, metric) for metric in table.metrics)]
    rule = [*["---"] * len(table.index), *["---:"] * len(table.metrics)]
    rows = [_pipes([*map(escape_markdown, texts), *map(_markdown_number, numbers)]) for texts, numbers in table.rows]
    return TableText(_pipes(map(escape_markdown, head)) + _pipes(rule), rows)


def _pipes(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _markdown_number(number: Number | None) -> str:
    if number is None:
        return ""
    text = escape_markdown(number.text)
    return {"best": f"**{text}**", "tie": f"≈ {text}"}.get(number.mark, text)


def in_latex(table: Table) -> TableText:
    """A ``tabular`` with the rules of ``booktabs``."""
    head = [*table.index, *(column_title(table, metric) for metric in table.metrics)]
    columns = "l" * len(table.index) + "r" * len(table.metrics)
    rows = [_ampersands([*map(escape_latex, texts), *map(_latex_number, numbers)]) for texts, numbers in table.rows]
    begin = f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{_ampersands(map(escape_latex, head))}\\midrule\n"
    return TableText(begin, rows, "\\bottomrule\n\\end{tabular}\n")


def _ampersands(cells: Any) -> str:
    return " & ".join(cells) + " \\\\\n"


def _latex_number(number: Number | None) -> str:
    if number is None:
        return ""
    text = escape_latex(number.text)
    return {"best": f"\\textbf{{{text}}}", "tie": f"$\\approx$ {text}"}.get(number.mark, text)


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "−": "$-$", "≈": r"$\approx$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """A text that LaTeX sets as it is."""
    return " ".join("".join(LATEX.get(character, character) for character in text).split())


def in_csv(table: Table) -> TableText:
    """Each metric as mean, std and number of values, unrounded."""
    more = ("", " std", " n")
    head = [*map(_cell, table.index), *(_cell(f"{metric}{end}") for metric in table.metrics for end in more)]
    rows = []
    for texts, numbers in table.rows:
        cells: list[Any] = [_cell(text) for text in texts]
        for n in numbers:
            cells += ["", "", 0] if n is None else [n.mean, "" if n.std is None else n.std, n.count]
        rows.append(_csv_line(cells))
    return TableText(_csv_line(head), rows)


def _csv_line(cells: Sequence[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(cells)
    return buffer.getvalue()


def _cell(text: str) -> str:
    # A spreadsheet would execute it.
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


FORMATS: Mapping[Format, Callable[[Table], TableText]] = {"Markdown": in_markdown, "LaTeX": in_latex, "CSV": in_csv}


def plain_table(table: Table, most: int = 20) -> str:
    """The table for a terminal or a Python prompt: its first ``most`` rows, in columns."""
    head = [*table.index, *(column_title(table, metric) for metric in table.metrics)]
    lines = [head]
    for texts, numbers in table.rows[:most]:
        lines.append([*texts, *("–" if n is None else f"{plain_mark(n)}{n.text}" for n in numbers)])
    lines = [[" ".join(cell.split()) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = len(table.index)
    shown = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    more = [f"… {len(table.rows) - most} more rows"] if len(table.rows) > most else []
    return "\n".join(filter(None, [table.title, *(line.rstrip() for line in shown), *more, caption(table)]))


def plain_mark(number: Number) -> str:
    """What stands before a marked number where there is no colour."""
    return {"best": "* ", "tie": "≈ "}.get(number.mark, "")


def markdown(document: RunReport) -> str:
    """The report without pictures."""
    lines = [f"# {escape_markdown(document.name)}", ""]
    if document.description:
        lines += [escape_markdown(document.description), ""]
    for table in document.tables:
        lines += [f"## {escape_markdown(table.title)}", "", in_markdown(table).whole]
        if sentence := caption(table):
            lines += [escape_markdown(sentence), ""]
    if document.failed:
        lines += ["## Failed steps", "", *_reasons(document.failed), ""]
    if document.not_run:
        lines += ["## Steps that were not run", "", *_reasons(document.not_run), ""]
    if document.notes:
        lines += ["## Notes", "", *(f"- {escape_markdown(note)}" for note in document.notes), ""]
    if document.repeat is not None:
        lines += ["## How to repeat it", ""]
        lines += [f"- {escape_markdown(name)}: {escape_markdown(text)}" for name, text in document.repeat.facts]
        lines.append("")
    return "\n".join(lines)


def _reasons(reasons: Mapping[str, str]) -> list[str]:
    return [f"- {escape_markdown(step)}: {escape_markdown(message)}" for step, message in reasons.items()]


def escape_markdown(text: str) -> str:
    """A text that Markdown sets as it is, on one line."""
    escaped = html.escape(text, quote=False).replace("\\", "\\\\")
    for character in "|`*_[]":
        escaped = escaped.replace(character, "\\" + character)
    return " ".join(escaped.split())
