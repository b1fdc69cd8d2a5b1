"""The sharpness-aware baselines: SAM and ASAM, LookSAM, ESAM, AE-SAM.

They share the interface of FGSAM, so that one loop runs all of them: ``step(gnn_loss, mlp_loss=None)``; the
second loss is ignored. g(w) is the gradient of ``gnn_loss``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from plait_fgsam.perturbing import (
    Loss,
    PerturbingOptimizer,
    finite,
    global_norm,
    orthogonal_part,
    require,
    stretched,
    whole_number,
)


class SAM(PerturbingOptimizer):
    """g(w + rho g / |g|) (Foret et al., ICLR 2021): two passes an update.

    Args:
        adaptive: ASAM (Kwon et al., ICML 2021): e_i = s w_i^2 g_i with s = rho / | |w| g |.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        eps: float = 1e-12,
        **base_options: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, eps=eps, **base_options)
        self.adaptive = adaptive

    def step(self, gnn_loss: Loss, mlp_loss: Loss | None = None) -> dict[str, Any]:  # type: ignore[override]
        """One update; see :meth:`plait_fgsam.fgsam.FGSAM.step`."""
        tensors, rhos, perturbed = self._trainable()
        loss, g = self._gradient(gnn_loss, "gnn_loss", tensors)
        if self.adaptive:
            scaled = [None if x is None else w.detach().abs() * x for w, x in zip(tensors, g, strict=True)]
            e = self._perturbation(tensors, scaled, rhos, perturbed)
            e = [None if x is None else w.detach().abs() * x for w, x in zip(tensors, e, strict=True)]
        else:
            e = self._perturbation(tensors, g, rhos, perturbed)
        perturbed_loss, g_s = self._gradient_at(gnn_loss, "gnn_loss at w + e", tensors, e)
        self._apply(tensors, g_s, gnn_loss=loss, perturbed_loss=perturbed_loss)
        return {"loss": loss, "exact": True, "gnn_norm": global_norm(g, tensors[0])}


