"""The clients' data as index views of one tensor, and the batches that every engine sees alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Random flip and shifted crop of images, each with probability ½.

    Attributes:
        padding: pixels of border to crop from.
        fill: colour of the border, one value a channel, in the units of the inputs.
    """

    padding: int
    fill: tuple[float, ...]

    def apply(self, images: Tensor, flip: Tensor, offset: Tensor) -> Tensor:
        """``images`` [b, C, H, W]; ``flip`` bool [b]; ``offset`` [b, 2] rows and columns, ``padding`` = no shift."""
        _, channels, height, width = images.shape
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        fill = torch.tensor(self.fill, dtype=images.dtype, device=images.device).expand(channels)[:, None, None]
        # Padding with the fill colour = padding what is left after subtracting it with 0.
        padded = F.pad(images - fill, [self.padding] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        chosen = windows[torch.arange(len(images), device=images.device), :, offset[:, 0], offset[:, 1]]
        return chosen + fill


@dataclass(frozen=True)
class ClientBatches:
    """What one client trains on in one round; places without a sample hold index −1.

    Attributes:
        index: rows of the inputs, ``[steps, B]``.
        flip: ``[steps, B]`` and offset: ``[steps, B, 2]``, draws of the augmentation (``None`` without one).
    """

    index: Tensor
    flip: Tensor | None = None
    offset: Tensor | None = None


@dataclass(frozen=True)
class ClientShards:
    """All clients' data: one tensor of inputs, one of labels, and rows of them for each client.

    Attributes:
        inputs: ``[N, ...]``; uint8 images are scaled to [0, 1] batch by batch, integers (token ids) are left alone.
        labels: ``[N]`` int64.
        members: for each client the rows of its samples.
        local_epochs: passes over a shard in one round, reshuffled each time.
        local_steps: stop a round after that many batches; ``None`` does whole epochs.
    """

    inputs: Tensor
    labels: Tensor
    members: tuple[Tensor, ...]
    seed: int
    batch_size: int
    local_epochs: int
    local_steps: int | None = None
    augmentation: Augmentation | None = None
    num_clients: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_clients", len(self.members))
        for client, rows in enumerate(self.members):
            if len(rows) == 0:
                raise ValueError(f"client {client} has no sample; give every client at least one")

    def to(self, device: torch.device) -> ClientShards:
        """The same shards with inputs and labels on a device."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "num_clients"}
        return ClientShards(**fields | {"inputs": self.inputs.to(device), "labels": self.labels.to(device)})

    def num_steps(self, client: int) -> int:
        """ClientBatches of one client in one round."""
        steps = self.local_epochs * -(-len(self.members[client]) // self.batch_size)
        return steps if self.local_steps is None else min(steps, self.local_steps)

    def batches(self, client: int, round_index: int) -> ClientBatches:
        """The batches of one client in one round; a function of (seed, round, client) alone."""
        rows = self.members[client]
        number = np.random.SeedSequence([self.seed, round_index, client]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(number))
        orders = torch.stack([torch.randperm(len(rows), generator=generator) for _ in range(self.local_epochs)])
        index = self._cut(rows[orders], fill=-1)[: self.local_steps]
        if self.augmentation is None:
            return ClientBatches(index)
        padding = self.augmentation.padding
        flip = torch.rand(orders.shape, generator=generator) < 0.5
        crop = torch.rand(orders.shape, generator=generator) < 0.5
        offset = torch.randint(2 * padding + 1, (*orders.shape, 2), generator=generator)
        offset = torch.where(crop[..., None], offset, padding)
        rows_columns = [self._cut(part, fill=0)[: self.local_steps] for part in offset.unbind(-1)]
        return ClientBatches(index, self._cut(flip, fill=0)[: self.local_steps], torch.stack(rows_columns, dim=-1))

    def _cut(self, values: Tensor, fill: int) -> Tensor:
        """``[epochs, m]`` → ``[epochs · batches, B]``, the last batch of an epoch filled up."""
        missing = -values.shape[1] % self.batch_size
        return F.pad(values, (0, missing), value=fill).reshape(-1, self.batch_size)

    def batch(self, index: Tensor, flip: Tensor | None, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inputs and labels of any shape of row numbers ``index`` [...]: ``[..., *sample]`` and ``[...]``."""
        device = self.inputs.device
        index = index.to(device)
        inputs = as_float(self.inputs[index])
        if self.augmentation is not None:
            if flip is None or offset is None:
                raise ValueError("these shards augment their inputs; give flip and offset")
            flat = inputs.reshape(-1, *inputs.shape[index.ndim :])
            flat = self.augmentation.apply(flat, flip.reshape(-1).to(device), offset.reshape(-1, 2).to(device))
            inputs = flat.view(inputs.shape)
        return inputs, self.labels[index]


def as_float(inputs: Tensor) -> Tensor:
    """8-bit images as float32 in [0, 1]; anything else as it is."""
    return inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs
