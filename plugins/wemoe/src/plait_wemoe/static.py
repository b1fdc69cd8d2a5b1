"""Baselines that merge once: one function per method, from state dicts to a state dict.

Every function takes the state of the base and name → state of the fine-tuned experts. Floating-point
entries are merged in float32 and returned in the base's type; others are the base's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from plait_wemoe.states import State, task_vectors

MERGE_FUNCTIONS = ("sum", "mean", "max")


def simple_average(base: State, experts: Mapping[str, State]) -> State:
    """(1/T) Σ_t θ_t; the base is not averaged in."""
    return task_arithmetic(base, experts, 1 / len(experts))


def task_arithmetic(base: State, experts: Mapping[str, State], scaling: float) -> State:
    """θ₀ + λ Σ_t τ_t (Ilharco et al., ICLR 2023)."""
    vectors = task_vectors(base, experts)
    return add_to_base(base, {name: scaling * sum(v[name] for v in vectors.values()) for name in float_entries(base)})


def ties(base: State, experts: Mapping[str, State], scaling: float, keep: float, merge: str = "sum") -> State:
    """Trim, elect a sign, merge what agrees (Yadav et al., NeurIPS 2023).

    Args:
        keep: percentage of entries of each task vector that are kept (a fraction if ≤ 1).
        merge: how agreeing entries are joined: ``sum``, ``mean`` over the non-zero ones, or ``max`` magnitude.
    """
    vectors = task_vectors(base, experts)
    names = sorted(float_entries(base))
    flat = torch.stack([torch.cat([vector[name].flatten() for name in names]) for vector in vectors.values()])
    return add_to_base(base, _unflatten(base, names, scaling * ties_merge(flat, keep, merge)))


def ties_merge(vectors: Tensor, keep: float, merge: str = "sum") -> Tensor:
    """Task vectors (T, n) → merged task vector (n,)."""
    if merge not in MERGE_FUNCTIONS:
        raise ValueError(f"merge_function is {merge!r}; allowed is one of {', '.join(MERGE_FUNCTIONS)}")
    n = vectors.shape[1]
    percentage = keep if keep > 1 else 100 * keep
    rank = max(1, n - math.floor(n * percentage / 100))
    thresholds = vectors.abs().kthvalue(rank, dim=1, keepdim=True).values
    trimmed = torch.where(vectors.abs() >= thresholds, vectors, 0)
    elected = trimmed.sum(dim=0).sign()
    elected = torch.where(elected == 0, elected.sum().sign(), elected)  # ties go with the majority of all signs
    agreeing = torch.where(trimmed.sign() == elected, trimmed, 0)
    if merge == "mean":
        return agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)
    if merge == "max":
        return agreeing.abs().amax(dim=0) * elected
    return agreeing.sum(dim=0)


def dare(
    base: State,
    experts: Mapping[str, State],
    drop_rate: float,
    merge: Callable[[State, Mapping[str, State]], State],
    generator: torch.Generator,
) -> State:
    """Drop entries of the task vectors at random and rescale the rest by 1/(1 − p), then merge (Yu et al., ICML 2024).

    Args:
        merge: what to do with the thinned experts, e.g. :func:`task_arithmetic` with its scaling.
        generator: on the CPU, whatever the weights' device.
    """
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate is {drop_rate}; allowed is [0, 1)")
    thinned = {}
    for expert, vector in task_vectors(base, experts).items():
        kept = {
            name: tau * (torch.rand(tau.shape, generator=generator) >= drop_rate).to(tau.device) / (1 - drop_rate)
            for name, tau in sorted(vector.items())
        }
        # float32, so that θ₀ + τ loses no more than the merge itself
        thinned[expert] = {name: base[name].float() + kept[name] if name in kept else base[name] for name in base}
    return merge(base, thinned)


def fisher_information(
    encoder: nn.Module, head: Callable[[Tensor], Tensor], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Diagonal Fisher information by squared gradients of Σ_n Σ_c √p_nc · log p_nc (√p constant), + 1e-6.

    As in the published code the gradient is summed over a batch before it is squared.
    """
    encoder.requires_grad_(True)
    parameters = {name: p for name, p in encoder.named_parameters() if p.is_floating_point()}
    information = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    count = 0
    for images in batches:
        log_p = head(encoder(images)).float().log_softmax(dim=-1)
        total = (log_p.detach().exp().sqrt() * log_p).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                information[name] += gradient.float() ** 2
        count += len(images)
    return {name: value / count + 1e-6 for name, value in information.items()}


