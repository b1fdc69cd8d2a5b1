"""What a user of plait is meant to see when something is wrong: one sentence, without a traceback."""

from __future__ import annotations

import difflib
import dis
import traceback
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType

Problem = tuple[tuple[str | int, ...], str]


class PlaitError(Exception):
    """A mistake of the user's, in one sentence: which step or field, which value, what to do.

    The command line prints the message without a traceback (``--debug`` shows it). Code of methods need not
    raise it: a ``ValueError`` (``FileNotFoundError``, …) with a good sentence is shown in the same way, see
    :func:`sentence_of`.
    """


class PipelineError(PlaitError):
    """A pipeline file or command is wrong; nothing has been run (exit code 2).

    Attributes:
        problems: one sentence each, all that were found, in the order of the file.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class ConfigurationError(PlaitError, ValueError):
    """Fields of a method are wrong.

    Attributes:
        problems: (path of the field, sentence) each.
    """

    def __init__(self, problems: list[Problem] | str) -> None:
        self.problems: list[Problem] = [((), problems)] if isinstance(problems, str) else problems
        super().__init__("; ".join(sentence for _, sentence in self.problems))

    def __reduce__(self) -> tuple[type[ConfigurationError], tuple[list[Problem]]]:
        return type(self), (self.problems,)


class MissingDependency(PlaitError, ImportError):  # noqa: N818 - what is missing is named, not the error
    """A library that is not installed is needed; the message says which package to install."""


class StoreError(PlaitError):
    """A result cannot be stored, or what is stored cannot be read back."""


def sentence_of(error: BaseException, packages: Collection[str] = ()) -> str | None:
    """The message of an exception that was raised for the user to read; ``None`` for one from deeper inside.

    An exception is meant for the user when it is a :class:`PlaitError`, or when it was raised, by a ``raise``
    statement with a message, in the code of one of ``packages`` (a method's own, or a kit's).

    Args:
        packages: names of top-level modules.
    """
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if isinstance(error, PipelineError):
        return str(error)
    if isinstance(error, PlaitError):
        return text
    if not text or not isinstance(error, Exception) or isinstance(error, AssertionError):
        return None
    last = _last(error.__traceback__)
    if last is None or not _is_raise_statement(last):
        return None
    module = str(last.tb_frame.f_globals.get("__name__", ""))
    return text if module.partition(".")[0] in packages else None


def _last(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _is_raise_statement(trace: TracebackType) -> bool:
    # A line such as int(text) fails in the same frame without the author having written a message.
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def located(error: BaseException) -> str:
    """Type, first line and place of an exception that nobody foresaw: ``TypeError: … (model.py:12; …)``."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}; " if frames else ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''} ({place}--debug shows all)"


def nearest(name: str, names: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the most similar valid name, or the empty string."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
