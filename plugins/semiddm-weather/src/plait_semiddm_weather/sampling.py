"""Which images make the batches of a training: epochs, and the curriculum of weathers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Batches:
    """Row numbers for every step; whole batches only, every epoch in an order of its own.

    Args:
        domains: the weather of every row (all the same where there is none).
        batch_size: rows of a batch; fewer rows than that are repeated.
        curriculum: weather → the step (or epoch, where ``by_epoch``) at which it joins; weathers it does not name are
            there from the start.
        per_epoch: weather → rows drawn anew for each epoch, where there are more.
        seed: of the orders.

    Raises:
        ValueError: no rows, or a curriculum that has none at the start.
    """

    def __init__(
        self,
        domains: Sequence[str],
        batch_size: int,
        *,
        curriculum: Mapping[str, int] | None = None,
        per_epoch: Mapping[str, int] | None = None,
        by_epoch: bool = False,
        seed: int = 0,
    ) -> None:
        if not domains:
            raise ValueError("there is no image to train on; give at least one")
        self.domains, self.batch_size, self.seed, self.by_epoch = list(domains), batch_size, seed, by_epoch
        self.curriculum, self.per_epoch = dict(curriculum or {}), dict(per_epoch or {})
        if unknown := [name for name in (*self.curriculum, *self.per_epoch) if name not in self.domains]:
            has = ", ".join(sorted(set(self.domains))) if any(self.domains) else "no column weather"
            raise ValueError(f"curriculum or images_per_epoch names {unknown[0]!r}; the images have {has}")
        if not any(self.curriculum.get(name, 0) <= 0 for name in self.domains):
            raise ValueError("curriculum leaves no image for the first step; let one weather start at 0")
        self._rows: dict[str, Tensor] = {
            name: torch.tensor([row for row, own in enumerate(self.domains) if own == name])
            for name in dict.fromkeys(self.domains)
        }
        self._epoch, self._first, self._order = -1, 0, torch.empty(0, dtype=torch.long)

    def __getitem__(self, step: int) -> Tensor:
        """The rows of a step, int64 ``[batch_size]``."""
        if step < self._first:
            self._epoch, self._first, self._order = -1, 0, torch.empty(0, dtype=torch.long)
        while step >= self._first + len(self._order) // self.batch_size:
            self._first += len(self._order) // self.batch_size
            self._epoch += 1
            self._order = self._of_epoch(self._epoch, self._first)
        place = (step - self._first) * self.batch_size
        return self._order[place : place + self.batch_size]

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to."""
        self[step]
        return self._epoch

    def steps(self, num_epochs: int) -> int:
        """How many steps that many epochs take."""
        first = 0
        for epoch in range(num_epochs):
            first += max(self._active_size(epoch, first), self.batch_size) // self.batch_size
        return first

    def _active(self, epoch: int, first_step: int) -> list[str]:
        now = epoch if self.by_epoch else first_step
        return [name for name in self._rows if self.curriculum.get(name, 0) <= now]

    def _active_size(self, epoch: int, first_step: int) -> int:
        return sum(self._drawn(name) for name in self._active(epoch, first_step))

    def _drawn(self, name: str) -> int:
        return min(len(self._rows[name]), self.per_epoch.get(name, len(self._rows[name])))

    def _of_epoch(self, epoch: int, first_step: int) -> Tensor:
        random = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        parts = []
        for name in self._active(epoch, first_step):
            rows = self._rows[name]
            parts.append(rows[torch.randperm(len(rows), generator=random)[: self._drawn(name)]])
        order = torch.cat(parts)
        order = order[torch.randperm(len(order), generator=random)]
        if len(order) < self.batch_size:
            order = order.repeat(-(-self.batch_size // len(order)))[: self.batch_size]
        return order[: len(order) // self.batch_size * self.batch_size]
