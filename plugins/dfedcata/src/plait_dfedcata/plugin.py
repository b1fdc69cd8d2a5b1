"""DFedCata and OledFL as ``aggregate`` methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import attrs
from plait import Report, hookimpl
from plait.fields import doc, in_range
from plait_federated.plugin.tables import client_members, joined, train_of, user_errors
from plait_federated.plugin.training import Decentralised, UpdateOrder, WeightsName, check_prox, describe_graph, train
from plait_federated.topology import Graph

from plait_dfedcata.dfedcata import Anchor, dfedcata, oledfl
from plait_dfedcata.stability import LIMIT, StabilityError, growth, largest_beta, stability

__plait_api__ = "0.1"

PRESETS: dict[str, tuple[UpdateOrder, WeightsName]] = {
    "released": ("sequential", "uniform"),
    "parallel": ("synchronous", "metropolis"),
}
ANCHOR_OF: dict[UpdateOrder, Anchor] = {"sequential": "own_previous", "synchronous": "mixed_previous"}


def _beta() -> Any:
    return attrs.field(
        default=0.9,
        validator=in_range(0, 1, high_open=True),
        metadata=doc("coefficient of the extrapolation; refused where the graph makes it unstable"),
    )


def _allow_unstable() -> Any:
    return attrs.field(default=False, metadata=doc("train although the stability radius is 1 or more"))


@attrs.frozen(kw_only=True)
class DFedCata(Decentralised):
    """DFedCata: extrapolated mixing and proximal local training (Li et al., arXiv 2410.07272)."""

    preset: Literal["released", "parallel"] = attrs.field(
        default="released",
        metadata=doc(
            "released: sequential, own_previous, uniform weights, as the official program; "
            "parallel: synchronous, mixed_previous, metropolis weights; a field that is set goes before it"
        ),
    )
    beta: float = _beta()
    prox_lambda: float = attrs.field(
        default=0.05,
        validator=in_range(0),
        metadata=doc("λ of the proximal term (λ/2)‖w − start‖²; λ · learning_rate < 1"),
    )
    anchor: Literal["own_previous", "mixed_previous"] | None = attrs.field(
        default=None,
        metadata=doc(
            "what is extrapolated from; null: own_previous in sequential order, mixed_previous in synchronous"
        ),
    )
    clip_scope: Literal["split", "joint"] = attrs.field(
        default="split",
        metadata=doc("split: half of the proximal term outside the clip, as the official program; joint: all inside"),
    )
    update_order: Literal["synchronous", "sequential"] | None = attrs.field(
        default=None, metadata=doc("sequential or synchronous; null: by preset, synchronous on engine peers")
    )
    weights: Literal["uniform", "metropolis", "lazy"] | None = attrs.field(
        default=None, metadata=doc("mixing weights; null: by preset, uniform on directed graphs")
    )
    allow_unstable: bool = _allow_unstable()

    @hookimpl
    def aggregate(self, model, clients, run) -> Any:
        check_prox(self)
        chosen = self.resolved()
        check_stability(chosen, chosen.anchor, clients, run)
        method = dfedcata(chosen.beta, chosen.prox_lambda, chosen.anchor, chosen.clip_scope)
        return train(chosen, method, model, clients, run)

    def resolved(self) -> DFedCata:
        """The same with order, anchor and weights filled in."""
        order, weights = PRESETS[self.preset]
        if self.engine == "peers":
            order = "synchronous"
        if self.topology == "exp":  # directed: metropolis weights do not exist
            weights = "uniform"
        order = self.update_order or order
        return attrs.evolve(
            self, update_order=order, weights=self.weights or weights, anchor=self.anchor or ANCHOR_OF[order]
        )


@attrs.frozen(kw_only=True)
class OledFL(Decentralised):
    """OledFL: extrapolation away from the own last model, plain or sharpness-aware steps (Li et al., arXiv 2410.06482)."""

    beta: float = _beta()
    sam_rho: float = attrs.field(
        default=0.0, validator=in_range(0), metadata=doc("radius of the sharpness-aware perturbation; 0 is plain SGD")
    )
    update_order: Literal["synchronous", "sequential"] = attrs.field(
        default="sequential",
        metadata=doc("sequential, as the official program, or synchronous, where nothing is gained"),
    )
    allow_unstable: bool = _allow_unstable()

    @hookimpl
    def aggregate(self, model, clients, run) -> Any:
        check_stability(self, "own_previous", clients, run)
        return train(self, oledfl(self.beta, self.sam_rho), model, clients, run)


def check_stability(config: Any, anchor: Anchor, clients: Any, run: Any) -> None:
    """Measure the radius of the round's linear part and refuse it at 1 or more.

    Raises:
        PlaitError: with the radius, the largest stable beta and the other remedies.
    """
    with user_errors():
        graph = config.graph(len(client_members(train_of(joined(clients)))), run.seed)
        radius_of = radius_rule(graph, anchor, config.update_order)
        radius = radius_of(config.beta)
        named = f"{anchor}, {config.update_order} order, beta {config.beta:g}, {describe_graph(graph)}"
        preset = f"preset {config.preset}: " if hasattr(config, "preset") else ""
        run.add(Report(notes=[f"{preset}{named}: stability radius {radius:.3f}"]))
        if radius < LIMIT:
            return
        sentence = f"{named} has stability radius {radius:.3f}; the clients' models fall apart at 1 or more"
        if config.allow_unstable:
            run.warn(sentence)
            return
        best = largest_beta(radius_of)
        remedy = f"beta: {best:g} or less" if best is not None else "another topology"
        others = [] if graph.weights == "lazy" or config.topology == "exp" else ["weights: lazy"]
        others += ["anchor: mixed_previous"] if anchor == "own_previous" and hasattr(config, "anchor") else []
        others += ["update_order: sequential"] if config.update_order == "synchronous" else []
        others = [text for text in others if _helps(text, graph, anchor, config)]
        raise StabilityError(f"{sentence}; take {' or '.join([remedy, *others])}")


def radius_rule(graph: Graph, anchor: Anchor, update_order: UpdateOrder) -> Callable[[float], float]:
    """beta → radius: of the fixed matrix, or the mean growth over 50 drawn graphs."""
    if graph.fresh_each_round:
        mixings = [graph.mixing(index) for index in range(50)]
        return partial(_growth_at, mixings, anchor, update_order, graph.seed)
    return partial(_radius_at, graph.mixing(0), anchor, update_order)


def _growth_at(mixings: list, anchor: Anchor, update_order: UpdateOrder, seed: int, beta: float) -> float:
    return growth(mixings.__getitem__, beta, anchor, update_order, len(mixings), seed)


def _radius_at(mixing: Any, anchor: Anchor, update_order: UpdateOrder, beta: float) -> float:
    return stability(mixing, beta, anchor, update_order)


def _helps(remedy: str, graph: Graph, anchor: Anchor, config: Any) -> bool:
    """Whether a proposed remedy is stable."""
    field, value = remedy.split(": ")
    if field == "weights":
        graph = replace(graph, weights=value)
    order = value if field == "update_order" else config.update_order
    return radius_rule(graph, value if field == "anchor" else anchor, order)(config.beta) < LIMIT
