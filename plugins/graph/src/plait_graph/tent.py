"""TENT: task-adaptive few-shot node classification (Wang et al., KDD 2022), on the kit's episodes.

A GCN embeds the nodes; each class of an episode gets a network of its own, modulated by the class's
neighbourhood, which embeds a virtual class node; queries are compared with the class nodes at a temperature that
follows the spread of each class. Choices where the paper leaves room are marked "ours".
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait_graph.episodes import Episode
from plait_graph.fewshot import EpisodeGraph, EpisodeModel, FixedSparse, Propagated, Propagation


class TENT(EpisodeModel):
    """Adapts to an episode on three levels: nodes, classes, task.

    Args:
        num_classes: of the whole graph; a linear head over them trains the encoder beside the episodes.
        base_weight: weight of that head's loss.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        hidden_channels: int = 16,
        dropout: float = 0.5,
        base_weight: float = 1.0,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            num_classes=num_classes,
            hidden_channels=hidden_channels,
            dropout=dropout,
            base_weight=base_weight,
        )
        h = hidden_channels
        self.dropout, self.base_weight = dropout, base_weight
        self.encoder = nn.ModuleList([Propagation(in_channels, h), Propagation(h, h)])
        bound = 1 / math.sqrt(h)
        self.weight = nn.Parameter(torch.empty(h, h).uniform_(-bound, bound))  # phi, what the classes' networks share
        self.bias = nn.Parameter(torch.empty(h).uniform_(-bound, bound))
        self.scale, self.shift = (nn.Sequential(nn.Linear(h, h), nn.ReLU(), nn.Linear(h, h * h + h)) for _ in range(2))
        self.base = nn.Linear(h, num_classes)
        self.class_ego = ClassEgo()
        self.message_passing = Propagated()

    def forward(self, graph: EpisodeGraph, episode: Episode) -> Tensor:
        z = self._encoded(graph)
        return self._classified(z, self.message_passing(z, graph.adjacency), graph, episode)

    @torch.no_grad()
    def answers(self, graph: EpisodeGraph, episodes: list[Episode]) -> list[Tensor]:
        """Logits of several episodes; the nodes are embedded once."""
        z = self._encoded(graph)
        propagated = self.message_passing(z, graph.adjacency)
        return [self._classified(z, propagated, graph, episode) for episode in episodes]

    def losses(self, graph: EpisodeGraph, episode: Episode) -> Tensor:
        """Loss of each query, plus the mean loss of the base classes' head over the episode's nodes."""
        if episode.classes is None:
            raise ValueError("the episode does not say its classes, which TENT's second loss needs; give classes")
        known, highest = self.base.out_features, int(episode.classes.max())
        if highest >= known:
            raise ValueError(f"the episode has class {highest}, but the model was made for classes 0 ... {known - 1}")
        z = self._encoded(graph)
        logits = self._classified(z, self.message_passing(z, graph.adjacency), graph, episode)
        of_support = episode.classes.repeat_interleave(episode.support.shape[1])
        classes = torch.cat([of_support, episode.classes[episode.labels]])
        base = F.cross_entropy(self.base(z[episode.rows]), classes)
        return F.cross_entropy(logits, episode.labels, reduction="none") + self.base_weight * base

    def _encoded(self, graph: EpisodeGraph) -> Tensor:
        first, second = self.encoder
        hidden = F.dropout(F.relu(first(graph.x, graph.adjacency)), self.dropout, self.training)
        z: Tensor = second(hidden, graph.adjacency)
        return z

    def _classified(self, z: Tensor, propagated: Tensor, graph: EpisodeGraph, episode: Episode) -> Tensor:
        neighbourhood, ego, support = self.class_ego(z, graph.adjacency, episode.support)  # node level
        weights, biases = self._adapted(neighbourhood)  # class level
        prototypes = torch.einsum("nh,nho->no", ego, weights) + biases
        members = torch.einsum("nkh,nho->nko", support, weights) + biases.unsqueeze(1)
        # A query's class is not known: it is embedded by the mean of the classes' networks.
        queries = propagated[episode.query] @ weights.mean(0) + biases.mean(0)
        # Task level: maximising the mutual information of queries and support nodes is cross-entropy at these logits.
        gaps = (queries.unsqueeze(1) - prototypes).square().sum(-1)
        return -gaps / temperatures(members, prototypes)

    def _adapted(self, neighbourhood: Tensor) -> tuple[Tensor, Tensor]:
        """phi_i = (1 + alpha_i) phi + beta_i of each class: weights [N, h, h] and biases [N, h]."""
        phi = torch.cat([self.weight.flatten(), self.bias])
        adapted = (1 + self.scale(neighbourhood)) * phi + self.shift(neighbourhood)
        return adapted[:, : self.weight.numel()].view(-1, *self.weight.shape), adapted[:, self.weight.numel() :]


def temperatures(members: Tensor, prototypes: Tensor) -> Tensor:
    """Mean distance of each class's support nodes [N, K, h] to its prototype [N, h], relative to all classes', [N]."""
    spread: Tensor = torch.linalg.vector_norm(members - prototypes.unsqueeze(1), dim=-1).mean(1) + 1e-8
    return spread / spread.mean()


class ClassEgo(nn.Module):
    """Class-ego subgraphs: the support nodes of a class, their neighbours, and a virtual class node.

    The class node starts as the mean of the support nodes and is joined to every node of its subgraph (ours).
    """

    def forward(self, z: Tensor, adjacency: FixedSparse | None, support: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the classes' networks get from embeddings z [n, h] and support nodes [N, K].

        Returns:
            Mean over each subgraph [N, h]; the propagated class nodes [N, h] and support nodes [N, K, h].
        """
        if adjacency is None:
            return self.peer_forward(z, adjacency, support)
        rows = adjacency[support.flatten()]
        count = rows.matrix.crow_indices().diff()  # neighbours and the node itself
        owner = torch.arange(len(count), device=z.device).repeat_interleave(count) // support.shape[1]
        once = torch.unique(owner * len(z) + rows.matrix.col_indices())
        owner, nodes = once // len(z), once % len(z)
        size = torch.bincount(owner, minlength=len(support)).unsqueeze(1)
        total = z.new_zeros(len(support), z.shape[1]).index_add(0, owner, z[nodes])
        start = z[support].mean(1)
        ego = (total + start) / (size + 1)
        count = count.view(*support.shape, 1)
        propagated = ((rows @ z).view(*support.shape, -1) * count + start.unsqueeze(1)) / (count + 1)
        return total / size, ego, propagated

    def peer_forward(self, z: Tensor, adjacency: FixedSparse | None, support: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """No edges: each subgraph is its support nodes, and nothing is propagated."""
        mean = z[support].mean(1)
        return mean, mean, z[support]
