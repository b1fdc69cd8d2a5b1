"""Baselines that merge once: one function per method, from state dicts to a state dict.

Every function takes the state of the base and name → state of the fine-tuned experts. Weights are merged in
float32 and returned in the base's type; a tensor with several names counts once. Buffers (``buffers`` names them;
by default those of normalisation layers, by their names) are averaged over the experts: a variance or a count has
no task vector. What comes out not finite is refused.

Methods that need the weights alone are a :class:`Recipe`. It holds one tensor of every model at a time, so states may
be lazy ones, which read from files (:mod:`plait_wemoe.folders`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from plait_wemoe import states
from plait_wemoe.heads import logits_of
from plait_wemoe.inputs import Inputs, call, count, token_mask
from plait_wemoe.states import Lazy, State, completed, layout_of, scaled_sum, task_vector, weight_names

MERGE_FUNCTIONS = ("sum", "mean", "max")
KEEP_OF = ("model", "tensor")
DIGIT_BITS = 16  # of a threshold that are settled at a time
Buffers = Collection[str] | None
Weights = Mapping[str, Tensor]
Pieces = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Recipe:
    """A merge that needs the weights alone.

    Attributes:
        method: its name, for errors.
        weights: (state of the base, those of the experts, names of the weights) → the merged weights.
    """

    method: str
    weights: Callable[[Weights, Mapping[str, Weights], Sequence[str]], Weights]

    def state(self, base: Weights, experts: Mapping[str, Weights], buffers: Buffers = None) -> State:
        """The whole state of the merged model."""
        names = weight_names(layout_of(base), buffers)
        return completed(base, experts, self.weights(base, experts, names), self.method, buffers)


def averaging() -> Recipe:
    """(1/T) Σ_t θ_t; the base is not averaged in."""
    return Recipe("simple average", lambda base, experts, names: _scaled_sums(base, experts, names, 1 / len(experts)))


def simple_average(base: Weights, experts: Mapping[str, Weights], buffers: Buffers = None) -> State:
    """See :func:`averaging`."""
    return averaging().state(base, experts, buffers)


def arithmetic(scaling: float) -> Recipe:
    """θ₀ + λ Σ_t τ_t (Ilharco et al., ICLR 2023)."""
    return Recipe("task arithmetic", lambda base, experts, names: _scaled_sums(base, experts, names, scaling))


def task_arithmetic(base: Weights, experts: Mapping[str, Weights], scaling: float, buffers: Buffers = None) -> State:
    """See :func:`arithmetic`."""
    return arithmetic(scaling).state(base, experts, buffers)


def _scaled_sums(base: Weights, experts: Mapping[str, Weights], names: Sequence[str], scaling: float) -> Lazy:
    def merged(name: str) -> Tensor:
        return scaled_sum(base[name], [expert[name] for expert in experts.values()], scaling)

    return Lazy({name: layout_of(base)[name] for name in names}, merged)


def trimming(scaling: float, keep: float, merge: str = "sum", keep_of: str = "model") -> Recipe:
    """Trim, elect a sign, merge what agrees (Yadav et al., NeurIPS 2023).

    Args:
        keep: percentage of entries of each task vector that are kept (a fraction if ≤ 1).
        merge: how agreeing entries are joined: ``sum``, ``mean`` over the non-zero ones, or ``max`` magnitude.
        keep_of: what the percentage is of: the ``model``, one threshold for all of a task vector, as in the paper and its code
            (which keeps one entry more), or of every ``tensor``, as mergekit counts.

    Raises:
        ValueError: another ``merge`` or ``keep_of``.
    """
    if merge not in MERGE_FUNCTIONS:
        raise ValueError(f"merge_function is {merge!r}; allowed is one of {', '.join(MERGE_FUNCTIONS)}")
    if keep_of not in KEEP_OF:
        raise ValueError(f"keep_of is {keep_of!r}; allowed is one of {', '.join(KEEP_OF)}")

    def weights(base: Weights, experts: Mapping[str, Weights], names: Sequence[str]) -> Lazy:
        def pieces() -> Iterator[Tensor]:
            for name in sorted(names):
                for _, vectors in _in_pieces(base[name], [expert[name] for expert in experts.values()]):
                    yield vectors

        of_model = ties_rule(pieces, keep, merge) if keep_of == "model" else None

        def merged(name: str) -> Tensor:
            origin, tuned = base[name], [expert[name] for expert in experts.values()]
            if not origin.numel():
                return origin.clone()
            rule = of_model or ties_rule(lambda: (v for _, v in _in_pieces(origin, tuned)), keep, merge, surplus=0)
            result = [(part + scaling * rule(vectors)).to(origin.dtype) for part, vectors in _in_pieces(origin, tuned)]
            return torch.cat(result).view(origin.shape)

        return Lazy({name: layout_of(base)[name] for name in names}, merged)

    return Recipe("TIES", weights)


def ties(
    base: Weights,
    experts: Mapping[str, Weights],
    scaling: float,
    keep: float,
    merge: str = "sum",
    buffers: Buffers = None,
) -> State:
    """See :func:`trimming`."""
    return trimming(scaling, keep, merge).state(base, experts, buffers)


def _in_pieces(base: Tensor, experts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces (k,) of a tensor and (T, k) of its task vectors in float32, k at most :data:`~plait_wemoe.states.PIECE`."""
    flat, tuned = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    for start in range(0, len(flat), states.PIECE):
        piece = slice(start, start + states.PIECE)
        origin = flat[piece].float()
        yield origin, torch.stack([expert[piece].to(base.device, torch.float32) for expert in tuned]) - origin


