"""What SemiDDM-Weather is compared with that has another network; the other baselines are rules of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait_semiddm_weather.diffusion import Random, normal
from plait_semiddm_weather.tiling import tile_starts

PATCH_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
}


def wavelet_regression(network: nn.Module, condition: Tensor) -> Tensor:
    """``ŝ_0 = G(c)``: one evaluation of the generator, with no noise, no step and no latent."""
    batch = len(condition)
    latent = condition.new_zeros(batch, network.latent_dim)
    return network(None, condition, torch.zeros(batch, dtype=torch.long, device=condition.device), latent)


def patch_network(base_channels: int, channel_mult: Sequence[int], layers_per_block: int) -> nn.Module:
    """A U-Net that predicts the noise in the clean image from ``[y_t, x]`` (WeatherDiff, TPAMI 2023)."""
    from diffusers import UNet2DModel

    widths = tuple(base_channels * mult for mult in channel_mult)
    return UNet2DModel(
        in_channels=6,
        out_channels=3,
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        norm_num_groups=min(base_channels // 4, 32),
        attention_head_dim=min(8, base_channels),
    )


def patch_ddim_loss(network: nn.Module, degraded: Tensor, clean: Tensor, random: torch.Generator) -> Tensor:
    """``‖ε − ε_θ(y_t, x, t)‖²`` with t uniform over 1,000 steps; images in [0, 1], the network's in [−1, 1]."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**PATCH_BETAS)
    noise = normal(clean.shape, random, clean)
    t = torch.randint(1000, (len(clean),), generator=random).to(clean.device)
    noisy = scheduler.add_noise(2 * clean - 1, noise, t)
    return F.mse_loss(network(torch.cat([noisy, 2 * degraded - 1], dim=1), t).sample, noise)


def patch_ddim(
    network: nn.Module, degraded: Tensor, random: Random, patch: int, num_steps: int = 25, stride: int | None = None
) -> Tensor:
    """Deterministic DDIM whose noise estimates are averaged over all overlapping patches before every update.

    Args:
        degraded: ``[B, 3, H, W]`` in [0, 1].
        patch: side of a patch; ``stride`` (a quarter of it) lies between neighbours.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**PATCH_BETAS)
    scheduler.set_timesteps(num_steps)
    x, state = 2 * degraded - 1, normal(degraded.shape, random, degraded)
    for t in scheduler.timesteps:
        noise = _averaged(network, torch.cat([state, x], dim=1), t, patch, stride or max(1, patch // 4))
        state = scheduler.step(noise, t, state, eta=0.0).prev_sample
    return (state + 1) / 2


def _averaged(network: nn.Module, inputs: Tensor, t: Tensor, patch: int, stride: int) -> Tensor:
    height, width = inputs.shape[-2:]
    tall, wide = min(patch, height), min(patch, width)
    total, count = torch.zeros_like(inputs[:, :3]), inputs.new_zeros(height, width)
    for top in tile_starts(height, patch, stride):
        for left in tile_starts(width, patch, stride):
            here = (..., slice(top, top + tall), slice(left, left + wide))
            total[here] += network(inputs[here], t).sample
            count[here] += 1
    return total / count
