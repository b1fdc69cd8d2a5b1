"""The ground that all optimizers of this package stand on: gradients of closures, perturbing, restoring.

They are ``torch.optim.Optimizer``s around a base optimizer (Adam, SGD, ...). ``step`` is given closures that
*return* a loss, differentiates them itself, and is the only place where ``.grad`` is written.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Loss = Callable[[], Tensor]
Gradients = list[Tensor | None]


class PerturbingOptimizer(torch.optim.Optimizer):
    """A base optimizer that steps with a gradient of our making.

    Args:
        params: tensors or parameter groups. A group may set its own ``rho`` and ``perturb=False`` (its tensors
            are then trained but not perturbed).
        base_optimizer: a ``torch.optim`` class; it gets ``base_options`` (``lr``, ``weight_decay``, ...). An option of
            its own that is also one of ours, such as ``eps``, is given in a parameter group.
        rho: length of the perturbation, >= 0.
        eps: added to the norm that the perturbation is divided by, >= 0.
        process_group: of ``torch.distributed``; losses and gradients of every pass are averaged over its processes,
            which must start from the same weights. The model is not wrapped in ``DistributedDataParallel``.

    ``param_groups`` is the base optimizer's own list, so that schedulers see one set of rates. In mixed precision use
    bf16: a ``GradScaler`` has nothing to scale, since gradients are computed within ``step``.

    Raises:
        ValueError: for a value out of its range.
        TypeError: for a single tensor as ``params``, and for a base optimizer that is not a ``torch.optim`` class,
            evaluates the loss itself (LBFGS), perturbs (another optimizer of this package), or has a ``rho``
            (Adadelta).
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
        *,
        rho: float = 0.05,
        eps: float = 1e-12,
        process_group: ProcessGroup | None = None,
        **base_options: Any,
    ) -> None:
        require(finite(rho) and rho >= 0, "rho", rho, "a finite number >= 0")
        require(finite(eps) and eps >= 0, "eps", eps, "a finite number >= 0")
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, torch.optim.Optimizer)):
            raise TypeError(f"base_optimizer is {base_optimizer!r}; give a class such as torch.optim.Adam")
        if issubclass(base_optimizer, (torch.optim.LBFGS, PerturbingOptimizer)):
            raise TypeError(
                f"base_optimizer {base_optimizer.__name__} evaluates the loss itself; use one such as Adam or SGD"
            )
        if isinstance(params, Tensor):
            raise TypeError("params is a single tensor; give a list of tensors, such as model.parameters()")
        groups = list(params)
        if not groups:
            raise ValueError("params is empty; give the tensors of the model")
        groups = [dict(group) for group in groups] if isinstance(groups[0], dict) else [{"params": groups}]
        for group in groups:
            _complete(group, rho)
        self.base = base_optimizer(groups, **base_options)
        if not self.base.defaults.keys().isdisjoint(("rho", "perturb")):
            raise TypeError(
                f"base_optimizer {base_optimizer.__name__} has a rho of its own; use one such as Adam or SGD"
            )
        # Schedulers look for betas or momentum among the defaults.
        super().__init__(self.base.param_groups, {**self.base.defaults, "rho": rho, "perturb": True})
        self.param_groups = self.base.param_groups
        self.eps, self.process_group = eps, process_group
        self.t = 0

    def step(self, gnn_loss: Loss, mlp_loss: Loss) -> dict[str, Any]:  # type: ignore[override]
        """One update of the weights; see the subclasses."""
        raise NotImplementedError

    # -- what the subclasses are written with ----------------------------------------------------------------

    def _trainable(self) -> tuple[list[Tensor], list[float], list[bool]]:
        """All trainable tensors w_1 ... w_P, their rho, and whether they are perturbed (are in S)."""
        found = [(p, g["rho"], g["perturb"]) for g in self.param_groups for p in g["params"] if p.requires_grad]
        if not found:
            raise ValueError("no tensor of the optimizer requires a gradient")
        return tuple(map(list, zip(*found, strict=True)))  # type: ignore[return-value]

    def _gradient(self, loss: Loss, name: str, tensors: list[Tensor]) -> tuple[Tensor, Gradients]:
        """Value and gradient of a closure; ``None`` where a tensor takes no part."""
        with torch.enable_grad():
            value = loss()
            self._check_scalar(value, name)
            return self._averaged(value.detach().reshape(()), differentiate(value, tensors))

    def _averaged(self, value: Tensor, gradients: Gradients) -> tuple[Tensor, Gradients]:
        """Mean over the processes, so that all of them take the same step."""
        if self.process_group is None:
            return value, gradients
        present = [(i, g) for i, g in enumerate(gradients) if g is not None]
        flat = torch.cat([part.flatten().to(value.device) for part in (value, *(g for _, g in present))])
        torch.distributed.all_reduce(flat, group=self.process_group)
        flat /= torch.distributed.get_world_size(self.process_group)
        averaged: Gradients = [None] * len(gradients)
        parts = torch.split(flat[1:], [g.numel() for _, g in present])
        for (i, g), part in zip(present, parts, strict=True):
            averaged[i] = part.view_as(g).to(g)
        return flat[0], averaged

    def _check_scalar(self, value: Any, name: str) -> None:
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"update {self.t}: {name} returned {shape}; return the loss as a scalar tensor")
        if not value.requires_grad:
            raise ValueError(f"update {self.t}: {name} does not depend on any trainable tensor")

    def _perturbation(
        self, tensors: list[Tensor], gradients: Gradients, rhos: list[float], perturbed: list[bool]
    ) -> list[Tensor | None]:
        """e_i = rho g_i / (|g|_S + eps): one norm over all perturbed tensors; ``None`` where e_i = 0."""
        inside = {i: g for i, g in enumerate(gradients) if g is not None and perturbed[i]}
        norm = global_norm(list(inside.values()), tensors[0])
        perturbation: list[Tensor | None] = [None] * len(tensors)
        for rho in {rhos[i] for i in inside} - {0}:
            group = [i for i in inside if rhos[i] == rho]
            for i, e in zip(group, scaled(rho / (norm + self.eps), [inside[i] for i in group]), strict=True):
                perturbation[i] = e
        return perturbation

    def _gradient_at(
        self, loss: Loss, name: str, tensors: list[Tensor], perturbation: list[Tensor | None]
    ) -> tuple[Tensor, Gradients]:
        """Value and gradient at w + e; w is restored from a copy, bit for bit, also when the closure raises."""
        with moved(tensors, perturbation):
            return self._gradient(loss, name, tensors)

    def _apply(self, tensors: list[Tensor], gradients: Gradients, **losses: Tensor) -> None:
        """Hand the gradient to the base optimizer; nothing has changed yet when a loss is not finite."""
        watched = torch.stack([value.float() for value in (*losses.values(), global_norm(gradients, tensors[0]))])
        if not bool(torch.isfinite(watched).all()):  # the one synchronisation of an update
            values = dict(zip([*losses, "the gradient's norm"], watched.tolist(), strict=True))
            name, value = next((n, v) for n, v in values.items() if not math.isfinite(v))
            raise FloatingPointError(
                f"update {self.t}: {name} is {value}; lower the learning rate or rho, or look at the data"
            )
        self.base.zero_grad(set_to_none=True)  # a tensor frozen since the last update must not move
        for p, g in zip(tensors, gradients, strict=True):
            p.grad = g
        self.base.step()
        torch.clear_autocast_cache()
        self.t += 1

    # -- torch.optim's own interface --------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if any(param_group is group for group in self.base.param_groups):
            super().add_param_group(param_group)  # from Optimizer.__init__, which registers the base's groups
            return
        _complete(param_group, self.defaults["rho"])
        self.base.add_param_group(param_group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What ``GradScaler.step`` asks an optimizer first."""
        raise TypeError(
            f"a GradScaler cannot step {type(self).__name__}, which computes its gradients within step; "
            "use bf16 and no scaler"
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but ``step``, which a scheduler may have tied to this very object."""
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, the counter and the tensors kept between updates, by position."""
        order = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        return {
            "base": self.base.state_dict(),
            "t": self.t,
            "kept": {order[p]: dict(state) for p, state in self.state.items()},
            "own": self._own_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict["base"])
        self.param_groups = self.base.param_groups  # loading replaced the base's list
        self.t = int(state_dict["t"])
        params = [p for g in self.param_groups for p in g["params"]]
        self.state.clear()
        for i, state in state_dict["kept"].items():
            p = params[int(i)]
            self.state[p] = {name: value.to(device=p.device, dtype=p.dtype).clone() for name, value in state.items()}
        self._load_own_state(state_dict["own"])

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _load_own_state(self, own: dict[str, Any]) -> None:
        return None


def _complete(group: dict[str, Any], rho: float) -> None:
    """Give a parameter group what it lacks, and check what it has."""
    group.setdefault("rho", rho)
    group.setdefault("perturb", True)
    require(finite(group["rho"]) and group["rho"] >= 0, "rho of a group", group["rho"], "a finite number >= 0")
    require(isinstance(group["perturb"], bool), "perturb of a group", group["perturb"], "True or False")


@contextmanager
def moved(weights: list[Tensor], perturbation: list[Tensor | None]) -> Iterator[None]:
    """Within the context the weights are w + e, in place; on exit they are w again, from a copy, bit for bit."""
    pairs = [(w, e) for w, e in zip(weights, perturbation, strict=True) if e is not None]
    if not pairs:
        yield
        return
    inside, steps = [w for w, _ in pairs], [e for _, e in pairs]
    with torch.no_grad():
        saved = [w.clone() for w in inside]
    try:
        with torch.no_grad():
            torch._foreach_add_(inside, steps)
        torch.clear_autocast_cache()  # it would go on using the weights of before
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(inside, saved)
        torch.clear_autocast_cache()


def differentiate(value: Tensor, tensors: Sequence[Tensor], retain_graph: bool = False) -> Gradients:
    """Detached gradients of a scalar; ``None`` for a tensor that takes no part.

    Raises:
        TypeError: for a sparse gradient.
    """
    gradients = torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=retain_graph)
    if any(g is not None and g.layout != torch.strided for g in gradients):
        raise TypeError("a gradient is sparse; use layers with dense gradients (nn.Embedding(sparse=False))")
    return list(gradients)


def global_norm(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Euclidean norm over all tensors; 0 (on ``like``'s device) for none. Of half-precision ones it is float32."""
    present = [g for g in gradients if g is not None]
    if not present:
        return torch.zeros((), device=like.device, dtype=_wide(like.dtype))
    norms = torch._foreach_norm([g.to(_wide(g.dtype)) for g in present])
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(like.device) for norm in norms]))
    return norm


