"""The JSON-lines log of a run, and how durations are written."""

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
    def step_said(self, step: str, text: str) -> None:
        self._write("step_said", step=step, text=text)

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
