"""Static and adaptive baselines: hand-computed values, limits, and training by entropy."""

import copy
import math

import plait
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_wemoe.adaptation import entropy, minimise_entropy
from plait_wemoe.baselines import adaptive, static
from plait_wemoe.states import check_states, digest
from torch import nn
from torch.nn import functional as F

BASE = {
    "a.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "a.bias": torch.tensor([0.5, -0.5]),
    "count": torch.tensor(7),
}


def moved(*changes):
    """Experts whose weights differ from the base by constants."""
    return {f"t{i}": {n: v + c if v.is_floating_point() else v for n, v in BASE.items()} for i, c in enumerate(changes)}


def test_average_leaves_the_base_out_and_integers_alone():
    merged = static.simple_average(BASE, moved(1.0, 3.0))
    assert torch.allclose(merged["a.weight"], BASE["a.weight"] + 2)
    assert merged["count"] == 7


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=4), st.floats(-1, 2))
def test_task_arithmetic_is_linear_in_the_task_vectors(changes, scaling):
    merged = static.task_arithmetic(BASE, moved(*changes), scaling)
    assert torch.allclose(merged["a.bias"], BASE["a.bias"] + scaling * sum(changes), atol=1e-5)


def test_ties_hand_computed():
    vectors = torch.tensor([[1, -2, 0.1, 0.2, 5], [-1.5, -1, 0.3, -0.1, 4]])
    for size in (1, 2, 5):  # in pieces or whole

        def merged(*facts, size=size):
            rule = static.ties_rule(lambda: iter(vectors.split(size, dim=1)), *facts)
            return torch.cat([rule(piece) for piece in vectors.split(size, dim=1)])

        assert torch.allclose(merged(40), torch.tensor([-1.5, -3, 0, 0, 9]))
        assert torch.allclose(merged(0.4), torch.tensor([-1.5, -3, 0, 0, 9]))
        assert torch.allclose(merged(40, "mean"), torch.tensor([-1.5, -1.5, 0, 0, 4.5]))
        assert torch.allclose(merged(40, "max"), torch.tensor([-1.5, -2, 0, 0, 5]))
    with pytest.raises(ValueError, match="merge_function is 'median'"):
        static.ties(BASE, moved(1.0), 0.3, 40, "median")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.floats(0.01, 100), st.integers(0, 2**16), st.integers(1, 64))
def test_the_thresholds_of_ties_are_order_statistics(tasks, n, keep, seed, size):
    draw = torch.Generator().manual_seed(seed)
    # Magnitudes of all sizes, some of them equal, some 0.
    vectors = torch.randn(tasks, n, generator=draw) * 10.0 ** torch.randint(-30, 30, (tasks, n), generator=draw)
    vectors[torch.rand(tasks, n, generator=draw) < 0.2] = 0
    vectors[:, ::3] = vectors[:, :1].clone()
    percentage = keep if keep > 1 else 100 * keep
    rank = max(1, n - math.floor(n * percentage / 100))
    found = static.ties_thresholds(lambda: iter(vectors.split(size, dim=1)), keep)
    assert torch.equal(found, vectors.abs().kthvalue(rank, dim=1, keepdim=True).values)


def test_ties_of_one_fully_kept_expert_is_task_arithmetic():
    experts = moved(0.7)
    merged, expected = static.ties(BASE, experts, 0.3, 100), static.task_arithmetic(BASE, experts, 0.3)
    assert all(torch.allclose(merged[name], expected[name]) for name in BASE)


def test_dare_drops_and_rescales_and_keeps_the_mean():
    base = {"w": torch.zeros(20_000)}
    experts = {"t": {"w": torch.ones(20_000)}}

    def run(rate):
        g = torch.Generator().manual_seed(0)
        return static.dare(base, experts, rate, static.arithmetic(1.0), g)["w"]

    thinned = run(0.75)
    assert set(thinned.unique().tolist()) == {0.0, 4.0}
    assert thinned.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(run(0.0), experts["t"]["w"])
    assert torch.equal(run(0.75), thinned)
    with pytest.raises(ValueError, match="drop_rate is 1"):
        run(1.0)


