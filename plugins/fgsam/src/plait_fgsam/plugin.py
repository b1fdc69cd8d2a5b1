"""FGSAM, FGSAM+ and the sharpness-aware baselines as trainings of the graph kit, and a picture of sharpness."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal, cast

import attrs
import torch
from plait import Report, Run, hookimpl
from plait.errors import ConfigurationError
from plait.fields import field, in_range
from plait.report import Curve, Image, Panel, png
from plait_graph import GRAPHS, GraphTraining, NodeObjective, PlainUpdate, Update, betas_field, check_is_module
from torch import nn

from plait_fgsam.baselines import AESAM, ESAM, SAM, LookSAM
from plait_fgsam.fgsam import FGSAM, FGSAMPlus
from plait_fgsam.peer import peer_layers, takes_edges
from plait_fgsam.perturbing import PerturbingOptimizer
from plait_fgsam.sharpness import SharpnessWalk, walk
from plait_fgsam.updates import Peers, PeerUpdate, TwoLossUpdate

BASES = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}

# -- optimize -----------------------------------------------------------------------------------------------------


def _patterns(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, (tuple, list)) or not all(isinstance(pattern, str) for pattern in value):
        raise ConfigurationError(f"perturb is {value!r}; expected a list of patterns, such as ['encoder.*']")


def _graphs_by_layer(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"peer is {value!r}; expected a mapping, such as {{GINConv: identity}}")
    for layer, graph in value.items():
        if graph not in ("identity", "empty"):
            raise ConfigurationError(f"peer of {layer} is {graph!r}; allowed is 'identity', 'empty'")


@attrs.frozen(kw_only=True)
class PerturbingTraining(GraphTraining):
    """What the sharpness-aware trainings share: a base optimizer and the length of the perturbation."""

    optimizer: Literal["adam", "adamw", "sgd"] = field("adam", "base optimizer")
    momentum: float = field(0.9, "of sgd", in_range(0, 1, high_open=True))
    betas: tuple[float, float] = betas_field()
    rho: float = field(0.05, "length of the perturbation", in_range(0))
    perturb: tuple[str, ...] = field(
        ("*",), "patterns of the names of the tensors that are perturbed, such as encoder.*", _patterns
    )

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The model's tensors: those that are perturbed, and those that are only trained."""
        named = list(model.named_parameters())
        inside = [p for name, p in named if any(fnmatch(name, pattern) for pattern in self.perturb)]
        if not inside:
            known = ", ".join(name for name, _ in named)
            raise ValueError(f"perturb is {list(self.perturb)}, which matches no tensor of the model; it has {known}")
        chosen = {id(p) for p in inside}
        outside = [p for _, p in named if id(p) not in chosen]
        return [{"params": inside}, *([{"params": outside, "perturb": False}] if outside else [])]

    def base_options(self) -> dict[str, Any]:
        return {
            "base_optimizer": BASES[self.optimizer],
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            **({"momentum": self.momentum} if self.optimizer == "sgd" else {"betas": self.betas}),
        }


@attrs.frozen(kw_only=True)
class PeerTraining(PerturbingTraining):
    """What the trainings with a PeerMLP share."""

    peer: dict[str, str] = field(
        attrs.Factory(dict),
        "layer type, such as GINConv → the graph its PeerMLP sees, identity or empty, not the usual one",
        _graphs_by_layer,
    )

    def peers(self, model: nn.Module) -> Peers:
        """The choices of ``peer`` by type; refuses models without a PeerMLP."""
        types = {type(layer).__name__: type(layer) for layer in model.modules() if takes_edges(layer)}
        unknown = sorted(set(self.peer) - set(types))
        if unknown:
            known = ", ".join(sorted(types)) or "none"
            raise ValueError(f"peer names {unknown[0]}; of layers that take edges the model has {known}")
        peers = cast(Peers, {types[name]: graph for name, graph in self.peer.items()})
        peer_layers(model, peers)
        return peers


