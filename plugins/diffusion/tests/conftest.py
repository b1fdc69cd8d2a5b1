"""Small models of every shape, made once."""

import functools

import pytest
from plait_diffusion.toy_models import tiny_backbone


@pytest.fixture(scope="session")
def tiny():
    """Kind → its tiny backbone; not to be changed."""
    return functools.cache(tiny_backbone)