def linear_pool(T=3, n=200, seed=0):
    """One linear layer, experts that fit other targets, and each task's inputs."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(4, 3))
    experts = [copy.deepcopy(base) for _ in range(T)]
    for expert in experts:
        nn.init.normal_(expert[0].weight)
    inputs = {f"t{i}": torch.randn(n, 4) @ torch.randn(4, 4) for i in range(T)}
    return base, {f"t{i}": e for i, e in enumerate(experts)}, inputs


def test_regmean_without_shrinkage_solves_the_least_squares_problem():
    base, experts, inputs = linear_pool()
    states = {t: e.state_dict() for t, e in experts.items()}
    grams = {t: static.gram_matrices(experts[t], [x[:150], x[150:]]) for t, x in inputs.items()}
    merged = static.regmean(base.state_dict(), states, grams, off_diagonal=1.0, ridge=1e-9)["0.weight"]
    stacked = torch.cat(list(inputs.values()))
    targets = torch.cat([x @ states[t]["0.weight"].T for t, x in inputs.items()])
    expected = torch.linalg.lstsq(stacked.double(), targets.double()).solution.T.float()
    assert torch.allclose(merged, expected, atol=1e-3)


def test_regmean_of_diagonal_inputs_is_a_weighted_average():
    base, experts, _ = linear_pool(2)
    states = {t: e.state_dict() for t, e in experts.items()}
    grams = {"t0": {"0": torch.eye(4)}, "t1": {"0": 3 * torch.eye(4)}}
    merged = static.regmean(base.state_dict(), states, grams)
    assert torch.allclose(
        merged["0.weight"], states["t0"]["0.weight"] / 4 + 3 * states["t1"]["0.weight"] / 4, atol=1e-4
    )
    assert torch.allclose(merged["0.bias"], (states["t0"]["0.bias"] + states["t1"]["0.bias"]) / 2)


def test_regmean_of_equal_experts_is_that_expert_even_where_inputs_do_not_span_the_space():
    base, experts, _ = linear_pool(2)
    state = experts["t0"].state_dict()
    rank_one = {"0": torch.outer(torch.arange(4.0), torch.arange(4.0))}
    merged = static.regmean(base.state_dict(), {"a": state, "b": state}, {"a": rank_one, "b": rank_one}, ridge=1e-3)
    assert torch.allclose(merged["0.weight"], state["0.weight"], atol=1e-3)


def test_fisher_information_by_hand():
    layer, head = nn.Linear(2, 3, bias=False), nn.Identity()
    x = torch.randn(4, 2)
    found = static.fisher_information(layer, head, [x])["weight"]
    # d/dz Σ √p_c log p_c with √p constant = √p − p · Σ √p, summed over the batch before squaring
    p = F.softmax(layer(x), dim=-1)
    by_logit = p.sqrt() - p * p.sqrt().sum(dim=-1, keepdim=True)
    assert torch.allclose(found, (by_logit.T @ x) ** 2 / 4 + 1e-6, atol=1e-6)


def test_fisher_merge_follows_the_informative_expert():
    experts = moved(0.0, 1.0)
    information = {
        "t0": {"a.weight": torch.full((2, 2), 1e-6), "a.bias": torch.full((2,), 1.0)},
        "t1": {"a.weight": torch.full((2, 2), 1.0), "a.bias": torch.full((2,), 1e-6)},
    }
    merged = static.fisher(BASE, experts, information)
    assert torch.allclose(merged["a.weight"], experts["t1"]["a.weight"], atol=1e-4)
    assert torch.allclose(merged["a.bias"], experts["t0"]["a.bias"], atol=1e-4)
    equal = static.fisher(BASE, experts, dict.fromkeys(experts, information["t0"]))
    assert torch.allclose(equal["a.weight"], BASE["a.weight"] + 0.5)


# ------------------------------------------------------------------------------------------- training


def test_entropy_values():
    assert entropy(torch.zeros(2, 4)).item() == pytest.approx(1.386294, abs=1e-5)
    assert entropy(torch.tensor([[2.0, 0.0]])).item() == pytest.approx(0.365334, abs=1e-5)
    assert entropy(torch.randn(50, 7)).item() <= math.log(7)
    with pytest.raises(ValueError, match="logits have shape"):
        entropy(torch.zeros(3))


class Repeated:
    """The same images in every step."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, step):
        return self.images


def toy(T=2):
    base, experts, inputs = linear_pool(T, n=16)
    heads = {t: nn.Linear(3, 4).requires_grad_(False) for t in experts}
    states = {t: e.state_dict() for t, e in experts.items()}
    return base.requires_grad_(False), states, heads, {t: Repeated(x) for t, x in inputs.items()}


