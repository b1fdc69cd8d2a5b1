"""Hand-computed updates and invariants of FGSAM, FGSAM+ and the SAM family, on closed-form losses."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_fgsam.baselines import AESAM, ESAM, SAM, LookSAM
from plait_fgsam.fgsam import FGSAM, FGSAMPlus
from plait_fgsam.perturbing import orthogonal_part, stretched

SGD = torch.optim.SGD


def pair():
    """w = (1, 2), L_gnn = 3 w1 + 4 w2, L_mlp = (w1^2 + 2 w2^2) / 2."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    slope, curvature = torch.tensor([3.0, 4.0]).double(), torch.tensor([1.0, 2.0]).double()
    return w, lambda: (slope * w).sum(), lambda: (curvature * w * w).sum() / 2


def trajectory(make, updates):
    w, gnn, mlp = pair()
    optimizer = make([w])
    found = []
    for _ in range(updates):
        optimizer.step(gnn, mlp)
        found += [w.grad.tolist(), w.detach().tolist()]
    return found


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda p: FGSAM(p, SGD, rho=0.5, eps=0, lam=0.5, lr=0.1),
            [(2.15, 4.40), (0.785, 1.56), (2.0425, 3.96), (0.58075, 1.164)],
        ),
        (
            lambda p: FGSAM(p, SGD, rho=0.5, eps=0, as_released=False, lam=1.0, lr=0.1),
            [(4.3, 8.8), (0.57, 1.12), (3.87, 7.04), (0.183, 0.416)],
        ),
        (lambda p: SAM(p, SGD, rho=0.5, eps=0, lr=0.1), [(3, 4), (0.7, 1.6)]),
        (
            lambda p: FGSAMPlus(p, SGD, rho=0.5, eps=0, lr=0.1, alpha=0.7, interval=2),
            [
                (2.15, 4.40),
                (0.785, 1.56),
                (2.969825991, 2.573793502),
                (0.488017401, 1.302620650),
                (1.894008700, 3.702620650),
            ],
        ),
        (
            lambda p: FGSAMPlus(p, SGD, rho=0.5, eps=0, lr=0.1, as_released=False, lam=1.0),
            [
                (4.3, 8.8),
                (0.57, 1.12),
                (4.952033405, 3.526991649),
                (0.074796660, 0.767300835),
                (3.374796660, 6.334601670),
            ],
        ),
    ],
)
def test_hand_computed_updates(make, expected):
    found = trajectory(make, (len(expected) + 1) // 2)
    for got, want in zip(found, expected, strict=False):
        assert got == pytest.approx(want, abs=2e-7)


def test_flatness_part_of_the_hand_example():
    w, gnn, mlp = pair()
    optimizer = FGSAMPlus([w], SGD, rho=0.5, eps=0, lr=0.1)
    optimizer.step(gnn, mlp)
    assert optimizer.state[w]["v"].tolist() == pytest.approx((0.988235294, -0.247058824), abs=1e-9)


# -- a small network on random data: the GNN mixes neighbours, its peer does not ------------------------------------


class Net(torch.nn.Module):
    def __init__(self, seed=0, dropout=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Parameter(torch.randn(5, 8, generator=generator, dtype=torch.float64) / 2)
        self.second = torch.nn.Parameter(torch.randn(8, 3, generator=generator, dtype=torch.float64) / 2)
        self.only_gnn = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        draw = torch.Generator().manual_seed(7)
        self.x = torch.randn(12, 5, generator=draw, dtype=torch.float64)
        self.y = torch.randint(3, (12,), generator=draw)
        mixing = torch.rand(12, 12, generator=draw, dtype=torch.float64)
        self.mixing = mixing / mixing.sum(1, keepdim=True)
        self.gnn_passes = self.mlp_passes = 0
        self.scale = 1.0

    def gnn(self):
        self.gnn_passes += 1
        hidden = (self.mixing @ (self.x @ self.first)).tanh()
        return self.scale * torch.nn.functional.cross_entropy(
            self.mixing @ (hidden @ self.second) * self.only_gnn, self.y
        )

    def mlp(self):
        self.mlp_passes += 1
        return self.scale * torch.nn.functional.cross_entropy((self.x @ self.first).tanh() @ self.second, self.y)


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def trained(make, updates=6, mlp=None, **options):
    net = Net()
    optimizer = make(net.parameters(), **options)
    for _ in range(updates):
        optimizer.step(net.gnn, mlp(net) if mlp else net.mlp)
    return net


def assert_same(a, b, tolerance=0.0):
    for x, y in zip(weights(a), weights(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rho", [0.0, 0.3])
@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW, SGD])
def test_lam_zero_is_the_base_optimizer_bit_for_bit(base, rho):
    plain = Net()
    optimizer = base(plain.parameters(), lr=0.05, weight_decay=0.01)
    for _ in range(6):
        optimizer.zero_grad()
        plain.gnn().backward()
        optimizer.step()
    assert_same(plain, trained(FGSAM, base_optimizer=base, rho=rho, lam=0.0, lr=0.05, weight_decay=0.01))


def test_equal_losses_and_lam_one_give_sam():
    a = trained(FGSAM, base_optimizer=SGD, rho=0.2, lam=1.0, lr=0.1, mlp=lambda net: net.gnn)
    assert_same(a, trained(SAM, base_optimizer=SGD, rho=0.2, lr=0.1), 1e-12)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    lam=st.floats(0.05, 1),
    alpha=st.floats(0, 2),
    topology=st.booleans(),
    projection=st.sampled_from(["tensor", "global"]),
    as_released=st.booleans(),
)
def test_interval_one_gives_fgsam(lam, alpha, topology, projection, as_released):
    a = trained(FGSAM, 3, base_optimizer=SGD, rho=0.1, lam=lam, as_released=as_released, lr=0.1)
    b = trained(
        FGSAMPlus, 3, base_optimizer=SGD, rho=0.1, lam=lam, alpha=alpha, interval=1, lr=0.1, eps=1e-12,
        topology=topology, projection=projection, as_released=as_released,
    )  # fmt: skip
    assert_same(a, b, 1e-12)


@pytest.mark.parametrize("lam", [0.2, 0.5, 0.8])
def test_additive_is_convex_at_another_rate(lam):
    a = trained(FGSAM, base_optimizer=SGD, lam=lam, lr=0.1)
    b = trained(FGSAM, base_optimizer=SGD, combine="additive", lam=(1 - lam) / lam, lr=0.1 * lam)
    assert_same(a, b, 1e-10)


@pytest.mark.parametrize("rho", [0.01, 0.5])
def test_perturbation_has_length_rho(rho):
    net = Net()
    before, seen = weights(net), []

    def mlp():
        seen.append([p.detach() - q for p, q in zip(net.parameters(), before, strict=True)])
        return net.mlp()

    FGSAM(net.parameters(), SGD, rho=rho, lr=0.1).step(net.gnn, mlp)
    assert math.sqrt(sum(float((e**2).sum()) for e in seen[0])) == pytest.approx(rho, rel=1e-6)


@pytest.mark.parametrize("make", [SAM, FGSAM, FGSAMPlus, LookSAM])
def test_zero_gradient_gives_no_nan(make):
    net = Net()
    optimizer = make(net.parameters(), SGD, lr=0.1)
    before = weights(net)
    for _ in range(3):
        optimizer.step(lambda: 0 * net.gnn(), lambda: 0 * net.mlp())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_projection_and_stretching(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 4, 3, generator=generator)
    v = orthogonal_part(a, b)
    assert abs(float((v * b).sum())) <= 1e-6 * float(v.norm() * b.norm()) + 1e-6
    assert float(stretched(v, b).norm()) == pytest.approx(float(b.norm()), rel=1e-5)
    assert torch.equal(orthogonal_part(a, torch.zeros_like(a)), a)


@pytest.mark.parametrize("projection", ["tensor", "global"])
@pytest.mark.parametrize("as_released", [True, False])
def test_kept_parts_are_orthogonal_to_the_mlp_gradient(as_released, projection):
    net = Net()
    reference = torch.autograd.grad(net.mlp(), [net.first, net.second])
    optimizer = FGSAMPlus(net.parameters(), SGD, as_released=as_released, projection=projection, lr=0.0)
    optimizer.step(net.gnn, net.mlp)
    kept = [optimizer.state[p] for p in (net.first, net.second)]
    for part in ("v",) if as_released else ("v", "u"):
        dots = [float((state[part] * g).sum()) for state, g in zip(kept, reference, strict=True)]
        assert (dots if projection == "tensor" else [sum(dots)]) == pytest.approx(
            [0] * (2 if projection == "tensor" else 1), abs=1e-12
        )
    assert net.unused not in optimizer.state


@pytest.mark.parametrize("make", [SAM, LookSAM, ESAM, FGSAM, FGSAMPlus])
def test_step_at_rate_zero_changes_nothing_but_grad(make):
    net = Net()
    optimizer = make(net.parameters(), SGD, rho=0.3, lr=0.0)
    before, storages = weights(net), [p.data_ptr() for p in net.parameters()]
    for _ in range(2):
        optimizer.step(net.gnn, net.mlp)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert storages == [p.data_ptr() for p in net.parameters()]
    assert net.unused.grad is None
    assert net.first.grad is not None


@pytest.mark.parametrize("fails_at", [1, 2])
def test_weights_are_restored_when_a_closure_raises(fails_at):
    net = Net()
    optimizer = FGSAMPlus(net.parameters(), SGD, rho=0.3, lr=0.1)
    before, calls = weights(net), []

    def mlp():
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError("out of memory")
        return net.mlp()

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(net.gnn, mlp)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_not_finite_loss_is_named_and_changes_nothing():
    net = Net()
    optimizer = FGSAM(net.parameters(), SGD, lr=0.1)
    before = weights(net)
    with pytest.raises(FloatingPointError, match="update 0: mlp_loss is nan"):
        optimizer.step(net.gnn, lambda: net.mlp() * math.nan)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_unused_tensor_is_skipped_decay_included():
    net = trained(FGSAMPlus, 4, lr=0.1, weight_decay=0.5)
    assert torch.equal(net.unused, torch.ones(2, dtype=torch.float64))
    assert not torch.equal(net.only_gnn, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "gnn", "mlp"),
    [
        (lambda p: SAM(p, lr=0.1), 14, 0),
        (lambda p: ESAM(p, lr=0.1), 14, 0),
        (lambda p: LookSAM(p, interval=3, lr=0.1), 10, 0),
        (lambda p: FGSAM(p, lr=0.1), 7, 7),
        (lambda p: FGSAMPlus(p, interval=2, lr=0.1), 4, 11),
        (lambda p: FGSAMPlus(p, interval=3, lr=0.1), 3, 10),
    ],
)
def test_number_of_passes_in_seven_updates(make, gnn, mlp):
    net = Net()
    backwards = []
    net.only_gnn.register_hook(lambda g: backwards.append(1))
    optimizer = make(net.parameters())
    for _ in range(7):
        optimizer.step(net.gnn, net.mlp)
    assert (net.gnn_passes, net.mlp_passes, len(backwards)) == (gnn, mlp, gnn)


