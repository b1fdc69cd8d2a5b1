"""Small real data and models for all tests of the kit."""

from __future__ import annotations

import copy

import plait
import pytest
import torch
from plait_clip.plugin.data import Digits
from plait_clip.plugin.models import OpenClip
from plait_clip.plugin.training import ClipContrastive


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path):
    """A run whose warnings and curves can be looked at."""
    messages: list[str] = []
    curves: list[tuple[int | None, dict[str, float]]] = []
    made = plait.Run(
        seed=0,
        step="step",
        folder=tmp_path / "run",
        on_warning=messages.append,
        on_log=lambda values, step: curves.append((step, values)),
    )
    return made, messages, curves


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return Digits().load_data(run=plait.Run(seed=0))


@pytest.fixture(scope="session")
def _trained(digits):
    run = plait.Run(seed=0, step="digits")
    model = OpenClip().load_model(data=None, run=run)
    method = ClipContrastive(num_epochs=9, batch_size=50, learning_rate=2e-3, warmup_steps=20)
    return method.optimize(model=model, data=digits["train"], run=run)


@pytest.fixture
def trained(_trained):
    """The tiny CLIP after 9 epochs on the digits."""
    return copy.deepcopy(_trained)


class KeptCheckpoint:
    """What a training keeps its state in, in memory, copied as a file would be."""

    def __init__(self):
        self.state = None

    def load(self):
        return copy.deepcopy(self.state)

    def save(self, state):
        self.state = copy.deepcopy(state)


@pytest.fixture
def checkpoint():
    return KeptCheckpoint()
