"""Generator and discriminator: sizes of the published networks, first values, exact parts."""

import math

import pytest
import torch
from plait_semiddm_weather.losses import discriminator_loss
from plait_semiddm_weather.networks import Discriminator, Generator, SmoothDown
from plait_semiddm_weather.settings import Architecture, preset


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def size_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


PUBLISHED = {
    "base_channels": 128,
    "channel_mult": (1, 2, 2, 2),
    "layers_per_block": 2,
    "attention_levels": (1,),
    "latent_dim": 100,
    "latent_embed_dim": 256,
    "mapping_layers": 4,
    "output": "tanh",
}


def test_sizes_of_the_published_and_the_small_networks():
    with torch.device("meta"):
        assert size_of(Generator(**PUBLISHED)) == 55_654_412
        assert size_of(Discriminator(base_channels=64, time_embed_dim=256)) == 12_743_937
    assert size_of(Generator()) == 299_068
    assert size_of(Discriminator()) == 212_449


def test_the_presets_are_these_networks():
    assert preset("small")[0] == Architecture()
    paper = preset("paper")[0]
    assert all(getattr(paper, name) == value for name, value in PUBLISHED.items())
    assert (paper.disc_base_channels, paper.disc_num_layers, paper.time_embed_dim) == (64, 4, 256)
    with pytest.raises(ValueError, match="preset is 'huge'"):
        preset("huge")


@pytest.mark.parametrize("output", ["residual", "tanh"])
def test_at_first_the_residual_head_gives_the_input_and_tanh_black(output):
    network = seeded(lambda: Generator(output=output))
    condition = torch.rand(2, 12, 8, 8)
    with torch.no_grad():
        found = network(torch.randn(2, 12, 8, 8), condition, torch.tensor([0, 3]), torch.randn(2, 32))
    expected = condition / 2 if output == "residual" else torch.zeros_like(condition)
    assert torch.allclose(found, expected, atol=1e-4)


def test_deep_networks_with_attention_take_any_size_that_is_a_multiple():
    network = seeded(
        lambda: Generator(base_channels=4, channel_mult=(1, 2, 2), layers_per_block=2, attention_levels=(1,))
    )
    assert network.multiple_of == 16
    for height, width in ((8, 8), (16, 24)):
        inputs = torch.rand(1, 12, height, width)
        assert network(inputs, inputs, torch.tensor([1]), torch.randn(1, 32)).shape == inputs.shape
    with pytest.raises(ValueError, match="20×16 pixels; sides have to be multiples of 16"):
        network(torch.rand(1, 12, 10, 8), torch.rand(1, 12, 10, 8), torch.tensor([1]), torch.randn(1, 32))


def test_images_of_a_batch_do_not_see_each_other():
    network = seeded(Generator).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02)  # away from a head of zeros
        inputs = [torch.rand(4, 12, 8, 8), torch.rand(4, 12, 8, 8), torch.tensor([0, 1, 2, 3]), torch.randn(4, 32)]
        order = torch.tensor([2, 0, 3, 1])
        permuted = network(*(part[order] for part in inputs))
        assert torch.allclose(permuted, network(*inputs)[order], atol=1e-5)
        assert torch.allclose(network(*(part[:1] for part in inputs)), network(*inputs)[:1], atol=1e-5)


def test_the_discriminator_knows_nothing_at_first():
    network = seeded(Discriminator)
    states = [torch.randn(8, 12, 32, 32) for _ in range(3)]
    t = torch.arange(8) % 4
    with torch.no_grad():
        real, fake = network(states[0], t, states[2]), network(states[1], t, states[2])
    assert discriminator_loss(real, fake).item() == pytest.approx(2 * math.log(2), abs=0.01)


@pytest.mark.slow
def test_the_discriminator_learns_what_is_easy():
    network, draw = seeded(Discriminator), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.9))
    t = torch.zeros(8, dtype=torch.long)
    for _ in range(25):
        real = torch.rand(8, 12, 16, 16, generator=draw) * 0.5
        fake = torch.rand(8, 12, 16, 16, generator=draw) * 0.5 + 0.2
        noisier = real + 0.7 * torch.randn(real.shape, generator=draw)
        logits = network(real, t, noisier), network(fake, t, noisier)
        optimizer.zero_grad()
        discriminator_loss(*logits).backward()
        optimizer.step()
    assert (logits[0] > 0).all()
    assert (logits[1] < 0).all()


def test_groups_of_four_in_the_discriminator():
    network = seeded(Discriminator)
    for batch in (1, 2, 3, 4, 8):
        assert network(*[torch.rand(batch, 12, 16, 16)], torch.zeros(batch), torch.rand(batch, 12, 16, 16)).shape == (
            batch,
        )
    with pytest.raises(ValueError, match=r"batch_size is 6; .* groups of 4"):
        network(torch.rand(6, 12, 16, 16), torch.zeros(6), torch.rand(6, 12, 16, 16))


def test_smooth_halving_keeps_a_constant_and_sums_to_one():
    down = SmoothDown()
    assert down.kernel.sum().item() == pytest.approx(1)
    assert torch.allclose(down(torch.full((1, 2, 12, 12), 0.7))[..., 1:-1, 1:-1], torch.tensor(0.7))


def test_a_discriminator_may_see_the_degraded_image():
    network = seeded(lambda: Discriminator(in_channels=36))
    parts = [torch.rand(2, 12, 16, 16) for _ in range(3)]
    assert network(parts[0], torch.tensor([0, 1]), parts[1], parts[2]).shape == (2,)


def test_impossible_networks_are_refused():
    with pytest.raises(ValueError, match="base_channels is 6"):
        Generator(base_channels=6)
    with pytest.raises(ValueError, match="attention_levels names level 2"):
        Generator(attention_levels=(2,))
    with pytest.raises(ValueError, match="num_layers of the discriminator is 2"):
        Discriminator(num_layers=2)
