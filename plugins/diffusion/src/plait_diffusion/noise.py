"""How much noise a backbone is shown, and which timestep its network is told: rules from a nominal timestep."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import attrs
import torch

TimestepRule = Literal["schedule_index", "exact", "snr"]

# Of Stable Diffusion: scaled_linear from 0.00085 to 0.012 in 1000 steps. "snr" matches its noise at the nominal timestep.
SD_BETAS = (0.00085, 0.012)


@attrs.frozen
class NoiseLevel:
    """What a network is shown: ``sample = signal · z0 + noise · eps`` at ``timestep`` (as the network is told it)."""

    timestep: float
    signal: float
    noise: float


def cumulative_alphas(num_steps: int = 1000, betas: tuple[float, float] = SD_BETAS) -> torch.Tensor:
    """abar of Stable Diffusion's schedule, float64 ``[num_steps]``; abar_50 is 0.951577."""
    return torch.cumprod(1 - torch.linspace(betas[0] ** 0.5, betas[1] ** 0.5, num_steps, dtype=torch.float64) ** 2, 0)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler belongs to a flow-matching model: ``(1 − σ) z0 + σ eps``."""
    return hasattr(scheduler, "scale_noise") and not hasattr(scheduler, "alphas_cumprod")


def is_edm(scheduler: Any) -> bool:
    """Whether a scheduler is of Karras et al.'s EDM parametrisation (Playground v2.5)."""
    return hasattr(scheduler.config, "sigma_data")


def default_rule(scheduler: Any) -> TimestepRule:
    """``schedule_index`` for variance-preserving schedules, ``snr`` for flow and EDM."""
    return "snr" if is_flow(scheduler) or is_edm(scheduler) else "schedule_index"


def noise_level(scheduler: Any, timestep: int, rule: TimestepRule | None = None) -> NoiseLevel:
    """What a nominal timestep means for a scheduler.

    ``schedule_index``: the entry of a schedule of all training steps that an image-to-image pipeline would start from:
    nominal 50 is network timestep 51 with PNDM and offset 1, 50 with Euler and DDIM of offset 1, 49
    with linspace or trailing spacing. ``exact``: the timestep itself, 0 for the clean image. ``snr``: the level whose
    noise-to-signal ratio is that of Stable Diffusion at the nominal timestep, 0.2256 at 50.

    Raises:
        ValueError: the timestep is outside the schedule; the rule does not fit the scheduler.
    """
    rule = rule or default_rule(scheduler)
    total = int(scheduler.config.num_train_timesteps)
    lowest = 0 if rule == "exact" else 1
    if not lowest <= timestep < total:
        raise ValueError(f"timestep is {timestep}; with timestep_rule {rule} allowed is {lowest} to {total - 1}")
    if rule == "exact" and timestep == 0:
        return clean_level(scheduler)
    if is_edm(scheduler):
        return _edm_level(scheduler, timestep, rule)
    if is_flow(scheduler):
        return _flow_level(scheduler, timestep, rule, total)
    if rule == "schedule_index":
        return _level_of_index(scheduler, timestep, total)
    abar = scheduler.alphas_cumprod.double()
    if rule == "snr":
        wanted = _sd_ratio(timestep)
        at = int(((1 / abar - 1).sqrt() - wanted).abs().argmin())
    else:
        at = timestep
    return NoiseLevel(float(at), float(abar[at]) ** 0.5, (1 - float(abar[at])) ** 0.5)


def clean_level(scheduler: Any) -> NoiseLevel:
    """No noise at all, and the smallest timestep that the model has seen (the reference at t = 0)."""
    if is_edm(scheduler):
        sigma = float(scheduler.config.sigma_min)
        return NoiseLevel(0.25 * math.log(sigma), 1 / float(scheduler.config.sigma_data), 0.0)
    return NoiseLevel(0.0, 1.0, 0.0)


def _sd_ratio(timestep: int) -> float:
    """sqrt((1 − abar) / abar) of Stable Diffusion."""
    abar = float(cumulative_alphas()[min(timestep, 999)])
    return ((1 - abar) / abar) ** 0.5


def _level_of_index(scheduler: Any, timestep: int, total: int) -> NoiseLevel:
    schedule = copy.deepcopy(scheduler)
    try:
        schedule.set_timesteps(total)
    except ValueError as error:
        raise ValueError(
            f"timestep_rule is schedule_index, and a {type(scheduler).__name__} has no schedule of all {total} steps ({error}); "
            "use exact or snr"
        ) from error
    at = schedule.timesteps[max(total - timestep, 0) * getattr(schedule, "order", 1)]
    network = float(at)
    # What the scheduler's own add_noise and scale_model_input do to an image and to noise of 1.
    one, zero, when = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), at.reshape(1)
    shown = []
    for image, noise in ((one, zero), (zero, one)):
        noised = schedule.add_noise(image, noise, when)
        stepped = copy.deepcopy(schedule)  # scale_model_input moves some schedulers on
        shown.append(float(stepped.scale_model_input(noised, at)))
    return NoiseLevel(network, shown[0], shown[1])


def _flow_level(scheduler: Any, timestep: int, rule: TimestepRule, total: int) -> NoiseLevel:
    if rule == "snr":
        ratio = _sd_ratio(timestep)
        sigma = ratio / (1 + ratio)
    elif rule == "exact":
        sigma = timestep / total
    else:
        raise ValueError("timestep_rule is schedule_index, which a flow-matching model does not have; use snr or exact")
    return NoiseLevel(sigma * total, 1 - sigma, sigma)


def _edm_level(scheduler: Any, timestep: int, rule: TimestepRule) -> NoiseLevel:
    if rule != "snr":
        raise ValueError(f"timestep_rule is {rule}, which means next to no noise in an EDM model; use snr")
    data = float(scheduler.config.sigma_data)
    sigma = _sd_ratio(timestep) * data
    scale = (sigma**2 + data**2) ** -0.5
    return NoiseLevel(0.25 * math.log(sigma), scale, sigma * scale)
