"""The hooks: ``merge`` (WEMoE, E-WEMoE, baselines) and the bed that they are measured on."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from plait import PlaitError, Report, hookimpl
from plait.configuration import plain
from plait.fields import doc, in_range, one_of
from plait.report import Image, Panel, png

from plait_wemoe import adaptive, static
from plait_wemoe.adaptation import History, minimise_entropy
from plait_wemoe.columns import Column, Reading, ShuffledBatches, column_of, reading_of, tokenizer_of
from plait_wemoe.evaluation import mixed_accuracy, one_task_accuracy, routing_figure, task_routing
from plait_wemoe.four_tasks import CLASSES, TASKS, four_tasks
from plait_wemoe.heads import CosineHead, Features, feature_tensor
from plait_wemoe.inputs import Inputs, call, input_dtype, placed
from plait_wemoe.pool import Pool, columns_of, label_names, pool_of
from plait_wemoe.states import State, fingerprint, with_state
from plait_wemoe.tasks import IndividualModels, MultiTaskModel, WithHeads
from plait_wemoe.training import LabelledTask, first_per_class, train_tasks
from plait_wemoe.upscaling import UpscaleConfig, upscale
from plait_wemoe.vit import seeded_vit

__plait_api__ = "0.1"

STATISTICS_BATCH = 128
ROUTING = ("sample", "batch", "fixed")


@contextmanager
def told() -> Iterator[None]:
    """Mistakes that the algorithms report, as the user's error."""
    try:
        yield
    except (ValueError, KeyError, TypeError, FloatingPointError, FileNotFoundError) as error:
        raise PlaitError(str(error.args[0]) if error.args else repr(error)) from error


# ---------------------------------------------------------------------------------------------- merge


@attrs.frozen(kw_only=True)
class Merging:
    """What all merge methods have in common."""

    templates: tuple[str, ...] | str = attrs.field(
        default="photo", metadata=doc("prompts with {} for zero-shot heads of image-text models, or a set's name")
    )
    class_names: dict[str, tuple[str, ...]] | None = attrs.field(
        default=None, metadata=doc("task → class names of image-text models; default: the names that the data declares")
    )
    strict: bool = attrs.field(default=False, metadata=doc("refuse an expert that equals the base, not only warn"))
    tokenizer: Path | None = attrs.field(
        default=None, metadata=doc("folder with the tokenizer of text models, for data with a column of texts")
    )

    def pool(self, base: Any, experts: Mapping[str, Any], data: Mapping[str, Any] | None, run: Any) -> Pool:
        for name, value in (("experts", experts), ("data", data)):
            if value is not None and not isinstance(value, Mapping):
                raise PlaitError(f"{name} is a {type(value).__name__}; give a mapping from task to step")
        names = {**label_names(data), **(self.class_names or {})}
        pool = pool_of(base, experts, names, self.templates)
        for task in pool.unchanged:
            if self.strict:
                raise PlaitError(f"expert {task!r} equals the base bit by bit; fine-tune it, or set strict to false")
            run.warn(f"expert {task!r} equals the base bit by bit; it adds nothing")
        return pool.to(run.device)

    def columns(self, pool: Pool, data: Mapping[str, Any] | None, run: Any) -> dict[str, Column]:
        """Every expert's unlabelled data."""
        reading = reading_of(pool.base, pool.image_size, tokenizer_of(self.tokenizer), run.warn)
        return columns_of(data, list(pool.encoders), reading)


@attrs.frozen(kw_only=True)
class Individual(Merging):
    """No merge: every task keeps its own expert (upper bound, T times the size)."""

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any | None, run: Any) -> IndividualModels:
        with told():
            return self.pool(base, experts, data, run).individual()


