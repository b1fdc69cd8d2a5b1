"""On a Slurm cluster: every step is a job of its own, and results travel through a store that all nodes see."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from plait.errors import PlaitError
from plait.optional import require
from plait.resources import Resources
from plait.work import Emit, Job, Outcome, carry_out

AT_ONCE = 1000  # jobs that wait or run; clusters bound what one user may submit
DEFAULT_MINUTES = 24 * 60
REQUEUED = 144  # the exit code by which submitit knows
PAUSE = 0.5  # seconds between two looks at the jobs
TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")


@attrs.define(eq=False)
class _Submitted:
    job: Job
    handle: Any
    events: Path
    read: int = 0


class SlurmCluster:
    """Jobs are submitted with ``sbatch`` through submitit; one that is preempted goes on from its checkpoint.

    Args:
        folder: for submitit's files and the events of jobs; all nodes have to see it.
        options: ``partition``, ``time`` (minutes, HH:MM:SS or D-HH:MM:SS), ``account``, ``qos``, ``constraint``, … as of
            ``sbatch``; ``cluster=local`` runs the jobs as processes of this machine, ``cluster=debug`` in this process.

    Raises:
        PlaitError: there is no Slurm here, or an option is unknown.
        MissingDependency: submitit is not installed.
    """

    def __init__(self, emit: Emit, folder: Path, options: Mapping[str, str]) -> None:
        submitit = require("submitit")
        given = dict(options)
        cluster = given.pop("cluster", "slurm")
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise PlaitError(
                "there is no Slurm here (no sbatch); run this on a login node, or try it with --slurm cluster=local"
            )
        minutes = _minutes(given.pop("time")) if "time" in given else DEFAULT_MINUTES
        self._folder = folder.absolute()
        self._emit = emit
        self._submitted: dict[str, _Submitted] = {}
        try:
            self._executor = submitit.AutoExecutor(folder=self._folder, cluster=cluster)
            self._executor.update_parameters(
                timeout_min=minutes, **{f"slurm_{name.replace('-', '_')}": value for name, value in given.items()}
            )
        except (NameError, TypeError, ValueError, AssertionError) as error:
            raise PlaitError(f"--slurm: {str(error).strip().splitlines()[0]}") from error

    def has_room_for(self, resources: Resources) -> bool:
        """Whether another job may be submitted now; what it asks for is Slurm's to find."""
        return len(self._submitted) < AT_ONCE

    def submit(self, job: Job) -> None:
        """Hand a job to Slurm."""
        asked = job.resources
        wanted: dict[str, Any] = {
            "cpus_per_task": max(1, int(asked.cpu)),
            "gpus_per_node": asked.gpu,
            "name": f"plait-{job.step}",
        }
        if asked.memory:
            wanted["mem_gb"] = asked.memory / 2**30
        self._executor.update_parameters(**wanted)
        events = self._folder / f"{job.key}.events"
        events.parent.mkdir(parents=True, exist_ok=True)
        events.touch()
        self._submitted[job.key] = _Submitted(job, self._executor.submit(Resumed(), job, events), events)

    def next_done(self) -> Outcome:
        """Wait for a job's end and pass on events meanwhile."""
        while True:
            for submitted in list(self._submitted.values()):
                is_done = submitted.handle.done()
                self._pass_on_events(submitted)
                if is_done:
                    del self._submitted[submitted.job.key]
                    return self._outcome_of(submitted)
            time.sleep(PAUSE)

    def _outcome_of(self, submitted: _Submitted) -> Outcome:
        try:
            outcome: Outcome = submitted.handle.result()
        except Exception as error:  # whatever Slurm did with it
            submitted.handle.cancel()
            reason = str(error).strip().splitlines()[0][:200]
            outcome = Outcome(
                submitted.job.key, False, 0.0, f"its job {submitted.handle.job_id} ended without a result ({reason})"
            )
        submitted.events.unlink(missing_ok=True)
        return outcome

    def _pass_on_events(self, submitted: _Submitted) -> None:
        with submitted.events.open("rb") as file:
            file.seek(submitted.read)
            for line in file:
                if not line.endswith(b"\n"):  # the rest of it has not been written yet
                    return
                submitted.read += len(line)
                name, facts = json.loads(line)
                self._emit(name, **facts)

    def close(self) -> None:
        """Cancel what still waits or runs."""
        for submitted in self._submitted.values():
            submitted.handle.cancel()
        self._submitted.clear()


class Resumed:
    """Carries out a job, and after a preemption again: it finds its checkpoint in the store."""

    def __init__(self) -> None:
        self._is_preempted = False

    def __call__(self, job: Job, events: Path) -> Outcome:
        with events.open("ab") as file:

            def emit(name: str, **facts: Any) -> None:
                os.write(file.fileno(), json.dumps([name, facts]).encode() + b"\n")

            outcome = carry_out(job, emit)
        if (
            self._is_preempted
        ):  # submitit ends the program in the middle of the method, which is no failure of the method
            raise SystemExit(REQUEUED)
        return outcome

    def checkpoint(self, job: Job, events: Path) -> Any:
        """What submitit submits again when Slurm is about to stop the job."""
        self._is_preempted = True
        return require("submitit").helpers.DelayedSubmission(Resumed(), job, events)


def _minutes(text: str) -> int:
    """Minutes of a time as Slurm writes it, rounded up."""
    if TIME.fullmatch(text) is None:
        raise PlaitError(f"--slurm: time is {text!r}; write minutes, MM:SS, HH:MM:SS or D-HH:MM:SS")
    days, dash, rest = text.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if dash:  # days are followed by hours
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:
        hours, minutes, seconds = {1: (0, *numbers, 0), 2: (0, *numbers), 3: tuple(numbers)}[len(numbers)]
    return int(days or 0) * 24 * 60 + hours * 60 + minutes + (seconds > 0)
