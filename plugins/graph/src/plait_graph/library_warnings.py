"""Warnings of libraries, for the people who run a method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def library_warnings_to(report: Callable[[str], None]) -> Iterator[None]:
    """Within the context libraries' warnings go to ``report`` (such as ``run.warn``) as one sentence, each once.

    Those of deprecation, for programmers, go where they went before.
    """
    reported: set[str] = set()
    elsewhere = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        sentence = " ".join(str(message).split())
        if issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
            elsewhere(message, category, *where)
        elif sentence not in reported:
            reported.add(sentence)
            report(sentence)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield
