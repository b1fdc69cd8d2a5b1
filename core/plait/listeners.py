"""The core's own listeners to run events: the display and the JSON-lines log."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.configuration import plain
from plait.hookspecs import hookimpl


class JSONLog:
    """Every event as one line of JSON with its time (seconds since 1970)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_writable = True

    def _write(self, event: str, **facts: Any) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # a log is no reason to lose the run
            if self._is_writable:
                self._is_writable = False
                sys.stderr.write(
                    f"warning: the log {self._path} cannot be written ({error.strerror}); the run goes on\n"
                )

    @hookimpl
    def run_started(self, run_id: str, pipeline: Mapping[str, Any], steps: list[str]) -> None:
        self._write("run_started", run=run_id, pipeline=plain(pipeline), steps=steps)

    @hookimpl
    def step_started(self, step: str, hook: str, method: str, config: Mapping[str, Any]) -> None:
        self._write("step_started", step=step, hook=hook, method=method, config=plain(config))

    @hookimpl
    def step_logged(self, step: str, values: Mapping[str, float], at: int | None) -> None:
        self._write("step_logged", step=step, at=at, values={name: _finite(value) for name, value in values.items()})

    @hookimpl
    def step_warned(self, step: str, message: str) -> None:
        self._write("step_warned", step=step, message=message)

    @hookimpl
    def step_cached(self, step: str, key: str) -> None:
        self._write("step_cached", step=step, key=key)

    @hookimpl
    def step_finished(self, step: str, key: str, seconds: float, report: Any) -> None:
        rows = [] if report is None else [{name: _finite(value) for name, value in row.items()} for row in report.rows]
        self._write("step_finished", step=step, key=key, seconds=round(seconds, 3), rows=rows)

    @hookimpl
    def step_failed(self, step: str, message: str) -> None:
        self._write("step_failed", step=step, message=message)

    @hookimpl
    def run_finished(self, failed: list[str], seconds: float) -> None:
        self._write("run_finished", failed=failed, seconds=round(seconds, 3))


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
    def step_finished(self, step: str, seconds: float) -> None:
        self._step("+", step, f"  {duration(seconds)}")

    @hookimpl
    def step_failed(self, step: str, message: str) -> None:
        self._step("!", step, f"  {message}")


class Display(Lines):
    """Lines for finished steps above live bars, with the time left, for what runs now."""

    def __init__(self, console: Any) -> None:
        super().__init__(console)
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self._bars: dict[str, Any] = {}

    @hookimpl
    def run_started(self, run_id: str, steps: list[str]) -> None:
        super().run_started(run_id, steps)
        self._progress.start()

    @hookimpl
    def step_started(self, step: str, method: str) -> None:
        self._bars[step] = self._progress.add_task(f"{step}  {method.rpartition('/')[2]}", total=None)

    @hookimpl
    def step_progress(self, step: str, description: str, done: int, total: int | None) -> None:
        if step in self._bars:
            self._progress.update(self._bars[step], description=f"{step}  {description}", completed=done, total=total)

    def _end(self, step: str) -> None:
        if step in self._bars:
            self._progress.remove_task(self._bars.pop(step))

    @hookimpl
    def step_cached(self, step: str) -> None:
        self._end(step)
        super().step_cached(step)

    @hookimpl
    def step_finished(self, step: str, seconds: float) -> None:
        self._end(step)
        super().step_finished(step, seconds)

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


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
