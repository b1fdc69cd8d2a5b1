import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from plait_sa_aet.baselines import co_attack_images, kl, pgd_images
from plait_sa_aet.randomness import PerImage, ReleasedStreams
from plait_sa_aet.source import Source
from torch import nn


class Encoder(nn.Module):
    image_size = 8

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tower = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 10))
            self.words = nn.Parameter(torch.randn(16, 10))

    def encode_image(self, images):
        return self.tower(images) * 4

    def encode_text(self, texts):
        return torch.stack([self.words[len(text)] for text in texts])


CAPTIONS, OWNERS = ["a", "bb", "ccc", "dddd", "eeeee"], torch.tensor([1, 0, 2, 0, 1])


def images(count=3):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def divergence(p, q):
    """KL by its definition."""
    p, q = p.softmax(-1), q.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def plain_loop(model, v, rng, epsilon, num_steps, loss):
    x = (v + rng.init(v.shape, 0, epsilon)).clamp(0, 1)
    for _ in range(num_steps):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(model.encode_image(x)).mean(), x)
        x = x.detach() + 1.25 * epsilon / num_steps * slope.sign()
        x = torch.min(torch.max(x, v - epsilon), v + epsilon).clamp(0, 1)
    return x


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_pgd_equals_the_plain_loop(micro_batch):
    model, v = Encoder(), images()
    clean = model.encode_image(v).detach()
    expected = plain_loop(model, v, ReleasedStreams(0), 8 / 255, 10, lambda e: divergence(clean, e))
    found = pgd_images(Source(model), v, ReleasedStreams(0), micro_batch=micro_batch)
    assert (found == expected).float().mean() >= 0.999


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_co_attack_keeps_the_image_of_the_last_caption(micro_batch):
    model, v = Encoder(), images()
    clean = model.encode_image(v).detach()
    last = F.normalize(model.words[[4, 5, 3]].detach(), dim=-1)  # dddd, eeeee, ccc

    def loss(e):
        return divergence(clean, e) + 3 * divergence(last, F.normalize(e, dim=-1))

    expected = plain_loop(model, v, ReleasedStreams(0), 0.05, 5, loss)
    source, options = Source(model), {"epsilon": 0.05, "num_steps": 5, "micro_batch": micro_batch}
    found = co_attack_images(source, v, CAPTIONS, OWNERS, ReleasedStreams(0), **options)
    assert (found == expected).float().mean() >= 0.999
    assert (source.num_forwards, source.num_backwards) == (3 + 5 * 3, 5 * 3)
    without = co_attack_images(Source(model), v, CAPTIONS, OWNERS, ReleasedStreams(0), text_weight=0.0, **options)
    assert (without == pgd_images(Source(model), v, ReleasedStreams(0), **options)).all()


def test_divergence_by_hand():
    half, quarter = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]).log()
    assert kl(half, quarter).item() == pytest.approx(0.5 * (torch.tensor(2.0).log() + torch.tensor(2 / 3).log()).item())
    assert kl(quarter, quarter + 5).item() == pytest.approx(0, abs=1e-6)


def test_moves_the_embedding_away():
    source, v = Source(Encoder()), images()
    with torch.no_grad():
        clean = source.raw_image_features(v)
        start = (v + PerImage(0, range(3)).init(v.shape, 0, 8 / 255)).clamp(0, 1)
        before = kl(clean, source.raw_image_features(start))
        after = kl(clean, source.raw_image_features(pgd_images(source, v, PerImage(0, range(3)))))
    assert (after > 10 * before).all()


@pytest.mark.slow
@given(epsilon=st.floats(0, 0.3), num_steps=st.integers(1, 4))
def test_stays_in_the_ball_and_in_range(epsilon, num_steps):
    v, source = images(), Source(Encoder())
    rng = PerImage(0, range(3))
    for x in (
        pgd_images(source, v, rng, epsilon=epsilon, num_steps=num_steps),
        co_attack_images(source, v, CAPTIONS, OWNERS, rng, epsilon=epsilon, num_steps=num_steps),
    ):
        assert (x - v).abs().max() <= epsilon + 1e-6
        assert x.min() >= 0
        assert x.max() <= 1
        assert epsilon > 0 or torch.equal(x, v)


def test_the_start_is_one_sided():
    v = torch.full((1, 3, 64, 64), 0.5)

    class Flat(nn.Module):  # no gradient, so the start stays
        def encode_image(self, images):
            return images.flatten(1)[:, :2] * 0

    moved = pgd_images(Source(Flat()), v, PerImage(0, [0]), epsilon=0.1, num_steps=1) - v
    assert moved.min() >= 0
    assert moved.mean().item() == pytest.approx(0.05, abs=0.002)


def test_batches_do_not_matter():
    v, source = images(), Source(Encoder())
    together = pgd_images(source, v, PerImage(0, "abc"))
    alone = torch.cat([pgd_images(source, v[i : i + 1], PerImage(0, "abc"[i])) for i in range(3)])
    assert (alone == together).float().mean() >= 0.999


def test_the_model_is_as_before():
    model = Encoder().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    co_attack_images(Source(model), images(), CAPTIONS, OWNERS, PerImage(0, range(3)), num_steps=2)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{"epsilon": -0.1}, {"epsilon": 2.0}, {"num_steps": 0}, {"micro_batch": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        pgd_images(Source(Encoder()), images(), PerImage(0, range(3)), **options)


def test_captions_have_to_fit_the_images():
    source, v, rng = Source(Encoder()), images(), PerImage(0, range(3))
    for owners in ([0, 1, 2, 0, 3], [0, 1, 1, 1, 1], [-1, 0, 1, 2, 2]):
        with pytest.raises(ValueError, match="it has to name each of 0 to 2"):
            co_attack_images(source, v, CAPTIONS, owners, rng)
    with pytest.raises(ValueError, match="4 images for 5 captions"):
        co_attack_images(source, v, CAPTIONS, [0, 1, 2, 0], rng)
    with pytest.raises(ValueError, match="image 0"):
        pgd_images(source, v + 1, rng)
    with pytest.raises(ValueError, match="image 0"):
        co_attack_images(source, v * float("nan"), CAPTIONS, OWNERS, rng)
