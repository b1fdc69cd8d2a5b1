"""One reader of CSV and TSV tables, which reports what it cannot be sure of instead of guessing."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

_BOMS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DELIMITERS = (",", "\t", ";", "|")
_LONGEST_CELL = 1 << 24
Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE


def read_table(
    path: Path | str, *, delimiter: str | None = None, encoding: str | None = None, quotes: bool = True
) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV or TSV file with a header, as (line number from 1, column → cell), one at a time.

    Args:
        delimiter: default: the one of comma, tab, semicolon and bar that cuts the header into most columns.
        encoding: default: UTF-8, or UTF-16 or UTF-32 where the file begins with their byte order mark.
        quotes: whether a cell may stand between ``"``, which is doubled inside it; False takes them as they are.

    Raises:
        ValueError: no such file, or an empty one; bytes of another encoding; two columns of one name; a delimiter that
            is not clear; a row with more or fewer cells than the header; a quote that does not end.
    """
    path = Path(path).expanduser()
    encoding = encoding or _encoding(path)
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with path.open(encoding=encoding, newline="") as file:
            yield from _rows(file, path, delimiter, quotes)
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, encoding) from error
    except LookupError as error:
        raise ValueError(
            f"encoding is {encoding!r}, which is unknown; write utf-8, latin-1, utf-16 or another"
        ) from error


def _encoding(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            return encoding
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the table; fetch it with 'git lfs pull'")
    if b"\0" in head:
        raise ValueError(
            f"{path} is not UTF-8 text: it has zero bytes; if it is UTF-16, set encoding: utf-16-le or utf-16-be"
        )
    return "utf-8"


def _wrong_encoding(path: Path, encoding: str) -> ValueError:
    content = path.read_bytes()
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, "replace").count("\n") + 1
        return ValueError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not {encoding.removesuffix('-sig')}; save the file "
            "as UTF-8, or say what it is, e.g. encoding: latin-1 or cp1252"
        )
    return ValueError(f"{path} changed while it was read; read it again")


def _rows(file: Iterator[str], path: Path, delimiter: str | None, quotes: bool) -> Iterator[tuple[int, dict[str, str]]]:
    skipped, first = next(((number, line) for number, line in enumerate(file) if line.strip("\ufeff\r\n\t ")), (0, ""))
    if not first:
        raise ValueError(f"{path} is empty; expected a header with the names of the columns")
    first = first.removeprefix("\ufeff")
    quoting: Quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    if delimiter is None:
        delimiter = _delimiter(first, path, quoting)
    elif len(delimiter) != 1 or delimiter in '\r\n"':
        raise ValueError(f"delimiter is {delimiter!r}; expected one character such as ',' or a tab")

    def lines() -> Iterator[str]:
        yield first
        yield from file

    reader = csv.reader(lines(), delimiter=delimiter, strict=True, quoting=quoting)
    header: list[str] = []
    line = 1 + skipped
    try:
        for cells in reader:
            if not header:
                header = _header(cells, path)
            elif cells:
                if len(cells) != len(header):
                    raise ValueError(_count_problem(path, line, cells, header, delimiter))
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1 + skipped
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {line}: the cell's quotes do not fit ({error}); a cell that begins with \" must end with it, and "
            "one inside is doubled; where quotes are ordinary characters, set quotes: false"
        ) from error


def _delimiter(line: str, path: Path, quoting: Quoting) -> str:
    counts = {}
    for candidate in _DELIMITERS:
        counts[candidate] = len(next(csv.reader([line], delimiter=candidate, quoting=quoting)))
    most = max(counts.values())
    if most == 1:
        return ","
    best = [candidate for candidate in _DELIMITERS if counts[candidate] == most]
    if len(best) > 1 and path.suffix.lower() in (".tsv", ".tab") and "\t" in best:
        return "\t"
    if len(best) > 1:
        raise ValueError(
            f"{path}: its header could be cut at {' or at '.join(map(repr, best))}; say which by delimiter"
        )
    return best[0]


def _header(cells: list[str], path: Path) -> list[str]:
    header = [cell.strip() for cell in cells]
    for name in header:
        if header.count(name) > 1:
            raise ValueError(f"{path}: duplicate column {name!r} in the header ({', '.join(header)}); rename one")
    return header


def _count_problem(path: Path, line: int, cells: list[str], header: list[str], delimiter: str) -> str:
    found = f"{path}, line {line}: the row has {len(cells)} cells and the header {len(header)} ({', '.join(header)})"
    if len(cells) > len(header):
        return f"{found}; put a cell that holds {delimiter!r} between quotes, or set another delimiter"
    return f"{found}; fill in what is missing"
