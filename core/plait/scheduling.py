"""Which task may run next: each as soon as those that it needs are done, in time that grows with the tasks alone."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Set

from plait.plan import Plan, Task
from plait.resources import Resources


class Progress:
    """The state of a run.

    Args:
        plan: its tasks, each after those that it needs.
        stored: keys of the tasks whose results are in the store.
        wanted: keys of tasks that have to run though no task needs their results.

    Attributes:
        failed: label → why, of the tasks that failed.
    """

    def __init__(self, plan: Plan, stored: set[str], wanted: Set[str] = frozenset()) -> None:
        self._tasks = {task.key: task for task in plan.tasks}
        self._stored = frozenset(stored)
        self._behind: dict[str, list[Task]] = {}
        for task in plan.tasks:
            for key in task.needs:
                self._behind.setdefault(key, []).append(task)
        self._needed = self._keys_needed(plan, stored) | wanted
        self._settled = {task.key for task in plan.tasks if task.key in stored or task.key not in self._needed}
        self._missing = {
            task.key: sum(key not in self._settled for key in task.needs)
            for task in plan.tasks
            if task.key not in self._settled
        }
        # The first of the plan first, so that one cell ends before the next begins. One heap for all that ask for the same.
        self._place = {task.key: place for place, task in enumerate(plan.tasks)}
        self._ready: dict[Resources, list[tuple[int, str]]] = {}
        for task in plan.tasks:
            if self._missing.get(task.key) == 0:
                self._make_ready(task)
        self._open = len(self._missing)
        self._finished: set[str] = set()
        self._skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def _keys_needed(self, plan: Plan, stored: set[str]) -> set[str]:
        # Results that only finished steps need may have been deleted; they are not made again.
        needed: set[str] = set()
        for task in reversed(plan.tasks):
            users = self._behind.get(task.key, ())
            is_end = not users or task.step.hook == "evaluate"
            if is_end or any(user.key in needed and user.key not in stored for user in users):
                needed.add(task.key)
        return needed

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to run."""
        return self._open == 0

    @property
    def settled(self) -> list[Task]:
        """The tasks that had not to be run from the start."""
        return [task for task in self._tasks.values() if task.key in self._settled]

    @property
    def to_be_loaded(self) -> list[Task]:
        """Stored results that will be read: by tasks that are to run, and evaluations by the report."""
        inputs = {key for key in self._missing for key in self._tasks[key].needs}
        return [t for t in self.settled if t.key in self._stored and (t.key in inputs or t.step.hook == "evaluate")]

    @property
    def not_run(self) -> dict[str, str]:
        """Label → why, of the tasks that were not run (yet)."""
        open_tasks = [task for key, task in self._tasks.items() if key in self._missing and key not in self._finished]
        never = {task.label: "the run ended before it" for task in open_tasks if task.label not in self.failed}
        return {**never, **self._skipped}

    @property
    def waiting(self) -> list[str]:
        """Labels of the tasks that wait for others."""
        return [self._tasks[key].label for key, count in self._missing.items() if count > 0]

    def task_of(self, key: str) -> Task:
        """The task with a key."""
        return self._tasks[key]

    def next_ready(self, has_room_for: Callable[[Resources], bool] = lambda _: True) -> Task | None:
        """Take the first task that may start now; ``None`` where all that is left waits for a running one.

        Args:
            has_room_for: whether what a task asks for is free.
        """
        heaps = [heap for resources, heap in self._ready.items() if heap and has_room_for(resources)]
        return self._tasks[heapq.heappop(min(heaps))[1]] if heaps else None

    @property
    def no_longer_needed(self) -> list[Task]:
        """Tasks that are done, whose results need not be kept, and all of whose users are done."""
        return [
            task
            for task in self._tasks.values()
            if not task.step.keep and self._is_done(task.key) and self._is_used_up(task)
        ]

    def used_up_by(self, task: Task) -> list[Task]:
        """Inputs of a task that has finished, whose results need not be kept and are needed by no other."""
        inputs = [self._tasks[key] for key in task.needs]
        return [one for one in inputs if not one.step.keep and self._is_used_up(one)]

    def _is_done(self, key: str) -> bool:
        return key in self._finished or key in self._settled

    def _is_used_up(self, task: Task) -> bool:
        users = self._behind.get(task.key, ())
        return bool(users) and all(self._is_done(user.key) for user in users)

    def finish(self, task: Task) -> None:
        """A task's result is in the store."""
        self._open -= 1
        self._finished.add(task.key)
        for user in self._behind.get(task.key, ()):
            if user.key in self._missing:
                self._missing[user.key] -= 1
                if self._missing[user.key] == 0 and user.label not in self._skipped:
                    self._make_ready(user)

    def _make_ready(self, task: Task) -> None:
        heapq.heappush(self._ready.setdefault(task.step.resources, []), (self._place[task.key], task.key))

    def fail(self, task: Task, message: str) -> list[tuple[Task, str]]:
        """A task failed; the tasks behind it, which are skipped, each with a sentence."""
        self.failed[task.label] = message
        self._open -= 1
        skipped = []
        todo = [(user, task) for user in self._behind.get(task.key, ())]
        while todo:
            user, cause = todo.pop(0)
            if user.key in self._missing and user.label not in self._skipped:
                self._skipped[user.label] = f"step {cause.label} {'failed' if cause is task else 'was not run'}"
                self._open -= 1
                skipped.append((user, f"not run, because {self._skipped[user.label]}"))
                todo += [(next_user, user) for next_user in self._behind.get(user.key, ())]
        return skipped
