"""What a method gets to work with: seed, device, progress, curves, a scratch folder."""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from plait.errors import PlaitError
from plait.fingerprints import fingerprint
from plait.loops import Loop
from plait.optional import require

if TYPE_CHECKING:
    from plait.report import Report

T = TypeVar("T")


_shown_at = 0.0


def _show_progress(description: str, done: int, total: int | None) -> None:
    """One line that is written over and over, on a terminal and in a notebook."""
    global _shown_at
    is_end, now = done == total, time.monotonic()
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules) or (not is_end and now - _shown_at < 0.2):
        return
    _shown_at = now
    text = f"{description} {done}{'' if total is None else f'/{total}'}"
    sys.stderr.write(f"\r{text:<60}" + ("\n" if is_end else ""))
    sys.stderr.flush()


def _ignore(*_: Any) -> None:
    return None


def _show_warning(message: str) -> None:
    # Up to the caller of the method: this function, warn, the method, its hook.
    warnings.warn(message, UserWarning, stacklevel=4)


@attrs.define(kw_only=True)
class Run:
    """The surroundings of one step. ``Run()`` makes a stand-alone one, for plain Python: it shows progress and warnings.

    Attributes:
        seed: the seed of the pipeline or of the matrix cell; use :meth:`generator` to draw.
        step: name of the step; part of what :meth:`generator` derives its seed from.
        folder: scratch that survives a kill, for checkpoints of long steps; emptied once the step
            has finished. A stand-alone run makes a temporary one at first use.
    """

    seed: int = 0
    step: str = ""
    requested_device: str | None = None
    reports: list[Report] = attrs.field(factory=list)
    _folder: Path | None = attrs.field(default=None, alias="folder")
    _on_progress: Callable[[str, int, int | None], None] = attrs.field(default=_show_progress, alias="on_progress")
    _on_log: Callable[[dict[str, float], int | None], None] = attrs.field(default=_ignore, alias="on_log")
    _on_warning: Callable[[str], None] = attrs.field(default=_show_warning, alias="on_warning")

    @property
    def folder(self) -> Path:
        """A folder of this step's own, kept when the process is killed and found again on resume."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="plait-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    @property
    def device(self) -> Any:
        """``torch.device``: the one asked for, else CUDA where there is one, else the CPU."""
        torch = require("torch")
        name = (
            self.requested_device or os.environ.get("PLAIT_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise PlaitError(f"device {name!r} is unknown to torch; use cpu, cuda or cuda:N") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise PlaitError(f"device {name!r} was asked for, but torch sees no CUDA device; use cpu")
        return device

    def derived_seed(self, name: str = "") -> int:
        """A seed in [0, 2**63) from seed, step and ``name``; independent of other steps and names."""
        digest = hashlib.sha256(f"{self.seed}/{self.step}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def generator(self, name: str = "", device: Any = "cpu") -> Any:
        """A fresh ``torch.Generator``; the same one for the same seed, step and ``name``."""
        return require("torch").Generator(device=device).manual_seed(self.derived_seed(name))

    def numpy_generator(self, name: str = "") -> Any:
        """A fresh ``numpy.random.Generator``; the same one for the same seed, step and ``name``."""
        return require("numpy").random.default_rng(self.derived_seed(name))

    def child(self, name: str) -> Run:
        """The surroundings of a method that this one calls: random numbers and scratch of its own, the rest shared."""
        child = copy.copy(self)
        child.step = f"{self.step}/{name}"
        child._folder = self.folder / name
        return child

    def track(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Iterate and show progress with the time left (only on a terminal)."""
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        self.progress(description, 0, total)
        for done, item in enumerate(iterable, start=1):
            yield item
            self.progress(description, done, total)

    def progress(self, description: str, done: int, total: int | None) -> None:
        """Say how far a loop is; :meth:`track` and :meth:`loop` do it by themselves."""
        self._on_progress(description, done, total)

    def loop(self, method: Any, description: str, *, inputs: Any = (), total: int | None = None) -> Loop:
        """A long loop that can be killed and goes on from its last checkpoint: see :class:`plait.loops.Loop`.

        Args:
            method: the method that runs it; its fields are part of what its state belongs to.
            description: shown with the progress; tells several loops of one method apart.
            inputs: what it computes from (models, data, …); anything that :func:`plait.fingerprints.fingerprint` takes.
            total: rounds, where it is :meth:`plait.loops.Loop.done` that reports them.
        """
        owner = f"{type(method).__module__}.{type(method).__qualname__}"
        made_of = fingerprint(owner, method, self.seed, self.step, description, inputs)
        return Loop(self, description, self.folder / "loops" / made_of[:16], total)

    def log(self, *, step: int | None = None, **values: float) -> None:
        """Add one point to a curve per keyword; the report draws them over ``step``."""
        self._on_log({name: float(value) for name, value in values.items()}, step)

    def warn(self, message: str) -> None:
        """Tell the user something in one sentence; it is shown, logged and put into the report."""
        self._on_warning(message)

    def add(self, report: Report) -> None:
        """Add tables, panels or notes to the run's report, from any hook."""
        self.reports.append(report)
