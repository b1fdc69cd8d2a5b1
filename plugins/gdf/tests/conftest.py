"""Small models of every shape, made once."""

import functools

import pytest
import torch
from plait_diffusion.toy_models import tiny_backbone


@pytest.fixture(scope="session")
def tiny():
    """Kind → its tiny backbone; not to be changed."""
    return functools.cache(tiny_backbone)


@pytest.fixture(scope="session")
def images():
    """Three images ``[3, 3, 64, 64]`` in [0, 1]."""
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
