"""FGSAM and the baselines as updates of the graph kit's training loop (:class:`plait_graph.Update`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from plait_graph import Task, Update
from torch import Tensor, nn

from plait_fgsam.fgsam import fgsam
from plait_fgsam.peer import Peer, peer_losses
from plait_fgsam.perturbing import PerturbingOptimizer

Peers = Mapping[type[nn.Module], Peer]


@attrs.frozen
class TwoLossUpdate:
    """A perturbing optimizer on the two losses of a task: with message passing, and of the PeerMLP's rows.

    Attributes:
        peers: see :func:`plait_fgsam.peer.peer_mlp`.
        per_sample: hand on the losses of the samples with message passing, [n], in place of their mean (ESAM).
    """

    model: nn.Module
    optimizer: PerturbingOptimizer
    peers: Peers | None = None
    per_sample: bool = False

    def step(self, task: Task) -> dict[str, Any]:
        passes = 0

        def gnn_loss(model: nn.Module, task: Task) -> Tensor:
            nonlocal passes
            passes += 1
            losses = task.losses(model)
            return losses if self.per_sample else losses.mean()

        (info,) = fgsam(self.optimizer, self.model, [task], gnn_loss, _row_losses, self.peers)
        return info | {"passes": passes}

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def _row_losses(model: nn.Module, task: Task) -> Tensor:
    return task.row_losses(model)


@attrs.frozen
class PeerTask:
    """A task that is learned by the PeerMLP alone."""

    task: Task
    peers: Peers

    def losses(self, model: nn.Module) -> Tensor:
        return peer_losses(model, self.task.row_losses, self.peers)

    def row_losses(self, model: nn.Module) -> Tensor:
        return self.losses(model)


@attrs.frozen
class PeerUpdate:
    """An update that sees a :class:`PeerTask` in place of each task."""

    update: Update
    peers: Peers

    def step(self, task: Task) -> dict[str, Any]:
        return self.update.step(PeerTask(task, self.peers)) | {"passes": 0}

    def state_dict(self) -> dict[str, Any]:
        return self.update.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update.load_state_dict(state)
