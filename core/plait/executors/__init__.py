"""Where the tasks of a run are carried out."""

from __future__ import annotations

from typing import Protocol

from plait.resources import Resources
from plait.work import Job, Outcome


class Executor(Protocol):
    """Carries out jobs, several at a time if it can."""

    def has_room_for(self, resources: Resources) -> bool:
        """Whether a job that asks for these may be submitted now."""

    def submit(self, job: Job) -> None:
        """Start a job."""

    def next_done(self) -> Outcome:
        """Wait for the end of any job, and pass on events meanwhile."""

    def close(self) -> None:
        """Stop everything that still runs; nothing of it lives on."""
