"""FGSAM and FGSAM+: a training, :func:`fgsam`, and optimizers for any training loop.

Luo et al., "Fast Graph Sharpness-Aware Minimization for Enhancing and Accelerating Few-Shot Node
Classification", NeurIPS 2024, Algorithm 1. Two losses share the weights w:

* ``gnn_loss``: the graph network with message passing;
* ``mlp_loss``: its PeerMLP (section 4, :mod:`plait_fgsam.peer`) on the rows that carry the loss.

An update of FGSAM, and every k-th of FGSAM+, ascends along the former and descends along the latter; the steps of
:class:`FGSAM` and :class:`FGSAMPlus` follow Algorithm 1 line by line::

    optimizer = FGSAMPlus(model.parameters(), torch.optim.Adam, rho=0.1, interval=2, lr=5e-3)
    for task in tasks:
        info = optimizer.step(lambda: gnn_loss(task), lambda: mlp_loss(task))  # no backward, no zero_grad
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait_fgsam.peer import Peer, peer_losses
from plait_fgsam.perturbing import (
    Gradients,
    Loss,
    PerturbingOptimizer,
    differentiate,
    finite,
    global_norm,
    moved,
    orthogonal_part,
    require,
    stretched,
    whole_number,
)

Combine = Literal["convex", "additive"]


def fgsam(
    optimizer: PerturbingOptimizer,
    model: nn.Module,
    tasks: Iterable[Any],
    gnn_loss: Callable[[nn.Module, Any], Tensor],
    row_losses: Callable[[nn.Module, Any], Tensor],
    peers: Mapping[type[nn.Module], Peer] | None = None,
) -> Iterator[dict[str, Any]]:
    """Algorithm 1 on one task (an episode, a batch, a mask) after the other; each update is made when it is asked for.

    Args:
        optimizer: :class:`FGSAM` or :class:`FGSAMPlus` over the model's tensors (or a baseline: it leaves the PeerMLP out).
        gnn_loss: the loss of the model on a task, with message passing.
        row_losses: the losses [n] of the rows of a task alone; they are run on the model as its own PeerMLP.
        peers: see :func:`plait_fgsam.peer.peer_mlp`.

    Yields:
        What the optimizer's ``step`` reports of each update.
    """

    def mlp_loss(task: Any) -> Tensor:
        return peer_losses(model, lambda peer: row_losses(peer, task), peers).mean()

    for task in tasks:
        yield optimizer.step(functools.partial(gnn_loss, model, task), functools.partial(mlp_loss, task))


class FGSAM(PerturbingOptimizer):
    """Ascend along the GNN's gradient, descend along the PeerMLP's: one GNN pass an update.

    Args:
        lam: weight of the MLP gradient (convex, in [0, 1], default 0.5) or of the GNN gradient
            (additive, >= 0, default 1).
        as_released: combine as the authors' released code does, ``convex``; else as Algorithm 1 does, ``additive``.
        combine: in place of what ``as_released`` says: (1 - lam) g_gnn + lam g_s, or lam g_gnn + g_s.
        reuse: the GNN gradient of line 4: ``cached`` is that of line 1, as in the paper. ``retained`` is what the
            authors' code gets instead, for comparisons with it: line 1's graph, differentiated again while the
            weights are w + e, which mixes w + e in upper layers with activations of w, at the price of a second
            GNN backward.

    With ``rho=0`` this is the *mix* of the two gradients without any perturbation.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
        *,
        rho: float = 0.05,
        lam: float | None = None,
        as_released: bool = True,
        combine: Combine | None = None,
        reuse: Literal["cached", "retained"] = "cached",
        eps: float = 1e-12,
        **base_options: Any,
    ) -> None:
        require(isinstance(as_released, bool), "as_released", as_released, "True or False")
        require(reuse in ("cached", "retained"), "reuse", reuse, "'cached' or 'retained'")
        self.reuse = reuse
        self.combine = ("convex" if as_released else "additive") if combine is None else combine
        require(self.combine in ("convex", "additive"), "combine", combine, "'convex' or 'additive'")
        convex = self.combine == "convex"
        self.lam = (0.5 if convex else 1.0) if lam is None else lam
        in_range = finite(self.lam) and 0 <= self.lam <= (1 if convex else math.inf)
        require(in_range, "lam", lam, "[0, 1] (convex)" if convex else "a finite number >= 0 (additive)")
        super().__init__(params, base_optimizer, rho=rho, eps=eps, **base_options)

    def step(self, gnn_loss: Loss, mlp_loss: Loss) -> dict[str, Any]:  # type: ignore[override]
        """One update. The closures return scalar losses; ``info`` holds 0-dim tensors, to be read when wanted.

        Raises:
            ValueError: for a loss that is not a scalar; FloatingPointError: for one that is not finite
                (the weights are as before).
        """
        if self.reuse == "retained":
            return self._retained_step(gnn_loss, mlp_loss)
        tensors, rhos, perturbed = self._trainable()
        loss, g_gnn = self._gradient(gnn_loss, "gnn_loss", tensors)  # line 1: GNN forward + backward
        e = self._perturbation(tensors, g_gnn, rhos, perturbed)  # line 2
        mlp_value, g_s = self._gradient_at(mlp_loss, "mlp_loss", tensors, e)  # line 3: at w + e
        gradient = self._combined(g_gnn, g_s)  # line 4
        self._apply(tensors, gradient, gnn_loss=loss, mlp_loss=mlp_value)  # line 5
        return {"loss": loss, "exact": True, **comparison(g_gnn, g_s, tensors)}

    def _retained_step(self, gnn_loss: Loss, mlp_loss: Loss) -> dict[str, Any]:
        tensors, rhos, perturbed = self._trainable()
        with torch.enable_grad():
            value = gnn_loss()
            self._check_scalar(value, "gnn_loss")
            loss, g_gnn = self._averaged(value.detach().reshape(()), differentiate(value, tensors, retain_graph=True))
        e = self._perturbation(tensors, g_gnn, rhos, perturbed)
        with moved([w.data for w in tensors], e):  # unseen by autograd, which else refuses the second backward
            mlp_value, g_s = self._gradient(mlp_loss, "mlp_loss", tensors)
            _, g_again = self._averaged(loss, differentiate(value, tensors))
        self._apply(tensors, self._combined(g_again, g_s), gnn_loss=loss, mlp_loss=mlp_value)
        return {"loss": loss, "exact": True, **comparison(g_gnn, g_s, tensors)}

    def _combined(self, g_gnn: Gradients, g_s: Gradients) -> Gradients:
        """A gradient missing in one pass counts as zero; missing in both it stays ``None``."""
        a, b = (1 - self.lam, self.lam) if self.combine == "convex" else (self.lam, 1.0)
        combined: Gradients = [None] * len(g_gnn)
        both: list[tuple[int, Tensor, Tensor]] = []
        for i, (g, s) in enumerate(zip(g_gnn, g_s, strict=True)):
            if g is not None and s is not None:
                both.append((i, g, s))
            elif g is not None:
                combined[i] = a * g
            elif s is not None:
                combined[i] = b * s
        if both:
            parts = torch._foreach_mul([g for _, g, _ in both], a)
            torch._foreach_add_(parts, [s for _, _, s in both], alpha=b)
            for (i, _, _), part in zip(both, parts, strict=True):
                combined[i] = part
        return combined


