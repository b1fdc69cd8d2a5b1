"""DFedCata (Li et al., arXiv 2410.07272, with its official program at commit 0589458): the method from first to last step.

n peers hold one model each, z_i, all the same at the start. In round t = 0 … T−1 every peer i

    (1) mixes           m_i = Σ_j W_ij · z_j                            over itself and its neighbours
    (2) extrapolates    s_i = m_i + β · (m_i − ref_i)                   :func:`own_previous_start`, :func:`mixed_previous_start`
    (3) trains          z_i = LocalTrain(s_i) on loss + (λ/2)‖w − s_i‖²  :func:`split_prox_step`, a batch at a time

and sends z_i to its neighbours, nothing else. The result is (4) the average z̄ of the last models. The numbers are those
of this package. In the words of the paper's abstract, (2) is the Nesterov extrapolation step of the aggregation phase and
(3) the Moreau envelope function, against the inconsistency of the local models.

(1), the loop over rounds and (4) are those of every decentralised method, :mod:`plait_federated.rounds` and
:func:`plait_federated.follow`; :func:`rule` is what sets this one apart, :func:`dfedcata` runs all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from plait_federated import (
    ClientShards,
    FederatedSettings,
    Gossip,
    Gradient,
    Graph,
    Local,
    TrainingOutcome,
    check_prox,
    clip,
    follow,
    prox_step,
)
from torch import Tensor, nn

from plait_dfedcata.stability import Anchor, Stability, check_stability

ClipScope = Literal["split", "joint"]


def dfedcata(
    model: nn.Module,
    shards: ClientShards,
    settings: FederatedSettings,
    *,
    graph: Graph,
    beta: float = 0.9,
    prox_lambda: float = 0.05,
    anchor: Anchor = "own_previous",
    clip_scope: ClipScope = "split",
    allow_unstable: bool = False,
    on_stability: Callable[[Stability], None] = lambda stability: None,
    **options: Any,
) -> TrainingOutcome:
    """Train one model on the shards of peers that talk to their neighbours only.

    Args:
        model: the start of all peers; it is not changed.
        settings: T, learning rate, and the order in which peers train. The official program's is ``sequential`` with
            anchor ``own_previous``; what can run in parallel is ``synchronous`` with ``mixed_previous``.
        graph: the neighbours and W of every round.
        beta: β of (2), in [0, 1).
        prox_lambda: λ of (3), >= 0; λ · learning rate < 1.
        anchor: ref_i of (2): ``own_previous`` is z_i of the last round, ``mixed_previous`` is m_i of the last round.
        clip_scope: how much of (3)'s proximal gradient the clip takes: ``split`` half, ``joint`` all.
        allow_unstable: train although the disagreement of the peers would grow.
        on_stability: called with how stable (1) and (2) are, before anything else.
        options: ``folder`` (checkpoints; needed), ``test``, ``engine``, ``on_round``, … of
            :func:`plait_federated.follow`.

    Returns:
        z̄ as ``reported``, all z_i as ``state["local"]``, and a history.

    Raises:
        ValueError: (1) and (2) by themselves would drive the peers apart.
        FloatingPointError: training did.
        ValueError: a value out of its range, or parts that do not fit together.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}; allowed is [0, 1)")
    check_prox(prox_lambda, settings.learning_rate)
    check_stability(graph, beta, anchor, settings.update_order, allow_unstable, on_stability)
    return follow(rule(beta, prox_lambda, anchor, clip_scope), model, shards, settings, graph=graph, **options)


def rule(beta: float, prox_lambda: float, anchor: Anchor, clip_scope: ClipScope) -> Gossip:
    """(2) and (3) as a rule for the engines of plait-federated, which do (1)."""
    step = partial(STEPS[clip_scope], prox_lambda=prox_lambda)
    return Gossip(step, partial(STARTS[anchor], beta=beta), keeps_mixed=anchor == "mixed_previous")


def own_previous_start(mixed: Tensor, own_previous: Tensor, previous_mixed: Tensor, *, beta: float) -> Tensor:
    """(2) with ref = z of the last round: away from the peer's own last trained model; all ``[k, P]``."""
    return mixed + beta * (mixed - own_previous)


def mixed_previous_start(mixed: Tensor, own_previous: Tensor, previous_mixed: Tensor, *, beta: float) -> Tensor:
    """(2) with ref = m of the last round: Nesterov's extrapolation of the mixed model; all ``[k, P]``."""
    return mixed + beta * (mixed - previous_mixed)


def split_prox_step(w: Tensor, gradient: Gradient, local: Local, *, prox_lambda: float) -> Tensor:
    """(3), one batch, as the official program has it: −λs lies inside the clip, λw outside.

    Without an active clip this is w − lr·(∇f + λ(w − s) + wd·w).
    """
    g = clip(gradient(w) - prox_lambda * local.start, local.max_grad_norm)
    return w - local.learning_rate * (g + (prox_lambda + local.weight_decay) * w)


STARTS = {"own_previous": own_previous_start, "mixed_previous": mixed_previous_start}
STEPS = {"split": split_prox_step, "joint": prox_step}
