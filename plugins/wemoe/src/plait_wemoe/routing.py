"""Routers: from the tokens that enter a block to one coefficient per expert, the r of (3) in :mod:`plait_wemoe.wemoe`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Router(nn.Module):
    """(3): g(x), averaged over the tokens of a sample; linear output, so coefficients may leave [0, 1].

    depth 0: r = w, whatever the input. depth 1: W₁x + b₁. depth 2: W₂ ReLU(W₁x + b₁) + b₂.
    Initialised so that every coefficient is close to ``init_lambda``.

    Raises:
        ValueError: depth other than 0, 1, 2.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        depth: int = 2,
        hidden_size: int | None = None,
        init_lambda: float = 0.3,
        init_std: float = 0.01,
    ) -> None:
        super().__init__()
        if depth not in (0, 1, 2):
            raise ValueError(f"router_depth is {depth}; allowed is 0, 1 or 2")
        self.depth, self.num_experts = depth, num_experts
        if depth == 0:
            self.weight = nn.Parameter(torch.full((num_experts,), float(init_lambda)))
            return
        # All linears first, then their values: the order in which the published code draws.
        hidden = hidden_size or width
        self.hidden = nn.Linear(width, hidden) if depth == 2 else None
        self.output = nn.Linear(hidden if depth == 2 else width, num_experts)
        for layer, bias in ((self.hidden, 0.0), (self.output, init_lambda)):
            if layer is not None:
                nn.init.normal_(layer.weight, std=init_std)
                nn.init.constant_(layer.bias, bias)

    def tokens(self, x: Tensor) -> Tensor:
        """Per-token coefficients, (B, S, width) → (B, S, T)."""
        if self.depth == 0:
            return self.weight.expand(*x.shape[:-1], -1)
        return _linear(self.output, x if self.hidden is None else F.relu(_linear(self.hidden, x)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over tokens of :meth:`tokens`, (B, S, width) → (B, T); ``mask`` (B, S) weighs the tokens.

        A sample all of whose tokens are masked is read whole. The mean is taken before the last linear,
        which is the same and S times cheaper.
        """
        if self.depth == 0:
            return self.weight.expand(x.shape[0], -1)
        if self.hidden is not None:
            x = F.relu(_linear(self.hidden, x))
        if mask is None:
            return _linear(self.output, x.mean(dim=1))
        mask = mask.to(x.dtype)
        mask = torch.where(mask.sum(dim=1, keepdim=True) > 0, mask, 1)
        return _linear(self.output, torch.einsum("bs,bsd->bd", mask, x) / mask.sum(dim=1, keepdim=True))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the type of its input: a router computes in float32 whatever its weights were cast to."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def position_code(block: int, size: int) -> Tensor:
    """Sines, then cosines, of block / 10000^(2i/size), i < size/2 (E-WEMoE, optional router input)."""
    if size < 2 or size % 2:
        raise ValueError(f"position_encoding_dim is {size}; allowed is an even number from 2 on")
    angles = block / 10000 ** (torch.arange(size // 2) * 2 / size)
    return torch.cat([angles.sin(), angles.cos()])


class Gate(nn.Module):
    """One block's coefficients: set when its first module is called, read by all its linears.

    Attributes:
        routing: ``sample`` (each sample its own), ``batch`` (their mean) or ``fixed`` (``fixed``).
        batch_axis: where samples lie in the block's input: 0 for (B, S, d), 1 for (S, B, d).
        per_sample: (B, T), what the router answered last; coefficients: what the linears use.
    """

    def __init__(self, router: Router, code: Tensor | None, batch_axis: int) -> None:
        super().__init__()
        self._router = (router,)  # owned by the model, once, even where all blocks share it
        self.register_buffer("code", code, persistent=False)
        self.register_buffer("fixed", None, persistent=False)
        self.batch_axis = batch_axis
        self.routing = "sample"
        self.mask: Tensor | None = None
        self.per_sample: Tensor | None = None
        self.coefficients: Tensor | None = None

    @property
    def router(self) -> Router:
        return self._router[0]

    def route(self, x: Tensor) -> None:
        x = samples_first(x, self.batch_axis)
        if self.routing == "fixed":
            self.per_sample, self.coefficients = self.fixed.expand(len(x), -1), self.fixed
            return
        mask = self.mask if self.mask is not None and self.mask.shape == x.shape[:2] else None
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.code is not None:
                x = torch.cat([self.code.expand(*x.shape[:-1], -1), x], dim=-1)
            weights = self.router(x, mask)
        self.per_sample = weights.detach()
        one_for_all = self.routing == "batch" or self.router.depth == 0
        self.coefficients = weights.mean(dim=0) if one_for_all else weights


def samples_first(x: Tensor, batch_axis: int) -> Tensor:
    """Any layout → (B, S, d): the samples' axis first, all other axes but the last are tokens."""
    return x.movedim(batch_axis, 0).reshape(x.shape[batch_axis], -1, x.shape[-1])
