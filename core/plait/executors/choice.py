"""Which executor a run takes, by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import attrs

from plait.errors import PlaitError
from plait.executors import Executor
from plait.executors.local import InProcess, Processes
from plait.executors.ray import RayCluster
from plait.executors.slurm import SlurmCluster
from plait.interrupts import Interrupts
from plait.plan import Plan
from plait.resources import cores, sensible_jobs
from plait.store import Store
from plait.work import Emit

KINDS = ("local", "ray", "slurm")


@attrs.frozen(kw_only=True)
class Execution:
    """How a run is carried out.

    Attributes:
        executor: ``local``, ``ray`` or ``slurm``.
        jobs: local: number of processes; ``auto``: as many as cores and memory allow, with torch's threads divided among
            them (then sums may differ in their last bits from those of one process; ``OMP_NUM_THREADS=1`` avoids that).
        address: ray: of a running cluster, ``auto`` or ``ray://host:port``; default one for this run on this machine.
        retries: ray: how often a job whose worker died is tried again.
        slurm: slurm: options of ``sbatch``.
    """

    executor: Literal["local", "ray", "slurm"] = "local"
    jobs: int | Literal["auto"] = 1
    address: str | None = None
    retries: int = 1
    slurm: Mapping[str, str] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        if self.executor not in KINDS:
            raise PlaitError(f"executor is {self.executor!r}; allowed is one of {', '.join(KINDS)}")
        for name, kind in (("address", "ray"), ("slurm", "slurm")):
            if getattr(self, name) and self.executor != kind:
                raise PlaitError(f"--{name} is for --executor {kind}, and the executor is {self.executor}")
        if self.executor != "local" and self.jobs != 1:
            raise PlaitError(
                f"--jobs is for processes of this machine; with --executor {self.executor} it has no meaning"
            )

    def start(self, emit: Emit, asked: Interrupts, plan: Plan, store: Store, folder: Path) -> Executor:
        """The executor, ready for jobs.

        Args:
            folder: of the run.

        Raises:
            PlaitError: it cannot be reached, or would not compute the same.
        """
        if self.executor == "ray":
            return RayCluster(emit, asked, plan, store, address=self.address, retries=self.retries)
        if self.executor == "slurm":
            return SlurmCluster(emit, folder / "slurm", self.slurm)
        jobs = sensible_jobs(len(plan.tasks)) if self.jobs == "auto" else self.jobs
        if jobs == 1:
            return InProcess(emit)
        own = "OMP_NUM_THREADS" in os.environ
        return Processes(
            jobs, emit, asked, threads=max(1, cores() // jobs) if self.jobs == "auto" and not own else None
        )
