"""Merges that are trained by entropy on unlabelled inputs: WEMoE, E-WEMoE, AdaMerging, Concrete masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import attrs
import torch
from plait import hookimpl
from plait.fields import field, in_range

from plait_wemoe.adaptation import History
from plait_wemoe.baselines import adaptive
from plait_wemoe.columns import ShuffledBatches
from plait_wemoe.heads import Features
from plait_wemoe.inputs import input_dtype
from plait_wemoe.plugin.merging import BY_INPUTS, OneModel
from plait_wemoe.pool import Pool
from plait_wemoe.states import State, with_state
from plait_wemoe.upscaling import UpscaleConfig
from plait_wemoe.wemoe import wemoe

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class Adaptive(OneModel):
    """What methods that train on unlabelled data have in common."""

    takes = BY_INPUTS

    renamed_fields: ClassVar[Mapping[str, str]] = {
        "lr": "learning_rate",
        "lr_schedule": "learning_rate_schedule",
        "max_steps": "num_steps",
    }

    learning_rate: float = field(1e-3, "of the optimizer", in_range(0, low_open=True))
    optimizer: Literal["adam", "adamw", "sgd"] = field("adam", "step rule")
    learning_rate_schedule: Literal["constant", "cosine"] = field("constant", "cosine: to 0 at num_steps")
    num_steps: int = field(1000, "optimizer steps; 0 trains nothing", in_range(0))
    batch_size: int = field(16, "inputs per task and step", in_range(1))
    grad_accumulate: bool = field(True, "backward after each task: same gradient, memory of one task")
    entropy_eps: float = field(1e-8, "ε in log(p + ε)", in_range(0, low_open=True))
    checkpoint_every: int = field(100, "steps between checkpoints", in_range(1))

    def adapt(self, method: Callable[..., tuple[T, History]], pool: Pool, data: Any, run: Any) -> T:
        """What ``method(heads=…, batches=…, …)`` makes of the unlabelled data."""
        columns, dtype = self.columns(pool, data, run), input_dtype(pool.base)
        batches = {
            task: ShuffledBatches(column, self.batch_size, run.derived_seed(f"batches/{task}"), run.device, dtype)
            for task, column in columns.items()
        }
        with run.loop(self, "adapt", inputs=(pool.base, pool.encoders, pool.task_heads, columns)) as loop:
            result, history = method(
                heads=pool.task_heads,
                batches=batches,
                num_steps=self.num_steps,
                learning_rate=self.learning_rate,
                optimizer=self.optimizer,
                learning_rate_schedule=self.learning_rate_schedule,
                entropy_eps=self.entropy_eps,
                grad_accumulate=self.grad_accumulate,
                checkpoint=loop,
                checkpoint_every=self.checkpoint_every,
                track=loop.track,
                on_step=lambda step, losses: loop.log(
                    step=step, **{f"entropy {t}": loss for t, loss in losses.items()}
                ),
            )
        for sentence in history.warnings:
            run.warn(sentence)
        return result

    def adapted_weights(
        self, method: Callable[..., tuple[State, History]], pool: Pool, data: Any, run: Any, **options: Any
    ) -> torch.nn.Module:
        """The model whose weights ``method`` finds."""
        # Under the names that they have in the function that is trained.
        states = {task: {f"encoder.{name}": value for name, value in s.items()} for task, s in pool.states.items()}
        features = Features(with_state(pool.base, pool.base_state)).eval().requires_grad_(False)
        state = self.adapt(partial(method, features, states, **options), pool, data, run)
        return self.merged(pool, {name.removeprefix("encoder."): value for name, value in state.items()}, data, run)


@attrs.frozen(kw_only=True)
class Levelled(Adaptive):
    """What methods have in common that may train AdaMerging's coefficients."""

    level: Literal["task", "layer"] = field("layer", "AdaMerging's coefficients: one per task, or per tensor too")


@attrs.frozen(kw_only=True)
class AdaMerging(Levelled):
    """Coefficients of the task vectors trained by entropy (Yang et al., ICLR 2024)."""

    initial: float = field(0.3, "first coefficients", in_range())

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any, run: Any) -> torch.nn.Module:
        pool, options = self.pool(base, experts, data, run), {"level": self.level, "initial": self.initial}
        return self.adapted_weights(adaptive.adamerging, pool, data, run, **options)


@attrs.frozen(kw_only=True)
class Concrete(Levelled):
    """A trained mask over the task vectors, for task arithmetic or AdaMerging (Tang et al., arXiv 2312.06173)."""

    num_steps: int = field(2000, "steps; AdaMerging takes as many for mask and coefficients", in_range(0))
    then: Literal["task-arithmetic", "adamerging"] = field("task-arithmetic", "what is merged under the mask")
    scaling: float = field(0.3, "λ, or AdaMerging's first coefficients", in_range())
    temperature: float = field(0.5, "of the relaxed Bernoulli draws", in_range(0, low_open=True))

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any, run: Any) -> torch.nn.Module:
        pool = self.pool(base, experts, data, run)
        mask = {"temperature": self.temperature, "seed": run.derived_seed("mask")}
        if self.then == "task-arithmetic":
            method = partial(adaptive.concrete_task_arithmetic, scaling=self.scaling)
        else:
            method = partial(adaptive.concrete_adamerging, level=self.level, initial=self.scaling)
        return self.adapted_weights(method, pool, data, run, **mask)