def ties_rule(pieces: Pieces, keep: float, merge: str = "sum", surplus: int = 1) -> Callable[[Tensor], Tensor]:
    """A function from pieces (T, k) of task vectors to (k,) of the merged one, after ``pieces()`` were gone through."""
    thresholds = ties_thresholds(pieces, keep, surplus)
    # Where an entry has no majority of its own, it goes with that of all signs.
    signs = sum(int(_trimmed(piece, thresholds).sum(dim=0).sign().sum()) for piece in pieces())
    majority = (signs > 0) - (signs < 0)

    def rule(piece: Tensor) -> Tensor:
        trimmed = _trimmed(piece, thresholds)
        elected = trimmed.sum(dim=0).sign()
        elected = torch.where(elected == 0, majority, elected)
        agreeing = torch.where(trimmed.sign() == elected, trimmed, 0)
        if merge == "mean":
            return agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)
        if merge == "max":
            return agreeing.abs().amax(dim=0) * elected
        return agreeing.sum(dim=0)

    return rule


def _trimmed(vectors: Tensor, thresholds: Tensor) -> Tensor:
    return torch.where(vectors.abs() >= thresholds, vectors, 0)


def ties_thresholds(pieces: Pieces, keep: float, surplus: int = 1) -> Tensor:
    """The magnitude from which on ``keep`` % of the entries of each task vector lie, (T, 1), exact.

    The bits of a magnitude in float32 order as the magnitudes do, so a few of them are settled by each count of all entries.

    Args:
        surplus: entries that are kept beyond the share; 1 in the paper's code. One at least is kept.
    """
    num_bins = 1 << DIGIT_BITS
    first = next(pieces())
    task = torch.arange(len(first), device=first.device)[:, None]
    percentage = keep if keep > 1 else 100 * keep
    rank = None
    found = torch.zeros_like(task)  # the higher bits of every threshold
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        counts = torch.zeros(len(task), num_bins + 1, dtype=torch.long, device=task.device)
        for piece in pieces():
            bits = piece.abs().view(torch.int32).long()
            digit = (bits >> shift) % num_bins
            digit[bits >> (shift + DIGIT_BITS) != found] = num_bins  # below or above what is looked for
            places = (digit + task * (num_bins + 1)).flatten()
            counts += torch.bincount(places, minlength=counts.numel()).view_as(counts)
        if rank is None:
            n = int(counts[0].sum())
            kept = max(1, math.floor(n * percentage / 100) + surplus)
            rank = torch.full_like(task, max(1, n - kept + 1))
        below = counts[:, :num_bins].cumsum(dim=1)
        digit = (below < rank).sum(dim=1, keepdim=True)
        rank = rank - (below - counts[:, :num_bins]).gather(1, digit)
        found = found * num_bins + digit
    return found.int().view(torch.float32)


