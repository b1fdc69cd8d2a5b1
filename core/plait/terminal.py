"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from plait.report.tables import Table, caption, column_title
from plait.report.text import plain_mark

STYLES = {"best": "bold green", "tie": "yellow"}


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables; one that is wider than the terminal is wrapped by it."""
    from rich.console import Console
    from rich.table import Table as Shown
    from rich.text import Text

    console = Console()
    for table in tables:
        shown = Shown(title=Text(table.title), title_justify="left", box=None, padding=(0, 2, 0, 0))
        for name in table.index:
            shown.add_column(Text(name), no_wrap=True)
        for metric in table.metrics:
            shown.add_column(Text(column_title(table, metric)), justify="right", no_wrap=True)
        for texts, numbers in table.rows:
            cells = [
                Text("–") if n is None else Text(f"{plain_mark(n)}{n.text}", style=STYLES.get(n.mark, ""))
                for n in numbers
            ]
            shown.add_row(*map(Text, texts), *cells)
        # A table wider than the terminal is wrapped by it, rather than cut by us.
        measured = console.measure(shown, options=console.options.update(width=10_000)).maximum
        Console(width=max(console.width, measured)).print(shown, soft_wrap=False)
        if sentence := caption(table):
            console.print(Text(sentence, style="dim"))
        console.print()
