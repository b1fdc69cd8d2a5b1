"""What libraries write to the standard error while a step runs: kept for the log, off the screen."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

MOST = 100_000  # characters of one step


class _Switch(io.TextIOBase):
    """A standard error that is kept while a step runs, and is the process's own otherwise.

    Handlers of ``logging`` and bars hold on to the stream that they found when they were made; so it is always this one.
    """

    def __init__(self) -> None:
        self.kept: list[str] | None = None
        self.own: Any = None
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            if self.kept is not None:
                self.kept.append(text)
                return len(text)
        return int(self.own.write(text) or 0) if self.own is not None else 0

    def flush(self) -> None:
        if self.kept is None and self.own is not None:
            self.own.flush()

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        if self.own is None:
            raise io.UnsupportedOperation("fileno")
        return int(self.own.fileno())

    def take(self) -> str:
        """What was kept, with only the last state of bars that were written over and over."""
        with self._lock:
            text, self.kept = "".join(self.kept or ()), None
        lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
        return "\n".join(line for line in lines if line)[-MOST:]


_switch = _Switch()


@contextlib.contextmanager
def errors_kept(tell: Callable[[str], Any] = lambda text: None) -> Iterator[None]:
    """Keep what is written to ``sys.stderr`` off the screen, and ``tell`` it at the end, where there was something (by default nobody).

    With ``PLAIT_DEBUG`` it is shown as it comes.
    """
    if os.environ.get("PLAIT_DEBUG") or sys.stderr is _switch:
        yield
        return
    own = sys.stderr
    _switch.own, _switch.kept = own, []
    sys.stderr = _switch
    try:
        yield
    finally:
        sys.stderr = own
        if text := _switch.take():
            tell(text)