@attrs.frozen(kw_only=True)
class OneModel(Merging):
    """What methods have in common that make one model of all."""

    statistics: Literal["average", "recompute"] = attrs.field(
        default="average",
        validator=one_of("average", "recompute"),
        metadata=doc("running statistics of normalisation layers: the experts' mean, or anew from all the data"),
    )

    def finished(self, pool: Pool, encoder: torch.nn.Module, data: Any, run: Any) -> torch.nn.Module:
        """The merged encoder as a model, with its statistics."""
        if self.statistics == "recompute":
            columns, features = self.columns(pool, data, run), Features(encoder).eval()
            with torch.no_grad(), static.recomputed_statistics(features) as any_there:
                for column in columns.values() if any_there else ():
                    for inputs in column.batches(STATISTICS_BATCH):
                        features(_on(run, encoder, inputs))
            if not any_there:
                run.warn("statistics is recompute, but the model has no layer with running statistics")
        return pool.merged(encoder)

    def merged(self, pool: Pool, state: State, data: Any, run: Any) -> torch.nn.Module:
        return self.finished(pool, with_state(pool.base, state), data, run)


@attrs.frozen(kw_only=True)
class SimpleAverage(OneModel):
    """Mean of the experts' weights (Wortsman et al., ICML 2022)."""

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any | None, run: Any) -> torch.nn.Module:
        with told():
            pool = self.pool(base, experts, data, run)
            state = static.simple_average(pool.base_state, pool.states, pool.buffers)
            return self.merged(pool, state, data, run)


@attrs.frozen(kw_only=True)
class TaskArithmetic(OneModel):
    """Base plus scaled sum of the task vectors (Ilharco et al., ICLR 2023)."""

    scaling: float = attrs.field(default=0.3, validator=in_range(), metadata=doc("λ, factor of the sum"))

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any | None, run: Any) -> torch.nn.Module:
        with told():
            pool = self.pool(base, experts, data, run)
            state = static.task_arithmetic(pool.base_state, pool.states, self.scaling, pool.buffers)
            return self.merged(pool, state, data, run)


@attrs.frozen(kw_only=True)
class Ties(OneModel):
    """Trim, elect sign, merge (Yadav et al., NeurIPS 2023)."""

    scaling: float = attrs.field(default=0.3, validator=in_range(), metadata=doc("λ, factor of the merged vector"))
    keep: float = attrs.field(
        default=20.0, validator=in_range(0, 100, low_open=True), metadata=doc("entries kept, % (up to 1: a fraction)")
    )
    merge_function: Literal["sum", "mean", "max"] = attrs.field(
        default="sum", validator=one_of(*static.MERGE_FUNCTIONS), metadata=doc("how agreeing entries are joined")
    )

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any | None, run: Any) -> torch.nn.Module:
        with told():
            pool = self.pool(base, experts, data, run)
            facts = (self.scaling, self.keep, self.merge_function, pool.buffers)
            return self.merged(pool, static.ties(pool.base_state, pool.states, *facts), data, run)


@attrs.frozen(kw_only=True)
class Dare(OneModel):
    """Randomly dropped and rescaled task vectors, then task arithmetic or TIES (Yu et al., ICML 2024)."""

    drop_rate: float = attrs.field(default=0.5, validator=in_range(0, 1, high_open=True), metadata=doc("share dropped"))
    then: Literal["task-arithmetic", "ties"] = attrs.field(
        default="task-arithmetic", validator=one_of("task-arithmetic", "ties"), metadata=doc("how the rest is merged")
    )
    scaling: float = attrs.field(default=0.3, validator=in_range(), metadata=doc("λ of the merge"))
    keep: float = attrs.field(
        default=20.0, validator=in_range(0, 100, low_open=True), metadata=doc("entries that TIES keeps, %")
    )

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any | None, run: Any) -> torch.nn.Module:
        with told():
            pool = self.pool(base, experts, data, run)

            def join(base_state: State, states: Mapping[str, State]) -> State:
                if self.then == "ties":
                    return static.ties(base_state, states, self.scaling, self.keep, buffers=pool.buffers)
                return static.task_arithmetic(base_state, states, self.scaling, pool.buffers)

            facts = (self.drop_rate, join, run.generator("drop"), pool.buffers)
            return self.merged(pool, static.dare(pool.base_state, pool.states, *facts), data, run)


