"""Where the random numbers of an image attack come from.

An attack asks, per batch, for its start (``init``), then in every step but the first for K ``triple`` draws and for
the ``noise`` of the rescaled views, in the order of the scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# Weights of the current, the clean and the previous image, and what draws them; see plait_sa_aet.sa_aet.LAWS.
Triple = tuple[float, float, float]
Law = Callable[[Random], Triple]


class Randomness(Protocol):
    """The three draws of an image attack."""

    def init(self, shape: Sequence[int], low: float, high: float) -> Tensor:
        """Uniform in [low, high], float32."""
        ...

    def triple(self, law: Law, count: int) -> Tensor:
        """[count, 3] weights of current, clean and previous image; one for the batch or one per image."""
        ...

    def noise(self, shape: Sequence[int], std: float) -> Tensor:
        """Normal with mean 0, float32."""
        ...


class PerImage:
    """Streams of their own for every image and purpose, so what an image gets does not depend on its batch.

    One triple for the whole batch comes from the stream of the batch's first image.

    Args:
        seed: of the run.
        image_ids: one per image of the batch; equal ids get equal numbers.
        device: where noise is drawn. The CPU gives the same numbers on every machine; a GPU saves drawing and moving
            40 noise images per attacked image, and has numbers of its own.
    """

    def __init__(self, seed: int, image_ids: Sequence[int | str], *, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._init = [_generator(seed, i, "init", device) for i in image_ids]
        self._triple = [Random(_derived(seed, i, "triple")) for i in image_ids]
        self._noise = [_generator(seed, i, "noise", device) for i in image_ids]

    def init(self, shape: Sequence[int], low: float, high: float) -> Tensor:
        self._check(shape[0])
        return (
            torch.stack([torch.rand(shape[1:], generator=g, device=self._device) for g in self._init]) * (high - low)
            + low
        )

    def triple(self, law: Law, count: int) -> Tensor:
        if count != 1:
            self._check(count)
        return torch.tensor([law(random) for random in self._triple[:count]])

    def noise(self, shape: Sequence[int], std: float) -> Tensor:
        self._check(shape[0])
        return torch.stack([torch.randn(shape[1:], generator=g, device=self._device) for g in self._noise]) * std

    def _check(self, count: int) -> None:
        if count != len(self._init):
            raise ValueError(f"random numbers for {count} images asked from {len(self._init)} image ids")


class ReleasedStreams:
    """The released code's streams: NumPy's for both noises, Python's for the triples. One object for all batches."""

    def __init__(self, seed: int) -> None:
        self._numpy = np.random.RandomState(seed)
        self._python = Random(seed)

    def init(self, shape: Sequence[int], low: float, high: float) -> Tensor:
        return torch.from_numpy(self._numpy.uniform(low, high, tuple(shape))).float()

    def triple(self, law: Law, count: int) -> Tensor:
        return torch.tensor([law(self._python) for _ in range(count)])

    def noise(self, shape: Sequence[int], std: float) -> Tensor:
        return torch.from_numpy(self._numpy.normal(0, std, tuple(shape))).float()

    def state_dict(self) -> dict[str, Any]:
        """Where the streams are, as JSON can hold it."""
        numpy = self._numpy.get_state(legacy=False)
        version, words, gauss_next = self._python.getstate()
        return {
            "numpy": [
                numpy["bit_generator"],
                numpy["state"]["key"].tolist(),
                numpy["state"]["pos"],
                numpy["has_gauss"],
                numpy["gauss"],
            ],
            "python": [version, list(words), gauss_next],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._numpy.set_state(tuple(state["numpy"]))
        version, words, gauss_next = state["python"]
        self._python.setstate((version, tuple(words), gauss_next))


def _derived(seed: int, image_id: int | str, purpose: str) -> int:
    return int.from_bytes(blake2b(f"{seed}/{purpose}/{image_id}".encode(), digest_size=8).digest()) >> 1


def _generator(seed: int, image_id: int | str, purpose: str, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(_derived(seed, image_id, purpose))