def test_tensors_outside_s_are_not_perturbed_and_take_plain_gradients():
    net = Net()
    groups = [{"params": [net.first]}, {"params": [net.second, net.only_gnn], "perturb": False}]
    optimizer = FGSAMPlus(groups, SGD, rho=0.5, lr=0.0, lam=0.5)
    moved = []

    def mlp():
        moved.append(not torch.equal(net.second, before))
        return net.mlp()

    before = net.second.detach().clone()
    optimizer.step(net.gnn, mlp)
    assert moved == [False, False]
    optimizer.step(net.gnn, mlp)
    (plain,) = torch.autograd.grad(net.mlp(), [net.second])
    torch.testing.assert_close(net.second.grad, plain)
    assert net.only_gnn.grad is None


def test_scaling_both_losses_scales_the_gradient_only():
    a, b = Net(), Net()
    b.scale = 7.0
    for net in (a, b):
        FGSAM(net.parameters(), SGD, rho=0.2, lr=0.0).step(net.gnn, net.mlp)
    torch.testing.assert_close(b.first.grad, 7 * a.first.grad)


MAKERS = {
    "fgsam": lambda p: FGSAM(p, lr=0.05),
    "fgsam+": lambda p: FGSAMPlus(p, lr=0.05, interval=3),
    "fgsam+ paper": lambda p: FGSAMPlus(p, lr=0.05, interval=3, as_released=False),
    "sam": lambda p: SAM(p, lr=0.05),
    "asam": lambda p: SAM(p, lr=0.05, adaptive=True),
    "looksam": lambda p: LookSAM(p, lr=0.05, interval=3),
    "esam": lambda p: ESAM(p, lr=0.05),
    "ae-sam": lambda p: AESAM(p, num_steps=9, lr=0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 4])
