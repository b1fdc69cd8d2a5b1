import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_clip.backdoor.clean_clip import Embeddings, clean_clip_loss
from plait_clip.backdoor.losses import embedding_shift, one_way_loss, self_supervised_loss, square_unlearn_loss
from plait_clip.losses import clip_loss

PAIR = torch.eye(2)


def unit(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


def test_two_orthonormal_pairs():
    assert clip_loss(PAIR, PAIR, 1.0).item() == pytest.approx(math.log1p(math.exp(-1)), abs=1e-6)
    same = Embeddings(PAIR, PAIR, PAIR, PAIR, torch.empty(0, 2), torch.tensor(1.0))
    assert clean_clip_loss(same).item() == pytest.approx(0.626523, abs=1e-6)
    assert clean_clip_loss(same, clip_weight=1.0, self_supervised_weight=0.0).item() == pytest.approx(
        0.313262, abs=1e-6
    )


def test_a_large_scale_perfects_the_loss():
    assert clip_loss(PAIR, PAIR, 100.0).item() == pytest.approx(0, abs=1e-6)


def test_equal_texts_make_the_image_loss_a_constant():
    images = unit(7, 5).requires_grad_()
    loss = one_way_loss(images, unit(1, 5, seed=1).expand(7, 5), 13.0)
    assert loss.item() == pytest.approx(math.log(7), abs=1e-5)
    loss.backward()
    assert images.grad.abs().max() < 1e-5


def test_the_in_modal_loss_has_one_direction_and_gradients_on_both_sides():
    u, ua = unit(4, 3).requires_grad_(), unit(4, 3, seed=1).requires_grad_()
    v, va = unit(4, 3, seed=2), unit(4, 3, seed=3)
    forward, backward = self_supervised_loss(u, ua, v, va, 5.0), self_supervised_loss(ua, u, va, v, 5.0)
    assert forward.item() != pytest.approx(backward.item(), abs=1e-3)
    target = torch.arange(4)
    by_hand = (
        torch.nn.functional.cross_entropy(5 * u @ ua.T, target)
        + torch.nn.functional.cross_entropy(5 * v @ va.T, target)
    ) / 2
    assert forward.item() == pytest.approx(by_hand.item(), abs=1e-6)
    forward.backward()
    assert u.grad.abs().sum() > 0
    assert ua.grad.abs().sum() > 0


@pytest.mark.parametrize(("target", "expected"), [(0.0, 0.145), (1.0, 1.445), (-1.0, 0.845)])
def test_square_unlearning_on_known_cosines(target, expected):
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    texts = torch.tensor([[c, math.sqrt(1 - c * c)] for c in (0.5, -0.2)])
    assert square_unlearn_loss(images, texts, target).item() == pytest.approx(expected, abs=1e-6)


@given(seed=st.integers(0, 1000), limit=st.floats(0.01, 4))
@settings(max_examples=50, deadline=None)
def test_shift_lies_between_0_and_4_and_stops_above_the_limit(seed, limit):
    now, before = unit(6, 4, seed=seed).requires_grad_(), unit(6, 4, seed=seed + 1)
    distance = (now - before).square().sum(dim=1).mean().item()
    shift = embedding_shift(now, before, limit)
    assert 0 <= distance <= 4
    shift.backward()
    if distance > limit:
        assert shift.item() == 0
        assert now.grad.abs().max() == 0
    else:
        assert shift.item() == pytest.approx(distance)
        assert now.grad.abs().max() > 0