def fisher(base: State, experts: Mapping[str, State], information: Mapping[str, Mapping[str, Tensor]]) -> State:
    """Σ_t c_t F_t θ_t / Σ_t c_t F_t, with c_t that even out the norms of F_t (Matena & Raffel, NeurIPS 2022).

    Entries without information (buffers) are averaged.
    """
    norms = {t: torch.stack([value.norm() for value in information[t].values()]).norm() for t in experts}
    inverse = {t: 1 / (norm + 1e-6) for t, norm in norms.items()}
    coefficient = {t: value / sum(inverse.values()) / len(experts) for t, value in inverse.items()}
    merged = dict(base)
    for name in float_entries(base):
        weights = {t: coefficient[t] * information[t][name] if name in information[t] else 1.0 for t in experts}
        total = sum(weights[t] * experts[t][name].float() for t in experts)
        merged[name] = (total / sum(weights.values())).to(base[name].dtype)
    return merged


def gram_matrices(encoder: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean over tokens of x xᵀ for what enters every ``nn.Linear``: linear → (in, in)."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            x = args[0].detach().float().flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    linears = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(record(name)) for name, module in linears]
    try:
        with torch.no_grad():
            for images in batches:
                encoder(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def regmean(
    base: State,
    experts: Mapping[str, State],
    grams: Mapping[str, Mapping[str, Tensor]],
    off_diagonal: float = 0.6,
    ridge: float = 1e-6,
) -> State:
    """Linear layers by least squares on the experts' own inputs, the rest averaged (Jin et al., ICLR 2023).

    Wᵀ = (Σ G_t)⁻¹ Σ G_t W_tᵀ, off-diagonal entries of G_t scaled by ``off_diagonal``. ``ridge`` times the
    mean diagonal is added to every G_t, which keeps the solution where inputs do not span the space.
    """
    merged = simple_average(base, experts)
    for linear in set.intersection(*[set(gram) for gram in grams.values()]):
        name = f"{linear}.weight"
        if name not in base:
            continue
        shrunk = {}
        for t, gram in grams.items():
            G = gram[linear]
            eye = torch.eye(len(G), device=G.device)
            shrunk[t] = (
                G * (off_diagonal + (1 - off_diagonal) * eye) + ridge * G.diagonal().mean().clamp(min=1e-30) * eye
            )
        right = sum(shrunk[t] @ experts[t][name].float().T for t in experts)
        factor = torch.linalg.cholesky(sum(shrunk.values()))
        merged[name] = torch.cholesky_solve(right, factor).T.to(base[name].dtype).contiguous()
    return merged


def float_entries(state: State) -> list[str]:
    return [name for name, value in state.items() if value.is_floating_point()]


def add_to_base(base: State, change: Mapping[str, Tensor]) -> State:
    """θ₀ + change where there is one, summed in the type of the change, in the type of the base."""
    return {
        name: (value.to(change[name].dtype) + change[name]).to(value.dtype) if name in change else value
        for name, value in base.items()
    }


def _unflatten(base: State, names: list[str], flat: Tensor) -> dict[str, Tensor]:
    pieces = flat.split([base[name].numel() for name in names])
    return {name: piece.view(base[name].shape) for name, piece in zip(names, pieces, strict=True)}