@pytest.mark.parametrize("name", MAKERS)
def test_resume_from_state_dict(name, stop, tmp_path):
    whole = Net()
    optimizer = MAKERS[name](whole.parameters())
    for t in range(9):
        if t == stop:
            torch.save({"w": whole.state_dict(), "o": optimizer.state_dict()}, tmp_path / "c.pt")
        optimizer.step(whole.gnn, whole.mlp)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed = Net(seed=1)
    resumed.load_state_dict(saved["w"])
    optimizer = MAKERS[name](resumed.parameters())
    optimizer.load_state_dict(saved["o"])
    for _ in range(stop, 9):
        optimizer.step(resumed.gnn, resumed.mlp)
    assert_same(whole, resumed)


def test_scheduler_sees_the_rates_also_after_loading():
    net = Net()
    optimizer = FGSAM(net.parameters(), SGD, lr=0.8)
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(net.gnn, net.mlp)
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.4


@pytest.mark.parametrize("base", [torch.optim.Adam, SGD])
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=10),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    ],
)
def test_schedulers_do_with_it_what_they_do_with_its_base(scheduler, base):
    options = {"lr": 0.05, **({"momentum": 0.9} if base is SGD else {})}
    net = Net()
    ours, theirs = FGSAM(net.parameters(), base, **options), base(Net().parameters(), **options)
    schedules = [scheduler(ours), scheduler(theirs)]
    for _ in range(4):
        ours.step(net.gnn, net.mlp)
        theirs.step()
        for schedule in schedules:
            plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
            schedule.step(*([1.0] if plateau else []))
        for name in ("lr", "betas", "momentum"):
            assert ours.base.param_groups[0].get(name) == theirs.param_groups[0].get(name)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_by_themselves(way):
    net = Net()
    optimizer = FGSAMPlus(net.parameters(), lr=0.05)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step(net.gnn, net.mlp)
    net2, optimizer2 = way((net, optimizer))
    for n, o in ((net, optimizer), (net2, optimizer2)):
        o.param_groups[0]["lr"] = 0.1
        for _ in range(3):
            o.step(n.gnn, n.mlp)
    assert_same(net, net2)
    assert optimizer2.base.param_groups is optimizer2.param_groups
    assert optimizer2.t == 4


