"""FGSAM, FGSAM+ and the SAM family against the equations written out once more, tensor by tensor, without sharing."""

import itertools
import math

import pytest
import torch
from plait_fgsam.baselines import AESAM, SAM, LookSAM
from plait_fgsam.fgsam import FGSAM, FGSAMPlus
from torch.nn.functional import cross_entropy


class Net(torch.nn.Module):
    """Two shared tensors, one that only the GNN uses, one that only the MLP uses, one that nobody uses."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(3)

        def tensor(*shape):
            return torch.nn.Parameter(torch.randn(*shape, generator=draw, dtype=torch.float64) / 2)

        self.first, self.second = tensor(5, 8), tensor(8, 3)
        self.of_gnn, self.of_mlp, self.unused = tensor(3), tensor(3), tensor(2)
        self.x = torch.randn(12, 5, generator=draw, dtype=torch.float64)
        self.y = torch.randint(3, (12,), generator=draw)
        self.mixing = torch.rand(12, 12, generator=draw, dtype=torch.float64).softmax(1)

    def gnn(self):
        hidden = (self.mixing @ self.x @ self.first).tanh()
        return cross_entropy(self.mixing @ hidden @ self.second * self.of_gnn, self.y)

    def mlp(self):
        return cross_entropy((self.x @ self.first).tanh() @ self.second + self.of_mlp, self.y)


GROUPS = {
    "all perturbed": lambda net: [{"params": list(net.parameters())}],
    "some perturbed": lambda net: [
        {"params": [net.first, net.of_gnn, net.unused]},
        {"params": [net.second, net.of_mlp], "perturb": False},
    ],
    "two radii": lambda net: [
        {"params": [net.second, net.of_mlp], "rho": 0.7},
        {"params": [net.first, net.of_gnn, net.unused]},
    ],
}


def gradient(loss, tensors):
    """Zero where a tensor takes no part."""
    found = torch.autograd.grad(loss(), tensors, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(tensors, found, strict=True)]


def gradient_at(loss, tensors, steps):
    before = [w.detach().clone() for w in tensors]
    with torch.no_grad():
        for w, e in zip(tensors, steps, strict=True):
            w.add_(e)
    found = gradient(loss, tensors)
    with torch.no_grad():
        for w, b in zip(tensors, before, strict=True):
            w.copy_(b)
    return found


def norm(tensors):
    return math.sqrt(sum(float((t * t).sum()) for t in tensors))


def along(g, rhos, inside, eps):
    """e_i = rho_i g_i / (|g|_S + eps) for i in S, else 0."""
    length = norm([g[i] for i in inside]) + eps
    return [rhos[i] / length * x if i in inside else torch.zeros_like(x) for i, x in enumerate(g)]


def orthogonal(a, b, whole):
    """a_i - (a_i . b_i) / (b_i . b_i) b_i, or with the dot products of all tensors."""
    dots = [(float((x * y).sum()), float((y * y).sum())) for x, y in zip(a, b, strict=True)]
    if whole:
        dots = [tuple(map(sum, zip(*dots, strict=True)))] * len(dots)
    return [x - (d / s * y if s > 0 else 0 * y) for x, y, (d, s) in zip(a, b, dots, strict=True)]


def fit(v, b, whole):
    """|b_i| / (|v_i| + 1e-8) v_i, or with the norms of all tensors."""
    lengths = [(norm([x]), norm([y])) for x, y in zip(v, b, strict=True)]
    if whole:
        lengths = [(norm(v), norm(b))] * len(v)
    return [short / (long + 1e-8) * x for x, (long, short) in zip(v, lengths, strict=True)]


def by_hand(groups, base, updates, direction):
    """``updates`` steps of the base optimizer with the gradients that ``direction`` computes."""
    tensors = [w for group in groups for w in group["params"]]
    taken = []
    for t in range(updates):
        gradients = direction(t, tensors)
        for w, g in zip(tensors, gradients, strict=True):
            w.grad = g
        base.step()
        taken.append(gradients)
    return taken


def assert_same_steps(optimizer, step, taken, net, other):
    """The optimizer's gradients are those taken by hand, and it ends at the same weights."""
    for expected in taken:
        step()
        tensors = [w for group in optimizer.param_groups for w in group["params"]]
        for w, g in zip(tensors, expected, strict=True):
            actual = torch.zeros_like(w) if w.grad is None else w.grad
            torch.testing.assert_close(actual, g, rtol=1e-9, atol=1e-12)
    for w, v in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(w, v, rtol=0, atol=1e-10)


BASES = {"sgd": (torch.optim.SGD, {"lr": 0.2, "momentum": 0.9}), "adam": (torch.optim.Adam, {"lr": 0.02})}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("grouping", GROUPS)
@pytest.mark.parametrize("combine", ["convex", "additive"])
def test_fgsam(combine, grouping, base):
    lam, rho, eps = 0.3, 0.4, 1e-12
    net, other = Net(), Net()
    cls, rates = BASES[base]
    optimizer = FGSAM(GROUPS[grouping](net), cls, rho=rho, lam=lam, combine=combine, **rates)
    groups = GROUPS[grouping](other)
    rhos, inside = radii(groups, rho)

    def direction(t, tensors):
        g_gnn = gradient(other.gnn, tensors)
        g_s = gradient_at(other.mlp, tensors, along(g_gnn, rhos, inside, eps))
        return combined(combine, lam, g_gnn, g_s)

    taken = by_hand(groups, cls([{"params": g["params"]} for g in groups], **rates), 6, direction)
    assert_same_steps(optimizer, lambda: optimizer.step(net.gnn, net.mlp), taken, net, other)


