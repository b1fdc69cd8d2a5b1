"""How a run shows itself: lines in a log, bars on a terminal, one line in a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from plait.hookspecs import hookimpl
from plait.listeners import duration
from plait.report.document import table_of
from plait.report.tables import headline


class TimeLeft:
    """How long the rest of a run will take, judged by the steps of the same name that it has finished.

    Args:
        steps: labels of all its steps.
        clock: seconds.
    """

    def __init__(self, steps: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting = dict.fromkeys(steps)
        self._running: dict[str, float] = {}
        self._parts: dict[str, float] = {}
        self._took: dict[str, list[float]] = {}

    def start(self, step: str) -> None:
        """A step begins."""
        self._waiting.pop(step, None)
        self._running[step] = self._clock()

    def progress(self, step: str, done: int, total: int | None) -> None:
        """A part of a step is done."""
        self._parts[step] = done / total if total else 0.0

    def end(self, step: str, seconds: float | None = None) -> None:
        """A step has ended; ``seconds`` is how long it took, where it was computed."""
        self._waiting.pop(step, None)
        self._running.pop(step, None)
        self._parts.pop(step, None)
        if seconds is not None:
            self._took.setdefault(_family(step), []).append(seconds)

    @property
    def seconds(self) -> float | None:
        """Of the rest; ``None`` while nothing is known about one of the steps that are left."""
        left = 0.0
        for step in self._waiting:
            took = self._took.get(_family(step))
            if took is None:
                return None
            left += sum(took) / len(took)
        for step, since in self._running.items():
            took = self._took.get(_family(step))
            gone, part = self._clock() - since, self._parts.get(step, 0.0)
            if took is not None:
                left += max(0.0, sum(took) / len(took) - gone)
            elif part:
                left += gone / part * (1 - part)
            else:
                return None
        return left / max(1, len(self._running))


def _family(step: str) -> str:
    """The step of the file that a step of a cell belongs to."""
    return step.partition("[")[0]


class Lines:
    """One line a step: for logs, pipes and everything that is not a terminal."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._total = 0
        self._done = 0

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _step(self, mark: str, step: str, rest: str) -> None:
        self._done += 1
        width = len(str(self._total))
        self._say(f"[{self._done:>{width}}/{self._total}] {mark} {step}{rest}")

    @hookimpl
    def run_started(self, run_id: str, steps: list[str]) -> None:
        self._total = len(steps)
        self._say(f"run {run_id}: {len(steps)} steps")

    @hookimpl
    def step_warned(self, step: str, message: str) -> None:
        self._say(f"warning: {step}: {message}")

    @hookimpl
    def step_cached(self, step: str) -> None:
        self._step("=", step, "  in the store already")

    @hookimpl
    def step_finished(self, step: str, seconds: float, report: Any) -> None:
        figure = _figure(report)
        self._step("+", step, f"  {duration(seconds)}{figure and f'  {figure}'}")

    @hookimpl
    def step_failed(self, step: str, message: str) -> None:
        self._step("!", step, f"  {message}")


def _figure(report: Any) -> str:
    """The main figure of an evaluation."""
    return "" if report is None or not report.rows else headline(table_of(report))