@attrs.frozen(kw_only=True)
class Fisher(OneModel):
    """Average weighted by diagonal Fisher information, from unlabelled inputs (Matena & Raffel, NeurIPS 2022)."""

    num_examples: int = attrs.field(default=256, validator=in_range(1), metadata=doc("inputs per task"))
    batch_size: int = attrs.field(default=32, validator=in_range(1), metadata=doc("inputs summed before squaring"))

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any, run: Any) -> torch.nn.Module:
        with told():
            pool = self.pool(base, experts, data, run)
            columns = self.columns(pool, data, run)
            information = {}
            for task, encoder in run.track(pool.encoders.items(), "Fisher information"):
                features = Features(with_state(encoder, encoder.state_dict())).eval()
                found = static.fisher_information(features, pool.heads[task], _few(columns[task], self, encoder, run))
                information[task] = {name.removeprefix("encoder."): value for name, value in found.items()}
            state = static.fisher(pool.base_state, pool.states, information, pool.buffers)
            return self.merged(pool, state, data, run)


@attrs.frozen(kw_only=True)
class RegMean(OneModel):
    """Least squares for linear layers, average for the rest (Jin et al., ICLR 2023)."""

    num_examples: int = attrs.field(default=256, validator=in_range(1), metadata=doc("inputs per task"))
    batch_size: int = attrs.field(default=32, validator=in_range(1), metadata=doc("inputs at a time"))
    off_diagonal: float = attrs.field(default=0.6, validator=in_range(0, 1), metadata=doc("factor of off-diagonals"))
    ridge: float = attrs.field(
        default=1e-6, validator=in_range(0, low_open=True), metadata=doc("share of the mean diagonal that is added")
    )

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any, run: Any) -> torch.nn.Module:
        with told():
            pool = self.pool(base, experts, data, run)
            columns = self.columns(pool, data, run)
            grams = {
                task: static.gram_matrices(
                    with_state(encoder, encoder.state_dict()).eval(), _few(columns[task], self, encoder, run)
                )
                for task, encoder in run.track(pool.encoders.items(), "inner products")
            }
            facts = (self.off_diagonal, self.ridge, pool.buffers)
            return self.merged(pool, static.regmean(pool.base_state, pool.states, grams, *facts), data, run)


@attrs.frozen(kw_only=True)
class Adaptive(OneModel):
    """What methods that train on unlabelled data have in common."""

    lr: float = attrs.field(default=1e-3, validator=in_range(0, low_open=True), metadata=doc("learning rate"))
    optimizer: Literal["adam", "adamw", "sgd"] = attrs.field(
        default="adam", validator=one_of("adam", "adamw", "sgd"), metadata=doc("step rule")
    )
    lr_schedule: Literal["constant", "cosine"] = attrs.field(
        default="constant", validator=one_of("constant", "cosine"), metadata=doc("cosine: to 0 at max_steps")
    )
    max_steps: int = attrs.field(default=1000, validator=in_range(0), metadata=doc("steps; 0 trains nothing"))
    batch_size: int = attrs.field(default=16, validator=in_range(1), metadata=doc("inputs per task and step"))
    grad_accumulate: bool = attrs.field(
        default=True, metadata=doc("backward after each task: same gradient, memory of one task")
    )
    entropy_eps: float = attrs.field(
        default=1e-8, validator=in_range(0, low_open=True), metadata=doc("ε in log(p + ε)")
    )
    checkpoint_every: int = attrs.field(default=100, validator=in_range(1), metadata=doc("steps between checkpoints"))

    def training(self, pool: Pool, columns: Mapping[str, Column], run: Any) -> dict[str, Any]:
        """Arguments of :func:`minimise_entropy` for this step."""
        dtype = input_dtype(pool.base)
        batches = {
            task: ShuffledBatches(column, self.batch_size, run.derived_seed(f"batches/{task}"), run.device, dtype)
            for task, column in columns.items()
        }
        return {
            "heads": pool.task_heads,
            "batches": batches,
            "max_steps": self.max_steps,
            "lr": self.lr,
            "optimizer": self.optimizer,
            "lr_schedule": self.lr_schedule,
            "entropy_eps": self.entropy_eps,
            "grad_accumulate": self.grad_accumulate,
            "checkpoint": self._scratch(pool, columns, run) / "training.pt",
            "checkpoint_every": self.checkpoint_every,
            "track": lambda steps: run.track(steps, "adapt"),
            "on_step": lambda step, losses: run.log(step=step, **{f"entropy {t}": loss for t, loss in losses.items()}),
        }

    def _scratch(self, pool: Pool, columns: Mapping[str, Column], run: Any) -> Path:
        """A folder for the state of this training: of this method, these models and inputs, and of no other."""
        inputs = {task: column.fingerprint for task, column in columns.items()}
        models = (pool.base, *pool.encoders.values(), *pool.task_heads.values())
        weights = [fingerprint(model.state_dict()) for model in models]
        facts = (plain(self), run.seed, run.step, inputs, weights)
        folder = run.folder / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@attrs.frozen(kw_only=True)
