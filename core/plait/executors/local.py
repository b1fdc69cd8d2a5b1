"""On this machine: in this process, or in several beside each other."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any

from plait.errors import PlaitError
from plait.work import Emit, Job, Outcome, carry_out


class InProcess:
    """One job after the other, in this process."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._job: Job | None = None

    def has_room(self) -> bool:
        """Whether another job may be submitted now."""
        return self._job is None

    def submit(self, job: Job) -> None:
        """Take a job; it runs in :meth:`next_done`."""
        self._job = job

    def next_done(self) -> Outcome:
        """Wait for a job's end."""
        assert self._job is not None
        job, self._job = self._job, None
        return carry_out(job, self._emit)

    def close(self) -> None:
        """Nothing to close."""


_events: Any = None


def _start_worker(events: Any) -> None:
    global _events
    _events = events


def _carry_out(job: Job) -> Outcome:
    return carry_out(job, lambda name, **facts: _events.put((name, facts)))


class Processes:
    """Up to ``jobs`` independent jobs at a time, each in a process of its own."""

    def __init__(self, jobs: int, emit: Emit) -> None:
        context = get_context("spawn")
        self._jobs = jobs
        self._emit = emit
        self._manager = context.Manager()
        self._events = self._manager.Queue()
        self._pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(self._events,))
        self._running: dict[Future[Outcome], Job] = {}

    def has_room(self) -> bool:
        """Whether another job may be submitted now."""
        return len(self._running) < self._jobs

    def submit(self, job: Job) -> None:
        """Start a job in a free process."""
        self._running[self._pool.submit(_carry_out, job)] = job

    def next_done(self) -> Outcome:
        """Wait for a job's end and pass on events meanwhile."""
        while True:
            done, _ = wait(self._running, timeout=0.1, return_when=FIRST_COMPLETED)
            self._relay()
            for future in done:
                job = self._running.pop(future)
                try:
                    return future.result()
                except Exception as error:
                    raise PlaitError(
                        f"step {job.label}: its process died ({error}); it may have run out of memory, try --jobs 1"
                    ) from error

    def _relay(self) -> None:
        for name, facts in _drain(self._events):
            self._emit(name, **facts)

    def close(self) -> None:
        """Stop the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in (self._pool._processes or {}).values():
            process.terminate()
        self._manager.shutdown()


def _drain(events: Any) -> Iterator[Any]:
    with contextlib.suppress(queue.Empty):
        while True:
            yield events.get_nowait()