class Display(Lines):
    """Lines for finished steps above live bars: one for what runs now, and one for the whole run."""

    def __init__(self, console: Any) -> None:
        super().__init__(console)
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
        from rich.text import Text

        display = self

        class Times(ProgressColumn):
            """``12 s so far, 40 s left``."""

            def render(self, task: Any) -> Text:
                left = display.left if task.id == display.whole else task.time_remaining
                so_far = f"{duration(task.elapsed or 0)} so far"
                return Text(so_far if left is None else f"{so_far}, about {duration(left)} left")

        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(), Times(),
            console=console, transient=True,
        )  # fmt: skip
        self._bars: dict[str, Any] = {}
        self._time = TimeLeft(())
        self.whole: Any = None

    @property
    def left(self) -> float | None:
        """Seconds left of the whole run, where they can be told."""
        return self._time.seconds

    @hookimpl
    def run_started(self, run_id: str, steps: list[str]) -> None:
        super().run_started(run_id, steps)
        self._time = TimeLeft(steps)
        self.whole = self._progress.add_task("whole run", total=len(steps))
        self._progress.start()

    @hookimpl
    def step_started(self, step: str, method: str) -> None:
        self._time.start(step)
        self._bars[step] = self._progress.add_task(f"{step}  {method.rpartition('/')[2]}", total=None)

    @hookimpl
    def step_progress(self, step: str, description: str, done: int, total: int | None) -> None:
        self._time.progress(step, done, total)
        if step in self._bars:
            self._progress.update(self._bars[step], description=f"{step}  {description}", completed=done, total=total)

    def _end(self, step: str, seconds: float | None = None) -> None:
        self._time.end(step, seconds)
        if step in self._bars:
            self._progress.remove_task(self._bars.pop(step))
        if self.whole is not None:
            self._progress.update(self.whole, advance=1)

    @hookimpl
    def step_cached(self, step: str) -> None:
        self._end(step)
        super().step_cached(step)

    @hookimpl
    def step_finished(self, step: str, seconds: float, report: Any) -> None:
        self._end(step, seconds)
        super().step_finished(step, seconds, report)

    @hookimpl
    def step_failed(self, step: str, message: str) -> None:
        self._end(step)
        super().step_failed(step, message)

    @hookimpl
    def run_finished(self) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        self._progress.stop()


class OneLine:
    """One line that is written over and over, for a notebook; warnings and failures stay below it."""

    def __init__(self) -> None:
        from IPython.display import display

        self._show: Any = display
        self._handle: Any = None
        self._time = TimeLeft(())
        self._run, self._total, self._done, self._failed = "", 0, 0, 0
        self._now = ""
        self._started = self._written = time.monotonic()

    def _write(self, always: bool = False) -> None:
        now = time.monotonic()
        if not always and now - self._written < 0.2:
            return
        self._written = now
        parts = [f"{self._run}: {self._done} of {self._total} steps", f"{duration(now - self._started)} so far"]
        left = self._time.seconds if self._done < self._total else None
        parts += [f"about {duration(left)} left"] if left is not None else []
        parts += [f"{self._failed} failed or not run"] if self._failed else []
        text = ", ".join(parts) + (f"; now {self._now}" if self._now else "")
        if self._handle is None:
            self._handle = self._show({"text/plain": text}, raw=True, display_id=True)
        else:
            self._handle.update({"text/plain": text}, raw=True)

    @hookimpl
    def run_started(self, run_id: str, steps: list[str]) -> None:
        self._run, self._total = run_id, len(steps)
        self._time = TimeLeft(steps)
        self._write(always=True)

    @hookimpl
    def step_started(self, step: str) -> None:
        self._time.start(step)
        self._now = step
        self._write()

    @hookimpl
    def step_progress(self, step: str, description: str, done: int, total: int | None) -> None:
        self._time.progress(step, done, total)
        self._now = f"{step} {description} {done}{f'/{total}' if total else ''}"
        self._write()

    @hookimpl
    def step_warned(self, step: str, message: str) -> None:
        print(f"warning: {step}: {message}")

    def _end(self, step: str, seconds: float | None = None) -> None:
        self._done += 1
        self._time.end(step, seconds)
        self._now = ""
        self._write()

    @hookimpl
    def step_cached(self, step: str) -> None:
        self._end(step)

    @hookimpl
    def step_finished(self, step: str, seconds: float) -> None:
        self._end(step, seconds)

    @hookimpl
    def step_failed(self, step: str, message: str) -> None:
        self._failed += 1
        self._end(step)
        print(f"step {step}: {message}")

    @hookimpl
    def run_finished(self) -> None:
        self._now = ""
        self._write(always=True)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    get: Any = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get is not None and type(get()).__name__ == "ZMQInteractiveShell"


def display_for_python(wanted: bool | None) -> Any:
    """What shows a run that was started from Python: one line in a notebook, bars on a terminal.

    Args:
        wanted: ``None``: nothing is shown elsewhere; ``True``: lines are; ``False``: nothing is shown at all.
    """
    if wanted is False or (wanted is None and not in_notebook() and not sys.stderr.isatty()):
        return None
    if in_notebook():
        return OneLine()
    from rich.console import Console

    console = Console(file=sys.stderr)
    return Display(console) if console.is_terminal else Lines(console)
