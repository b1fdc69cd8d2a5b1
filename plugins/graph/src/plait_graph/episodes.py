"""N-way K-shot episodes of node classification."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor


@attrs.frozen
class Episode:
    """One few-shot task.

    Attributes:
        support: nodes [N, K]; row i belongs to local class i.
        query: nodes [N * M].
        labels: local classes 0 ... N-1 of the queries, [N * M].
        classes: the graph's own labels of the local classes, [N]; ``None`` where nobody needs them.
    """

    support: Tensor
    query: Tensor
    labels: Tensor
    classes: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """Support nodes, then query nodes, [N * (K + M)]."""
        return torch.cat([self.support.flatten(), self.query])

    def renumbered(self) -> Episode:
        """The same episode on the rows of :attr:`rows`."""
        places = torch.arange(self.support.numel() + len(self.query), device=self.query.device)
        support = places[: self.support.numel()].view_as(self.support)
        return Episode(support, places[self.support.numel() :], self.labels, self.classes)


class EpisodeSampler:
    """Draws N classes without replacement and K + M distinct nodes of each.

    Raises:
        ValueError: fewer classes than ``n_way``, or a class with fewer than ``k_shot + n_query`` nodes.
    """

    def __init__(
        self, y: Tensor, classes: Tensor, n_way: int, k_shot: int, n_query: int, name: str = "training"
    ) -> None:
        if len(classes) < n_way:
            raise ValueError(f"n_way is {n_way}, but there are only {len(classes)} {name} classes")
        y, self.classes = y.cpu(), classes.cpu()
        self.members = [torch.nonzero(y == c).flatten() for c in classes.tolist()]
        for c, nodes in zip(classes.tolist(), self.members, strict=True):
            if len(nodes) < k_shot + n_query:
                raise ValueError(
                    f"{name} class {c} has {len(nodes)} nodes, fewer than k_shot + n_query = {k_shot + n_query}"
                )
        self.n_way, self.k_shot, self.n_query = n_way, k_shot, n_query

    def draw(self, generator: torch.Generator, device: torch.device | str = "cpu") -> Episode:
        chosen = torch.randperm(len(self.members), generator=generator)[: self.n_way]
        count = self.k_shot + self.n_query
        nodes = torch.stack(
            [m[torch.randperm(len(m), generator=generator)[:count]] for m in (self.members[c] for c in chosen.tolist())]
        )
        labels = torch.arange(self.n_way).repeat_interleave(self.n_query)
        support, query = nodes[:, : self.k_shot], nodes[:, self.k_shot :].flatten()
        return Episode(*(part.to(device) for part in (support, query, labels, self.classes[chosen])))
