import random
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_sa_aet.choices import Triangle
from plait_sa_aet.images import quantize
from plait_sa_aet.randomness import PerImage, ReleasedStreams
from plait_sa_aet.sa_aet import caption_targets, evolve_images, semantic_projection, sub
from plait_sa_aet.source import Source
from plait_sa_aet.views import ScaledViews
from torch import nn

SIDE, WIDTH = 16, 24


class SmallViT(nn.Module):
    """Patches of 4, two layers; random weights of a fixed seed."""

    image_size = SIDE

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.patches = nn.Conv2d(3, 32, 4, 4)
            self.positions = nn.Parameter(torch.randn(16, 32) * 0.3)
            layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(32, WIDTH)

    def encode_image(self, images):
        x = self.patches((images - 0.5) / 0.25).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.layers(x).mean(dim=1))


class Flatten(nn.Module):
    def encode_image(self, images):
        return images.flatten(1)


class WithoutNormalising(Source):
    def image_features(self, images):
        return self.raw_image_features(images)


@pytest.fixture(scope="module")
def model():
    return SmallViT().eval()


@pytest.fixture(scope="module")
def corpus():
    generator = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(60, WIDTH, generator=generator) + 1, dim=-1)


def scene(count=4, seed=0):
    """Images, features of two captions each, and their owners."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, SIDE, SIDE, generator=generator)
    texts = F.normalize(torch.randn(2 * count, WIDTH, generator=generator) + 1, dim=-1)
    return images, texts, torch.arange(count).repeat_interleave(2)


def targets_of(corpus, count=4, seed=0):
    _, texts, owners = scene(count, seed)
    return caption_targets(texts, owners, count, semantic_projection(corpus))


def one_after_the_other(
    model, v, texts, owners, P, rng, *, epsilon, step_size, num_steps, num_samples, project, per_image=False
):
    """The attack as a plain loop: one mixture, one view at a time; returns v_T, v_{T−1} and the losses in order."""
    order = []

    def loss(x):
        f = F.normalize(model.encode_image(x), dim=-1)
        terms = torch.stack([sum(-(f[i] @ (P @ g)) for g in texts[owners == i]) for i in range(len(x))])
        order.append(terms.mean().item())
        return terms

    def clip(x):
        return torch.min(torch.max(x, v - epsilon), v + epsilon).clamp(0, 1)

    def rescaled(x, scale):
        size = int(scale * x.shape[2]), int(scale * x.shape[3])
        x = x + rng.noise(x.shape, 0.05)
        x = F.interpolate(x, size, mode="bicubic", align_corners=False).clamp(0, 1)
        return F.interpolate(x, v.shape[2:], mode="bicubic", align_corners=False)

    x, h = (v + rng.init(v.shape, -epsilon, epsilon)).clamp(0, 1), None
    for _ in range(num_steps):
        z = x
        if h is not None:
            triples = [rng.triple(sub, len(v) if per_image else 1)[:, :, None, None, None] for _ in range(num_samples)]
            mixtures, values = [], []
            for triple in triples:
                a, b, c = triple.unbind(1)
                m = (a * x + b * v + c * h).requires_grad_()
                (slope,) = torch.autograd.grad(loss(m).mean(), m)
                y = x + step_size * slope.sign()
                mixtures.append(m.detach())
                values.append(loss(clip(y) if project else y).detach())
            if per_image:
                best = [max(range(num_samples), key=lambda k: values[k][i].item()) for i in range(len(v))]
            else:
                best = [max(range(num_samples), key=lambda k: values[k].mean().item())] * len(v)
            z = torch.stack([mixtures[k][i] for i, k in enumerate(best)])
        z = z.clone().requires_grad_()
        total = loss(z).mean() + sum(loss(rescaled(z, scale)).mean() for scale in (0.5, 0.75, 1.25, 1.5))
        (slope,) = torch.autograd.grad(total, z)
        x, h = clip(x + step_size * slope.sign()), x
    return x, h, order


def losses_in_order(trace):
    for step in trace:
        for pair in zip(step["mixture_losses"], step["candidate_losses"], strict=True):
            yield from pair
        yield from step["view_losses"]


def share_equal(a, b):
    return (a == b).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    "make_rng", [lambda: PerImage(7, range(4)), lambda: ReleasedStreams(7)], ids=["per image", "released"]
)
@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("selection", ["batch", "image"])
def test_equals_the_plain_loop(model, corpus, make_rng, project, selection):
    v, texts, owners = scene()
    P = semantic_projection(corpus)
    settings = {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 10, "num_samples": 5}
    expected, previous, order = one_after_the_other(
        model,
        v,
        texts,
        owners,
        P.matrix().float(),
        make_rng(),
        project=project,
        per_image=selection == "image",
        **settings,
    )
    G = caption_targets(texts, owners, 4, P)
    result = evolve_images(Source(model), v, G, make_rng(), project_candidates=project, selection=selection, **settings)
    assert share_equal(result.images, expected) >= 0.999
    assert share_equal(result.previous_images, previous) >= 0.999
    assert len(order) == 5 + 9 * (2 * 5 + 5)
    losses = list(losses_in_order(result.trace))
    # The plain loop takes mixture, candidate, mixture, candidate …, then five views.
    np.testing.assert_allclose(losses, order, atol=2e-4)
    np.testing.assert_allclose(losses[: 5 + 10], order[: 5 + 10], atol=2e-6)


@settings(max_examples=25)
@given(
    epsilon=st.floats(0, 0.3),
    step_size=st.floats(1e-3, 0.5),
    num_steps=st.integers(1, 3),
    num_samples=st.integers(1, 3),
    triangle=st.sampled_from(get_args(Triangle)),
    selection=st.sampled_from(["batch", "image"]),
    random_start=st.booleans(),
    project_candidates=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_stays_in_the_ball_and_in_range(seed, epsilon, **options):
    v = scene(2, seed)[0]
    G = F.normalize(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)
    result = evolve_images(Source(SmallViT().eval()), v, G, PerImage(seed, [0, 1]), epsilon=epsilon, **options)
    for x in (result.images, result.previous_images):
        assert x.dtype == torch.float32
        assert (x - v).abs().max() <= epsilon + 1e-6
        assert x.min() >= 0
        assert x.max() <= 1
    assert len(result.trace) == options["num_steps"]


def test_without_a_budget_nothing_changes(model, corpus):
    v = scene()[0]
    result = evolve_images(Source(model), v, targets_of(corpus), PerImage(0, range(4)), epsilon=0.0)
    assert torch.equal(result.images, v)
    assert torch.equal(result.previous_images, v)


def test_raises_the_loss(model, corpus):
    v, G, source = scene()[0], targets_of(corpus), Source(model)
    result = evolve_images(source, v, G, PerImage(0, range(4)))
    with torch.no_grad():
        before, after = (-(source.image_features(x) * G).sum(1) for x in (v, result.images))
    assert (after > before).all()


def test_identity_encoder_ends_at_the_lower_face_of_the_ball():
    v = scene()[0]
    G = torch.ones(4, 3 * SIDE * SIDE)
    for start in (True, False):
        result = evolve_images(
            WithoutNormalising(Flatten()), v, G, PerImage(0, range(4)), views=ScaledViews(()), random_start=start
        )
        assert torch.equal(result.images, (v - 8 / 255).clamp(0, 1))


def test_no_gradient_no_step():
    v = scene()[0]
    result = evolve_images(
        WithoutNormalising(Flatten()), v, torch.zeros(4, 3 * SIDE * SIDE), PerImage(0, range(4)), random_start=False
    )
    assert torch.equal(result.images, v)


def test_number_of_passes(model, corpus):
    v, G = scene()[0], targets_of(corpus)
    B, T, K = 4, 10, 5

    def passes(**options):
        source = Source(model)
        evolve_images(source, v, G, PerImage(0, range(B)), **options)
        return source.num_forwards, source.num_backwards

    assert passes() == (140 * B, 95 * B) == (5 * B + (T - 1) * (2 * K + 5) * B, 5 * B + (T - 1) * (K + 5) * B)
    assert passes(triangle="none") == (50 * B, 50 * B)
    assert passes(num_samples=1) == (50 * B, 50 * B)
    assert passes(triangle="none", views=ScaledViews(())) == (10 * B, 10 * B)
    assert passes(num_steps=3, num_samples=2, micro_batch=3) == (23 * B, 19 * B)


def test_without_mixtures_it_is_sga(model):
    v, texts, owners = scene()
    G = caption_targets(texts, owners, 4, None)
    rng, x = ReleasedStreams(3), None
    for step in range(10):
        x = (v + rng.init(v.shape, -8 / 255, 8 / 255)).clamp(0, 1) if step == 0 else x
        z = x.clone().requires_grad_()
        f = F.normalize(model.encode_image(ScaledViews()(z, rng).flatten(0, 1)), dim=-1)
        (slope,) = torch.autograd.grad(-(f * G.repeat(5, 1)).sum(), z)
        x = torch.min(torch.max(x + 2 / 255 * slope.sign(), v - 8 / 255), v + 8 / 255).clamp(0, 1)
    for options in ({}, {"num_samples": 1}, {"project_candidates": False}):
        result = evolve_images(Source(model), v, G, ReleasedStreams(3), triangle="none", **options)
        assert torch.equal(result.images, x)


def test_one_sample_is_taken_as_it_is(model, corpus):
    v, G = scene()[0], targets_of(corpus)
    result = evolve_images(Source(model), v, G, ReleasedStreams(0), num_samples=1)
    stream = random.Random(0)
    for step in result.trace[1:]:
        assert step["triples"] == [pytest.approx(sub(stream))]
        assert step["candidate_losses"] == []


def test_the_best_candidate_is_chosen(model, corpus):
    v, G = scene()[0], targets_of(corpus)
    stream = random.Random(0)
    for step in evolve_images(Source(model), v, G, ReleasedStreams(0)).trace[1:]:
        drawn = [sub(stream) for _ in range(5)]
        best = step["candidate_losses"].index(max(step["candidate_losses"]))
        assert step["triples"] == [pytest.approx(drawn[best])]


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("selection", ["batch", "image"])
def test_micro_batches_change_nothing(model, corpus, micro_batch, selection):
    v, G = scene()[0], targets_of(corpus)
    whole, parts = (
        evolve_images(Source(model), v, G, PerImage(1, range(4)), selection=selection, num_steps=4, micro_batch=size)
        for size in (None, micro_batch)
    )
    assert share_equal(whole.images, parts.images) >= 0.999


def test_micro_batch_bounds_the_encoders_batches(corpus):
    model, sizes = SmallViT().eval(), []
    model.patches.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    evolve_images(Source(model), scene()[0], targets_of(corpus), PerImage(1, range(4)), num_steps=2, micro_batch=3)
    assert max(sizes) == 3


def test_images_one_by_one_or_together(model, corpus):
    v, G = scene()[0], targets_of(corpus)
    together = evolve_images(Source(model), v, G, PerImage(2, list("abcd")), selection="image").images
    alone = [
        evolve_images(Source(model), v[i : i + 1], G[i : i + 1], PerImage(2, ["abcd"[i]]), selection="image").images
        for i in range(4)
    ]
    assert share_equal(torch.cat(alone), together) >= 0.999


@pytest.mark.slow
def test_scale_and_order_of_captions_do_not_matter(model, corpus):
    v, texts, owners = scene()
    P = semantic_projection(corpus)

    def attacked(texts, owners):
        G = caption_targets(texts, owners, 4, P)
        return evolve_images(Source(model), v, G, PerImage(0, range(4))).images

    expected = attacked(texts, owners)
    assert torch.equal(attacked(texts * 4, owners), expected)
    assert share_equal(attacked(texts * 3.7, owners), expected) >= 0.999
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert share_equal(attacked(texts[order], owners[order]), expected) >= 0.999


def test_the_model_is_as_before(corpus):
    model = SmallViT().train()
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    needs = [p.requires_grad for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    evolve_images(Source(model), scene()[0], targets_of(corpus), PerImage(0, range(4)), num_steps=2)
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.positions.grad is None


def test_works_where_gradients_are_off(model, corpus):
    v, G = scene()[0], targets_of(corpus)
    expected = evolve_images(Source(model), v, G, PerImage(0, range(4)), num_steps=3).images
    with torch.no_grad():
        assert torch.equal(evolve_images(Source(model), v, G, PerImage(0, range(4)), num_steps=3).images, expected)


def test_custom_views(model, corpus):
    v, G = scene()[0], targets_of(corpus)

    def mirrored(images, rng):
        return [images, images.flip(-1)]

    result = evolve_images(Source(model), v, G, PerImage(0, range(4)), views=mirrored, num_steps=2)
    assert [len(step["view_losses"]) for step in result.trace] == [2, 2]


def test_an_encoder_without_gradients_is_refused(corpus):
    model = SmallViT()
    tower = model.encode_image
    model.encode_image = lambda images: tower(images.detach())
    with pytest.raises(RuntimeError, match="differentiable"):
        evolve_images(Source(model), scene()[0], targets_of(corpus), PerImage(0, range(4)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: (v * 255).to(torch.uint8), "torch.uint8"),
        (lambda v: v.index_fill(0, torch.tensor([2]), float("nan")), "image 2 of the batch has NaN"),
        (lambda v: v.index_fill(0, torch.tensor([1]), 1.01), "image 1 of the batch has values from 1.01 to 1.01"),
        (lambda v: v - 0.5, "image 0 of the batch has values from -0.499 to 0.5"),
        (lambda v: v[0], "expected"),
        (lambda v: v[:0], "at least one image"),
    ],
)
def test_unusable_images_are_refused(model, corpus, spoil, message):
    with pytest.raises(ValueError, match=message):
        evolve_images(Source(model), spoil(scene()[0]), targets_of(corpus), PerImage(0, range(4)))


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": -0.01},
        {"epsilon": 1.5},
        {"step_size": 0.0},
        {"num_steps": 0},
        {"num_samples": 0},
        {"micro_batch": 0},
        {"triangle": "square"},
        {"selection": "pixel"},
    ],
)
def test_impossible_options_are_refused(model, corpus, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        evolve_images(Source(model), scene()[0], targets_of(corpus), PerImage(0, range(4)), **options)


def test_captions_have_to_fit_the_images(model):
    texts = torch.eye(3)
    for owners, message in [
        ([0, 1, 2], r"txt2img\[2\] is 2"),
        ([0, -1, 1], r"txt2img\[1\] is -1"),
        ([0, 0, 0], r"images \[1\] have no caption"),
        ([0, 1], "txt2img of shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            caption_targets(texts, owners, 2, None)
    with pytest.raises(ValueError, match=r"expected finite \[4, D\]"):
        evolve_images(Source(model), scene()[0], torch.ones(3, WIDTH), PerImage(0, range(4)))


@settings(max_examples=60)
@given(
    levels=st.integers(1, 40),
    eight_bit=st.booleans(),
    mode=st.sampled_from(["round", "floor"]),
    seed=st.integers(0, 99),
)
def test_eight_bit_images_stay_in_the_ball(levels, eight_bit, mode, seed):
    generator, epsilon = torch.Generator().manual_seed(seed), levels / 255
    clean = torch.rand(2, 3, 8, 8, generator=generator)
    if eight_bit:
        clean = (clean * 255).round() / 255
    images = (clean + (torch.rand(clean.shape, generator=generator) * 2 - 1) * epsilon).clamp(0, 1)
    stored = quantize(images, clean, epsilon, mode)
    assert torch.equal((stored * 255).round() / 255, stored)
    assert (stored - clean).abs().max() <= epsilon + 1e-6
    assert stored.min() >= 0
    assert stored.max() <= 1
    assert (stored - images).abs().max() <= (1.01 if mode == "floor" else 0.51) / 255 + (not eight_bit) * 1 / 255
    assert torch.equal(quantize(stored, clean, epsilon, mode), stored)


def test_every_level_survives_both_roundings():
    levels = (torch.arange(256).float() / 255).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for mode in ("round", "floor"):
        assert torch.equal(quantize(levels, levels, 8 / 255, mode), levels)


def test_rounding_by_hand():
    clean, images = torch.tensor([100.0, 100, 100, 0, 255]) / 255, torch.tensor([102.6, 98.4, 102.0, 0.7, 254.4]) / 255
    assert (quantize(images, clean, 2 / 255, "round") * 255).round().tolist() == [102, 98, 102, 1, 254]
    assert (quantize(images, clean, 2 / 255, "floor") * 255).round().tolist() == [102, 98, 102, 0, 254]
    assert (quantize(images, clean, 2.5 / 255, "round") * 255).round().tolist() == [102, 98, 102, 1, 254]
    assert quantize(images, clean, 2 / 255, "none") is images
    assert torch.equal(quantize(images, clean + 0.001, 0.0), clean + 0.001)


def test_a_ball_below_one_level_is_refused():
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="below one 8-bit level"):
        quantize(x, x, 0.9 / 255)
    assert quantize(x, x, 0.9 / 255, "none") is x
    quantize(x, x, 1 / 255)
    with pytest.raises(ValueError, match="round, floor and none"):
        quantize(x, x, 0.1, "ceil")
