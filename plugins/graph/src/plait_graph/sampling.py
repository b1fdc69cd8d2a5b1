"""Neighbour sampling (Hamilton et al., NeurIPS 2017): a few random neighbours a node and hop, not all of them."""

from __future__ import annotations

import torch
from torch import Tensor


class NeighbourSampler:
    """Draws subgraphs around target nodes.

    Args:
        edge_index: [2, e]; the neighbours of a node are the sources of the edges that point to it.
        num_nodes: of the graph.
        num_neighbors: drawn without replacement for each node and hop; all where there are fewer.
    """

    def __init__(self, edge_index: Tensor, num_nodes: int, num_neighbors: int) -> None:
        self.source, target = edge_index
        self.edges = torch.argsort(target, stable=True)  # edge numbers, by target
        self.count = torch.bincount(target, minlength=num_nodes)
        self.start = self.count.cumsum(0) - self.count
        self.num_neighbors = num_neighbors

    def draw(self, targets: Tensor, num_hops: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The subgraph of ``num_hops`` hops.

        Returns:
            Its nodes, the targets first; and the numbers of its edges, each pointing to a node less than
            ``num_hops`` away.
        """
        nodes, edges, frontier = targets, [], targets
        known = torch.zeros(len(self.count), dtype=torch.bool, device=targets.device)
        known[targets] = True
        for _ in range(num_hops):
            edges.append(self._drawn(frontier, generator))
            frontier = torch.unique(self.source[edges[-1]])
            frontier = frontier[~known[frontier]]
            known[frontier] = True
            nodes = torch.cat([nodes, frontier])
        return nodes, torch.cat(edges)

    def _drawn(self, frontier: Tensor, generator: torch.Generator) -> Tensor:
        """Numbers of the drawn edges that point to the frontier."""
        count = self.count[frontier]
        owner = torch.arange(len(frontier), device=frontier.device).repeat_interleave(count)
        first = (count.cumsum(0) - count)[owner]
        place = torch.arange(len(owner), device=frontier.device)
        candidates = self.edges[self.start[frontier][owner] + place - first]
        key = torch.rand(len(owner), generator=generator, dtype=torch.float64).to(frontier.device)
        order = torch.argsort(owner + (1 - 1e-6) * key)  # shuffled within each owner; no sum is rounded to the next
        return candidates[order[place - first < self.num_neighbors]]
