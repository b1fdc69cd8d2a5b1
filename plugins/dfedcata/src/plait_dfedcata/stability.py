"""Will the extrapolation blow up? The spectral radius of gossip on the disagreement of the peers.

Without training, a round is linear in the models. What is not shared by all peers must shrink: the spectral radius
of that map, taken modulo the all-equal models, has to be below 1. Necessary, not sufficient, with training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from plait_dfedcata.dfedcata import Anchor

UpdateOrder = Literal["synchronous", "sequential"]


# A radius of exactly 1 comes out of the eigenvalue solver as 1 ± rounding.
LIMIT = 1 - 1e-9


class StabilityError(ValueError):
    """The disagreement of the peers would grow."""


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
        return solve @ ((1 + beta) * later - beta * identity)
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


def _disagreement(n: int, size: int) -> np.ndarray:
    """I − 11ᵀ/n on each block of ``size``: takes away what all peers share."""
    return np.kron(np.eye(size // n), np.eye(n) - 1 / n)
