"""DFedCata and OledFL as ``aggregate`` methods."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import attrs
from plait import Report, hookimpl
from plait.fields import field, in_range
from plait_federated import MixingWeights, UpdateOrder
from plait_federated.methods import Decentralised, Proximal, train

from plait_dfedcata.baselines import oledfl
from plait_dfedcata.dfedcata import ClipScope, dfedcata
from plait_dfedcata.stability import Anchor, Stability

ANCHOR_OF: dict[UpdateOrder, Anchor] = {"sequential": "own_previous", "synchronous": "mixed_previous"}


@attrs.frozen(kw_only=True)
class Extrapolated(Decentralised):
    """Extrapolation of the mixed model, and what to do where it is unstable."""

    beta: float = field(
        0.9,
        "coefficient of the extrapolation; refused where the graph makes it unstable",
        in_range(0, 1, high_open=True),
    )
    allow_unstable: bool = field(False, "train although the stability radius is 1 or more")


@attrs.frozen(kw_only=True)
class DFedCata(Proximal, Extrapolated):
    """DFedCata: extrapolated mixing and proximal local training (Li et al., arXiv 2410.07272)."""

    renamed_fields: ClassVar[Mapping[str, str]] = {
        **Decentralised.renamed_fields,
        "preset": "as_released",
    }

    as_released: bool = field(
        True,
        "true: sequential, own_previous, uniform weights, as the official program; "
        "false: synchronous, mixed_previous, metropolis weights, which can run in parallel; a field that is set goes before it",
    )
    anchor: Anchor | None = field(
        None, "what is extrapolated from; null: own_previous in sequential order, mixed_previous in synchronous"
    )
    clip_scope: ClipScope = field(
        "split", "split: half of the proximal term outside the clip, as the official program; joint: all inside"
    )
    # None stands for a choice of resolved(), which gives what the base class has.
    update_order: UpdateOrder | None = field(  # type: ignore[assignment]
        None, "sequential or synchronous; null: by as_released, synchronous on engine peers"
    )
    weights: MixingWeights | None = field(  # type: ignore[assignment]
        None, "mixing weights; null: by as_released, uniform on directed graphs"
    )

    @hookimpl
    def aggregate(self, model: Any, clients: Any, run: Any) -> Any:
        chosen = self.resolved()
        own = {
            name: getattr(chosen, name) for name in ("beta", "prox_lambda", "anchor", "clip_scope", "allow_unstable")
        }
        prefix = "as released: " if self.as_released else "in parallel: "
        method = partial(dfedcata, **own, on_stability=partial(report_stability, run, prefix))
        return train(chosen, method, model, clients, run)

    def resolved(self) -> DFedCata:
        """The same with order, anchor and weights filled in."""
        parallel = not self.as_released
        order = self.update_order or ("synchronous" if parallel or self.engine == "peers" else "sequential")
        # Directed graphs such as exp have no metropolis weights.
        weights = self.weights or ("metropolis" if parallel and self.topology != "exp" else "uniform")
        return attrs.evolve(self, update_order=order, weights=weights, anchor=self.anchor or ANCHOR_OF[order])


@attrs.frozen(kw_only=True)
class OledFL(Extrapolated):
    """OledFL: extrapolation away from the own last model, plain or sharpness-aware steps (Li et al., arXiv 2410.06482)."""

    renamed_fields: ClassVar[Mapping[str, str]] = {**Decentralised.renamed_fields, "sam_rho": "rho"}

    rho: float = field(0.0, "radius of the sharpness-aware perturbation; 0 is plain SGD", in_range(0))
    update_order: UpdateOrder = field(
        "sequential", "sequential, as the official program, or synchronous, where nothing is gained"
    )

    @hookimpl
    def aggregate(self, model: Any, clients: Any, run: Any) -> Any:
        method = partial(
            oledfl,
            beta=self.beta,
            rho=self.rho,
            allow_unstable=self.allow_unstable,
            on_stability=partial(report_stability, run, ""),
        )
        return train(self, method, model, clients, run)


def report_stability(run: Any, prefix: str, found: Stability) -> None:
    """In the report, and as a warning where the method runs on in spite of it."""
    run.add(Report(notes=[f"{prefix}{found.setting}: stability radius {found.radius:.3f}"]))
    if not found.is_stable:
        run.warn(str(found))
