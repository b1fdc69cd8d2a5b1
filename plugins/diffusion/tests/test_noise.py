"""Timestep rules: what each scheduler makes of a nominal timestep."""

import diffusers
import pytest
import torch
from plait_diffusion.noise import clean_level, cumulative_alphas, default_rule, noise_level

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_the_schedule_of_stable_diffusion():
    alphas = cumulative_alphas()
    assert float(alphas[50]) == pytest.approx(0.951577, abs=1e-6)
    assert float(alphas[51]) == pytest.approx(0.950524, abs=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "network"),
    [
        (diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1), 51),
        (diffusers.EulerDiscreteScheduler(**SD, steps_offset=1, timestep_spacing="leading"), 50),
        (diffusers.DDIMScheduler(**SD, steps_offset=1), 50),
        (diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="linspace"), 49),
        (diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing"), 49),
    ],
    ids=["pndm", "euler-leading", "ddim", "euler-linspace", "euler-trailing"],
)
def test_nominal_50(scheduler, network):
    level = noise_level(scheduler, 50)
    assert level.timestep == network
    abar = float(cumulative_alphas()[network])
    assert level.signal == pytest.approx(abar**0.5, abs=1e-5)
    assert level.noise == pytest.approx((1 - abar) ** 0.5, abs=1e-5)


def test_the_formula_is_what_euler_does_in_two_steps():
    euler = diffusers.EulerDiscreteScheduler(**SD, steps_offset=1, timestep_spacing="leading")
    level = noise_level(euler, 50)
    latents, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    euler.set_timesteps(1000)
    at = euler.timesteps[950]
    theirs = euler.scale_model_input(euler.add_noise(latents, eps, at.reshape(1)), at)
    assert torch.allclose(level.signal * latents + level.noise * eps, theirs, atol=1e-5)


def test_the_scheduler_is_left_alone():
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    before = scheduler.timesteps.clone()
    noise_level(scheduler, 50)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.step_index is None


def test_flow_models_get_the_same_noise_to_signal_ratio():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert default_rule(flow) == "snr"
    level = noise_level(flow, 50)
    assert level.noise / level.signal == pytest.approx(0.2256, abs=1e-4)
    assert level.noise == pytest.approx(0.184, abs=1e-3)
    assert noise_level(flow, 100, "exact").noise == pytest.approx(0.1)
    with pytest.raises(ValueError, match="schedule_index"):
        noise_level(flow, 50, "schedule_index")


def test_edm_models_get_the_same_noise_to_signal_ratio():
    edm = diffusers.EDMEulerScheduler(sigma_data=0.5)
    level = noise_level(edm, 50)
    assert level.noise / level.signal == pytest.approx(0.2256 * 0.5, abs=1e-4)
    assert level.signal**2 * (0.5**2) + level.noise**2 == pytest.approx(1.0)  # what the network sees has variance 1
    with pytest.raises(ValueError, match="use snr"):
        noise_level(edm, 50, "schedule_index")


def test_snr_on_a_variance_preserving_schedule_is_the_timestep_itself_for_stable_diffusion():
    assert noise_level(diffusers.DDIMScheduler(**SD), 50, "snr").timestep == 50


@pytest.mark.parametrize(("timestep", "rule"), [(0, None), (1000, None), (-1, "exact"), (1000, "exact")])
def test_timesteps_outside_the_schedule(timestep, rule):
    with pytest.raises(ValueError, match=f"timestep is {timestep}; .* allowed is"):
        noise_level(diffusers.DDIMScheduler(**SD), timestep, rule)


def test_a_scheduler_of_few_steps():
    few = diffusers.LCMScheduler(**SD)
    with pytest.raises(ValueError, match="LCMScheduler has no schedule of all 1000 steps"):
        noise_level(few, 50)
    assert noise_level(few, 50, "exact").timestep == 50


def test_no_noise_at_all():
    for scheduler in (diffusers.DDIMScheduler(**SD), diffusers.FlowMatchEulerDiscreteScheduler()):
        assert clean_level(scheduler).noise == 0
        assert noise_level(scheduler, 0, "exact") == clean_level(scheduler)
