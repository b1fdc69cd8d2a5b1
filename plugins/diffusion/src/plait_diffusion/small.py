"""The small model that needs no download: a U-Net in pixel space for 16×16 images, and a ControlNet for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plait_diffusion.backbone import Backbone
from plait_diffusion.class_tokens import ClassTokens
from plait_diffusion.loading import default_scheduler

TOKEN_LENGTH = 32


def small_backbone(names: Sequence[str], seed: int) -> Backbone:
    """A fresh 0.87 M-parameter ``UNet2DConditionModel`` with a frozen random token for every class.

    Args:
        names: of the classes; prompt ``""`` stands for none.
        seed: of weights and tokens; the global generators are left alone.
    """
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32, 48),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=4,
            cross_attention_dim=TOKEN_LENGTH,
            norm_num_groups=8,
        )
    tokens = ClassTokens.drawn(names, TOKEN_LENGTH, torch.Generator().manual_seed(seed))
    parts = {"unet": unet, "scheduler": default_scheduler("UNet2DConditionModel"), "class_tokens": tokens}
    return Backbone(parts, name="small-digits")


def small_controlnet(unet: Any, seed: int) -> Any:
    """A ControlNet of a U-Net in pixel space: its condition encoder keeps the size."""
    from diffusers import ControlNetModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16,), conditioning_channels=1)


def gradient_magnitude(images: Tensor) -> Tensor:
    """Outlines ``[B, 1, H, W]`` in [0, 1] of images ``[B, 3, H, W]`` in [0, 1]: what the small ControlNet is shown."""
    grey = F.pad(images.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]) / 2
    down = (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]) / 2
    return ((across**2 + down**2).sqrt() * 2**0.5).clamp(0, 1)
