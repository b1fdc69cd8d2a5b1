"""What a user of plait is meant to see when something is wrong: one sentence, without a traceback."""

from __future__ import annotations

import contextlib
import difflib
import dis
import errno
import os
import traceback
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import TracebackType

Problem = tuple[tuple[str | int, ...], str]
LONGEST = 500  # characters of a sentence


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
        self.problems = [shortened(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


class ConfigurationError(PlaitError, ValueError):
    """Fields of a method are wrong.

    Attributes:
        problems: (path of the field, sentence) each.
    """

    def __init__(self, problems: list[Problem] | str) -> None:
        given: list[Problem] = [((), problems)] if isinstance(problems, str) else problems
        self.problems: list[Problem] = [(path, shortened(sentence)) for path, sentence in given]
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
    if isinstance(error, PipelineError):
        return str(error)
    text = shortened(" ".join(_message_of(error).split()))
    if isinstance(error, PlaitError):
        return text
    if not text or not isinstance(error, Exception) or isinstance(error, AssertionError):
        return None
    last = _last(error.__traceback__)
    if last is None or not _is_raise_statement(last):
        return None
    module = str(last.tb_frame.f_globals.get("__name__", ""))
    return text if module.partition(".")[0] in packages else None


def shortened(text: str) -> str:
    """A sentence of at most :data:`LONGEST` characters: its middle, such as a long value or list, is left out with a count."""
    text = text.encode("utf-8", "backslashreplace").decode()  # what no terminal and no file can show
    if len(text) <= LONGEST:
        return text
    head, tail = LONGEST // 2 + 50, LONGEST // 2 - 100
    return f"{text[:head]} … ({len(text) - head - tail:,} characters left out) … {text[-tail:]}"


def _message_of(error: BaseException) -> str:
    try:
        return str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    except Exception as broken:  # a class that cannot say what it is about
        return f"its message cannot be shown ({type(broken).__name__})"


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
    message = shortened(next(iter(_message_of(error).strip().splitlines()), ""))
    return f"{type(error).__name__}{f': {message}' if message else ''} ({place}--debug shows all)"


UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)


def unwritable(error: BaseException) -> str | None:
    """Why a file or folder cannot be written, in the system's words; ``None`` where the error is another.

    Libraries that write by themselves raise errors of their own, with the system's words inside.
    """
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return os.strerror(error.errno)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        if os.strerror(code) in str(error):
            return os.strerror(code)
    return None


@contextlib.contextmanager
def writing(what: str, remedy: str, kind: type[PlaitError] = PlaitError) -> Iterator[None]:
    """Where the system refuses to write inside, one sentence says what cannot be written, why, and what to do.

    Raises:
        PlaitError: of ``kind``; other exceptions pass as they are.
    """
    try:
        yield
    except Exception as error:
        if (reason := unwritable(error)) is None:
            raise
        raise kind(f"{what} cannot be written ({reason}); {remedy}") from error


def nearest(name: str, names: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the most similar valid name, or the empty string."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