@pytest.mark.parametrize("make", [SAM, FGSAM, FGSAMPlus])
def test_a_tensor_frozen_between_updates_stays(make):
    net = Net()
    optimizer = make(net.parameters(), lr=0.05)
    optimizer.step(net.gnn, net.mlp)
    net.second.requires_grad_(False)
    before = net.second.detach().clone()
    optimizer.step(net.gnn, net.mlp)
    assert torch.equal(net.second, before)
    net.second.requires_grad_(True)
    for _ in range(2):  # an approximate update of FGSAM+ may come first
        optimizer.step(net.gnn, net.mlp)
    assert not torch.equal(net.second, before)


def test_a_loss_of_one_element_is_a_scalar():
    a, b = Net(), Net()
    FGSAM(a.parameters(), SGD, lr=0.1).step(a.gnn, a.mlp)
    FGSAM(b.parameters(), SGD, lr=0.1).step(lambda: b.gnn().view(1), lambda: b.mlp().view(1, 1))
    assert_same(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [SAM, LookSAM, FGSAM, FGSAMPlus])
def test_half_precision_keeps_tiny_and_large_gradients(make, dtype):
    # the squares of 1e-4 and of 300 are outside of half precision, the gradients are not
    w = torch.nn.Parameter(torch.zeros(2, 8, dtype=dtype))
    slope = torch.tensor([[1e-4], [300.0]], dtype=dtype).expand(2, 8)
    optimizer = make([w], SGD, rho=0.5, lr=0.001)
    for _ in range(3):
        optimizer.step(lambda: (slope * w).sum(), lambda: (slope * w).sum())
    assert w.dtype == dtype
    assert torch.isfinite(w).all()
    assert (w[1] < -0.1).all()
    assert (orthogonal_part(slope, slope).abs() <= 0.01 * slope).all()
    small = slope[0]
    torch.testing.assert_close(stretched(small, slope[1]).float(), slope[1].float(), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("slope", [0.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [SAM, LookSAM, FGSAM, FGSAMPlus])
def test_half_precision_at_its_ends(make, dtype, slope):
    w = torch.nn.Parameter(torch.zeros(2, 64, dtype=dtype))
    optimizer = make([w], SGD, rho=0.5, lr=1e-4)
    for _ in range(3):
        info = optimizer.step(lambda: (slope * w.float()).sum(), lambda: (slope * w.float()).sum())
        assert torch.isfinite(w).all()
    assert (w < -1).all() if slope else (w == 0).all()
    assert float(info.get("cosine", 1)) == pytest.approx(1, rel=1e-3) or not slope


def test_global_projection_of_tensors_of_two_types():
    a, b = torch.nn.Parameter(torch.ones(3).double()), torch.nn.Parameter(torch.ones(3))
    optimizer = FGSAMPlus([a, b], SGD, projection="global", as_released=False, lr=0.01)
    for _ in range(3):
        optimizer.step(lambda: (a**3).sum() + (b**2).sum(), lambda: (a**2).sum() + (b**3).sum())
    assert (a.dtype, b.dtype, optimizer.state[b]["v"].dtype) == (torch.float64, torch.float32, torch.float32)


@pytest.mark.parametrize("make", [SAM, FGSAM])
def test_a_grad_scaler_is_refused_in_words(make):
    net = Net()
    optimizer, scaler = make(net.parameters(), SGD, lr=0.1), torch.amp.GradScaler("cpu")
    before = weights(net)
    scaler.scale(net.gnn()).backward()
    with pytest.raises(TypeError, match=f"GradScaler cannot step {make.__name__}.*use bf16"):
        scaler.step(optimizer, net.gnn, net.mlp)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer, net.gnn, net.mlp)
    assert not torch.equal(net.first, before[0])


def test_a_nan_leaves_ae_sam_as_it_was():
    net = Net()
    optimizer = AESAM(net.parameters(), num_steps=10, lr=0.05)
    optimizer.step(net.gnn)
    mean, variance = optimizer.mean, optimizer.variance
    with pytest.raises(FloatingPointError):
        optimizer.step(lambda: net.gnn() * math.nan)
    assert (optimizer.mean, optimizer.variance) == (mean, variance)
    assert optimizer.step(net.gnn)["exact"] in (True, False)


def test_added_group_is_trained():
    net = Net()
    optimizer = FGSAM([net.first], SGD, lr=0.1)
    optimizer.add_param_group({"params": [net.second], "lr": 0.0})
    before = weights(net)
    optimizer.step(net.gnn, net.mlp)
    assert not torch.equal(net.first, before[0])
    assert torch.equal(net.second, before[1])
    assert net.second.grad is not None


def test_looksam_uses_the_orthogonal_part():
    net = Net()
    optimizer = LookSAM([net.first, net.second], SGD, rho=0.2, interval=2, alpha=0.5, lr=0.0)
    optimizer.step(net.gnn)
    g_s = net.first.grad.clone()
    (g, _) = torch.autograd.grad(net.gnn(), [net.first, net.second])
    v = g_s - (g_s * g).sum() / (g * g).sum() * g
    optimizer.step(net.gnn)
    torch.testing.assert_close(net.first.grad, g + 0.5 * g.norm() / v.norm() * v, rtol=1e-5, atol=1e-7)


def test_esam_uses_the_samples_whose_loss_grew_most():
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    x = torch.tensor([[4.0, 0.0], [3.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]).double()
    ESAM([w], SGD, rho=0.1, beta=1.0, gamma=0.5, lr=0.0).step(lambda: x @ w)
    assert w.grad.tolist() == [3.5, 0.5]  # the first two rows grow along the mean gradient (1.5, 0)


def test_esam_perturbs_a_share_of_the_tensors_by_more():
    """Each with probability beta, by e / beta: the perturbation is e on average."""
    tensors = [torch.nn.Parameter(torch.tensor([1.0 + i, 2.0], dtype=torch.float64)) for i in range(6)]
    seen = []

    def loss():
        seen.append([w.detach().clone() for w in tensors])
        return sum((w**2).sum() for w in tensors)

    optimizer = ESAM(tensors, SGD, rho=0.1, beta=0.25, lr=0.0)
    length = math.sqrt(sum(float((2 * w.detach()).square().sum()) for w in tensors))
    shares = []
    for _ in range(200):
        seen.clear()
        optimizer.step(loss)
        for w, before, after in zip(tensors, *seen, strict=True):
            shares.append(not torch.equal(before, after))
            if shares[-1]:
                torch.testing.assert_close(after - before, 0.1 / 0.25 * 2 * w.detach() / length)
    assert sum(shares) / len(shares) == pytest.approx(0.25, abs=0.05)


def test_ae_sam_switches_between_the_two_updates():
    net = Net()
    optimizer = AESAM(net.parameters(), num_steps=40, lr=0.05)
    exact = [optimizer.step(net.gnn)["exact"] for _ in range(40)]
    assert 0 < sum(exact) < 40
    assert sum(exact[20:]) > sum(exact[:20])  # the threshold falls from mu + s to mu - s


def test_asam_perturbs_by_squared_weights():
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    slope = torch.tensor([3.0, 2.0, 5.0]).double()
    seen = []

    def loss():
        seen.append(w.detach().clone())
        return (slope * w).sum()

    SAM([w], SGD, rho=0.5, eps=0, adaptive=True, lr=0.1).step(loss)
    assert (seen[1] - seen[0]).tolist() == pytest.approx([0.5 * 3 / 5, 0.5 * 8 / 5, 0])


def test_retained_graph_mixes_perturbed_weights_with_old_activations():
    """L_gnn = w2 (w1 x): the second backward gives w1 the perturbed w2, and w2 the activation of before."""
    w1, w2 = (torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (2.0, 3.0))
    before = (w1.data_ptr(), w2.data_ptr())
    passes = []
    w1.register_hook(lambda g: passes.append(1))
    optimizer = FGSAM([w1, w2], SGD, rho=0.5, eps=0, lam=0.25, lr=0.1, reuse="retained")
    optimizer.step(lambda: w2 * (w1 * 4), lambda: w1**2 + w2)
    norm = math.sqrt(12**2 + 8**2)  # g_gnn = (4 w2, 4 w1)
    e1, e2 = 0.5 * 12 / norm, 0.5 * 8 / norm
    expected = (0.75 * 4 * (3 + e2) + 0.25 * 2 * (2 + e1), 0.75 * 8 + 0.25)
    assert (w1.grad.item(), w2.grad.item()) == pytest.approx(expected, rel=1e-12)
    assert (w1.item(), w2.item()) == pytest.approx((2 - 0.1 * expected[0], 3 - 0.1 * expected[1]), rel=1e-12)
    assert (w1.data_ptr(), w2.data_ptr()) == before
    assert len(passes) == 3  # the GNN's twice, the MLP's once


def test_retained_is_cached_where_nothing_is_perturbed():
    assert_same(trained(FGSAM, rho=0.0, reuse="retained", lr=0.05), trained(FGSAM, rho=0.0, lr=0.05))
    far = trained(FGSAM, rho=0.5, reuse="retained", lr=0.05)
    assert not torch.allclose(far.first, trained(FGSAM, rho=0.5, lr=0.05).first, atol=1e-4)


def halves(name, rank=None, group=None):
    """Weights after updates on all samples, or on the half of process ``rank``."""
    net = Net()
    rows = slice(None) if rank is None else slice(6 * rank, 6 * rank + 6)
    makers = {
        "fgsam": lambda p: FGSAM(p, lr=0.05, process_group=group),
        "fgsam+": lambda p: FGSAMPlus(p, lr=0.05, interval=3, process_group=group),
        "sam": lambda p: SAM(p, lr=0.05, process_group=group),
    }
    optimizer = makers[name](net.parameters())

    def gnn():
        hidden = (net.mixing @ (net.x @ net.first)).tanh()
        logits = net.mixing @ (hidden @ net.second) * net.only_gnn
        return torch.nn.functional.cross_entropy(logits[rows], net.y[rows])

    def mlp():
        return torch.nn.functional.cross_entropy(((net.x @ net.first).tanh() @ net.second)[rows], net.y[rows])

    losses = [float(optimizer.step(gnn, mlp)["loss"]) for _ in range(5)]
    return losses, weights(net)


NAMES = ("fgsam", "fgsam+", "sam")


def one_process(rank, store):
    group = torch.distributed.ProcessGroupGloo(store, rank, 2, timedelta(minutes=5))
    return {name: halves(name, rank, group) for name in NAMES}


def test_two_processes_on_half_the_samples_each_are_one_on_all():
    """Groups of torch.distributed are made for processes; threads can be their members, too, and start at once."""
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(partial(one_process, store=store), (0, 1)))
    for name in NAMES:
        losses, expected = halves(name)
        for process in found:
            assert process[name][0] == pytest.approx(losses, rel=1e-9)
            for w, v in zip(process[name][1], expected, strict=True):
                torch.testing.assert_close(w, v, atol=1e-9, rtol=1e-9)


def added(optimizer, **group):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], **group})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: FGSAM(p, reuse="twice"), "reuse is 'twice'"),
        (lambda p: FGSAMPlus(p, reuse="retained"), "FGSAM\\+ always uses the cached gradient"),
        (lambda p: FGSAM(p, rho=-1), "rho is -1"),
        (lambda p: FGSAM(p, rho=math.nan), "rho is nan"),
        (lambda p: FGSAM(p, lam=1.5), "lam is 1.5"),
        (lambda p: FGSAM(p, lam=-1.0, combine="additive"), "lam is -1.0"),
        (lambda p: FGSAM(p, as_released="book"), "as_released is 'book'"),
        (lambda p: FGSAMPlus(p, interval=0), "interval is 0"),
        (lambda p: FGSAMPlus(p, alpha=-0.1), "alpha is -0.1"),
        (lambda p: FGSAMPlus(p, lam=0.0, topology=True), "lam is 0"),
        (lambda p: FGSAMPlus(p, projection="rows"), "projection is 'rows'"),
        (lambda p: ESAM(p, gamma=0), "gamma is 0"),
        (lambda p: AESAM(p, num_steps=5, delta=1.0), "delta is 1.0"),
        (lambda p: SAM([]), "params is empty"),
        (lambda p: FGSAMPlus(p, interval=2.5), "interval is 2.5"),
        (lambda p: LookSAM(p, interval=True), "interval is True"),
        (lambda p: SAM([{"params": p, "perturb": "no"}]), "perturb of a group is 'no'"),
        (lambda p: added(SAM(p), rho=-1.0), "rho of a group is -1.0"),
        (lambda p: added(SAM(p), rho="small"), "rho of a group is 'small'"),
        (lambda p: SAM(p).add_param_group({"params": p}), "more than one parameter group"),
        (lambda p: SAM(p, rho="small"), "rho is 'small'; allowed is a finite number"),
        (lambda p: SAM(p, eps=None), "eps is None"),
        (lambda p: FGSAM(p, lam="half"), "lam is 'half'"),
        (lambda p: FGSAM(p, combine=""), "combine is ''"),
        (lambda p: FGSAMPlus(p, flatness_from=""), "flatness_from is ''"),
        (lambda p: LookSAM(p, alpha="0.7"), "alpha is '0.7'"),
        (lambda p: ESAM(p, beta="half"), "beta is 'half'"),
        (lambda p: AESAM(p, num_steps=5, delta="0.9"), "delta is '0.9'"),
        (lambda p: added(SAM(p), perturb=1), "perturb of a group is 1"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make([torch.nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize("base", [torch.optim.LBFGS, torch.optim.Adadelta, SAM, "adam", torch.nn.Linear])
def test_base_optimizers_that_cannot_be_are_refused(base):
    with pytest.raises(TypeError, match=f"base_optimizer (is )?.?{getattr(base, '__name__', base)}|Linear"):
        FGSAM([torch.nn.Parameter(torch.ones(1))], base)


def test_a_single_tensor_is_no_list_of_tensors():
    with pytest.raises(TypeError, match="params is a single tensor; give a list"):
        SAM(torch.nn.Parameter(torch.ones(2)))


BASES = ["ASGD", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


@pytest.mark.parametrize("base", BASES)
def test_lam_zero_is_any_base_optimizer(base):
    cls, plain = getattr(torch.optim, base), Net()
    optimizer = cls(plain.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        plain.gnn().backward()
        optimizer.step()
    assert_same(plain, trained(FGSAM, 4, base_optimizer=cls, rho=0.3, lam=0.0, lr=0.01))


def test_eps_of_the_base_is_given_in_a_group():
    optimizer = FGSAM([{"params": [torch.nn.Parameter(torch.ones(1))], "eps": 0.1}], eps=1e-3)
    assert (optimizer.eps, optimizer.base.param_groups[0]["eps"]) == (1e-3, 0.1)


def test_interval_may_be_of_numpy():
    assert FGSAMPlus([torch.nn.Parameter(torch.ones(1))], interval=np.int64(3)).interval == 3


def test_esam_names_a_loss_that_is_no_tensor():
    with pytest.raises(ValueError, match="gnn_loss returned float"):
        ESAM([torch.nn.Parameter(torch.ones(1))]).step(lambda: 0.5)


def test_loss_that_is_not_a_scalar_is_refused():
    net = Net()
    with pytest.raises(ValueError, match=r"gnn_loss returned \(5,\)"):
        FGSAM(net.parameters()).step(lambda: net.first.sum(1), net.mlp)


def test_sparse_gradient_is_refused():
    table = torch.nn.Embedding(4, 2, sparse=True)
    with pytest.raises(TypeError, match="sparse"):
        SAM(table.parameters()).step(lambda: table(torch.tensor([1])).sum())