class LookSAM(PerturbingOptimizer):
    """SAM on every ``interval``-th update; in between g plus the stretched part of g_s orthogonal to g.

    Liu et al., CVPR 2022. Per tensor, ``alpha`` is the weight of that part.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
        *,
        rho: float = 0.05,
        interval: int = 5,
        alpha: float = 0.7,
        eps: float = 1e-12,
        **base_options: Any,
    ) -> None:
        interval = whole_number("interval", interval)
        require(finite(alpha) and alpha >= 0, "alpha", alpha, "a finite number >= 0")
        super().__init__(params, base_optimizer, rho=rho, eps=eps, **base_options)
        self.interval, self.alpha = interval, alpha

    def step(self, gnn_loss: Loss, mlp_loss: Loss | None = None) -> dict[str, Any]:  # type: ignore[override]
        """One update; see :meth:`plait_fgsam.fgsam.FGSAM.step`."""
        tensors, rhos, perturbed = self._trainable()
        loss, g = self._gradient(gnn_loss, "gnn_loss", tensors)
        exact = self.t % self.interval == 0
        if exact:
            e = self._perturbation(tensors, g, rhos, perturbed)
            perturbed_loss, gradient = self._gradient_at(gnn_loss, "gnn_loss at w + e", tensors, e)
            kept = {
                w: {"v": orthogonal_part(s, x)}
                for w, s, x, p in zip(tensors, gradient, g, perturbed, strict=True)
                if p and s is not None and x is not None
            }
            self._apply(tensors, gradient, gnn_loss=loss, perturbed_loss=perturbed_loss)
            self.state.clear()
            self.state.update(kept)
        else:
            gradient = [
                x if x is None or w not in self.state else x + self.alpha * stretched(self.state[w]["v"], x)
                for w, x in zip(tensors, g, strict=True)
            ]
            self._apply(tensors, gradient, gnn_loss=loss)
        return {"loss": loss, "exact": exact, "gnn_norm": global_norm(g, tensors[0])}


class ESAM(PerturbingOptimizer):
    """SAM with a random part of the tensors perturbed and a part of the samples used (Du et al., ICLR 2022).

    Each tensor is perturbed with probability ``beta``, by e / beta; at w + e only the share ``gamma`` of samples
    whose loss grew most is used. For that ``gnn_loss`` returns the losses of the samples, shape [n]; with a
    scalar only the first half applies.

    Args:
        seed: of the draw of tensors, which is kept in ``state_dict``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
        *,
        rho: float = 0.05,
        beta: float = 0.5,
        gamma: float = 0.5,
        seed: int = 0,
        eps: float = 1e-12,
        **base_options: Any,
    ) -> None:
        require(finite(beta) and 0 < beta <= 1, "beta", beta, "(0, 1]")
        require(finite(gamma) and 0 < gamma <= 1, "gamma", gamma, "(0, 1]")
        super().__init__(params, base_optimizer, rho=rho, eps=eps, **base_options)
        self.beta, self.gamma = beta, gamma
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, gnn_loss: Loss, mlp_loss: Loss | None = None) -> dict[str, Any]:  # type: ignore[override]
        """One update; ``gnn_loss`` returns a scalar or the losses of the samples, shape [n]."""
        tensors, rhos, perturbed = self._trainable()
        before: list[Tensor] = []

        def mean_loss() -> Tensor:
            losses = gnn_loss()
            if not isinstance(losses, Tensor):
                return losses  # refused in words
            before.append(losses.detach())
            return losses.mean()

        def loss_of_the_grown() -> Tensor:
            losses = gnn_loss()
            if losses.dim() == 0:
                return losses
            grown = (losses.detach() - before[0]).flatten().topk(max(1, round(self.gamma * losses.numel()))).indices
            return losses.flatten()[grown].mean()

        loss, g = self._gradient(mean_loss, "gnn_loss", tensors)
        e = self._perturbation(tensors, g, rhos, perturbed)
        chosen = torch.rand(len(tensors), generator=self.generator) < self.beta
        e = [x / self.beta if x is not None and take else None for x, take in zip(e, chosen.tolist(), strict=True)]
        perturbed_loss, g_s = self._gradient_at(loss_of_the_grown, "gnn_loss at w + e", tensors, e)
        self._apply(tensors, g_s, gnn_loss=loss, perturbed_loss=perturbed_loss)
        return {"loss": loss, "exact": True, "gnn_norm": global_norm(g, tensors[0])}

    def _own_state(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def _load_own_state(self, own: dict[str, Any]) -> None:
        self.generator.set_state(own["generator"])


class AESAM(PerturbingOptimizer):
    """A SAM update only where the squared gradient norm is large against its running mean and spread.

    Jiang et al., ICLR 2023: with n = |g|^2, mu <- delta mu + (1 - delta) n and
    s2 <- delta s2 + (1 - delta) (n - mu)^2, it is a SAM update if n >= mu + c s, where
    c = (t/T) lambda_1 + (1 - t/T) lambda_2.

    Args:
        num_steps: T, how many updates the training has, >= 1.
        delta: of the running means, in [0, 1).
        lambda_1, lambda_2: threshold at the end and at the start, in standard deviations.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
        *,
        num_steps: int,
        rho: float = 0.05,
        delta: float = 0.9,
        lambda_1: float = -1.0,
        lambda_2: float = 1.0,
        eps: float = 1e-12,
        **base_options: Any,
    ) -> None:
        num_steps = whole_number("num_steps", num_steps)
        require(finite(delta) and 0 <= delta < 1, "delta", delta, "[0, 1)")
        require(finite(lambda_1), "lambda_1", lambda_1, "a finite number")
        require(finite(lambda_2), "lambda_2", lambda_2, "a finite number")
        super().__init__(params, base_optimizer, rho=rho, eps=eps, **base_options)
        self.num_steps, self.delta, self.lambda_1, self.lambda_2 = num_steps, delta, lambda_1, lambda_2
        self.mean = self.variance = 0.0

    def step(self, gnn_loss: Loss, mlp_loss: Loss | None = None) -> dict[str, Any]:  # type: ignore[override]
        """One update; see :meth:`plait_fgsam.fgsam.FGSAM.step`."""
        tensors, rhos, perturbed = self._trainable()
        loss, g = self._gradient(gnn_loss, "gnn_loss", tensors)
        norm = global_norm(g, tensors[0])
        n = float(norm) ** 2
        mean = self.delta * self.mean + (1 - self.delta) * n
        variance = self.delta * self.variance + (1 - self.delta) * (n - mean) ** 2
        done = min(self.t / self.num_steps, 1.0)
        threshold = mean + (done * self.lambda_1 + (1 - done) * self.lambda_2) * math.sqrt(variance)
        exact = n >= threshold
        if exact:
            e = self._perturbation(tensors, g, rhos, perturbed)
            perturbed_loss, g = self._gradient_at(gnn_loss, "gnn_loss at w + e", tensors, e)
            self._apply(tensors, g, gnn_loss=loss, perturbed_loss=perturbed_loss)
        else:
            self._apply(tensors, g, gnn_loss=loss)
        self.mean, self.variance = mean, variance  # not before: a NaN would stay for ever
        return {"loss": loss, "exact": exact, "gnn_norm": norm}

    def _own_state(self) -> dict[str, Any]:
        return {"mean": self.mean, "variance": self.variance}

    def _load_own_state(self, own: dict[str, Any]) -> None:
        self.mean, self.variance = float(own["mean"]), float(own["variance"])