class AdaMerging(Adaptive):
    """Coefficients of the task vectors trained by entropy (Yang et al., ICLR 2024)."""

    level: Literal["task", "layer"] = attrs.field(
        default="layer", validator=one_of(*adaptive.LEVELS), metadata=doc("one coefficient per task, or per tensor too")
    )
    initial: float = attrs.field(default=0.3, validator=in_range(), metadata=doc("first coefficients"))

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any, run: Any) -> torch.nn.Module:
        with told():
            pool = self.pool(base, experts, data, run)
            training = self.training(pool, self.columns(pool, data, run), run)
            features, states = _features(pool)
            state, history = adaptive.adamerging(features, states, level=self.level, initial=self.initial, **training)
            _tell(history, run)
            return self.merged(pool, _unprefixed(state), data, run)


@attrs.frozen(kw_only=True)
class Concrete(Adaptive):
    """A trained mask over the task vectors, for task arithmetic or AdaMerging (Tang et al., arXiv 2312.06173)."""

    max_steps: int = attrs.field(
        default=2000, validator=in_range(0), metadata=doc("steps; AdaMerging takes as many for mask and coefficients")
    )
    then: Literal["task-arithmetic", "adamerging"] = attrs.field(
        default="task-arithmetic",
        validator=one_of("task-arithmetic", "adamerging"),
        metadata=doc("what is merged under the mask"),
    )
    level: Literal["task", "layer"] = attrs.field(
        default="layer", validator=one_of(*adaptive.LEVELS), metadata=doc("of AdaMerging's coefficients")
    )
    scaling: float = attrs.field(
        default=0.3, validator=in_range(), metadata=doc("λ, or AdaMerging's first coefficients")
    )
    temperature: float = attrs.field(
        default=0.5, validator=in_range(0, low_open=True), metadata=doc("of the relaxed Bernoulli draws")
    )

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any, run: Any) -> torch.nn.Module:
        with told():
            pool = self.pool(base, experts, data, run)
            training = self.training(pool, self.columns(pool, data, run), run)
            features, states = _features(pool)
            mask = {"temperature": self.temperature, "seed": run.derived_seed("mask")}
            if self.then == "task-arithmetic":
                state, history = adaptive.concrete_task_arithmetic(
                    features, states, scaling=self.scaling, **mask, **training
                )
            else:
                state, history = adaptive.concrete_adamerging(
                    features, states, level=self.level, initial=self.scaling, **mask, **training
                )
            _tell(history, run)
            return self.merged(pool, _unprefixed(state), data, run)