@attrs.frozen(kw_only=True)
class FGSAMTraining(PeerTraining):
    """FGSAM: ascend with the graph network, descend with its PeerMLP (Luo et al., NeurIPS 2024)."""

    lam: float | None = field(None, "weight of the MLP (convex, 0.5) or GNN (additive, 1) gradient", in_range(0))
    as_released: bool = field(True, "as the authors' released code combines gradients; false: as Algorithm 1 does")
    combine: Literal["convex", "additive"] | None = field(None, "in place of what as_released says")

    renamed_fields: ClassVar[Mapping[str, str]] = {**GraphTraining.renamed_fields, "variant": "as_released"}

    def __attrs_post_init__(self) -> None:
        self._optimizer([torch.nn.Parameter(torch.zeros(1))])  # which checks the fields together

    def make_update(self, model: nn.Module, seed: int) -> Update:
        return TwoLossUpdate(model, self._optimizer(self.groups(model)), self.peers(model))

    def _optimizer(self, params: Any) -> PerturbingOptimizer:
        return FGSAM(params, **self._options(), **self.base_options())

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("rho", "lam", "as_released", "combine")}


@attrs.frozen(kw_only=True)
class FGSAMPlusTraining(FGSAMTraining):
    """FGSAM+: exact FGSAM updates now and then, PeerMLP updates in between (Luo et al., NeurIPS 2024)."""

    rho: float = field(0.1, "length of the perturbation", in_range(0))
    interval: int = field(2, "updates from one exact update to the next", in_range(1))
    alpha: float = field(0.7, "weight of the flatness part in approximate updates", in_range(0))
    flatness_from: Literal["combined", "perturbed"] | None = field(None, "in place of what as_released says")
    topology: bool | None = field(
        None, "add the kept topology part in approximate updates; none: not as_released, in Algorithm 1"
    )
    projection: Literal["tensor", "global"] = field("tensor", "projections per tensor or over all")

    def _optimizer(self, params: Any) -> PerturbingOptimizer:
        own = {name: getattr(self, name) for name in ("interval", "alpha", "flatness_from", "topology", "projection")}
        return FGSAMPlus(params, **own, **self._options(), **self.base_options())


@attrs.frozen(kw_only=True)
class MixTraining(FGSAMTraining):
    """The mix of GNN and PeerMLP gradients at the weights themselves: FGSAM without perturbation."""

    rho: float = field(0.0, "always 0", in_range(0, 0))


@attrs.frozen(kw_only=True)
class PeerMLPTraining(PeerTraining):
    """Training of the PeerMLP alone, used with message passing afterwards; SAM where rho > 0."""

    rho: float = field(0.0, "length of the perturbation", in_range(0))

    def make_update(self, model: nn.Module, seed: int) -> Update:
        peers, options = self.peers(model), self.base_options()
        if self.rho > 0:
            return PeerUpdate(TwoLossUpdate(model, SAM(self.groups(model), rho=self.rho, **options)), peers)
        base_optimizer = options.pop("base_optimizer")
        return PeerUpdate(PlainUpdate(model, base_optimizer(model.parameters(), **options)), peers)


@attrs.frozen(kw_only=True)
class SAMTraining(PerturbingTraining):
    """SAM: the gradient at the weights perturbed along the gradient (Foret et al., ICLR 2021)."""

    def make_update(self, model: nn.Module, seed: int) -> Update:
        return TwoLossUpdate(model, SAM(self.groups(model), rho=self.rho, **self.base_options()))


@attrs.frozen(kw_only=True)
class ASAMTraining(PerturbingTraining):
    """ASAM: SAM with the perturbation scaled by the weights (Kwon et al., ICML 2021)."""

    rho: float = field(0.5, "length of the scaled perturbation", in_range(0))

    def make_update(self, model: nn.Module, seed: int) -> Update:
        return TwoLossUpdate(model, SAM(self.groups(model), rho=self.rho, adaptive=True, **self.base_options()))


@attrs.frozen(kw_only=True)
class LookSAMTraining(PerturbingTraining):
    """LookSAM: SAM now and then, its flat part reused in between (Liu et al., CVPR 2022)."""

    interval: int = field(5, "updates from one SAM update to the next", in_range(1))
    alpha: float = field(0.7, "weight of the reused part", in_range(0))

    def make_update(self, model: nn.Module, seed: int) -> Update:
        options: dict[str, Any] = {"rho": self.rho, "interval": self.interval, "alpha": self.alpha}
        return TwoLossUpdate(model, LookSAM(self.groups(model), **options, **self.base_options()))


