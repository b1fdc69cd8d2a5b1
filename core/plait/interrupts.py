"""Ctrl-C and SIGTERM end a run at the next safe moment, with what is finished kept."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it before they kill."""


class Interrupts:
    """What was asked for by a signal and has not been heeded yet."""

    def __init__(self) -> None:
        self._pending: type[KeyboardInterrupt] | None = None
        self._waits = False

    def ask(self, signum: int, _: Any = None) -> None:
        """The signal handler."""
        self._pending = Terminated if signum == signal.SIGTERM else KeyboardInterrupt
        if not self._waits:
            raise self._pending

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal waits for the end: for calls into libraries that an exception should not cut short."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        self.check()

    def check(self) -> None:
        """Raise again what was swallowed where it was raised: in a destructor, or by a method that catches all."""
        if self._pending is not None:
            raise self._pending

    def heeded(self) -> None:
        """The run is ending; a further signal ends that too."""
        self._pending = None


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupts]:
    """While it holds, SIGINT raises KeyboardInterrupt and SIGTERM :class:`Terminated`, and neither is lost.

    Outside the main thread signals cannot be handled, and nothing changes.
    """
    asked = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mine = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # nohup keeps its meaning
    for number in mine:
        signal.signal(number, asked.ask)
    try:
        yield asked
    finally:
        for number in mine:
            signal.signal(number, before[number])