@attrs.frozen(kw_only=True)
class WEMoE(Adaptive):
    """Weight-ensembling mixture of experts: MLPs merged anew for every input (Tang et al., ICML 2024)."""

    lr: float = attrs.field(default=1e-4, validator=in_range(0, low_open=True), metadata=doc("learning rate"))
    init_lambda: float = attrs.field(
        default=0.3, validator=in_range(), metadata=doc("λ of the static part and first coefficients")
    )
    upscale: tuple[Literal["mlp", "attention"], ...] = attrs.field(
        default=("mlp",), metadata=doc("parts of a block with routed weights")
    )
    pattern: str | None = attrs.field(
        default=None, metadata=doc("regular expression for names of the modules to up-scale, in place of upscale")
    )
    router_depth: int = attrs.field(default=2, validator=one_of(0, 1, 2), metadata=doc("linear layers of a router"))
    router_hidden_size: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("hidden width of a router; default: that of its input")
    )
    router_init_std: float = attrs.field(default=0.01, validator=in_range(0), metadata=doc("of the router's weights"))
    shared_router: bool = attrs.field(default=False, metadata=doc("one router for all blocks"))
    position_encoding: bool = attrs.field(default=False, metadata=doc("tell the router the number of the block"))
    position_encoding_dim: int = attrs.field(
        default=8, validator=in_range(2), metadata=doc("values that tell it, even")
    )
    prune_ratio: float | None = attrs.field(
        default=None, validator=in_range(0, 1), metadata=doc("share of a task vector that is dropped; none: nothing")
    )
    prune_granularity: Literal["tensor", "block", "model"] = attrs.field(
        default="tensor", validator=one_of("tensor", "block", "model"), metadata=doc("what shares one threshold")
    )
    gate_prune_ratio: float | None = attrs.field(
        default=None, validator=in_range(0, 1), metadata=doc("share of a trained router tensor that is dropped")
    )
    train_routing: Literal["sample", "batch"] = attrs.field(
        default="sample", validator=one_of("sample", "batch"), metadata=doc("coefficients per sample, or their mean")
    )
    eval_routing: Literal["sample", "batch", "fixed"] = attrs.field(
        default="sample",
        validator=one_of(*ROUTING),
        metadata=doc("of the returned model; fixed: mean coefficients of the unlabelled data"),
    )
    merge_dtype: Literal["float32", "float64"] = attrs.field(
        default="float32", validator=one_of("float32", "float64"), metadata=doc("in which weights are merged")
    )
    delta_storage: Literal["auto", "dense", "sparse", "lowrank"] = attrs.field(
        default="auto",
        validator=one_of("auto", "dense", "sparse", "lowrank"),
        metadata=doc("of task vectors; auto: sparse from prune_ratio 0.5 on"),
    )
    delta_rank: int | None = attrs.field(default=None, validator=in_range(1), metadata=doc("of lowrank storage"))
    compute: Literal["auto", "merge", "activation", "group", "reference"] = attrs.field(
        default="auto",
        validator=one_of("auto", "merge", "activation", "group", "reference"),
        metadata=doc("how per-sample layers are computed; auto: by tokens"),
    )
    group_radius: float = attrs.field(
        default=0.0, validator=in_range(0), metadata=doc("compute group: largest distance of coefficients in a group")
    )

    def __attrs_post_init__(self) -> None:
        with told():
            self.config()
        if self.position_encoding and self.position_encoding_dim % 2:
            raise PlaitError(f"position_encoding_dim is {self.position_encoding_dim}; allowed is an even number")

    def config(self) -> UpscaleConfig:
        names = attrs.fields_dict(type(self)).keys() & UpscaleConfig.__dataclass_fields__.keys()
        return UpscaleConfig(**{name: getattr(self, name) for name in names})

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any, run: Any) -> torch.nn.Module:
        with told():
            pool = self.pool(base, experts, data, run)
            columns = self.columns(pool, data, run)
            if not 0 <= self.init_lambda <= 1:
                run.warn(f"init_lambda is {self.init_lambda}, outside the usual [0, 1]")
            if self.eval_routing == "batch":
                run.warn(
                    "eval_routing is batch: an output depends on its batch, and accuracy falls where tasks are mixed"
                )
            example = _on(run, pool.base, next(iter(columns.values())).read([0]))
            mixture = upscale(pool.base, pool.encoders, example, self.config(), run.derived_seed("routers") % 2**63)
            mixture.eval().set_routing(self.train_routing)
            training = self.training(pool, columns, run)
            history = minimise_entropy(
                mixture.router_parameters(),
                lambda step: lambda inputs: feature_tensor(call(mixture, inputs)),
                **training,
            )
            _tell(history, run)
            if self.gate_prune_ratio is not None:
                mixture.prune_routers(self.gate_prune_ratio)
            mixture.set_routing("sample" if self.eval_routing == "fixed" else self.eval_routing)
            model = self.finished(pool, mixture, data, run)
            if self.eval_routing == "fixed":
                means, _ = task_routing(mixture, columns, batch_size=128)
                mixture.set_routing("fixed", means.mean(dim=1))
            return model


