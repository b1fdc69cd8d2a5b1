"""A linear layer whose weights are W₀ + Σ_t r_t Δ_t, with other coefficients r for every sample: (3) of
:mod:`plait_wemoe.wemoe`.

The same output can be computed in several ways that differ in arithmetic and memory traffic:

* ``merge``: merge all samples' weights with one matrix product, then one batched product. Done tile by
  tile over output rows and recomputed in the backward pass, so no per-sample weight is ever kept.
* ``activation``: x W₀ᵀ + Σ_t r_t (x Δ_tᵀ); no weight is merged. T+1 times the arithmetic of a plain
  layer, best for a single token per sample.
* ``group``: samples whose coefficients agree (within a radius) share one merged weight.
* ``reference``: one sample after the other; what the others are measured against.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from plait_wemoe.routing import Gate, samples_first

COMPUTE = ("auto", "merge", "activation", "group", "reference")
STORAGE = ("dense", "sparse", "lowrank")
# A tile of merged weights: what stays in a core's cache but is not too thin for matrix products, neither in output
# rows nor in samples; on a GPU, what fills its units.
TILE_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
TILE_ROWS, TILE_SAMPLES = 96, 8


class DenseDeltas(nn.Module):
    """Task vectors of one weight matrix, (T, out, in), every entry stored."""

    def __init__(self, deltas: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", deltas.contiguous())
        self.num_experts, self.shape = deltas.shape[0], deltas.shape[1:]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start…stop of every expert's matrix, (T, (stop − start)·in)."""
        return self.values[:, start:stop].flatten(1).to(dtype)

    def merged(self, base: Tensor, coefficients: Tensor) -> Tensor:
        """W₀ + Σ_t r_t Δ_t for one coefficient vector (T,), in the type of the coefficients."""
        values = self.values.to(coefficients.dtype).flatten(1)
        return torch.addmv(base.to(coefficients.dtype).flatten(), values.T, coefficients).view(base.shape)

    def project(self, x: Tensor) -> Tensor:
        """x Δ_tᵀ for every expert, (B, S, in) → (B, S, T, out)."""
        return F.linear(x, self.values.to(x.dtype).flatten(0, 1)).unflatten(-1, (self.num_experts, -1))

    def dense(self) -> Tensor:
        return self.values


class SparseDeltas(nn.Module):
    """Task vectors of one weight matrix, only entries other than 0, in the order of their flat position.

    In this order the entries that a tile of rows needs are one slice, whatever the number of experts.
    """

    def __init__(self, positions: Tensor, experts: Tensor, values: Tensor, num_experts: int, shape: torch.Size) -> None:
        super().__init__()
        order = torch.argsort(positions, stable=True)
        self.register_buffer("positions", positions[order].to(torch.int32))
        self.register_buffer("experts", experts[order].to(torch.uint8 if num_experts <= 256 else torch.int32))
        self.register_buffer("values", values[order])
        self.num_experts, self.shape = num_experts, shape

    @classmethod
    def from_dense(cls, deltas: Tensor) -> SparseDeltas:
        experts, positions = deltas.flatten(1).nonzero(as_tuple=True)
        return cls(positions, experts, deltas.flatten(1)[experts, positions], deltas.shape[0], deltas.shape[1:])

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        width = self.shape[1]
        ends = torch.tensor([start * width, stop * width], device=self.positions.device)
        first, last = torch.searchsorted(self.positions, ends.to(torch.int32)).tolist()
        tile = self.values.new_zeros(self.num_experts, (stop - start) * width)
        tile[self.experts[first:last].long(), self.positions[first:last].long() - start * width] = self.values[
            first:last
        ]
        return tile.to(dtype)

    def merged(self, base: Tensor, coefficients: Tensor) -> Tensor:
        weighted = self.values.to(coefficients.dtype) * coefficients[self.experts.long()]
        flat = base.to(coefficients.dtype).flatten().index_add(0, self.positions, weighted)
        return flat.view(base.shape)

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype).flatten(0, 1)).unflatten(-1, (self.num_experts, -1))

    def dense(self) -> Tensor:
        return self.rows(0, self.shape[0], self.values.dtype).unflatten(1, self.shape)