def dropping(drop_rate: float, then: Recipe, generator: torch.Generator) -> Recipe:
    """Drop entries of the task vectors at random and rescale the rest by 1/(1 − p), then merge (Yu et al., ICML 2024).

    Args:
        then: what merges the thinned experts, which are float32, so that θ₀ + τ loses no more than the merge itself.
        generator: on the CPU, whatever the weights' device.

    Raises:
        ValueError: another drop_rate.
    """
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate is {drop_rate}; allowed is [0, 1)")

    def weights(base: Weights, experts: Mapping[str, Weights], names: Sequence[str]) -> Weights:
        layout = {name: layout_of(base)[name] for name in sorted(names)}
        # Where in the stream of random numbers every tensor begins, so that it can be drawn again by itself.
        starts = {}
        for expert in experts:
            for name, like in layout.items():
                starts[expert, name] = generator.get_state()
                torch.rand(like.shape, generator=generator)

        def thinned(expert: str, name: str) -> Tensor:
            draw = torch.Generator()
            draw.set_state(starts[expert, name])
            origin = base[name]
            tau = task_vector(origin, experts[expert][name])
            kept = (torch.rand(tau.shape, generator=draw) >= drop_rate).to(tau.device)
            return origin.float() + tau * kept / (1 - drop_rate)

        return then.weights(base, {t: Lazy(layout, partial(thinned, t)) for t in experts}, names)

    return Recipe(then.method, weights)


def dare(
    base: Weights,
    experts: Mapping[str, Weights],
    drop_rate: float,
    then: Recipe,
    generator: torch.Generator,
    buffers: Buffers = None,
) -> State:
    """See :func:`dropping`."""
    return dropping(drop_rate, then, generator).state(base, experts, buffers)


def fisher_information(
    encoder: nn.Module, head: Callable[[Tensor], Tensor], batches: Iterable[Inputs]
) -> dict[str, Tensor]:
    """Diagonal Fisher information by squared gradients of Σ_n Σ_c √p_nc · log p_nc (√p constant), + 1e-6.

    As in the published code the gradient is summed over a batch before it is squared.
    """
    encoder.requires_grad_(True)
    parameters = {name: p for name, p in encoder.named_parameters() if p.is_floating_point()}
    information = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    samples = 0
    for inputs in batches:
        log_p = logits_of(head, encoder, inputs).float().log_softmax(dim=-1)
        total = (log_p.detach().exp().sqrt() * log_p).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                information[name] += gradient.float() ** 2
        samples += count(inputs)
    return {name: value / samples + 1e-6 for name, value in information.items()}


def fisher(
    base: State,
    experts: Mapping[str, State],
    information: Mapping[str, Mapping[str, Tensor]],
    buffers: Buffers = None,
) -> State:
    """Σ_t c_t F_t θ_t / Σ_t c_t F_t, with c_t that even out the norms of F_t (Matena & Raffel, NeurIPS 2022).

    Weights without information are averaged.
    """
    norms = {t: torch.stack([value.norm() for value in information[t].values()]).norm() for t in experts}
    inverse = {t: 1 / (norm + 1e-6) for t, norm in norms.items()}
    coefficient = {t: value / sum(inverse.values()) / len(experts) for t, value in inverse.items()}
    merged = {}
    for name in weight_names(base, buffers):
        weights = {t: coefficient[t] * information[t][name] if name in information[t] else 1.0 for t in experts}
        total = sum(weights[t] * experts[t][name].float() for t in experts)
        merged[name] = total / sum(weights.values())
    return completed(base, experts, merged, "Fisher", buffers)


def gram_matrices(encoder: nn.Module, batches: Iterable[Inputs]) -> dict[str, Tensor]:
    """Mean over tokens of x xᵀ for what enters every ``nn.Linear``: linear → (in, in). Padding is left out."""
    current: Inputs = {}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            x = args[0].detach().float()
            mask = token_mask(current, x)
            x = x.flatten(0, -2) if mask is None else x[mask].flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    linears = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(record(name)) for name, module in linears]
    try:
        with torch.no_grad():
            for current in batches:  # the hooks read it
                call(encoder, current)
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
    buffers: Buffers = None,
) -> State:
    """Linear layers by least squares on the experts' own inputs, the rest averaged (Jin et al., ICLR 2023).

    Wᵀ = (Σ G_t)⁻¹ Σ G_t W_tᵀ, off-diagonal entries of G_t scaled by ``off_diagonal``. ``ridge`` times the
    mean diagonal is added to every G_t, which keeps the solution where inputs do not span the space.
    """
    names = set(weight_names(base, buffers))
    merged = {name: scaled_sum(base[name], [e[name] for e in experts.values()], 1 / len(experts)) for name in names}
    for linear in set.intersection(*[set(gram) for gram in grams.values()]):
        name = f"{linear}.weight"
        if name not in names:
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
    return completed(base, experts, merged, "RegMean", buffers)
