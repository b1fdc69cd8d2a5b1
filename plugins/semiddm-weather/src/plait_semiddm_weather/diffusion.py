"""A diffusion of few, large steps: schedule, noisy pairs, posterior, sampling (Xiao et al., DDGAN, ICLR 2022).

``t`` in {0, …, T − 1} is what the networks are told; ``x_t`` is the less and ``x_{t+1}`` the more noisy state of a pair.
Random numbers come from a generator on the CPU, or from a list with one generator an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

# Planning a pipeline reads fields alone, and diffusers takes longer to import than all else together.
if TYPE_CHECKING:
    from diffusers import DDPMScheduler

Random: TypeAlias = torch.Generator | list[torch.Generator]


def betas(num_steps: int, beta_min: float, beta_max: float) -> Tensor:
    """β_0, …, β_T in float64: ``β_i = 1 − ᾱ(τ_i) / ᾱ(τ_{i−1})``, ``τ_i`` evenly from 0.001 to 1, ``β_0 = 1e-8``."""
    tau = 1e-3 + (1 - 1e-3) * torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    log_alpha = -0.5 * tau**2 * (beta_max - beta_min) - tau * beta_min
    return torch.cat([torch.tensor([1e-8], dtype=torch.float64), 1 - (log_alpha[1:] - log_alpha[:-1]).exp()])


def normal(shape: tuple[int, ...] | torch.Size, random: Random, like: Tensor) -> Tensor:
    """Standard normal numbers of ``shape`` on the device of ``like``, the same on every device."""
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(shape, generator=random, device=like.device, dtype=torch.float32)


class Diffusion:
    """The schedule of T steps and what is computed with it.

    Attributes:
        beta, a, sigma, A, S: float32 ``[T + 1]``: ``a_i = √(1 − β_i)``, ``σ_i = √β_i``, ``A_i = Π a_j``, ``S_i = √(1 − A_i²)``.
        m1, m2, variance: float32 ``[T]``, the posterior's.
    """

    def __init__(self, num_train_timesteps: int = 4, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {num_train_timesteps}; allowed is 1 or more")
        if not 0 < beta_min < beta_max:
            raise ValueError(f"beta_min is {beta_min} and beta_max {beta_max}; allowed is 0 < beta_min < beta_max")
        self.num_steps = num_train_timesteps
        self.beta = betas(num_train_timesteps, beta_min, beta_max).float()
        self.a, self.sigma = (1 - self.beta).sqrt(), self.beta.sqrt()
        self.A = self.a.double().cumprod(0).float()
        self.S = (1 - self.a.double().cumprod(0).square()).clamp_min(0).sqrt().float()
        self.S[0], self.A[0] = 0, 1  # β_0 is there for the pairs of the schedule only
        beta = self.beta[1:].double()
        product = (1 - beta).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), product[:-1]])
        self.m1 = (beta * before.sqrt() / (1 - product)).float()
        self.m2 = ((1 - before) * (1 - beta).sqrt() / (1 - product)).float()
        self.variance = (beta * (1 - before) / (1 - product)).float()

    def scheduler(self) -> DDPMScheduler:
        """The same schedule as diffusers' sampler."""
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(
            num_train_timesteps=self.num_steps,
            trained_betas=self.beta[1:].tolist(),
            prediction_type="sample",
            clip_sample=False,
            variance_type="fixed_small",
            timestep_spacing="leading",
        )
        scheduler.set_timesteps(self.num_steps)
        return scheduler

    def pair(self, clean: Tensor, t: Tensor, random: Random) -> tuple[Tensor, Tensor]:
        """``x_t = A_t s_0 + S_t ε_q`` and ``x_{t+1} = a_{t+1} x_t + σ_{t+1} ε_s`` (ε_s is drawn first); t is ``[B]``."""
        step_noise, noise = (normal(clean.shape, random, clean) for _ in range(2))
        less = _at(self.A, t, clean) * clean + _at(self.S, t, clean) * noise
        return less, _at(self.a, t + 1, clean) * less + _at(self.sigma, t + 1, clean) * step_noise

    def posterior(self, predicted: Tensor, noisier: Tensor, t: Tensor, random: Random) -> Tensor:
        """A draw of ``x_t`` given ``ŝ_0`` and ``x_{t+1}``, each image at a ``t`` of its own; at t = 0 it is ``ŝ_0``.

        diffusers' scheduler, which samples, takes one t for all images; this is the same formula for training.
        """
        noise = normal(predicted.shape, random, predicted)
        mean = _at(self.m1, t, predicted) * predicted + _at(self.m2, t, predicted) * noisier
        return mean + _at(self.variance.sqrt(), t, predicted) * noise

    def sample(
        self,
        predict: Callable[[Tensor, Tensor, Tensor], Tensor],
        shape: tuple[int, ...],
        latent_dim: int,
        random: Random,
        like: Tensor,
    ) -> Tensor:
        """From noise to ``s_0`` in T steps; gradients flow where they are enabled.

        Args:
            predict: ``(x_{t+1}, t [B], z [B, latent_dim]) → ŝ_0``; z is fresh in every step.
            shape: of ``s_0``, ``[B, C, h, w]``.
        """
        scheduler: Any = self.scheduler()
        state = normal(shape, random, like)
        for t in scheduler.timesteps.tolist():
            latent = normal((shape[0], latent_dim), random, like)
            steps = torch.full((shape[0],), t, device=like.device)
            state = scheduler.step(predict(state, steps, latent), t, state, generator=random).prev_sample
        return state


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """``[sin(t f), cos(t f)]`` with ``f_j = exp(−j ln 1e4 / (dim/2 − 1))``; ``[B] → [B, dim]``."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * -(math.log(1e4) / (half - 1)))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return table.to(like.device)[t].view(-1, 1, 1, 1)
