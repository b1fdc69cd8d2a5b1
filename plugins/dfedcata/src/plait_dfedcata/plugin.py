"""DFedCata and OledFL as ``aggregate`` methods."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import attrs
from plait import Report, hookimpl
from plait.fields import doc, in_range
from plait_federated.plugin.training import Decentralised, UpdateOrder, WeightsName, train

from plait_dfedcata.baselines import oledfl
from plait_dfedcata.dfedcata import dfedcata
from plait_dfedcata.stability import Anchor, Stability

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
        chosen = self.resolved()
        method = partial(
            dfedcata,
            beta=chosen.beta,
            prox_lambda=chosen.prox_lambda,
            anchor=chosen.anchor,
            clip_scope=chosen.clip_scope,
            allow_unstable=chosen.allow_unstable,
            on_stability=partial(tell_stability, run, f"preset {chosen.preset}: "),
        )
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
        method = partial(
            oledfl,
            beta=self.beta,
            rho=self.sam_rho,
            allow_unstable=self.allow_unstable,
            on_stability=partial(tell_stability, run, ""),
        )
        return train(self, method, model, clients, run)


def tell_stability(run: Any, prefix: str, found: Stability) -> None:
    """In the report, and as a warning where the method runs on in spite of it."""
    run.add(Report(notes=[f"{prefix}{found.setting}: stability radius {found.radius:.3f}"]))
    if not found.is_stable:
        run.warn(str(found))
