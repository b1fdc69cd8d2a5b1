"""Tiny models, made once."""

import functools

import pytest
import torch
from diffusers import ControlNetModel
from plait_diffusion.toy_models import tiny_backbone


@pytest.fixture(scope="session")
def tiny():
    """Kind → its tiny backbone; not to be changed."""
    return functools.cache(tiny_backbone)


@functools.cache
def _controlnet(kind: str, scale: float):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ControlNetModel.from_unet(tiny_backbone(kind).denoiser).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.startswith(
                ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
            ):
                parameter.data.normal_(0, scale) if scale else None
    return model


@pytest.fixture(scope="session")
def controlnet():
    """(kind, spread of its last convolutions; 0: fresh) → its ControlNet."""
    return _controlnet