class LowRankDeltas(nn.Module):
    """Task vectors of one weight matrix as products Δ_t ≈ U_t V_t: an approximation (truncated SVD).

    Attributes:
        up: (out, T·k), down: (T·k, in).
    """

    def __init__(self, up: Tensor, down: Tensor, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("up", up.contiguous())
        self.register_buffer("down", down.contiguous())
        self.num_experts, self.rank = num_experts, down.shape[0] // num_experts
        self.shape = torch.Size((up.shape[0], down.shape[1]))

    @classmethod
    def from_dense(cls, deltas: Tensor, rank: int) -> LowRankDeltas:
        rank = min(rank, *deltas.shape[1:])
        left, singular, right = torch.linalg.svd(deltas, full_matrices=False)
        up = left[..., :rank] * singular[:, None, :rank]  # (T, out, k)
        return cls(up.movedim(0, 1).flatten(1), right[:, :rank].flatten(0, 1), deltas.shape[0])

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        up = self.up[start:stop].unflatten(1, (self.num_experts, -1)).movedim(1, 0)
        return torch.bmm(up, self.down.unflatten(0, (self.num_experts, -1))).flatten(1).to(dtype)

    def merged(self, base: Tensor, coefficients: Tensor) -> Tensor:
        scale = coefficients.repeat_interleave(self.rank)
        return torch.addmm(base.to(scale.dtype), self.up.to(scale.dtype) * scale, self.down.to(scale.dtype))

    def ensembled(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """Σ_t r_t x (U_t V_t)ᵀ as two plain products, (B, S, in) → (B, S, out)."""
        scale = coefficients.repeat_interleave(self.rank, dim=1)[:, None].to(x.dtype)
        return F.linear(F.linear(x, self.down.to(x.dtype)) * scale, self.up.to(x.dtype))

    def dense(self) -> Tensor:
        return self.rows(0, self.shape[0], self.up.dtype).unflatten(1, self.shape)


Deltas = DenseDeltas | SparseDeltas | LowRankDeltas


def store_deltas(deltas: Tensor, storage: str, rank: int | None = None) -> Deltas:
    """Keep (T, out, in) task vectors ``dense``, ``sparse`` or ``lowrank``."""
    if storage == "lowrank":
        if not rank or rank < 1:
            raise ValueError(f"delta_rank is {rank}; low-rank storage needs a whole number from 1 on")
        return LowRankDeltas.from_dense(deltas, rank)
    if storage not in STORAGE:
        raise ValueError(f"delta_storage is {storage!r}; allowed is one of {', '.join(STORAGE)}")
    return SparseDeltas.from_dense(deltas) if storage == "sparse" else DenseDeltas(deltas)


class EnsembledLinear(nn.Linear):
    """An ``nn.Linear`` (weight and bias of the pre-trained model) plus the experts' task vectors.

    ``weight`` and ``bias`` stay where code around the layer expects them; gradients reach the input, the gate's
    coefficients, and weight and bias where these require them, never the task vectors.
    """

    def __init__(self, base: nn.Linear, weight_deltas: Deltas, bias_deltas: Tensor | None, gate: Gate) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.deltas = weight_deltas
        self.register_buffer("bias_deltas", bias_deltas)
        self._gate = (gate,)
        self.compute, self.group_radius, self.merge_dtype = "auto", 0.0, torch.float32

    @property
    def gate(self) -> Gate:
        return self._gate[0]

    def merged(self, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for one coefficient vector (T,), in ``merge_dtype``."""
        coefficients = coefficients.to(self.merge_dtype)
        return self.deltas.merged(self.weight, coefficients), self.merged_bias(coefficients)

    def merged_bias(self, coefficients: Tensor) -> Tensor | None:
        """(T,) → (out,) or (B, T) → (B, out)."""
        if self.bias is None:
            return None
        coefficients = coefficients.to(self.merge_dtype)
        return self.bias.to(self.merge_dtype) + coefficients @ self.bias_deltas.to(self.merge_dtype)

    def forward(self, x: Tensor) -> Tensor:
        coefficients = self.gate.coefficients
        if coefficients is None:
            raise ValueError("a routed layer is called outside its block, so that no router has read an input")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            if coefficients.dim() == 1:
                weight, bias = self.merged(coefficients)
                return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            samples = samples_first(x, self.gate.batch_axis)
            if len(samples) != len(coefficients):
                raise ValueError(f"{len(samples)} samples reach a layer whose router saw {len(coefficients)}")
            out = self.per_sample(samples, coefficients)
        sizes = x.movedim(self.gate.batch_axis, 0).shape[:-1]
        return out.view(*sizes, self.out_features).movedim(0, self.gate.batch_axis)

    def per_sample(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """Own coefficients for each sample: (B, S, in), (B, T) → (B, S, out)."""
        compute = choose_compute(x.shape[1]) if self.compute == "auto" else self.compute
        if compute == "group":
            return grouped(x, coefficients, self)
        if compute == "reference":
            merged = [self.merged(row) for row in coefficients]
            return torch.stack([_linear(sample, *weights) for sample, weights in zip(x, merged, strict=True)])
        if isinstance(self.deltas, LowRankDeltas):
            out = F.linear(x, self.weight.to(x.dtype)) + self.deltas.ensembled(x, coefficients)
        elif compute == "activation":
            projected = self.deltas.project(x)
            out = F.linear(x, self.weight.to(x.dtype))
            out = out + torch.einsum("bsto,bt->bso", projected, coefficients.to(x.dtype))
        else:
            out = _MergedLinear.apply(x, coefficients, self.weight, self)
        bias = self.merged_bias(coefficients)
        return out if bias is None else out + bias[:, None].to(out.dtype)


def choose_compute(num_tokens: int) -> str:
    """Merging costs T + S, activation space S(T + 1) plain layers per sample: merge for S > 1."""
    return "merge" if num_tokens > 1 else "activation"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _MergedLinear(torch.autograd.Function):
    """x W_nᵀ with W_n = W₀ + Σ_t R[n, t] Δ_t; saves x and R, merges the weights again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, weight: Tensor, layer: EnsembledLinear) -> Tensor:
        ctx.save_for_backward(x, R)
        ctx.layer = layer
        out = x.new_empty(*x.shape[:2], layer.out_features)
        for some, rows, W, _ in _merged_tiles(layer, R):
            out[some, :, rows] = torch.bmm(x[some], W.to(x.dtype).mT)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, R = ctx.saved_tensors
        need_x, need_R, need_W, _ = ctx.needs_input_grad
        grad_x = torch.zeros_like(x) if need_x else None
        grad_R = R.new_zeros(R.shape, dtype=ctx.layer.merge_dtype) if need_R else None
        for some, rows, W, D in _merged_tiles(ctx.layer, R):
            part = grad[some, :, rows]
            if grad_x is not None:
                grad_x[some].baddbmm_(part, W.to(part.dtype))
            if grad_R is not None:  # dr[n, t] = ⟨dW_n, Δ_t⟩ with dW_n = g_nᵀ x_n
                dW = torch.bmm(part.mT, x[some]).flatten(1).to(D.dtype)
                grad_R[some].addmm_(dW, D.T)
        # W₀ is in every sample's weight, so its gradient is that of a plain layer.
        grad_W = (grad.flatten(0, 1).T @ x.flatten(0, 1)).to(ctx.layer.weight.dtype) if need_W else None
        return grad_x, None if grad_R is None else grad_R.to(R.dtype), grad_W, None


def _merged_tiles(layer: EnsembledLinear, R: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Samples, output rows, their merged weights (samples, rows, in) and the task vectors (T, rows·in) these came from.

    The merged weights are in one buffer, which the next tile overwrites.
    """
    R, width = R.to(layer.merge_dtype), layer.in_features
    row_bytes = width * layer.merge_dtype.itemsize
    budget = TILE_BYTES.get(layer.weight.device.type, TILE_BYTES["cuda"])
    samples = min(max(TILE_SAMPLES, budget // (TILE_ROWS * row_bytes)), len(R))
    height = min(max(TILE_ROWS, budget // (samples * row_bytes)), layer.out_features)
    buffer = R.new_empty(samples * height * width)
    base = layer.weight.reshape(-1)
    for start in range(0, layer.out_features, height):
        rows = slice(start, min(start + height, layer.out_features))
        D = layer.deltas.rows(rows.start, rows.stop, layer.merge_dtype)
        origin = base[rows.start * width : rows.stop * width].to(layer.merge_dtype)
        for first in range(0, len(R), samples):
            some = slice(first, min(first + samples, len(R)))
            W = buffer[: (some.stop - some.start) * D.shape[1]].view(-1, D.shape[1])
            torch.addmm(origin, R[some], D, out=W)
            yield some, rows, W.unflatten(1, (-1, width)), D


def group_coefficients(R: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Cover the rows of R (B, T) by balls of ``radius``: indices of G centres and each row's group (B,).

    With radius 0 only equal rows share a group. The output error of a layer is at most
    radius · (Σ_t ‖Δ_t‖²)^½ · ‖x‖.
    """
    if radius == 0:
        _, group = torch.unique(R, dim=0, return_inverse=True)
        centres = torch.full((int(group.max()) + 1,), len(R), device=R.device)
        return centres.scatter_reduce(0, group, torch.arange(len(R), device=R.device), "amin"), group
    group = torch.full((len(R),), -1, device=R.device)
    centres = []
    while (left := (group < 0).nonzero()).numel():
        centre = left[0, 0]
        near = (R - R[centre]).norm(dim=1) <= radius
        group[near & (group < 0)] = len(centres)
        centres.append(centre)
    return torch.stack(centres), group


def grouped(x: Tensor, coefficients: Tensor, layer: EnsembledLinear) -> Tensor:
    """One merged weight per group of samples with (almost) the same coefficients."""
    centres, group = group_coefficients(coefficients.detach(), layer.group_radius)
    out = x.new_empty(*x.shape[:2], layer.out_features)
    for index, centre in enumerate(centres.tolist()):
        members = (group == index).nonzero().squeeze(1)
        out = out.index_copy(0, members, _linear(x[members], *layer.merged(coefficients[centre])))
    return out
