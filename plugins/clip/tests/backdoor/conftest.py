"""A victim on the digits: a checkerboard in the corner makes every digit a seven."""

from __future__ import annotations

import copy

import plait
import pytest
from plait_clip.backdoor.plugin.attacks import BadNetFixed
from plait_clip.plugin.models import OpenClip
from plait_clip.plugin.training import ClipContrastive

TRIGGER = {"target": "seven", "patch_size": 2, "margin": 0, "first": 1, "templates": "digits"}


@pytest.fixture(scope="session")
def trigger():
    return BadNetFixed(**TRIGGER, n_poison=42)


@pytest.fixture(scope="session")
def dirty(digits, trigger):
    return trigger.attack(model=None, data=digits["train"], run=plait.Run(seed=0))


@pytest.fixture(scope="session")
def _victim(dirty):
    model = OpenClip().load_model(data=None, run=plait.Run(seed=0))
    method = ClipContrastive(num_epochs=30, batch_size=100, learning_rate=2e-3, warmup_steps=20)
    return method.optimize(model=model, data=dirty, run=plait.Run(seed=0))


@pytest.fixture
def victim(_victim):
    return copy.deepcopy(_victim)


@pytest.fixture(scope="session")
def small(digits):
    """200 digits and their captions."""
    return digits["train"].select(range(200))


@pytest.fixture(scope="session")
def clean_model(_trained):
    """The tiny CLIP trained on clean digits; not to be modified."""
    return _trained
