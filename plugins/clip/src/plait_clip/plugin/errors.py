"""The mistakes that the plain functions find, as the sentences that plait shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from plait import PlaitError


@contextlib.contextmanager
def as_plait_errors() -> Iterator[None]:
    """Turn ValueError, TypeError and OSError of the kit's functions into PlaitError."""
    from plait_clip.training import DivergedError

    try:
        yield
    except (ValueError, TypeError, OSError, DivergedError) as error:
        raise PlaitError(str(error)) from error