def scaled(factor: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """factor g for every g, which may be of several types and on several devices."""
    if {(g.dtype, g.device) for g in gradients} == {(factor.dtype, factor.device)}:
        return list(torch._foreach_mul(gradients, factor))
    return [(g.to(_wide(g.dtype)) * factor.to(g.device)).to(g.dtype) for g in gradients]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Squares of half-precision numbers and the small eps are lost in half precision: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def orthogonal_part(a: Tensor, b: Tensor) -> Tensor:
    """P(a, b) = a - (a.b)/(b.b) b, and a where b = 0."""
    wide_a, wide_b = a.to(_wide(a.dtype)), b.to(_wide(b.dtype))
    square = (wide_b * wide_b).sum()
    share = (wide_a * wide_b).sum() / square.clamp_min(torch.finfo(square.dtype).tiny)
    return (wide_a - torch.where(square > 0, share, 0.0) * wide_b).to(a.dtype)


def stretched(v: Tensor, b: Tensor) -> Tensor:
    """``v`` at the length of ``b``: |b| / (|v| + 1e-8) v."""
    wide_v = v.to(_wide(v.dtype))
    factor: Tensor = torch.linalg.vector_norm(b, dtype=_wide(b.dtype)) / (torch.linalg.vector_norm(wide_v) + 1e-8)
    return (wide_v * factor).to(v.dtype)


def whole_number(name: str, value: Any) -> int:
    """``value`` as an int >= 1, from Python's or NumPy's; ``ValueError`` for anything else."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    require(number >= 1, name, value, "a whole number >= 1")
    return number


def finite(value: Any) -> bool:
    """Whether ``value`` is a finite number; not for text and other types."""
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def require(ok: bool, name: str, value: Any, allowed: str) -> None:
    """Raise ``ValueError`` naming the value and what is allowed, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} is {value!r}; allowed is {allowed}")