@attrs.frozen(kw_only=True)
class WEMoEIcml(WEMoE):
    """WEMoE as in its first publication: per-sample routing, cosine schedule."""

    lr_schedule: Literal["constant", "cosine"] = attrs.field(
        default="cosine", validator=one_of("constant", "cosine"), metadata=doc("cosine: to 0 at max_steps")
    )


@attrs.frozen(kw_only=True)
class EWEMoE(WEMoE):
    """WEMoE with one shared router and task vectors pruned by 90 % (arXiv 2410.21804)."""

    shared_router: bool = attrs.field(default=True, metadata=doc("one router for all blocks"))
    prune_ratio: float | None = attrs.field(
        default=0.9, validator=in_range(0, 1), metadata=doc("share of a task vector that is dropped; none: nothing")
    )


@attrs.frozen(kw_only=True)
class EWEMoEFast(EWEMoE):
    """E-WEMoE trained on batch means and used per sample: cheaper training, less accurate."""

    train_routing: Literal["sample", "batch"] = attrs.field(
        default="batch", validator=one_of("sample", "batch"), metadata=doc("coefficients per sample, or their mean")
    )


@attrs.frozen(kw_only=True)
class EWEMoEPublished(EWEMoEFast):
    """E-WEMoE as its published numbers were made: one routing decision per batch, in training and in use."""

    eval_routing: Literal["sample", "batch", "fixed"] = attrs.field(
        default="batch",
        validator=one_of(*ROUTING),
        metadata=doc("of the returned model; fixed: mean coefficients of the unlabelled data"),
    )


def _features(pool: Pool) -> tuple[Features, dict[str, State]]:
    """The base as a function to feature tensors, and the experts' states under its names."""
    states = {task: {f"encoder.{name}": value for name, value in s.items()} for task, s in pool.states.items()}
    return Features(with_state(pool.base, pool.base_state)).eval().requires_grad_(False), states


def _unprefixed(state: State) -> State:
    return {name.removeprefix("encoder."): value for name, value in state.items()}


def _few(column: Column, method: Fisher | RegMean, model: torch.nn.Module, run: Any) -> Iterator[Inputs]:
    return (_on(run, model, inputs) for inputs in column.batches(method.batch_size, method.num_examples))


def _on(run: Any, model: torch.nn.Module, inputs: Inputs) -> Inputs:
    return placed(inputs, run.device, input_dtype(model))


def _tell(history: History, run: Any) -> None:
    for sentence in history.warnings:
        run.warn(sentence)


# ------------------------------------------------------------------------- the bed and its evaluation


@attrs.frozen(kw_only=True)
class FourTasks:
    """Small classification tasks from packaged digits and photographs, 16×16: train and test of one of four."""

    task: Literal["digits", "clutter", "rotated", "textures"] = attrs.field(
        validator=one_of(*TASKS), metadata=doc("which: digits, digits over photos, digits turned and renamed, textures")
    )

    @hookimpl
    def load_data(self, run: Any) -> Any:
        import datasets

        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES[self.task]))}
        )
        parts = {}
        for split, (images, labels) in four_tasks(self.task, run.seed).items():
            rows = {"image": [_picture(image) for image in images], "label": labels.tolist()}
            parts[split] = datasets.Dataset.from_dict(rows, features=features)
        return datasets.DatasetDict(parts)


def _picture(image: Any) -> Any:
    import PIL.Image

    return PIL.Image.fromarray(image).convert("RGB")