@attrs.frozen(kw_only=True)
class ESAMTraining(PerturbingTraining):
    """ESAM: SAM on a part of the tensors and of the samples (Du et al., ICLR 2022)."""

    beta: float = field(0.5, "chance of a tensor to be perturbed", in_range(0, 1, low_open=True))
    gamma: float = field(0.5, "share of samples in the second pass", in_range(0, 1, low_open=True))

    def make_update(self, model: nn.Module, seed: int) -> Update:
        options: dict[str, Any] = {"rho": self.rho, "beta": self.beta, "gamma": self.gamma, "seed": seed + 1}
        optimizer = ESAM(self.groups(model), **options, **self.base_options())
        return TwoLossUpdate(model, optimizer, per_sample=True)


@attrs.frozen(kw_only=True)
class AESAMTraining(PerturbingTraining):
    """AE-SAM: a SAM update only where the gradient is large for its time (Jiang et al., ICLR 2023)."""

    delta: float = field(0.9, "decay of the running mean and spread", in_range(0, 1, high_open=True))
    lambda_1: float = field(-1.0, "threshold at the end, in spreads", in_range())
    lambda_2: float = field(1.0, "threshold at the start, in spreads", in_range())

    def make_update(self, model: nn.Module, seed: int) -> Update:
        options = {name: getattr(self, name) for name in ("num_steps", "rho", "delta", "lambda_1", "lambda_2")}
        return TwoLossUpdate(model, AESAM(self.groups(model), **options, **self.base_options()))


# -- evaluate -----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class GraphSharpness:
    """Loss around the weights: along the gradient (SAM's perturbation) and along random directions."""

    takes = {"model": "graph-network", "data": GRAPHS}

    radius: float = field(1.0, "farthest distance in weight space", in_range(0, low_open=True))
    num_points: int = field(21, "points on each line, 0 included", in_range(2))
    num_directions: int = field(10, "random directions", in_range(1))

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Run) -> Report:
        models = model if isinstance(model, dict) else {"": model}
        objective = NodeObjective(data, run.device)
        walks = {name: self._walked(candidate, objective, run) for name, candidate in models.items()}
        rows = [
            ({"model": name} if name else {})
            | {
                "loss": float(walked.ascent[0]),
                "rise along the gradient": float(walked.ascent[-1] - walked.ascent[0]),
                "rise along random": float((walked.random[:, -1] - walked.random[:, 0]).mean()),
            }
            for name, walked in walks.items()
        ]
        return Report(
            rows=rows,
            better={"rise along the gradient": "lower", "rise along random": "lower"},
            curves=[curve for name, walked in walks.items() for curve in _curves(name, walked)],
            panels=[Panel(title="Sharpness", images=[[Image(caption=_CAPTION, data=png(_figure(walks)))]])],
            notes=(f"rise: training loss (no dropout) at distance {self.radius:g} in weight space, less that at 0.",),
        )

    def _walked(self, model: Any, objective: NodeObjective, run: Run) -> SharpnessWalk:
        check_is_module(model)
        objective.check(model)
        task = objective.whole
        model = copy.deepcopy(model).to(run.device).eval()
        radii = torch.linspace(0, self.radius, self.num_points)
        generator = Run(seed=run.seed).generator("directions")  # the same directions for every model
        return walk(model, lambda: task.losses(model).mean(), radii, self.num_directions, generator)


_CAPTION = (
    "Training loss over the distance in weight space; solid: along the gradient, dashed: mean of random directions"
)


def _curves(name: str, walked: SharpnessWalk) -> list[Curve]:
    labels: dict[str, Any] = {
        "x": walked.radii.tolist(),
        "x_label": "distance in weight space",
        "y_label": "training loss",
    }
    return [
        Curve(name=f"{name} along the gradient".strip(), y=walked.ascent.tolist(), **labels),
        Curve(name=f"{name} along random directions".strip(), y=walked.random.mean(0).tolist(), **labels),
    ]


def _figure(walks: dict[str, SharpnessWalk]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name, walked in walks.items():
        (line,) = axes.plot(walked.radii, walked.ascent, label=name or "along the gradient")
        spread = walked.random.quantile(torch.tensor([0.1, 0.9]), dim=0)
        axes.plot(walked.radii, walked.random.mean(0), "--", color=line.get_color(), label=None if name else "random")
        axes.fill_between(walked.radii, *spread, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="distance in weight space", ylabel="training loss")
    axes.legend()
    return figure