def test_accumulated_and_summed_losses_give_the_same_gradients():
    base, states, heads, batches = toy()
    found = []
    for accumulate in (True, False):
        state, _ = adaptive.adamerging(
            base, states, heads, batches, num_steps=3, learning_rate=0.1, grad_accumulate=accumulate
        )
        found.append(state["0.weight"])
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("level", ["task", "layer"])
def test_adamerging_lowers_the_entropy_and_starts_as_task_arithmetic(level):
    base, states, heads, batches = toy()
    start, _ = adaptive.adamerging(base, states, heads, batches, level=level, num_steps=0)
    expected = static.task_arithmetic(base.state_dict(), states, 0.3)
    assert all(torch.allclose(start[name], expected[name], atol=1e-6) for name in expected)
    _, history = adaptive.adamerging(base, states, heads, batches, level=level, num_steps=40, learning_rate=0.05)
    totals = [sum(step) for step in zip(*history.entropies.values(), strict=True)]
    assert totals[-1] < totals[0]


@pytest.mark.parametrize("method", [adaptive.concrete_task_arithmetic, adaptive.concrete_adamerging])
def test_concrete_masks_are_reproducible_and_train(method):
    base, states, heads, batches = toy()
    one, history = method(base, states, heads, batches, num_steps=30, learning_rate=0.1, seed=1)
    two, _ = method(base, states, heads, batches, num_steps=30, learning_rate=0.1, seed=1)
    other, _ = method(base, states, heads, batches, num_steps=30, learning_rate=0.1, seed=2)
    assert torch.equal(one["0.weight"], two["0.weight"])
    assert not torch.equal(one["0.weight"], other["0.weight"])
    totals = [sum(step) for step in zip(*history.entropies.values(), strict=True)]
    assert sum(totals[-5:]) < sum(totals[:5])


def test_a_concrete_mask_has_mean_one_and_follows_its_logits():
    mask = adaptive.ConcreteMask({"w": torch.Size([2000])})
    with torch.no_grad():
        mask.logits[0][:1000] = 6.0
        mask.logits[0][1000:] = -6.0
    drawn = mask.sample(torch.Generator().manual_seed(0))["w"]
    assert drawn.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert drawn[:1000].mean() > 1.9


def train(parameter, batches, heads=None, **options):
    heads = heads or {"t": nn.Identity()}
    return minimise_entropy([parameter], lambda step: lambda x: x * parameter, heads, batches, **options)


def test_resumed_training_ends_where_an_unbroken_one_does(tmp_path):
    x = torch.randn(16, 3)

    class Broken(Repeated):
        def __getitem__(self, step):
            if step == 7:
                raise KeyboardInterrupt
            return self.images * (1 + step % 3)

    class Whole(Repeated):
        def __getitem__(self, step):
            return self.images * (1 + step % 3)

    options = {"num_steps": 10, "learning_rate": 0.1, "learning_rate_schedule": "cosine", "checkpoint_every": 3}
    expected = nn.Parameter(torch.ones(3))
    train(expected, {"t": Whole(x)}, **options)
    saved = plait.Run(folder=tmp_path).loop("test", "train")
    broken = nn.Parameter(torch.ones(3))
    with pytest.raises(KeyboardInterrupt):
        train(broken, {"t": Broken(x)}, checkpoint=saved, **options)
    fresh = nn.Parameter(torch.ones(3))
    history = train(fresh, {"t": Whole(x)}, checkpoint=saved, **options)
    assert torch.equal(fresh, expected)
    assert len(history.entropies["t"]) == 10


def test_a_loss_that_is_not_finite_stops_with_step_and_task_and_the_last_finite_parameters():
    class Bad(Repeated):
        def __getitem__(self, step):
            return self.images if step < 2 else self.images * float("nan")

    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(FloatingPointError, match="task 't' is nan in step 2"):
        train(parameter, {"t": Bad(torch.randn(4, 3))}, learning_rate=0.1)
    two_steps = nn.Parameter(torch.ones(3))
    assert torch.isfinite(parameter).all()
    assert not torch.equal(parameter, two_steps)


def test_collapse_is_reported_and_confident_varied_predictions_are_not():
    one_class = {"t": Repeated(torch.tensor([[50.0, 0.0, 0.0]]).repeat(8, 1))}
    assert "may have collapsed" in train(nn.Parameter(torch.ones(3)), one_class, num_steps=3).warnings[0]
    varied = {"t": Repeated(50 * torch.eye(3).repeat(3, 1))}
    assert train(nn.Parameter(torch.ones(3)), varied, num_steps=3).warnings == []


def test_tasks_without_head_or_data_are_named():
    with pytest.raises(KeyError, match="other"):
        train(nn.Parameter(torch.ones(3)), {"t": Repeated(torch.ones(2, 3)), "other": Repeated(torch.ones(2, 3))})


def test_digests_and_unchanged_experts():
    assert digest(BASE) == digest(dict(reversed(BASE.items())))
    assert digest(BASE) != digest(moved(1e-3)["t0"])
    assert check_states(BASE, {"same": dict(BASE), **moved(1.0)}) == ["same"]