@attrs.frozen(kw_only=True)
class MultiTaskViT:
    """A small fresh vision transformer with one cosine head per task of ``data``."""

    image_size: int = attrs.field(default=16, validator=in_range(1), metadata=doc("side, pixels"))
    patch_size: int = attrs.field(default=4, validator=in_range(1), metadata=doc("side of a patch, pixels"))
    embed_dim: int = attrs.field(default=48, validator=in_range(1), metadata=doc("hidden size"))
    depth: int = attrs.field(default=4, validator=in_range(1), metadata=doc("blocks"))
    num_heads: int = attrs.field(default=4, validator=in_range(1), metadata=doc("attention heads"))
    logit_scale: float = attrs.field(
        default=10.0, validator=in_range(0, low_open=True), metadata=doc("factor of the cosines")
    )

    @hookimpl
    def load_model(self, data: Any, run: Any) -> MultiTaskModel:
        if not isinstance(data, Mapping):
            raise PlaitError("multi-task-vit needs a mapping from task to labelled data")
        if self.image_size % self.patch_size or self.embed_dim % self.num_heads:
            raise PlaitError("patch_size must divide image_size, and num_heads must divide embed_dim")
        sizes = {name: getattr(self, name) for name in ("image_size", "patch_size", "embed_dim", "depth", "num_heads")}
        encoder = seeded_vit(run.derived_seed("weights"), **sizes)
        draw = run.generator("heads")
        heads = {
            task: CosineHead(
                torch.randn(len(names), self.embed_dim, generator=draw) * self.embed_dim**-0.5, self.logit_scale
            )
            for task, names in label_names(data).items()
        }
        missing = [task for task in data if task not in heads]
        if missing:
            raise PlaitError(f"the data of task {missing[0]!r} declares no class names; make its label a ClassLabel")
        return MultiTaskModel(encoder, heads).to(run.device)


@attrs.frozen(kw_only=True)
class MultiTaskTraining:
    """Supervised training on the tasks of ``data``: pre-training, one expert, or joint training."""

    num_steps: int = attrs.field(default=250, validator=in_range(0), metadata=doc("optimiser steps"))
    batch_size: int = attrs.field(default=64, validator=in_range(1), metadata=doc("images per task and step"))
    lr: float = attrs.field(default=1e-3, validator=in_range(0, low_open=True), metadata=doc("learning rate of AdamW"))
    weight_decay: float = attrs.field(default=0.01, validator=in_range(0), metadata=doc("of AdamW"))
    trainable: str | None = attrs.field(
        default=None, metadata=doc("regular expression for names of encoder parameters; default: all")
    )
    train_heads: bool = attrs.field(default=False, metadata=doc("train the heads too"))
    examples_per_class: int | None = attrs.field(
        default=None, validator=in_range(1), metadata=doc("use the first ones of every class only; default: all")
    )
    tokenizer: Path | None = attrs.field(default=None, metadata=doc("folder with the tokenizer of a text model"))

    @hookimpl
    def optimize(self, model: Any, data: Any, run: Any) -> MultiTaskModel:
        with told():
            if not isinstance(model, MultiTaskModel):
                raise PlaitError(f"multi-task training needs a MultiTaskModel, not a {type(model).__name__}")
            tasks = _labelled(data, _reading(model, self.tokenizer, run), self.examples_per_class)
            return train_tasks(
                model.to(run.device),
                tasks,
                num_steps=self.num_steps,
                batch_size=self.batch_size,
                lr=self.lr,
                weight_decay=self.weight_decay,
                seed=run.derived_seed("batches"),
                trainable=self.trainable,
                train_heads=self.train_heads,
                track=lambda steps: run.track(steps, "train"),
                on_step=lambda step, loss: run.log(step=step, loss=loss),
            )