@attrs.frozen(kw_only=True)
class WEMoE(Adaptive):
    """Weight-ensembling mixture of experts: MLPs merged anew for every input (Tang et al., ICML 2024)."""

    learning_rate: float = field(1e-4, "of the optimizer", in_range(0, low_open=True))
    init_lambda: float = field(0.3, "λ of the static part and first coefficients", in_range())
    upscale: tuple[Literal["mlp", "attention"], ...] = field(("mlp",), "parts of a block with routed weights")
    pattern: str | None = field(None, "regular expression for names of the modules to up-scale, in place of upscale")
    router_depth: Literal[0, 1, 2] = field(2, "linear layers of a router")
    router_hidden_size: int | None = field(None, "hidden width of a router; default: that of its input", in_range(1))
    router_init_std: float = field(0.01, "of the router's weights", in_range(0))
    shared_router: bool = field(False, "one router for all blocks")
    position_encoding: bool = field(False, "tell the router the number of the block")
    position_encoding_dim: int = field(8, "values that tell it, even", in_range(2))
    prune_ratio: float | None = field(None, "share of a task vector that is dropped; none: nothing", in_range(0, 1))
    prune_granularity: Literal["tensor", "block", "model"] = field("tensor", "what shares one threshold")
    gate_prune_ratio: float | None = field(None, "share of a trained router tensor that is dropped", in_range(0, 1))
    train_routing: Literal["sample", "batch"] = field("sample", "coefficients per sample, or their mean")
    eval_routing: Literal["sample", "batch", "fixed"] = field(
        "sample", "of the returned model; fixed: mean coefficients of the unlabelled data"
    )
    merge_dtype: Literal["float32", "float64"] = field("float32", "in which weights are merged")
    delta_storage: Literal["auto", "dense", "sparse", "lowrank"] = field(
        "auto", "of task vectors; auto: sparse from prune_ratio 0.5 on"
    )
    delta_rank: int | None = field(None, "of lowrank storage", in_range(1))
    compute: Literal["auto", "merge", "activation", "group", "reference"] = field(
        "auto", "how per-sample layers are computed; auto: by tokens"
    )
    group_radius: float = field(0.0, "compute group: largest distance of coefficients in a group", in_range(0))

    def __attrs_post_init__(self) -> None:
        self.config()

    def config(self) -> UpscaleConfig:
        names = attrs.fields_dict(type(self)).keys() & UpscaleConfig.__dataclass_fields__.keys()
        return UpscaleConfig(**{name: getattr(self, name) for name in names})

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any, run: Any) -> torch.nn.Module:
        pool = self.pool(base, experts, data, run)
        if not 0 <= self.init_lambda <= 1:
            run.warn(f"init_lambda is {self.init_lambda}, outside the usual [0, 1]")
        if self.eval_routing == "batch":
            run.warn("eval_routing is batch: an output depends on its batch, and accuracy falls where tasks are mixed")
        method = partial(
            wemoe,
            pool.base,
            pool.encoders,
            config=self.config(),
            train_routing=self.train_routing,
            eval_routing=self.eval_routing,
            gate_prune_ratio=self.gate_prune_ratio,
            statistics=self.statistics,
            seed=run.derived_seed("routers"),
        )
        return pool.merged(self.adapt(method, pool, data, run))


@attrs.frozen(kw_only=True)
class WEMoEIcml(WEMoE):
    """WEMoE as in its first publication: per-sample routing, cosine schedule."""

    learning_rate_schedule: Literal["constant", "cosine"] = field("cosine", "cosine: to 0 at num_steps")


@attrs.frozen(kw_only=True)
class EWEMoE(WEMoE):
    """WEMoE with one shared router and task vectors pruned by 90 % (arXiv 2410.21804)."""

    shared_router: bool = field(True, "one router for all blocks")
    prune_ratio: float | None = field(0.9, "share of a task vector that is dropped; none: nothing", in_range(0, 1))


@attrs.frozen(kw_only=True)
class EWEMoEFast(EWEMoE):
    """E-WEMoE trained on batch means and used per sample: cheaper training, less accurate."""

    train_routing: Literal["sample", "batch"] = field("batch", "coefficients per sample, or their mean")


@attrs.frozen(kw_only=True)
class EWEMoEPublished(EWEMoEFast):
    """E-WEMoE as its published numbers were made: one routing decision per batch, in training and in use."""

    eval_routing: Literal["sample", "batch", "fixed"] = field(
        "batch", "of the returned model; fixed: mean coefficients of the unlabelled data"
    )
