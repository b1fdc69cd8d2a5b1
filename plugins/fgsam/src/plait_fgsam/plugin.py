"""FGSAM, FGSAM+ and the sharpness-aware baselines as trainings of the graph kit, and a picture of sharpness."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any, Literal

import attrs
import torch
from plait import PlaitError, Report, Run, hookimpl
from plait.fields import doc, in_range, one_of
from plait.report import Curve, Image, Panel, png
from plait_graph.plugin import GraphTraining, are_two, told_as_plait_error
from plait_graph.tasks import NodeObjective, Task
from plait_graph.training import PlainUpdate, Update
from torch import nn

from plait_fgsam.baselines import AESAM, ESAM, SAM, LookSAM
from plait_fgsam.fgsam import FGSAM, FGSAMPlus, fgsam
from plait_fgsam.peer import Peer, peer_layers, peer_losses, takes_edges
from plait_fgsam.perturbing import PerturbingOptimizer
from plait_fgsam.sharpness import Sharpness as Walked
from plait_fgsam.sharpness import sharpness

__plait_api__ = "0.1"

Peers = Mapping[type[nn.Module], Peer]
BASES = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class TwoLossUpdate:
    """A perturbing optimizer on the two losses of a task: with message passing, and of the PeerMLP's rows."""

    def __init__(self, model: nn.Module, optimizer: PerturbingOptimizer, peers: Peers | None = None) -> None:
        self.model, self.optimizer, self.peers = model, optimizer, peers

    def step(self, task: Task) -> dict[str, Any]:
        passes = 0

        def gnn_loss(model: nn.Module, task: Task) -> torch.Tensor:
            nonlocal passes
            passes += 1
            return self.gnn_loss(task)

        (info,) = fgsam(self.optimizer, self.model, [task], gnn_loss, _row_losses, self.peers)
        return info | {"passes": passes}

    def gnn_loss(self, task: Task) -> torch.Tensor:
        return task.losses(self.model).mean()

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class SampleLossUpdate(TwoLossUpdate):
    """Hands on the losses of the samples in place of their mean."""

    def gnn_loss(self, task: Task) -> torch.Tensor:
        return task.losses(self.model)


@attrs.frozen
class PeerTask:
    """A task that is learned by the PeerMLP alone."""

    task: Task
    peers: Peers

    def losses(self, model: nn.Module) -> torch.Tensor:
        return peer_losses(model, self.task.row_losses, self.peers)

    def row_losses(self, model: nn.Module) -> torch.Tensor:
        return self.losses(model)


@attrs.frozen
class PeerUpdate:
    """An update that sees only :class:`PeerTask`s."""

    update: Update
    peers: Peers

    def step(self, task: Task) -> dict[str, Any]:
        return self.update.step(PeerTask(task, self.peers)) | {"passes": 0}

    def state_dict(self) -> dict[str, Any]:
        return self.update.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update.load_state_dict(state)


def _row_losses(model: nn.Module, task: Task) -> torch.Tensor:
    return task.row_losses(model)


# -- optimize -----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class PerturbingTraining(GraphTraining):
    """What the sharpness-aware trainings share: a base optimizer and the length of the perturbation."""

    optimizer: Literal["adam", "adamw", "sgd"] = attrs.field(
        default="adam", validator=one_of(*BASES), metadata=doc("base optimizer")
    )
    momentum: float = attrs.field(default=0.9, validator=in_range(0, 1, high_open=True), metadata=doc("of sgd"))
    betas: tuple[float, float] = attrs.field(
        default=(0.9, 0.999), validator=in_range(0, 1, high_open=True), metadata=doc("of adam and adamw")
    )
    rho: float = attrs.field(default=0.05, validator=in_range(0), metadata=doc("length of the perturbation"))
    perturb: tuple[str, ...] = attrs.field(
        default=("*",), metadata=doc("patterns of the names of the tensors that are perturbed, such as encoder.*")
    )

    betas.validator(are_two)

    @perturb.validator
    def _is_a_list(self, attribute: Any, value: Any) -> None:
        if not isinstance(value, (tuple, list)) or not all(isinstance(pattern, str) for pattern in value):
            raise PlaitError(f"perturb is {value!r}; give a list of patterns, such as ['encoder.*']")

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The model's tensors: those that are perturbed, and those that are only trained."""
        named = list(model.named_parameters())
        inside = [p for name, p in named if any(fnmatch(name, pattern) for pattern in self.perturb)]
        if not inside:
            known = ", ".join(name for name, _ in named)
            raise PlaitError(f"perturb is {list(self.perturb)}, which matches no tensor of the model; it has {known}")
        chosen = {id(p) for p in inside}
        outside = [p for _, p in named if id(p) not in chosen]
        return [{"params": inside}, *([{"params": outside, "perturb": False}] if outside else [])]

    def base_options(self) -> dict[str, Any]:
        options = {"base_optimizer": BASES[self.optimizer], "lr": self.lr, "weight_decay": self.weight_decay}
        return options | ({"momentum": self.momentum} if self.optimizer == "sgd" else {"betas": self.betas})


