"""OledFL (Li et al., arXiv 2410.06482): DFedCata's start without its proximal term."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from plait_federated import ClientShards, FederatedSettings, Gossip, Graph, TrainingOutcome, follow, sam_step, sgd_step
from torch import nn

from plait_dfedcata.dfedcata import own_previous_start
from plait_dfedcata.stability import Stability, check_stability


def oledfl(
    model: nn.Module,
    shards: ClientShards,
    settings: FederatedSettings,
    *,
    graph: Graph,
    beta: float = 0.9,
    rho: float = 0.0,
    allow_unstable: bool = False,
    on_stability: Callable[[Stability], None] = lambda stability: None,
    **options: Any,
) -> TrainingOutcome:
    """Train as :func:`plait_dfedcata.dfedcata.dfedcata`, by plain (``rho`` 0) or sharpness-aware local steps."""
    check_stability(
        graph, beta, "own_previous", settings.update_order, allow_unstable, on_stability, anchors=("own_previous",)
    )
    return follow(oledfl_rule(beta, rho), model, shards, settings, graph=graph, **options)


def oledfl_rule(beta: float, rho: float) -> Gossip:
    """Opposite-lookahead start with plain (rho = 0) or sharpness-aware local steps."""
    step = partial(sam_step, rho=rho) if rho > 0 else sgd_step
    return Gossip(step, partial(own_previous_start, beta=beta))
