"""Few-shot backbones: what they share, GPN (Ding et al., CIKM 2020) and Meta-GCN (MAML on a GCN).

They see an :class:`EpisodeGraph` and an :class:`Episode` and return the logits of the queries. Without adjacency
(``EpisodeGraph.alone``) they compute the support and query rows alone, which is their PeerMLP.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.utils import coalesce, remove_self_loops
from torch_geometric.utils import degree as count_degree

from plait_graph.episodes import Episode
from plait_graph.models import SavedModule


class _Product(torch.autograd.Function):
    """matrix @ dense, its backward with the transpose at hand: PyTorch's own would transpose in every pass."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, transposed: Tensor, dense: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ dense

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.transposed @ gradient


@attrs.frozen
class FixedSparse:
    """A sparse CSR matrix without gradient, and its transpose."""

    matrix: Tensor
    transposed: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> FixedSparse:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            transposed: Tensor = matrix.to_sparse_coo().t().coalesce()  # type: ignore[no-untyped-call]
            return cls(matrix.to_sparse_csr(), transposed.to_sparse_csr())

    @property
    def shape(self) -> torch.Size:
        return self.matrix.shape

    def __matmul__(self, dense: Tensor) -> Tensor:
        product: Tensor = _Product.apply(self.matrix, self.transposed, dense)
        return product

    def __getitem__(self, rows: Tensor) -> FixedSparse:
        pointers, columns, values = self.matrix.crow_indices(), self.matrix.col_indices(), self.matrix.values()
        count = pointers.diff()[rows]
        row = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
        within = torch.arange(len(row), device=rows.device) - (count.cumsum(0) - count)[row]
        entries = pointers[rows][row] + within
        places, shape = torch.stack([row, columns[entries]]), (len(rows), self.shape[1])
        return FixedSparse.of(
            torch.sparse_coo_tensor(places, values[entries], shape, check_invariants=False).coalesce()
        )


@attrs.frozen
class EpisodeGraph:
    """A graph as the few-shot models see it.

    Attributes:
        x: features [n, d].
        adjacency: row-normalised D^-1 (Adj + I), [n, n], or ``None``: rows are on their own.
        degree: number of neighbours without the self-loop, [n].
    """

    x: Tensor | FixedSparse
    adjacency: FixedSparse | None
    degree: Tensor

    @classmethod
    def of(cls, x: Tensor, edge_index: Tensor) -> EpisodeGraph:
        n = x.shape[0]
        source, target = coalesce(remove_self_loops(edge_index)[0], num_nodes=n)
        degree = count_degree(target, n)
        loops = torch.arange(n, device=x.device)
        places = torch.stack([torch.cat([target, loops]), torch.cat([source, loops])])
        weights = (1 / (degree + 1))[places[0]]
        adjacency = torch.sparse_coo_tensor(places, weights, (n, n), check_invariants=False).coalesce()
        rows = FixedSparse.of(x) if x.layout == torch.sparse_csr else x
        return cls(rows, FixedSparse.of(adjacency), degree)

    def alone(self, rows: Tensor) -> EpisodeGraph:
        """These rows without edges; degrees stay those of the whole graph."""
        return attrs.evolve(self, x=self.x[rows], adjacency=None, degree=self.degree[rows])


