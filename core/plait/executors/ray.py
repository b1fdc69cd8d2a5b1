"""On a Ray cluster: every step is a Ray task, and results travel through a store that all nodes see."""

from __future__ import annotations

import contextlib
import signal
import threading
import uuid
from collections.abc import Callable
from typing import Any

from plait.errors import PlaitError, StoreError, writing
from plait.executors.same_code import Differences, Look, look_around
from plait.interrupts import Interrupts
from plait.optional import require
from plait.plan import Plan
from plait.resources import Resources
from plait.store import Store
from plait.work import Emit, Job, Outcome, carry_out

SLICE = 0.2  # seconds between two looks at the events that workers send
CHECK_SECONDS = 120.0  # that a node gets to answer the first question


class RayCluster:
    """Jobs are Ray tasks with what their steps ask for; Ray decides where and when.

    A worker that dies is replaced and its job tried again ``retries`` times, from its last checkpoint; then the job fails
    alone.

    Args:
        address: as of ``ray.init``: ``auto``, ``ray://host:port``; default a cluster on this machine for this run.
        plan: its store and the code of its methods are looked for on every node before anything runs.

    Raises:
        PlaitError: a node does not see the store, or has other code.
        MissingDependency: Ray is not installed.
    """

    def __init__(
        self,
        emit: Emit,
        asked: Interrupts,
        plan: Plan,
        store: Store,
        *,
        address: str | None = None,
        retries: int = 1,
    ) -> None:
        self._ray = require("ray")
        self._emit = emit
        self._asked = asked
        self._retries = retries
        self._running: dict[Any, tuple[Job, int]] = {}
        self._is_ours = not self._ray.is_initialized()
        try:
            with asked.deferred():
                if self._is_ours:
                    self._connect(address)
                _check_nodes(self._ray, plan, store)
                self._events = require("ray.util.queue").Queue()
                self._task = self._ray.remote(max_retries=0)(_carry_out)
                self._room = max(4, 2 * int(self._ray.cluster_resources().get("CPU", 1)))
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str | None) -> None:
        before = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level="ERROR",
                include_dashboard=None if address else False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise PlaitError(f"the Ray cluster at {address!r} cannot be reached ({error}); see ray status") from error
        finally:
            if threading.current_thread() is threading.main_thread():  # Ray sets its own, and the run's would be lost
                signal.signal(signal.SIGTERM, before)

    def has_room_for(self, resources: Resources) -> bool:
        """Whether another job may be handed to Ray now; what it asks for is Ray's to find."""
        return len(self._running) < self._room

    def submit(self, job: Job) -> None:
        """Hand a job to Ray."""
        with self._asked.deferred():
            self._submit(job, self._retries)

    def _submit(self, job: Job, tries_left: int) -> None:
        asked = job.resources
        options: dict[str, Any] = {"num_cpus": asked.cpu or 1, "num_gpus": asked.gpu, "name": job.label}
        if asked.memory:
            options["memory"] = asked.memory
        self._running[self._task.options(**options).remote(job, self._events)] = (job, tries_left)

    def next_done(self) -> Outcome:
        """Wait for a job's end and pass on events meanwhile."""
        while True:
            outcome = None
            with self._asked.deferred():
                done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=SLICE)
                size = self._events.size()
                events = self._events.get_nowait_batch(size) if size else []
                for reference in done:
                    job, tries_left = self._running.pop(reference)
                    outcome = self._outcome_of(reference, job, tries_left)
            for name, facts in events:
                self._emit(name, **facts)
            if outcome is not None:
                return outcome

    def _outcome_of(self, reference: Any, job: Job, tries_left: int) -> Outcome | None:
        """How a job ended; ``None`` where it is tried again."""
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0][:200]
            if tries_left == 0:
                return Outcome(job.key, False, 0.0, f"its worker died ({reason})")
            self._emit("step_warned", step=job.label, message="its worker died; it is tried again")
            self._submit(job, tries_left - 1)
            return None
        return outcome

    def close(self) -> None:
        """Stop what still runs, and the cluster if it was started for this run."""
        for reference in self._running:
            with contextlib.suppress(Exception):
                self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._is_ours:
            self._ray.shutdown()


def _carry_out(job: Job, events: Any) -> Outcome:
    return carry_out(job, lambda name, **facts: events.put((name, facts)))


def _check_nodes(ray: Any, plan: Plan, store: Store) -> None:
    """Every node sees the same store and has the same code."""
    probe = store.root / "tmp" / f"probe-{uuid.uuid4().hex}"
    with writing(
        f"the store {store.root}", "name a folder that all nodes share with --store, or free some space", StoreError
    ):
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text(probe.name, encoding="utf-8")
    look = Look.at(plan, probe)
    strategy: Callable[..., Any] = require("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(look_around)
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        found = {node: task.options(scheduling_strategy=strategy(node, soft=False)).remote(look) for node in nodes}
        for node, reference in found.items():
            _refuse_other(nodes[node], reference, ray, store)
    finally:
        probe.unlink(missing_ok=True)


def _refuse_other(name: str, reference: Any, ray: Any, store: Store) -> None:
    try:
        differences: Differences = ray.get(reference, timeout=CHECK_SECONDS)
    except ray.exceptions.RayError as error:
        raise PlaitError(
            f"node {name} cannot run plait ({str(error).strip().splitlines()[-1][:200]}); install plait and the plugins there"
        ) from error
    if not differences.sees_store:
        raise PlaitError(
            f"node {name} does not see the store {store.root}; name a folder that all nodes share with --store"
        )
    if differences.code:
        raise PlaitError(
            f"node {name} has other code than this machine: {'; '.join(differences.code[:3])}; install the same there"
        )
