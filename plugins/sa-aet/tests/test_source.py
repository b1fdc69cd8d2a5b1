import functools

import pytest
import torch
import torch.nn.functional as F
from plait_sa_aet.source import Source, frozen
from torch import nn


class Encoder(nn.Module):
    """Small, with dropout and batch norm, so that modes and buffers show."""

    image_size = 8

    def __init__(self, width=6, text_width=6):
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, width)
        )
        self.words = nn.Parameter(torch.randn(64, text_width))
        self.tower[1].eval()
        self.tower[4].bias.requires_grad_(False)
        self.calls = []

    def encode_image(self, images):
        return self.tower(images)

    def encode_text(self, texts):
        self.calls.append(list(texts))
        return torch.stack([self.words[len(text)] * 3 for text in texts])


def images(count=3):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_features_have_length_one_and_are_those_of_evaluation_mode():
    model = Encoder()
    source = Source(model)
    first, again = source.image_features(images()), source.image_features(images())
    assert torch.equal(first, again)  # no dropout
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(F.normalize(source.raw_image_features(images()), dim=1), first)
    assert model.tower.training
    raw = source.raw_text_features(["a", "bb"])
    torch.testing.assert_close(raw, model.words[1:3].detach() * 3)
    torch.testing.assert_close(source.text_features(["a", "bb"]), F.normalize(raw, dim=1))
    assert not raw.requires_grad
    assert source.image_size == 8
    assert source.device == torch.device("cpu")


def test_counts_single_images_forwards_and_backwards():
    source = Source(Encoder())
    x = images(5).requires_grad_()
    with torch.no_grad():
        source.image_features(x)
    assert (source.num_forwards, source.num_backwards) == (5, 0)
    loss = source.image_features(x).sum()
    assert (source.num_forwards, source.num_backwards) == (10, 0)
    torch.autograd.grad(loss, x)
    assert (source.num_forwards, source.num_backwards) == (10, 5)


def test_sentences_are_encoded_once_in_chunks_and_the_oldest_forgotten():
    model = Encoder()
    source = Source(model, text_batch_size=2, memory=3)
    texts = ["a", "bb", "a", "ccc", "dddd"]
    expected = model.words[[1, 2, 1, 3, 4]].detach() * 3
    torch.testing.assert_close(source.raw_text_features(texts), expected)
    assert model.calls == [["a", "bb"], ["ccc", "dddd"]]
    source.raw_text_features(["dddd", "bb", "ccc"])
    assert len(model.calls) == 2
    torch.testing.assert_close(source.raw_text_features(["dddd", "a"]), expected[[4, 0]])
    assert model.calls[2:] == [["a"]]


def test_frozen_leaves_no_trace():
    model = Encoder()
    model.tower(images()).sum().backward()
    before = {
        "grad": [None if p.grad is None else (p.grad, p.grad.clone()) for p in model.parameters()],
        "needs": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
    }

    def spoil():
        with frozen(model):
            assert not any(p.requires_grad for p in model.parameters())
            assert not any(m.training for m in model.modules())
            model.tower[1].train()(torch.rand(4, 4, 2, 2))  # moves the running statistics
            model.requires_grad_(True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spoil()
    assert [p.requires_grad for p in model.parameters()] == before["needs"]
    assert [m.training for m in model.modules()] == before["modes"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before["state"][name]), name
    for parameter, kept in zip(model.parameters(), before["grad"], strict=True):
        assert (parameter.grad is None) == (kept is None)
        if kept is not None:
            assert parameter.grad is kept[0]
            assert torch.equal(*kept)


def test_gradients_reach_a_model_that_is_in_training_mode():
    model, x = Encoder().train(), images().requires_grad_()
    (slope,) = torch.autograd.grad(Source(model).image_features(x).square().sum(1)[0], x)
    (direct,) = torch.autograd.grad(Source(model.eval()).image_features(x).square().sum(1)[0], x)
    torch.testing.assert_close(slope, direct)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}])
def test_other_arithmetic_gives_about_the_same(options):
    model, x = Encoder().eval(), images()
    other = Source(model, **options)
    assert other.image_features(x).dtype == other.text_features(["a"]).dtype == torch.float32
    torch.testing.assert_close(other.image_features(x), Source(model).image_features(x), atol=0.02, rtol=0)


@pytest.mark.slow
def test_compiled_gives_the_same(monkeypatch):
    # The default backend needs a C++ compiler, which not every machine has.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model, x = Encoder().eval(), images().requires_grad_()
    slopes = []
    for source in (Source(model), Source(model, compile=True)):
        slopes += torch.autograd.grad(source.image_features(x)[:, 0].sum(), x)
    torch.testing.assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize(
    "cut",
    [
        lambda tower, x: tower(x.detach()),
        lambda tower, x: tower((x * 255).to(torch.uint8).float()),
        torch.inference_mode()(lambda tower, x: tower(x)),
    ],
)
def test_an_encoder_that_cuts_the_gradient_is_refused(cut):
    model = Encoder()
    model.encode_image = lambda x: cut(model.tower, x)
    source = Source(model)
    with torch.no_grad():
        source.image_features(images())
    with frozen(model), pytest.raises(RuntimeError, match="differentiable"):
        source.image_features(images().requires_grad_())


def test_unusable_features_are_refused():
    broken = Encoder()
    broken.encode_image = lambda x: torch.where(torch.arange(len(x))[:, None] == 1, float("nan"), x.flatten(1))
    with pytest.raises(ValueError, match="image features are not finite, first in row 1"):
        Source(broken).image_features(images())
    source = Source(Encoder(6, text_width=5))
    source.image_features(images())
    with pytest.raises(ValueError, match="text features have 5 dimensions, those of the other side 6"):
        source.text_features(["a"])
    source = Source(Encoder(6, text_width=5))
    source.text_features(["a"])
    with pytest.raises(ValueError, match="image features have 6 dimensions, those of the other side 5"):
        source.image_features(images())
    tokens = Encoder()
    tokens.encode_image = lambda x: x.flatten(2)
    with pytest.raises(ValueError, match=r"expected \[3, D\]"):
        Source(tokens).image_features(images())
    with pytest.raises(ValueError, match="no sentence"):
        Source(Encoder()).text_features([])


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"memory": 0}, {"text_batch_size": 0}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match=r"fp32|at least 1"):
        Source(Encoder(), **options)