class Propagation(nn.Module):
    """A (x W) + b; without adjacency, and as a PeerMLP, x W + b. Weights and bias start in U(+-1/sqrt(out))."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(out_channels)
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))

    def forward(self, x: Tensor | FixedSparse, adjacency: FixedSparse | None) -> Tensor:
        return propagate(adjacency, x @ self.weight) + self.bias

    def peer_forward(self, x: Tensor | FixedSparse, adjacency: FixedSparse | None) -> Tensor:
        return x @ self.weight + self.bias


def propagate(adjacency: FixedSparse | None, x: Tensor) -> Tensor:
    return x if adjacency is None else adjacency @ x


class EpisodeModel(SavedModule):
    """A model that answers episodes: ``forward(graph, episode)`` gives query logits [N * M, N]."""

    def forward(self, graph: EpisodeGraph, episode: Episode) -> Tensor:
        raise NotImplementedError

    def losses(self, graph: EpisodeGraph, episode: Episode) -> Tensor:
        """What training minimises: cross-entropy of each query, [N * M]."""
        return F.cross_entropy(self(graph, episode), episode.labels, reduction="none")

    @torch.no_grad()
    def answers(self, graph: EpisodeGraph, episodes: list[Episode]) -> list[Tensor]:
        """Logits of several episodes."""
        return [self(graph, episode) for episode in episodes]


class GPN(EpisodeModel):
    """Graph prototypical network: prototypes weighted by a scorer and the nodes' degrees.

    Args:
        weighting: ``softmax`` over the support nodes of a class, their weighted embeddings averaged (the code of
            Luo et al.); ``sum``: weights divided by their sum, embeddings summed (Ding et al.).
        distance: ``euclidean`` (Luo et al.) or ``squared`` (Ding et al.).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        hidden_channels: int = 16,
        dropout: float = 0.2,
        weighting: str = "softmax",
        distance: str = "euclidean",
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            hidden_channels=hidden_channels,
            dropout=dropout,
            weighting=weighting,
            distance=distance,
        )
        h = hidden_channels
        self.dropout, self.weighting, self.distance = dropout, weighting, distance
        self.encoder = nn.ModuleList([Propagation(in_channels, 2 * h), Propagation(2 * h, h)])
        self.scorer = nn.ModuleList([Propagation(in_channels, 2 * h), Propagation(2 * h, h)])
        self.score = nn.Linear(h, 1)

    def forward(self, graph: EpisodeGraph, episode: Episode) -> Tensor:
        return self._classified(self._encoded(graph), *self._scored(graph, episode.support), graph, episode)

    @torch.no_grad()
    def answers(self, graph: EpisodeGraph, episodes: list[Episode]) -> list[Tensor]:
        """Logits of several episodes; embeddings and scores of the graph are computed once."""
        everything = torch.arange(len(graph.degree), device=graph.degree.device)
        z, (s, _) = self._encoded(graph), self._scored(graph, everything)
        return [self._classified(z, s[e.support], e.support, graph, e) for e in episodes]

    def _encoded(self, graph: EpisodeGraph) -> Tensor:
        first, second = self.encoder
        hidden = F.dropout(F.relu(first(graph.x, graph.adjacency)), self.dropout, self.training)
        z: Tensor = second(hidden, graph.adjacency)
        return z

    def _scored(self, graph: EpisodeGraph, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the nodes, in their shape; rows on their own are computed for these nodes only."""
        first, second = self.scorer
        x = graph.x[nodes.flatten()] if graph.adjacency is None else graph.x
        hidden = F.dropout(F.relu(first(x, graph.adjacency)), self.dropout, self.training)
        scores = self.score(F.relu(second(hidden, graph.adjacency))).squeeze(-1)
        return (scores.view(nodes.shape) if graph.adjacency is None else scores[nodes]), nodes

    def _classified(self, z: Tensor, scores: Tensor, support: Tensor, graph: EpisodeGraph, episode: Episode) -> Tensor:
        raw = torch.sigmoid(graph.degree[support].clamp_min(1).log() * scores)  # [N, K]
        if self.weighting == "softmax":
            prototypes = (raw.softmax(1).unsqueeze(-1) * z[support]).mean(1)
        else:
            prototypes = ((raw / raw.sum(1, keepdim=True)).unsqueeze(-1) * z[support]).sum(1)
        difference = z[episode.query].unsqueeze(1) - prototypes
        squared = self.distance == "squared"
        gap: Tensor = difference.square().sum(-1) if squared else torch.linalg.vector_norm(difference, dim=-1)
        return -gap


class MetaGCN(EpisodeModel):
    """First-order MAML on GC + ReLU, dropout, GC, Linear: all six tensors are adapted to the support nodes.

    Args:
        num_inner_steps, inner_learning_rate: plain gradient steps on the support loss; their gradients are detached.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        n_way: int = 5,
        hidden_channels: int = 16,
        dropout: float = 0.5,
        num_inner_steps: int = 10,
        inner_learning_rate: float = 0.1,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            n_way=n_way,
            hidden_channels=hidden_channels,
            dropout=dropout,
            num_inner_steps=num_inner_steps,
            inner_learning_rate=inner_learning_rate,
        )
        self.dropout, self.num_inner_steps, self.inner_learning_rate = dropout, num_inner_steps, inner_learning_rate
        shapes = [(in_channels, hidden_channels), (hidden_channels, hidden_channels), (hidden_channels, n_way)]
        self.weights = nn.ParameterList([nn.init.xavier_normal_(torch.empty(shape)) for shape in shapes])
        self.biases = nn.ParameterList([torch.zeros(width) for _, width in shapes])
        self.message_passing = Propagated()

    def forward(self, graph: EpisodeGraph, episode: Episode) -> Tensor:
        n_way = episode.support.shape[0]
        if n_way != self.weights[2].shape[1]:
            raise ValueError(
                f"the model was made for n_way = {self.weights[2].shape[1]}; the episode has {n_way} classes"
            )
        labels = torch.arange(n_way, device=graph.degree.device).repeat_interleave(episode.support.shape[1])
        adapted = [*self.weights, *self.biases]
        for _ in range(self.num_inner_steps):
            with torch.enable_grad():
                current = [p.detach().requires_grad_() for p in adapted]
                logits = self._logits(graph, current, self.dropout if self.training else 0.0)
                loss = F.cross_entropy(logits[episode.support.flatten()], labels)
                gradients = torch.autograd.grad(loss, current)
            adapted = [p - self.inner_learning_rate * g for p, g in zip(adapted, gradients, strict=True)]
        return self._logits(graph, adapted, 0.0)[episode.query]

    def _logits(self, graph: EpisodeGraph, parameters: list[Tensor], dropout: float) -> Tensor:
        w1, w2, w3, b1, b2, b3 = parameters
        hidden = F.relu(self.message_passing(graph.x @ w1, graph.adjacency) + b1)
        hidden = self.message_passing(F.dropout(hidden, dropout, dropout > 0) @ w2, graph.adjacency) + b2
        logits: Tensor = hidden @ w3 + b3
        return logits


class Propagated(nn.Module):
    """A x, and x as a PeerMLP."""

    def forward(self, x: Tensor, adjacency: FixedSparse | None) -> Tensor:
        return propagate(adjacency, x)

    def peer_forward(self, x: Tensor, adjacency: FixedSparse | None) -> Tensor:
        return x