class FGSAMPlus(FGSAM):
    """FGSAM on every ``interval``-th update; in between MLP gradients alone, corrected by what was kept.

    Kept for each tensor: the flatness part v, orthogonal to the MLP gradient, and with ``topology`` the
    topology part u.

    Args:
        interval: k, an exact update every so many (the first is exact), >= 1.
        alpha: weight of the flatness part in approximate updates, >= 0.
        as_released: as the authors' released code does: convex, combined, no topology; else as Algorithm 1 does:
            additive, perturbed, topology.
        flatness_from: v from the ``combined`` gradient or from the ``perturbed`` MLP gradient.
        topology: whether approximate updates add lam (g_mlp + the stretched u); lam is the additive form's.
        projection: dot products and norms of v and u per ``tensor`` or ``global``, over all perturbed tensors.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
        *,
        rho: float = 0.1,
        lam: float | None = None,
        interval: int = 2,
        alpha: float = 0.7,
        as_released: bool = True,
        combine: Combine | None = None,
        flatness_from: Literal["combined", "perturbed"] | None = None,
        topology: bool | None = None,
        projection: Literal["tensor", "global"] = "tensor",
        eps: float = 1e-8,
        **base_options: Any,
    ) -> None:
        interval = whole_number("interval", interval)
        require(finite(alpha) and alpha >= 0, "alpha", alpha, "a finite number >= 0")
        require(projection in ("tensor", "global"), "projection", projection, "'tensor' or 'global'")
        require(isinstance(as_released, bool), "as_released", as_released, "True or False")
        usual = "combined" if as_released else "perturbed"
        self.flatness_from = usual if flatness_from is None else flatness_from
        known = self.flatness_from in ("combined", "perturbed")
        require(known, "flatness_from", flatness_from, "'combined' or 'perturbed'")
        self.topology = not as_released if topology is None else topology
        self.interval, self.alpha, self.projection = interval, alpha, projection
        super().__init__(
            params, base_optimizer, rho=rho, lam=lam, as_released=as_released, combine=combine, eps=eps, **base_options
        )
        if self.reuse != "cached":
            raise ValueError(
                f"reuse is {self.reuse!r}; FGSAM+ always uses the cached gradient, as the authors' code does"
            )
        if self.topology and self.combine == "convex" and self.lam == 0:
            raise ValueError("lam is 0; with topology its additive form (1 - lam) / lam needs lam > 0")

    def step(self, gnn_loss: Loss, mlp_loss: Loss) -> dict[str, Any]:  # type: ignore[override]
        """One update; ``gnn_loss`` is not called on approximate ones. See :meth:`FGSAM.step`."""
        if self.t % self.interval == 0:
            return self._exact(gnn_loss, mlp_loss)
        return self._approximate(mlp_loss)

    def _exact(self, gnn_loss: Loss, mlp_loss: Loss) -> dict[str, Any]:
        tensors, rhos, perturbed = self._trainable()
        loss, g_gnn = self._gradient(gnn_loss, "gnn_loss", tensors)  # line 1
        mlp_value, g_mlp = self._gradient(mlp_loss, "mlp_loss", tensors)  # line 2: unperturbed
        e = self._perturbation(tensors, g_gnn, rhos, perturbed)  # line 3
        perturbed_value, g_s = self._gradient_at(mlp_loss, "mlp_loss at w + e", tensors, e)  # line 4
        gradient = self._combined(g_gnn, g_s)  # line 5
        inside = [i for i, p in enumerate(perturbed) if p and gradient[i] is not None]
        reference = [zero_if_none(g_mlp[i], tensors[i]) for i in inside]
        source = gradient if self.flatness_from == "combined" else g_s
        v = self._orthogonal([zero_if_none(source[i], tensors[i]) for i in inside], reference)  # line 6
        u = self._orthogonal([zero_if_none(g_gnn[i], tensors[i]) for i in inside], reference) if self.topology else None
        self._apply(tensors, gradient, gnn_loss=loss, mlp_loss=mlp_value, perturbed_mlp_loss=perturbed_value)  # line 7
        self.state.clear()
        for j, i in enumerate(inside):
            self.state[tensors[i]] = {"v": v[j]} if u is None else {"v": v[j], "u": u[j]}
        return {"loss": loss, "exact": True, **comparison(g_gnn, g_mlp, tensors), "v_norm": global_norm(v, tensors[0])}

    def _approximate(self, mlp_loss: Loss) -> dict[str, Any]:
        tensors, _, perturbed = self._trainable()
        value, g_mlp = self._gradient(mlp_loss, "mlp_loss", tensors)  # line 1: this update's own task
        inside = [i for i, p in enumerate(perturbed) if p and tensors[i] in self.state]
        reference = [zero_if_none(g_mlp[i], tensors[i]) for i in inside]
        v = [self.state[tensors[i]]["v"] for i in inside]
        corrected = [
            g + self.alpha * f for g, f in zip(reference, self._stretched(v, reference), strict=True)
        ]  # line 2
        if self.topology:
            lam = self.lam if self.combine == "additive" else (1 - self.lam) / self.lam
            u = [self.state[tensors[i]]["u"] for i in inside]
            topology = zip(corrected, reference, self._stretched(u, reference), strict=True)
            corrected = [flat + lam * (g + part) for flat, g, part in topology]
        gradient = list(g_mlp)
        for i, g in zip(inside, corrected, strict=True):
            gradient[i] = g
        self._apply(tensors, gradient, mlp_loss=value)  # line 3
        return {"loss": value, "exact": False, "mlp_norm": global_norm(g_mlp, tensors[0])}

    def _orthogonal(self, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        return self._projected(orthogonal_part, a, b)

    def _stretched(self, v: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        return self._projected(stretched, v, b)

    def _projected(self, operation: Any, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        """The operation on each pair of tensors, or once on all of them as one vector."""
        if self.projection == "tensor" or not a:
            return [operation(x, y) for x, y in zip(a, b, strict=True)]
        whole = operation(as_vector(a), as_vector(b))
        return [part.view_as(x).to(x) for part, x in zip(whole.split([x.numel() for x in a]), a, strict=True)]


def as_vector(tensors: list[Tensor]) -> Tensor:
    """All of them as one vector, on the first one's device, in float32 or wider."""
    wide = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return torch.cat([t.flatten().to(tensors[0].device, wide) for t in tensors])


def zero_if_none(g: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if g is None else g


def comparison(g_gnn: Gradients, g_mlp: Gradients, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Norms of the two gradients and the cosine between them (nan where one is zero)."""
    both = [(g, m) for g, m in zip(g_gnn, g_mlp, strict=True) if g is not None and m is not None]
    dot = torch.zeros((), device=tensors[0].device)
    if both:
        dot = torch.dot(*(as_vector(list(side)) for side in zip(*both, strict=True))).to(dot.device)
    gnn_norm, mlp_norm = global_norm(g_gnn, tensors[0]), global_norm(g_mlp, tensors[0])
    return {"gnn_norm": gnn_norm, "mlp_norm": mlp_norm, "cosine": dot / (gnn_norm * mlp_norm)}
