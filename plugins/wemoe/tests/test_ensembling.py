"""The merged forward pass: hand-computed values, all strategies against the plain loop, gradients, memory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_wemoe.ensembling import (
    EnsembledLinear,
    SparseDeltas,
    choose_compute,
    group_coefficients,
    store_deltas,
)
from plait_wemoe.pruning import prune
from plait_wemoe.routing import Gate, Router, position_code
from torch import nn


def layer_of(B, S, T, d, h, storage="dense", bias=True, seed=0, prune_ratio=None, batch_axis=0):
    g = torch.Generator().manual_seed(seed)
    deltas, bias_deltas = torch.randn(T, h, d, generator=g), torch.randn(T, h, generator=g)
    deltas = torch.stack([prune(delta, prune_ratio) for delta in deltas])
    linear = nn.Linear(d, h, bias=bias).requires_grad_(False)
    gate = Gate(Router(d, T), None, batch_axis)
    rank = min(d, h)
    layer = EnsembledLinear(linear, store_deltas(deltas, storage, rank), bias_deltas if bias else None, gate)
    x, R = torch.randn(B, S, d, generator=g), torch.randn(B, T, generator=g)
    return layer, x, R


def value_and_gradients(layer, x, R, compute):
    layer.compute = compute
    x, R = x.clone().requires_grad_(True), R.clone().requires_grad_(True)
    layer.gate.coefficients = R
    y = layer(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    return y.detach(), x.grad, R.grad


def test_hand_computed_merge_of_weights_not_of_outputs():
    gate = Gate(Router(1, 2), None, 0)
    gate.coefficients = torch.tensor([[0.5, 0.25]])
    layers = []
    for base, experts in ((1.0, (3.0, 1.0)), (2.0, (2.0, 1.0))):
        linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(linear.weight, base)
        deltas = (torch.tensor(experts) - base).view(2, 1, 1)
        layers.append(EnsembledLinear(linear, store_deltas(deltas, "dense"), None, gate))
    out = layers[1](torch.relu(layers[0](torch.tensor([[[3.0]]]))))
    assert out.item() == pytest.approx(10.5)  # mixing the experts' outputs would give 11.25


@pytest.mark.parametrize("compute", ["merge", "activation", "group", "auto"])
@pytest.mark.parametrize("storage", ["dense", "sparse", "lowrank"])
@pytest.mark.parametrize("bias", [True, False])
@settings(max_examples=8, deadline=None)
@given(B=st.integers(1, 5), S=st.integers(1, 6), T=st.integers(1, 5), d=st.integers(1, 9), h=st.integers(1, 9))
def test_every_strategy_equals_the_plain_loop(compute, storage, bias, B, S, T, d, h):
    layer, x, R = layer_of(B, S, T, d, h, storage, bias)
    expected = value_and_gradients(layer, x, R, "reference")
    for got, want in zip(value_and_gradients(layer, x, R, compute), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-4)


def test_tiles_do_not_change_the_result(monkeypatch):
    layer, x, R = layer_of(4, 5, 3, 8, 33, "sparse", prune_ratio=0.7)
    whole = value_and_gradients(layer, x, R, "merge")
    monkeypatch.setattr("plait_wemoe.ensembling.TILE_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr("plait_wemoe.ensembling.TILE_ROWS", 7)
    monkeypatch.setattr("plait_wemoe.ensembling.TILE_SAMPLES", 3)
    for got, want in zip(value_and_gradients(layer, x, R, "merge"), whole, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_gradients_by_finite_differences():
    layer, x, R = layer_of(2, 3, 2, 3, 4)
    layer, x, R = layer.double(), x.double().requires_grad_(True), R.double().requires_grad_(True)
    layer.merge_dtype = torch.float64
    layer.compute = "merge"

    def run(x, R):
        layer.gate.coefficients = R
        return layer(x)

    assert torch.autograd.gradcheck(run, (x, R))


def test_backward_keeps_no_per_sample_weight():
    B, S, d, h, T = 16, 2, 32, 64, 3
    layer, x, R = layer_of(B, S, T, d, h)
    layer.compute = "merge"
    layer.gate.coefficients = R.requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x.requires_grad_(True))
    assert max(kept) < B * d * h


def test_sparse_storage_densifies_to_the_pruned_vectors():
    dense = torch.stack([prune(torch.randn(7, 5), 0.6) for _ in range(3)])
    sparse = SparseDeltas.from_dense(dense)
    assert torch.equal(sparse.dense(), dense)
    assert torch.equal(sparse.rows(2, 5, torch.float32), dense[:, 2:5].flatten(1))
    assert len(sparse.values) == int((dense != 0).sum())
    empty = SparseDeltas.from_dense(torch.zeros(2, 3, 3))
    assert torch.equal(empty.dense(), torch.zeros(2, 3, 3))


def test_low_rank_of_a_low_rank_vector_is_exact_and_of_another_is_the_best_approximation():
    low = torch.randn(2, 8, 2) @ torch.randn(2, 2, 6)
    assert torch.allclose(store_deltas(low, "lowrank", 2).dense(), low, atol=1e-5)
    full = torch.randn(1, 8, 6)
    rest = (store_deltas(full, "lowrank", 3).dense() - full).norm()
    assert torch.allclose(rest, torch.linalg.svdvals(full)[0, 3:].norm(), rtol=1e-4)


def test_one_coefficient_vector_for_all_is_a_plain_layer():
    layer, x, R = layer_of(3, 4, 2, 5, 6)
    layer.gate.coefficients = R[0]
    plain = layer(x)
    layer.gate.coefficients = R[:1].expand(3, -1)
    assert torch.allclose(layer(x), plain, atol=1e-5)


def test_samples_axis_second_gives_the_transpose():
    layer, x, R = layer_of(3, 4, 2, 5, 6)
    layer.gate.coefficients = R
    first = layer(x)
    layer.gate.batch_axis = 1
    assert torch.allclose(layer(x.transpose(0, 1)), first.transpose(0, 1), atol=1e-6)


def test_tokens_on_a_grid_keep_their_places():
    layer, x, R = layer_of(2, 12, 3, 5, 6)
    layer.gate.coefficients = R
    assert torch.allclose(layer(x.view(2, 3, 4, 5)), layer(x).view(2, 3, 4, 6), atol=1e-6)


def test_merging_in_bfloat16_activations_keeps_small_task_vectors():
    layer, x, R = layer_of(2, 3, 4, 8, 8)
    layer.deltas.values.mul_(1e-4)
    layer.gate.coefficients = R
    exact = layer.double()(x.double())
    layer.float()
    assert (layer(x.bfloat16()).double() - exact).abs().max() < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16


def test_groups_with_radius_zero_are_equal_rows_and_with_radius_are_near_ones():
    R = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 1.0], [0.05, 1.0]])
    centres, group = group_coefficients(R, 0.0)
    assert len(centres) == 3
    assert group[0] == group[2] != group[3]
    assert torch.equal(R[centres[group]], R)
    centres, group = group_coefficients(R, 0.1)
    assert len(centres) == 2
    assert (R - R[centres[group]]).norm(dim=1).max() <= 0.1


def test_group_error_is_within_its_bound():
    layer, x, R = layer_of(6, 3, 2, 5, 4, bias=False)
    R = 0.01 * R
    layer.gate.coefficients, layer.compute, layer.group_radius = R, "group", 0.02
    approximate = layer(x)
    layer.compute = "reference"
    bound = 0.02 * layer.deltas.values.norm() * x.norm(dim=-1)
    assert ((approximate - layer(x)).norm(dim=-1) <= bound).all()


def test_automatic_choice():
    assert choose_compute(1) == "activation"
    assert choose_compute(50) == "merge"


def test_wrong_storage_is_named():
    with pytest.raises(ValueError, match="delta_storage is 'zip'"):
        store_deltas(torch.zeros(1, 1, 1), "zip")
    with pytest.raises(ValueError, match="delta_rank is None"):
        store_deltas(torch.zeros(1, 1, 1), "lowrank")


# --------------------------------------------------------------------------------- router and pruning


def test_pooling_before_the_last_layer_equals_pooling_after_it_and_not_before_the_relu():
    torch.manual_seed(0)
    router, x = Router(8, 3, init_std=1.0), torch.randn(4, 5, 8)
    assert torch.allclose(router(x), router.tokens(x).mean(dim=1), atol=1e-5)
    assert not torch.allclose(router(x), router.tokens(x.mean(dim=1, keepdim=True))[:, 0], atol=1e-2)
    shallow = Router(8, 3, depth=1, init_std=1.0)
    assert torch.allclose(shallow(x), shallow.tokens(x).mean(dim=1), atol=1e-5)


def test_masked_tokens_do_not_count():
    router, x = Router(8, 3, init_std=1.0), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    got = router(x, mask)
    assert torch.allclose(got[0], router(x[:1, :3])[0], atol=1e-6)
    assert torch.allclose(got[1], router(x[1:])[0], atol=1e-6)


@pytest.mark.parametrize(
    ("width", "depth", "expected"), [(768, 2, 596_744), (768, 1, 6_152), (1024, 2, 1_057_800), (768, 0, 8)]
)
def test_published_router_sizes(width, depth, expected):
    assert sum(p.numel() for p in Router(width, 8, depth).parameters()) == expected


def test_position_code():
    assert torch.allclose(position_code(1, 4), torch.tensor([0.8415, 0.0100, 0.5403, 0.9999]), atol=1e-4)
    with pytest.raises(ValueError, match="position_encoding_dim is 3"):
        position_code(0, 3)


TAU = torch.tensor([0.1, -0.4, 0.2, 0.3, -0.05, 0.6, -0.7, 0.8, 0.9, -1.0])


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.9, [9]), (0.5, [5, 6, 7, 8, 9]), (0.0, [0, 1, 2, 3, 5, 6, 7, 8, 9]), (1.0, [])]
)
def test_pruning_keeps_the_largest_unscaled(ratio, kept):
    pruned = prune(TAU, ratio)
    assert pruned.nonzero().flatten().tolist() == kept
    assert torch.equal(pruned[kept], TAU[kept])
    assert prune(TAU, None) is TAU


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.1, -0.1, 0.5, -2.0, 3.0]), min_size=1, max_size=40),
    st.sampled_from([0, 0.1, 0.3, 0.5, 0.9, 1]),
)
def test_pruning_selects_what_lies_above_the_interpolated_quantile(values, ratio):
    """Interpolated in float64 at the float32 rank; releases of ``torch.quantile`` round the rank differently."""
    tau = torch.tensor(values)
    ordered = tau.abs().double().sort().values
    rank = float(np.float32(ratio) * np.float32(len(values) - 1))
    below, above = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    quantile = below + (rank - math.floor(rank)) * (above - below)
    assert torch.equal(prune(tau, ratio), torch.where(tau.abs() > quantile, tau, 0))


def test_the_rank_is_computed_in_float32():
    """0.99 × 4,194,303 is 4,152,359.97; in float32 it is 4,152,360."""
    kept = prune(torch.arange(4_194_304.0), 0.99).nonzero()
    assert kept[0] == 4_152_361


def test_pruning_ratio_outside_its_range():
    with pytest.raises(ValueError, match=r"prune_ratio is 1\.5"):
        prune(TAU, 1.5)