def radii(groups, rho):
    flat = [(g.get("rho", rho), g.get("perturb", True)) for g in groups for _ in g["params"]]
    return [r for r, _ in flat], [i for i, (_, perturbed) in enumerate(flat) if perturbed]


def combined(combine, lam, g_gnn, g_s):
    if combine == "convex":
        return [(1 - lam) * a + lam * b for a, b in zip(g_gnn, g_s, strict=True)]
    return [lam * a + b for a, b in zip(g_gnn, g_s, strict=True)]


CHOICES = list(itertools.product(["combined", "perturbed"], [False, True], ["tensor", "global"], [1, 2, 3]))


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("grouping", GROUPS)
@pytest.mark.parametrize("combine", ["convex", "additive"])
@pytest.mark.parametrize(("flatness_from", "topology", "projection", "interval"), CHOICES)
def test_fgsam_plus(flatness_from, topology, projection, interval, combine, grouping, base):
    lam, rho, alpha, eps, whole = 0.3, 0.4, 0.6, 1e-8, projection == "global"
    net, other = Net(), Net()
    cls, rates = BASES[base]
    options = {"flatness_from": flatness_from, "topology": topology, "projection": projection, "interval": interval}
    optimizer = FGSAMPlus(
        GROUPS[grouping](net), cls, rho=rho, lam=lam, alpha=alpha, combine=combine, **options, **rates
    )
    groups = GROUPS[grouping](other)
    rhos, inside = radii(groups, rho)
    kept = {}

    def only(parts):
        return [parts[i] for i in inside]

    def direction(t, tensors):
        if t % interval == 0:
            g_gnn, g_mlp = gradient(other.gnn, tensors), gradient(other.mlp, tensors)
            g_s = gradient_at(other.mlp, tensors, along(g_gnn, rhos, inside, eps))
            g = combined(combine, lam, g_gnn, g_s)
            kept["v"] = orthogonal(only(g if flatness_from == "combined" else g_s), only(g_mlp), whole)
            kept["u"] = orthogonal(only(g_gnn), only(g_mlp), whole)
            return g
        g_mlp = gradient(other.mlp, tensors)
        g = list(g_mlp)
        weight = lam if combine == "additive" else (1 - lam) / lam
        v, u = fit(kept["v"], only(g_mlp), whole), fit(kept["u"], only(g_mlp), whole)
        for i, v_hat, u_hat in zip(inside, v, u, strict=True):
            g[i] = g_mlp[i] + alpha * v_hat
            if topology:
                g[i] = g[i] + weight * (g_mlp[i] + u_hat)
        return g

    taken = by_hand(groups, cls([{"params": g["params"]} for g in groups], **rates), 7, direction)
    assert_same_steps(optimizer, lambda: optimizer.step(net.gnn, net.mlp), taken, net, other)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["sam", "asam", "looksam", "ae-sam"])
def test_baselines(method, base):
    rho, eps, updates = 0.4, 1e-12, 9
    net, other = Net(), Net()
    cls, rates = BASES[base]
    used = ("first", "second", "of_gnn")
    optimizer = {
        "sam": lambda p: SAM(p, cls, rho=rho, **rates),
        "asam": lambda p: SAM(p, cls, rho=rho, adaptive=True, **rates),
        "looksam": lambda p: LookSAM(p, cls, rho=rho, interval=3, alpha=0.6, **rates),
        "ae-sam": lambda p: AESAM(p, cls, rho=rho, num_steps=updates, delta=0.8, **rates),
    }[method]([getattr(net, n) for n in used])
    groups = [{"params": [getattr(other, n) for n in used]}]
    state = {"mean": 0.0, "variance": 0.0}
    exact = []

    def direction(t, tensors):
        g = gradient(other.gnn, tensors)
        if method == "asam":  # e_i = s w_i^2 g_i, s = rho / | |w| g |
            length = norm([w.detach().abs() * x for w, x in zip(tensors, g, strict=True)]) + eps
            e = [rho / length * w.detach() ** 2 * x for w, x in zip(tensors, g, strict=True)]
        else:
            e = along(g, [rho] * len(g), range(len(g)), eps)
        exact.append(takes_sam(t, norm(g) ** 2))
        if exact[-1]:
            g_s = gradient_at(other.gnn, tensors, e)
            state["v"] = orthogonal(g_s, g, whole=False)
            return g_s
        if method == "looksam":
            return [x + 0.6 * part for x, part in zip(g, fit(state["v"], g, whole=False), strict=True)]
        return g

    def takes_sam(t, square):
        if method == "looksam":
            return t % 3 == 0
        if method != "ae-sam":
            return True
        state["mean"] = 0.8 * state["mean"] + 0.2 * square
        state["variance"] = 0.8 * state["variance"] + 0.2 * (square - state["mean"]) ** 2
        done = t / updates
        return square >= state["mean"] + (-done + (1 - done)) * math.sqrt(state["variance"])

    taken = by_hand(groups, cls([{"params": g["params"]} for g in groups], **rates), updates, direction)
    seen = []
    assert_same_steps(optimizer, lambda: seen.append(optimizer.step(net.gnn)["exact"]), taken, net, other)
    assert seen == exact
