"""On this machine: in this process, or in several beside each other."""

from __future__ import annotations

import functools
import os
import signal
import threading
from multiprocessing import connection, get_context, parent_process, resource_tracker
from typing import Any

import attrs

from plait.interrupts import Interrupts
from plait.resources import NOTHING, Resources, machine
from plait.work import Emit, Job, Outcome, carry_out

PATIENCE = 5.0  # seconds that a worker gets to end by itself


class InProcess:
    """One job after the other, in this process."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._job: Job | None = None

    def has_room_for(self, resources: Resources) -> bool:
        """Whether a job may be submitted now."""
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


def _serve(pipe: Any, threads: int | None) -> None:
    """Carry out jobs until the pipe or the main process ends."""
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # what torch, MKL and OpenBLAS go by
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the main process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            job = pipe.recv()
            outcome = carry_out(job, lambda name, **facts: pipe.send((name, facts)))
            pipe.send(outcome)
    except (EOFError, OSError):  # the main process is gone or has closed the pipe
        return


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


@attrs.define(eq=False)
class _Worker:
    process: Any
    pipe: Any
    job: Job | None = None


class Processes:
    """Up to ``jobs`` independent jobs at a time, each in a process of its own.

    A process that dies fails its own job, and another takes its place. None outlives the main process. Jobs run beside
    each other as far as the machine has what they ask for together; one that asks for more than that runs alone. Of
    several GPUs each job gets its own.

    Args:
        threads: that torch may use in each process; default as many as it takes by itself.
    """

    def __init__(self, jobs: int, emit: Emit, asked: Interrupts, threads: int | None = None) -> None:
        self._asked = asked
        self._context = get_context("spawn")
        self._jobs = jobs
        self._emit = emit
        self._threads = threads
        self._workers: list[_Worker] = []
        self._done: list[Outcome] = []

    def has_room_for(self, resources: Resources) -> bool:
        """Whether a job that asks for these may be submitted now."""
        running = [worker.job for worker in self._workers if worker.job is not None]
        if not running:
            return True
        asking = [*(job.resources for job in running), resources]
        if len(running) == self._jobs or all(one == NOTHING for one in asking):
            return len(running) < self._jobs
        return functools.reduce(Resources.plus, (one.at_most(self._machine) for one in asking)).fits_in(self._machine)

    @functools.cached_property
    def _machine(self) -> Resources:
        return machine()

    def submit(self, job: Job) -> None:
        """Start a job in a free process."""
        if job.resources.gpu == 1 and job.device in (None, "cuda") and self._machine.gpu > 1:
            taken = {worker.job.device for worker in self._workers if worker.job is not None}
            free = [device for gpu in range(self._machine.gpu) if (device := f"cuda:{gpu}") not in taken]
            job = attrs.evolve(job, device=free[0] if free else job.device)
        worker = next((worker for worker in self._workers if worker.job is None), None) or self._new_worker()
        worker.job = job
        try:
            worker.pipe.send(job)
        except OSError:  # it died between two jobs
            self._forget(worker)
            self.submit(job)

    def next_done(self) -> Outcome:
        """Wait for a job's end and pass on events meanwhile."""
        while not self._done:
            # In slices, so that an interrupt is heeded on every system.
            connection.wait([worker.pipe for worker in self._workers if worker.job is not None], timeout=0.5)
            for worker in [worker for worker in self._workers if worker.job is not None]:
                self._hear(worker)
        return self._done.pop(0)

    def _hear(self, worker: _Worker) -> None:
        try:
            while worker.job is not None and worker.pipe.poll():
                message = worker.pipe.recv()
                if isinstance(message, Outcome):
                    worker.job = None
                    self._done.append(message)
                else:
                    name, facts = message
                    self._emit(name, **facts)
        except (EOFError, OSError):
            job = worker.job
            self._forget(worker)
            assert job is not None
            self._done.append(Outcome(job.key, False, 0.0, f"its process {_end_of(worker.process)}"))

    def _new_worker(self) -> _Worker:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there, self._threads), daemon=False)
        worker = _Worker(process, here)
        # A process that is told half of what it is to do ends with a traceback. The mask is of this thread alone, and
        # where libraries have threads of their own, one of these may take the signal.
        with self._asked.deferred():
            # A Ctrl-C that comes while Python starts would end it there, with a traceback; it inherits the mask.
            resource_tracker.ensure_running()  # starting it lets the signal through again
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            there.close()
            self._workers.append(worker)
        return worker

    def _forget(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.join(PATIENCE)

    def close(self) -> None:
        """Stop the processes."""
        for worker in self._workers:
            worker.pipe.close()
            if worker.job is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()


def _end_of(process: Any) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        memory = "; it may have run out of memory, try fewer --jobs" if -code == signal.SIGKILL else ""
        return f"was ended by {name}{memory}"
    return f"ended with exit code {code}"