@attrs.frozen(kw_only=True)
class PeerTraining(PerturbingTraining):
    """What the trainings with a PeerMLP share."""

    peer: dict[str, str] = attrs.field(
        factory=dict,
        metadata=doc("layer type, such as GINConv → the graph its PeerMLP sees, identity or empty, not the usual one"),
    )

    @peer.validator
    def _is_known(self, attribute: Any, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise PlaitError(f"peer is {value!r}; give a mapping, such as {{GINConv: identity}}")
        for layer, graph in value.items():
            if graph not in ("identity", "empty"):
                raise PlaitError(f"peer of {layer} is {graph!r}; allowed is 'identity', 'empty'")

    def peers(self, model: nn.Module) -> Peers:
        """The choices of ``peer`` by type; refuses models without a PeerMLP."""
        types = {type(layer).__name__: type(layer) for layer in model.modules() if takes_edges(layer)}
        unknown = sorted(set(self.peer) - set(types))
        if unknown:
            known = ", ".join(sorted(types)) or "none"
            raise PlaitError(f"peer names {unknown[0]}; of layers that take edges the model has {known}")
        peers = {types[name]: graph for name, graph in self.peer.items()}
        peer_layers(model, peers)
        return peers


@attrs.frozen(kw_only=True)
class FGSAMTraining(PeerTraining):
    """FGSAM: ascend with the graph network, descend with its PeerMLP (Luo et al., NeurIPS 2024)."""

    lam: float | None = attrs.field(
        default=None,
        validator=in_range(0),
        metadata=doc("weight of the MLP (convex, 0.5) or GNN (additive, 1) gradient"),
    )
    variant: Literal["code", "paper"] = attrs.field(
        default="code", validator=one_of("code", "paper"), metadata=doc("preset: the authors' code, or Algorithm 1")
    )
    combine: Literal["convex", "additive"] | None = attrs.field(
        default=None, validator=one_of(None, "convex", "additive"), metadata=doc("overrides the variant's")
    )

    def __attrs_post_init__(self) -> None:
        with told_as_plait_error():
            self._optimizer([torch.nn.Parameter(torch.zeros(1))])

    def make_update(self, model: nn.Module, seed: int) -> TwoLossUpdate:
        return TwoLossUpdate(model, self._optimizer(self.groups(model)), self.peers(model))

    def _optimizer(self, params: Any) -> PerturbingOptimizer:
        return FGSAM(
            params, rho=self.rho, lam=self.lam, variant=self.variant, combine=self.combine, **self.base_options()
        )


@attrs.frozen(kw_only=True)
class FGSAMPlusTraining(FGSAMTraining):
    """FGSAM+: exact FGSAM updates now and then, PeerMLP updates in between (Luo et al., NeurIPS 2024)."""

    rho: float = attrs.field(default=0.1, validator=in_range(0), metadata=doc("length of the perturbation"))
    interval: int = attrs.field(
        default=2, validator=in_range(1), metadata=doc("updates from one exact update to the next")
    )
    alpha: float = attrs.field(
        default=0.7, validator=in_range(0), metadata=doc("weight of the flatness part in approximate updates")
    )
    flatness_from: Literal["combined", "perturbed"] | None = attrs.field(
        default=None, validator=one_of(None, "combined", "perturbed"), metadata=doc("overrides the variant's")
    )
    topology: bool | None = attrs.field(
        default=None, metadata=doc("add the kept topology part in approximate updates; none: the variant's")
    )
    projection: Literal["tensor", "global"] = attrs.field(
        default="tensor", validator=one_of("tensor", "global"), metadata=doc("projections per tensor or over all")
    )

    def _optimizer(self, params: Any) -> PerturbingOptimizer:
        return FGSAMPlus(
            params,
            rho=self.rho,
            lam=self.lam,
            interval=self.interval,
            alpha=self.alpha,
            variant=self.variant,
            combine=self.combine,
            flatness_from=self.flatness_from,
            topology=self.topology,
            projection=self.projection,
            **self.base_options(),
        )


@attrs.frozen(kw_only=True)
class MixTraining(FGSAMTraining):
    """The mix of GNN and PeerMLP gradients at the weights themselves: FGSAM without perturbation."""

    rho: float = attrs.field(default=0.0, validator=in_range(0, 0), metadata=doc("always 0"))


@attrs.frozen(kw_only=True)
class PeerMLPTraining(PeerTraining):
    """Training of the PeerMLP alone, used with message passing afterwards; SAM where rho > 0."""

    rho: float = attrs.field(default=0.0, validator=in_range(0), metadata=doc("length of the perturbation"))

    def make_update(self, model: nn.Module, seed: int) -> Any:
        peers, options = self.peers(model), self.base_options()
        if self.rho > 0:
            return PeerUpdate(TwoLossUpdate(model, SAM(self.groups(model), rho=self.rho, **options)), peers)
        base_optimizer = options.pop("base_optimizer")
        return PeerUpdate(PlainUpdate(model, base_optimizer(model.parameters(), **options)), peers)


@attrs.frozen(kw_only=True)
class SAMTraining(PerturbingTraining):
    """SAM: the gradient at the weights perturbed along the gradient (Foret et al., ICLR 2021)."""

    def make_update(self, model: nn.Module, seed: int) -> TwoLossUpdate:
        return TwoLossUpdate(model, SAM(self.groups(model), rho=self.rho, **self.base_options()))


@attrs.frozen(kw_only=True)
class ASAMTraining(PerturbingTraining):
    """ASAM: SAM with the perturbation scaled by the weights (Kwon et al., ICML 2021)."""

    rho: float = attrs.field(default=0.5, validator=in_range(0), metadata=doc("length of the scaled perturbation"))

    def make_update(self, model: nn.Module, seed: int) -> TwoLossUpdate:
        return TwoLossUpdate(model, SAM(self.groups(model), rho=self.rho, adaptive=True, **self.base_options()))


@attrs.frozen(kw_only=True)
class LookSAMTraining(PerturbingTraining):
    """LookSAM: SAM now and then, its flat part reused in between (Liu et al., CVPR 2022)."""

    interval: int = attrs.field(
        default=5, validator=in_range(1), metadata=doc("updates from one SAM update to the next")
    )
    alpha: float = attrs.field(default=0.7, validator=in_range(0), metadata=doc("weight of the reused part"))

    def make_update(self, model: nn.Module, seed: int) -> TwoLossUpdate:
        options = {"rho": self.rho, "interval": self.interval, "alpha": self.alpha}
        return TwoLossUpdate(model, LookSAM(self.groups(model), **options, **self.base_options()))


@attrs.frozen(kw_only=True)
class ESAMTraining(PerturbingTraining):
    """ESAM: SAM on a part of the tensors and of the samples (Du et al., ICLR 2022)."""

    beta: float = attrs.field(
        default=0.5, validator=in_range(0, 1, low_open=True), metadata=doc("chance of a tensor to be perturbed")
    )
    gamma: float = attrs.field(
        default=0.5, validator=in_range(0, 1, low_open=True), metadata=doc("share of samples in the second pass")
    )

    def make_update(self, model: nn.Module, seed: int) -> TwoLossUpdate:
        options = {"rho": self.rho, "beta": self.beta, "gamma": self.gamma, "seed": seed + 1}
        return SampleLossUpdate(model, ESAM(self.groups(model), **options, **self.base_options()))


@attrs.frozen(kw_only=True)
class AESAMTraining(PerturbingTraining):
    """AE-SAM: a SAM update only where the gradient is large for its time (Jiang et al., ICLR 2023)."""

    delta: float = attrs.field(
        default=0.9, validator=in_range(0, 1, high_open=True), metadata=doc("decay of the running mean and spread")
    )
    lambda_1: float = attrs.field(default=-1.0, validator=in_range(), metadata=doc("threshold at the end, in spreads"))
    lambda_2: float = attrs.field(default=1.0, validator=in_range(), metadata=doc("threshold at the start, in spreads"))

    def make_update(self, model: nn.Module, seed: int) -> TwoLossUpdate:
        options = {"rho": self.rho, "delta": self.delta, "lambda_1": self.lambda_1, "lambda_2": self.lambda_2}
        return TwoLossUpdate(
            model, AESAM(self.groups(model), num_updates=self.num_updates, **options, **self.base_options())
        )


# -- evaluate -----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class GraphSharpness:
    """Loss around the weights: along the gradient (SAM's perturbation) and along random directions."""

    radius: float = attrs.field(
        default=1.0, validator=in_range(0, low_open=True), metadata=doc("farthest distance in weight space")
    )
    num_points: int = attrs.field(default=21, validator=in_range(2), metadata=doc("points on each line, 0 included"))
    num_directions: int = attrs.field(default=10, validator=in_range(1), metadata=doc("random directions"))

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Run) -> Report:
        models = model if isinstance(model, dict) else {"": model}
        with told_as_plait_error():
            objective = NodeObjective(data, run.device)
        walks = {name: self._walked(candidate, objective, run) for name, candidate in models.items()}
        rows = [
            ({"model": name} if name else {})
            | {
                "loss": float(walk.ascent[0]),
                "rise along the gradient": float(walk.ascent[-1] - walk.ascent[0]),
                "rise along random": float((walk.random[:, -1] - walk.random[:, 0]).mean()),
            }
            for name, walk in walks.items()
        ]
        return Report(
            rows=rows,
            better={"rise along the gradient": "lower", "rise along random": "lower"},
            curves=[curve for name, walk in walks.items() for curve in _curves(name, walk)],
            panels=[Panel(title="Sharpness", images=[[Image(caption=_CAPTION, data=png(_figure(walks)))]])],
            notes=(f"rise: training loss (no dropout) at distance {self.radius:g} in weight space, less that at 0.",),
        )

    def _walked(self, model: Any, objective: NodeObjective, run: Run) -> Walked:
        if not isinstance(model, nn.Module):
            raise PlaitError(f"a model is a {type(model).__name__}; a torch.nn.Module on graphs is needed")
        with told_as_plait_error():
            objective.check(model)
        task = objective.whole
        model = copy.deepcopy(model).to(run.device).eval()
        radii = torch.linspace(0, self.radius, self.num_points)
        generator = Run(seed=run.seed).generator("directions")  # the same directions for every model
        return sharpness(model, lambda: task.losses(model).mean(), radii, self.num_directions, generator)


_CAPTION = (
    "Training loss over the distance in weight space; solid: along the gradient, dashed: mean of random directions"
)


def _curves(name: str, walk: Walked) -> list[Curve]:
    labels = {"x": walk.radii.tolist(), "x_label": "distance in weight space", "y_label": "training loss"}
    return [
        Curve(name=f"{name} along the gradient".strip(), y=walk.ascent.tolist(), **labels),
        Curve(name=f"{name} along random directions".strip(), y=walk.random.mean(0).tolist(), **labels),
    ]


def _figure(walks: dict[str, Walked]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name, walk in walks.items():
        (line,) = axes.plot(walk.radii, walk.ascent, label=name or "along the gradient")
        spread = walk.random.quantile(torch.tensor([0.1, 0.9]), dim=0)
        axes.plot(walk.radii, walk.random.mean(0), "--", color=line.get_color(), label=None if name else "random")
        axes.fill_between(walk.radii, *spread, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="distance in weight space", ylabel="training loss")
    axes.legend()
    return figure
