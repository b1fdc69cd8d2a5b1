"""Update rules of local training."""

from functools import partial

import pytest
import torch
from plait_federated.steps import Local, clip, corrected_step, momentum_step, prox_step, sam_step, sgd_step


def local(start, **changes):
    fields = {"learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": None} | changes
    return Local(start, **fields)


def test_clip_scales_each_client_by_its_own_norm():
    g = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(clip(g, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4]]), atol=1e-5, rtol=0)
    assert clip(g, None) is g


def test_the_decay_is_outside_the_clip():
    w = torch.tensor([2.0])
    stepped = sgd_step(w, lambda at: torch.tensor([30.0]), local(w, max_grad_norm=10.0, weight_decay=0.5))
    assert stepped.item() == pytest.approx(2 - 0.1 * (10 + 1), abs=1e-5)


def test_heavy_ball_remembers_inside_a_round():
    w, memory = torch.tensor([1.0]), local(torch.tensor([1.0]))
    for expected in (1 - 0.1 * 2, 0.8 - 0.1 * (0.9 * 2 + 2)):
        w = momentum_step(w, lambda at: torch.tensor([2.0]), memory, momentum=0.9)
        assert w.item() == pytest.approx(expected)


def test_sam_takes_the_gradient_uphill():
    w = torch.tensor([3.0, 4.0])
    stepped = sam_step(w, lambda at: at, local(w), rho=0.5)  # loss ‖w‖²/2
    torch.testing.assert_close(stepped, w - 0.1 * (w + 0.5 * w / 5), atol=1e-6, rtol=0)


def test_a_sam_radius_of_zero_is_sgd():
    w = torch.randn(5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        sam_step(w, lambda at: at**3, local(w), rho=0.0), sgd_step(w, lambda at: at**3, local(w))
    )


def test_prox_equals_autograd_of_the_penalised_loss():
    generator = torch.Generator().manual_seed(0)
    w, s = torch.randn(2, 6, generator=generator).unbind(0)
    v = w.clone().requires_grad_()
    loss = v.sin().sum() + 0.35 * (v - s).square().sum() + 0.005 * v.square().sum()
    (expected,) = torch.autograd.grad(loss, v)
    stepped = prox_step(w, torch.cos, local(s, weight_decay=0.01), prox_lambda=0.7)
    torch.testing.assert_close((w - stepped) / 0.1, expected, atol=1e-5, rtol=0)


def test_the_correction_is_inside_the_clip():
    w = torch.zeros(1)
    memory = local(w, max_grad_norm=10.0)
    memory.offset = torch.tensor([-25.0])
    assert corrected_step(w, lambda at: torch.tensor([30.0]), memory).item() == pytest.approx(-0.5)


@pytest.mark.parametrize(
    "step",
    [sgd_step, partial(momentum_step, momentum=0.9), partial(sam_step, rho=0.1), partial(prox_step, prox_lambda=0.3)],
)
def test_a_stack_steps_like_its_clients(step):
    generator = torch.Generator().manual_seed(1)
    w, s = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    options = {"max_grad_norm": 1.0, "weight_decay": 0.1}
    together = step(w, lambda at: 3 * at, local(s, **options))
    apart = torch.stack(
        [step(one, lambda at: 3 * at, local(center, **options)) for one, center in zip(w, s, strict=True)]
    )
    torch.testing.assert_close(together, apart)