@attrs.frozen(kw_only=True)
class MultiTaskAccuracy:
    """Accuracy of every task and their mean, size, and what the routers do."""

    batch_size: int = attrs.field(default=128, validator=in_range(1), metadata=doc("inputs at a time"))
    batches: tuple[Literal["one-task", "mixed"], ...] = attrs.field(
        default=("one-task",), metadata=doc("one-task: a batch holds one task's images in order; mixed: all, shuffled")
    )
    routing: tuple[Literal["sample", "batch", "fixed"], ...] = attrs.field(
        default=(), metadata=doc("routings to measure of models that route; default: the one each model is set to")
    )
    pictures: bool = attrs.field(default=True, metadata=doc("draw routing weights and first choices"))
    tokenizer: Path | None = attrs.field(default=None, metadata=doc("folder with the tokenizer of text models"))

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Any) -> Report:
        models = model if isinstance(model, Mapping) else {"": model}
        rows, panels = [], []
        with told():
            for name, one in models.items():
                if not isinstance(one, WithHeads):
                    raise PlaitError(f"evaluate: multi-task needs models with heads, not a {type(one).__name__}")
                tasks = _labelled(data, _reading(one, self.tokenizer, run))
                one = one.to(run.device).eval()
                size = {"parameters": stored_numbers(one), "bytes on disk": _bytes_on_disk(one)}
                label = {"method": name} if name else {}
                rows += [{**label, **row, **size} for row in self._rows(one, tasks, run)]
                if self.pictures and one.mixture is not None:
                    panels += self._panels(name, one, tasks)
        metrics = [*tasks, "mean"]
        return Report(
            rows=rows,
            better=dict.fromkeys(metrics, "higher") | {"bytes on disk": "lower"},
            formats=dict.fromkeys(metrics, ".1f") | dict.fromkeys(("parameters", "bytes on disk"), ".0f"),
            panels=panels,
        )

    def _rows(self, model: WithHeads, tasks: Mapping[str, LabelledTask], run: Any) -> Iterator[dict[str, Any]]:
        mixture = model.mixture
        before = None if mixture is None else mixture.gates[0].routing
        for routing in self.routing or (before,) if mixture is not None else (None,):
            if routing is not None and routing != before:
                mixture.set_routing(routing)
            for batches in self.batches:
                # Without routing by batch an output does not depend on the batch; experts cannot be mixed.
                if batches == "mixed" and (mixture is None or isinstance(model, IndividualModels)):
                    continue
                if batches == "mixed":
                    scores = mixed_accuracy(model, tasks, self.batch_size, run.generator("mixed"))
                else:
                    scores = one_task_accuracy(model, tasks, self.batch_size)
                kind = {"routing": routing or "–", "batches": batches if mixture is not None else "any"}
                yield {**kind, **scores, "mean": sum(scores.values()) / len(scores)}
            if routing is not None and routing != before:
                mixture.set_routing(before)

    def _panels(self, name: str, model: WithHeads, tasks: Mapping[str, LabelledTask]) -> list[Panel]:
        columns = {task: part.inputs for task, part in tasks.items()}
        means, shares = task_routing(model.mixture, columns, self.batch_size)
        experts = list(model.mixture.experts)
        drawn = [(means, "mean coefficient"), (shares, "share of samples with this first choice")]
        return [
            Panel(
                title=f"{name}: {text}, task × expert".removeprefix(": "),
                images=[[Image(caption=text, data=png(routing_figure(values, list(columns), experts, text)))]],
            )
            for values, text in drawn
        ]


def stored_numbers(model: WithHeads) -> int:
    """Numbers that the model keeps, heads left out; of sparse task vectors only values count, as in the papers."""
    if model.mixture is not None:
        return model.mixture.summary()["total"]
    heads = sum(parameter.numel() for parameter in model.task_heads.parameters())
    return sum(parameter.numel() for parameter in model.parameters()) - heads


def _bytes_on_disk(model: WithHeads) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        weights = [path for path in Path(folder).rglob("*") if path.suffix in (".safetensors", ".pt", ".bin")]
        return sum(path.stat().st_size for path in weights)


def _reading(model: WithHeads, tokenizer: Path | None, run: Any) -> Reading:
    if hasattr(model, "encode_image"):
        return reading_of(model, model.image_size, None)
    encoder = model.encoders[0] if isinstance(model, IndividualModels) else model.encoder
    encoder = getattr(encoder, "backbone", encoder)
    return reading_of(encoder, getattr(encoder, "image_size", None), tokenizer_of(tokenizer), run.warn)


def _labelled(data: Any, reading: Reading, per_class: int | None = None) -> dict[str, LabelledTask]:
    """task → inputs and labels; ``per_class`` keeps the first ones of every class."""
    if not isinstance(data, Mapping):
        raise PlaitError(f"data is a {type(data).__name__}; give a mapping from task to labelled data")
    found = {}
    for task, part in data.items():
        if "label" not in getattr(part, "column_names", ()):
            raise PlaitError(f"the data of task {task!r} is no dataset with a column 'label'")
        labels = torch.tensor(part.with_format(None)["label"][:])
        if per_class is not None:
            rows = first_per_class(labels, per_class)
            part, labels = part.select(rows.tolist()), labels[rows]
        found[task] = LabelledTask(column_of(part, reading), labels)
    return found
