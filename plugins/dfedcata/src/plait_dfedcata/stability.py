"""Will the extrapolation blow up? The spectral radius of gossip on the disagreement of the peers.

Without training, a round is linear in the models. What is not shared by all peers must shrink: the spectral radius
of that map, taken modulo the all-equal models, has to be below 1. Necessary, not sufficient, with training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from plait_federated import Graph, UpdateOrder, describe_graph

Anchor = Literal["own_previous", "mixed_previous"]

# A radius of exactly 1 comes out of the eigenvalue solver as 1 ± rounding.
LIMIT = 1 - 1e-9


@dataclass(frozen=True)
class Stability:
    """How stable mixing and extrapolation are by themselves.

    Attributes:
        setting: anchor, order, β and graph, in words.
        radius: below 1 the disagreement shrinks.
    """

    setting: str
    radius: float

    @property
    def is_stable(self) -> bool:
        return self.radius < LIMIT

    def __str__(self) -> str:
        end = "" if self.is_stable else "; the clients' models fall apart at 1 or more"
        return f"{self.setting} has stability radius {self.radius:.3f}{end}"


def check_stability(
    graph: Graph,
    beta: float,
    anchor: Anchor,
    update_order: UpdateOrder,
    allow_unstable: bool,
    on_stability: Callable[[Stability], None],
    anchors: Sequence[Anchor] = ("own_previous", "mixed_previous"),
) -> None:
    """Measure the radius of the round's linear part and refuse it at 1 or more, unless allowed.

    Args:
        on_stability: called with what was found, also before a refusal.
        anchors: between which the method may choose.

    Raises:
        ValueError: it is refused; with the radius, the largest stable β and the other remedies that help.
    """
    radius_of = radius_rule(graph, anchor, update_order)
    setting = f"{anchor}, {update_order} order, beta {beta:g}, {describe_graph(graph)}"
    found = Stability(setting, radius_of(beta))
    on_stability(found)
    if found.is_stable or allow_unstable:
        return
    best = largest_beta(radius_of)
    remedies = [f"beta: {best:g} or less" if best is not None else "another topology"]
    if graph.weights != "lazy" and graph.name != "exp":  # which is directed
        lazy = replace(graph, weights="lazy")
        remedies += ["weights: lazy"] * (radius_rule(lazy, anchor, update_order)(beta) < LIMIT)
    for other in anchors:
        if anchor == "own_previous" and other != anchor:
            remedies += [f"anchor: {other}"] * (radius_rule(graph, other, update_order)(beta) < LIMIT)
    if update_order == "synchronous":
        remedies += ["update_order: sequential"] * (radius_rule(graph, anchor, "sequential")(beta) < LIMIT)
    raise ValueError(f"{found}; take {' or '.join(remedies)}")


def radius_rule(graph: Graph, anchor: Anchor, update_order: UpdateOrder) -> Callable[[float], float]:
    """beta → radius: of the fixed matrix, or the mean growth over 50 drawn graphs."""
    if graph.fresh_each_round:
        mixings = [graph.mixing(index) for index in range(50)]
        return partial(_growth_at, mixings, anchor, update_order, graph.seed)
    return partial(_radius_at, graph.mixing(0), anchor, update_order)


def sweep_matrix(mixing: np.ndarray, beta: float, anchor: Anchor, update_order: UpdateOrder) -> np.ndarray:
    """The linear map of one round of pure gossip.

    Returns:
        ``[n, n]`` on the models Z for anchor ``own_previous``; ``[2n, 2n]`` on (Z, previous mixed models) for
        ``mixed_previous``.
    """
    n = len(mixing)
    identity = np.eye(n)
    # z' = (1+β)(E z' + L z) − β ref: E holds the neighbours that have trained before in this round, L all others.
    earlier = np.tril(mixing, -1) if update_order == "sequential" else np.zeros((n, n))
    later = mixing - earlier
    solve = np.linalg.inv(identity - (1 + beta) * earlier)
    if anchor == "own_previous":
        matrix: np.ndarray = solve @ ((1 + beta) * later - beta * identity)
        return matrix
    to_models = np.hstack([solve @ ((1 + beta) * later), solve @ (-beta * identity)])
    to_mixed = earlier @ to_models + np.hstack([later, np.zeros((n, n))])
    return np.vstack([to_models, to_mixed])


def stability(mixing: np.ndarray, beta: float, anchor: Anchor, update_order: UpdateOrder) -> float:
    """Spectral radius of one round on the disagreement, for a graph that stays; < 1 is stable."""
    sweep = sweep_matrix(mixing, beta, anchor, update_order)
    return float(np.abs(np.linalg.eigvals(_disagreement(len(mixing), len(sweep)) @ sweep)).max())


def growth(
    mixing_of_round: Callable[[int], np.ndarray],
    beta: float,
    anchor: Anchor,
    update_order: UpdateOrder,
    num_rounds: int = 50,
    seed: int = 0,
) -> float:
    """Mean growth a round (geometric) of a random disagreement, for graphs drawn afresh every round; < 1 is stable."""
    n = len(mixing_of_round(0))
    size = n if anchor == "own_previous" else 2 * n
    project = _disagreement(n, size)
    vector = project @ np.random.RandomState(seed).standard_normal(size)
    vector /= np.linalg.norm(vector)
    logarithm = 0.0
    for index in range(num_rounds):
        vector = project @ (sweep_matrix(mixing_of_round(index), beta, anchor, update_order) @ vector)
        norm = np.linalg.norm(vector)
        if norm == 0:
            return 0.0
        logarithm += np.log(norm)
        vector /= norm
    return float(np.exp(logarithm / num_rounds))


def largest_beta(radius_of: Callable[[float], float]) -> float | None:
    """The largest β < 1, to 0.01, up to which ``radius_of`` stays below 1; ``None`` if no β > 0 does."""
    stable = None
    for beta in np.arange(0.01, 1.0, 0.01):
        if radius_of(float(beta)) >= LIMIT:
            break
        stable = round(float(beta), 2)
    return stable


def _growth_at(mixings: list[np.ndarray], anchor: Anchor, update_order: UpdateOrder, seed: int, beta: float) -> float:
    return growth(mixings.__getitem__, beta, anchor, update_order, len(mixings), seed)


def _radius_at(mixing: np.ndarray, anchor: Anchor, update_order: UpdateOrder, beta: float) -> float:
    return stability(mixing, beta, anchor, update_order)


def _disagreement(n: int, size: int) -> np.ndarray:
    """I − 11ᵀ/n on each block of ``size``: takes away what all peers share."""
    return np.kron(np.eye(size // n), np.eye(n) - 1 / n)
