"""A long loop that can be killed: progress, curves and a checkpoint, in one object."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from plait.optional import require

if TYPE_CHECKING:
    from plait.context import Run

T = TypeVar("T")
CHECKPOINT = "checkpoint.pt"


class Loop:
    """What :meth:`plait.Run.loop` gives. A plain function takes it, or parts of it, without knowing plait::

        with run.loop(self, "adapt", inputs=(model, data)) as loop:
            train(model, batches, checkpoint=loop, track=loop.track, log=loop.log)

        def train(model, batches, checkpoint=None, track=iter, log=lambda **values: None):
            state = checkpoint.load() if checkpoint else None
            ...
                checkpoint.save({"model": model.state_dict(), "step": step})

    Its state belongs to one method with its fields, seed, step and inputs, and is never found by another. Left at the
    end of the ``with`` block, it is gone; after a kill or an exception it is there for the next call.

    Attributes:
        folder: the loop's own, for state that is more than one file.
    """

    def __init__(self, run: Run, description: str, folder: Path, total: int | None) -> None:
        self._run = run
        self._description = description
        self._folder = folder
        self._total = total

    @property
    def folder(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.forget()

    def load(self) -> Any:
        """The last saved state, its tensors on the CPU; ``None`` where there is none."""
        file = self._folder / CHECKPOINT
        if not file.exists():
            return None
        try:
            return require("torch").load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises whatever its bytes lead to
            self._run.warn(
                f"the checkpoint of {self._description!r} cannot be read ({type(error).__name__}); it starts anew"
            )
            return None

    def save(self, state: Any) -> None:
        """Replace the saved state in one piece.

        Args:
            state: tensors, numbers, texts, and lists and dicts of these.
        """
        unfinished = self.folder / f"{CHECKPOINT}.new"
        with unfinished.open("wb") as file:
            require("torch").save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.folder / CHECKPOINT)

    def forget(self) -> None:
        """Drop all state of this loop."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def track(self, iterable: Iterable[T], description: str = "", total: int | None = None) -> Iterator[T]:
        """As :meth:`plait.Run.track`, under the loop's own description."""
        return self._run.track(iterable, description or self._description, total)

    def done(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """Round ``step``, counted from 0, is over: progress moves on, and ``values`` go to the curves.

        For a loop that runs elsewhere and calls back after every round.
        """
        if values:
            self._run.log(step=step, **values)
        self._run.progress(self._description, step + 1, self._total)

    def log(self, *, step: int | None = None, **values: float) -> None:
        """As :meth:`plait.Run.log`."""
        self._run.log(step=step, **values)
