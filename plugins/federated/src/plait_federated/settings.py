"""What all methods of a comparison share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from plait_federated.steps import Local

UpdateOrder = Literal["synchronous", "sequential"]


@dataclass(frozen=True, kw_only=True)
class FederatedSettings:
    """Length, optimiser and order of a training.

    Attributes:
        learning_rate: of round 0; constant inside a round, times ``learning_rate_decay`` after each.
        max_grad_norm: of the gradient of all parameters; ``None`` does not clip.
        update_order: ``synchronous`` (all clients read the models of the last round) or ``sequential`` (client
            after client, reading what earlier ones have already trained).
        buffers: what happens to BatchNorm-like buffers: ``error``, ``average`` (mixed like parameters) or
            ``local`` (each client keeps its own).
        eval_clients_every: rounds between evaluations of all local models; 0: after the last round only.
        checkpoint_every: rounds between checkpoints.
        allow_wavefront: let processes wait for each other in sequential order.
    """

    rounds: int
    learning_rate: float = 0.1
    learning_rate_decay: float = 0.998
    weight_decay: float = 5e-4
    max_grad_norm: float | None = 10.0
    update_order: UpdateOrder = "synchronous"
    buffers: Literal["error", "average", "local"] = "error"
    eval_clients_every: int = 0
    checkpoint_every: int = 1
    allow_wavefront: bool = False
    seed: int = 0

    @property
    def keep_buffers(self) -> bool:
        return self.buffers == "local"

    def learning_rate_of(self, round_index: int) -> float:
        return self.learning_rate * self.learning_rate_decay**round_index

    def local(self, learning_rate: float, start: Tensor) -> Local:
        """What local training from ``start`` holds constant."""
        return Local(start, learning_rate, self.weight_decay, self.max_grad_norm)

    def evaluates_clients(self, round_index: int) -> bool:
        last = round_index == self.rounds - 1
        return last or (self.eval_clients_every > 0 and (round_index + 1) % self.eval_clients_every == 0)

    def saves(self, round_index: int) -> bool:
        return round_index == self.rounds - 1 or (round_index + 1) % self.checkpoint_every == 0
