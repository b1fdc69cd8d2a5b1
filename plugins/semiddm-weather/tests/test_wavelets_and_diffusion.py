"""Sub-bands against PyWavelets, the schedule against its table and diffusers."""

import numpy as np
import pytest
import pywt
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_semiddm_weather.diffusion import Diffusion, timestep_embedding
from plait_semiddm_weather.wavelets import SubBands


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_one_block_by_hand():
    block = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    assert SubBands()(block).flatten().tolist() == [5, -2, -1, 0]
    assert SubBands(order="generator")(block).flatten().tolist() == [5, -1, -2, 0]


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "sym4", "bior2.2", "rbio1.3"])
def test_equals_pywavelets_and_inverts(wavelet):
    image = torch.rand(2, 3, 16, 20, generator=generator())
    bands = SubBands(wavelet)
    found = bands(image)
    low, details = pywt.dwt2(image.numpy(), wavelet, mode="periodization", axes=(-2, -1))
    assert np.abs(found.numpy() - np.concatenate([low, *details], axis=1)).max() < 2e-6
    assert torch.allclose(bands.inverse(found), image, atol=1e-5)
    swapped = SubBands(wavelet, "generator")
    assert torch.equal(swapped(image).unflatten(1, (4, 3))[:, [0, 2, 1, 3]].flatten(1, 2), found)
    assert torch.allclose(swapped.inverse(swapped(image)), image, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), channels=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_the_transform_keeps_energy_and_its_adjoint_is_its_inverse(height, width, channels, seed):
    image = torch.rand(1, channels, 2 * height, 2 * width, generator=generator(seed), requires_grad=True)
    bands = SubBands()
    found = bands(image)
    assert torch.allclose(found.square().sum(), image.square().sum(), rtol=1e-5)
    weights = torch.randn(found.shape, generator=generator(seed + 1))
    (found * weights).sum().backward()
    assert torch.allclose(image.grad, bands.inverse(weights), atol=1e-5)


def test_what_cannot_be_transformed_is_refused():
    with pytest.raises(ValueError, match="5×4 pixels; the transform needs even sides"):
        SubBands()(torch.rand(1, 3, 5, 4))
    with pytest.raises(ValueError, match="db8 needs sides of at least 7"):
        SubBands("db8")(torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match="wavelet is 'morlet'"):
        SubBands("morlet")


def test_the_schedule_of_four_steps():
    schedule = Diffusion(4)
    table = {
        "beta": [1e-8, 0.4782553, 0.8492060, 0.9564177, 0.9874039],
        "a": [1, 0.7223190, 0.3883220, 0.2087638, 0.1122322],
        "sigma": [1e-4, 0.6915600, 0.9215237, 0.9779661, 0.9936820],
        "A": [1, 0.7223190, 0.2804924, 0.0585566, 0.0065719],
        "S": [0, 0.6915600, 0.9598563, 0.9982841, 0.9999784],
        "m1": [1, 0.6657785, 0.2691908, 0.0578216],
        "m2": [0, 0.2015763, 0.1930009, 0.1118522],
        "variance": [0, 0.4408191, 0.8842024, 0.9840608],
    }
    for name, values in table.items():
        assert torch.allclose(getattr(schedule, name), torch.tensor(values), atol=1e-6), name
    assert torch.allclose(schedule.A**2 + schedule.S**2, torch.ones(5), atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_the_posterior_is_that_of_diffusers(num_steps):
    schedule = Diffusion(num_steps)
    clean, noisier = (torch.randn(2, 3, 4, 4, generator=generator(n)) for n in (1, 2))
    scheduler = schedule.scheduler()
    assert isinstance(scheduler, DDPMScheduler)
    for t in range(num_steps):
        ours = schedule.posterior(clean, noisier, torch.tensor([t, t]), generator(7))
        theirs = scheduler.step(clean, t, noisier, generator=generator(7)).prev_sample
        assert torch.allclose(ours, theirs, atol=2e-6)
    assert torch.equal(schedule.posterior(clean, noisier, torch.tensor([0, 0]), generator(7)), clean)


def test_each_image_of_a_pair_has_its_own_step():
    schedule, clean = Diffusion(4), torch.rand(2, 3, 2, 2, generator=generator())
    less, noisier = schedule.pair(clean, torch.tensor([0, 3]), generator(1))
    assert torch.equal(less[0], clean[0])
    draw = generator(1)
    step_noise, noise = (torch.randn(clean.shape, generator=draw) for _ in range(2))  # ε_s comes first
    assert torch.allclose(less[1], schedule.A[3] * clean[1] + schedule.S[3] * noise[1])
    assert torch.allclose(noisier[0], schedule.a[1] * clean[0] + schedule.sigma[1] * step_noise[0])


def test_a_generator_that_knows_the_truth_is_not_disturbed_by_noise():
    truth = torch.rand(2, 12, 4, 4, generator=generator())
    for seed in range(3):
        found = Diffusion(4).sample(lambda state, t, z: truth, (2, 12, 4, 4), 5, generator(seed), truth)
        assert torch.equal(found, truth)


def test_steps_are_told_from_noisy_to_clean_with_fresh_latents():
    told = []

    def predict(state, t, latent):
        told.append((t.tolist(), latent))
        return torch.zeros_like(state)

    Diffusion(3).sample(predict, (2, 1, 2, 2), 4, generator(), torch.zeros(1))
    assert [t for t, _ in told] == [[2, 2], [1, 1], [0, 0]]
    assert not torch.equal(told[0][1], told[1][1])


def test_the_embedding_of_time_is_that_of_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.arange(4)
    theirs = get_timestep_embedding(t, 16, flip_sin_to_cos=False, downscale_freq_shift=1)
    assert torch.allclose(timestep_embedding(t, 16), theirs, atol=1e-6)


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="num_train_timesteps is 0"):
        Diffusion(0)
    with pytest.raises(ValueError, match="0 < beta_min < beta_max"):
        Diffusion(4, 2.0, 1.0)
