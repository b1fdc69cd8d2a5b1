"""Merges that are done once: what all merge methods share, and the baselines without training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import torch
from plait import hookimpl
from plait.fields import field, in_range

from plait_wemoe.baselines import static
from plait_wemoe.columns import Column, reading_of, tokenizer_of
from plait_wemoe.folders import ModelFolder, merge_folders, opened
from plait_wemoe.heads import Features
from plait_wemoe.inputs import Inputs, input_dtype, placed
from plait_wemoe.pool import Pool, columns_of, label_names, pool_of
from plait_wemoe.preprocessing import image_processor_of
from plait_wemoe.states import NO_STATISTICS, State, recompute_statistics, with_state
from plait_wemoe.tasks import IndividualModels

STATISTICS_BATCH = 128
# Kinds: what a data set for each task may come as, and models that answer by a head.
DATA = ("dataset", "clients")
WITH_HEADS = ("multi-task-model", "classifier", "image-text-model")
BY_INPUTS = {"base": (*WITH_HEADS, "model-folder"), "experts": (*WITH_HEADS, "model-folder"), "data": DATA}


@attrs.frozen(kw_only=True)
class ReadsData:
    """How data become what a model of transformers is called with."""

    tokenizer: Path | None = field(None, "folder with the tokenizer of text models, for data with a column of texts")
    image_processor: Path | None = field(
        None,
        "folder with the image processor of image models of transformers; default: as timm's models say of themselves, "
        "else as the images are, in [0, 1]",
    )


@attrs.frozen(kw_only=True)
class Merging(ReadsData):
    """What all merge methods have in common."""

    takes: ClassVar[Mapping[str, Any]] = {"data": DATA}

    templates: tuple[str, ...] | str = field(
        "photo", "prompts with {} for zero-shot heads of image-text models, or a set's name"
    )
    class_names: dict[str, tuple[str, ...]] | None = field(
        None, "task → class names of image-text models; default: the names that the data declares"
    )
    strict: bool = field(False, "refuse an expert that equals the base, not only warn")

    def pool(self, base: Any, experts: Mapping[str, Any], data: Mapping[str, Any] | None, run: Any) -> Pool:
        for name, value in (("experts", experts), ("data", data)):
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"{name} is a {type(value).__name__}; give a mapping from task to step")
        base, experts = opened(base), {task: opened(expert) for task, expert in experts.items()}
        names = {**label_names(data), **(self.class_names or {})}
        pool = pool_of(base, experts, names, self.templates)
        for task in pool.unchanged:
            if self.strict:
                raise ValueError(f"expert {task!r} equals the base bit by bit; fine-tune it, or set strict to false")
            run.warn(f"expert {task!r} equals the base bit by bit; it adds nothing")
        return pool.to(run.device)

    def columns(self, pool: Pool, data: Mapping[str, Any] | None, run: Any) -> dict[str, Column]:
        """Every expert's unlabelled data."""
        own = tokenizer_of(self.tokenizer), image_processor_of(self.image_processor)
        reading = reading_of(pool.base, pool.image_size, *own, run.warn)
        return columns_of(data, list(pool.encoders), reading)


@attrs.frozen(kw_only=True)
class Individual(Merging):
    """No merge: every task keeps its own expert (upper bound, T times the size)."""

    gives = "multi-task-model"

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any | None, run: Any) -> IndividualModels:
        return self.pool(base, experts, data, run).individual()


@attrs.frozen(kw_only=True)
class OneModel(Merging):
    """What methods have in common that make one model of all."""

    statistics: Literal["average", "recompute"] = field(
        "average", "running statistics of normalisation layers: the experts' mean, or anew from all the data"
    )

    def merged(self, pool: Pool, state: State, data: Any, run: Any) -> torch.nn.Module:
        """The model with the merged weights, with its statistics."""
        encoder = with_state(pool.base, state)
        if self.statistics == "recompute":
            columns = self.columns(pool, data, run).values()
            inputs = (in_order(column, STATISTICS_BATCH, encoder, run) for column in columns)
            if not recompute_statistics(encoder.eval(), inputs):
                run.warn(NO_STATISTICS)
        return pool.merged(encoder)


@attrs.frozen(kw_only=True)
class ByWeights(OneModel):
    """What methods have in common that need the weights alone: models that stay on disk are merged tensor by tensor."""

    # Of a classifier it may be a multi-task-model, which every step takes that takes a classifier. Methods that open folders
    # declare nothing: of a folder they make a model in memory.
    gives = "base"

    def recipe(self, run: Any) -> static.Recipe:
        raise NotImplementedError

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any | None, run: Any) -> Any:
        if isinstance(base, ModelFolder) and isinstance(experts, Mapping):
            return self.merged_folder(base, experts, run)
        pool = self.pool(base, experts, data, run)
        return self.merged(pool, self.recipe(run).state(pool.base_state, pool.states, pool.buffers), data, run)

    def merged_folder(self, base: ModelFolder, experts: Mapping[str, Any], run: Any) -> ModelFolder:
        for task, expert in experts.items():
            if not isinstance(expert, ModelFolder):
                raise TypeError(f"the base is a folder, expert {task!r} a {type(expert).__name__}; load both alike")
        if self.statistics == "recompute":
            raise ValueError("statistics is recompute, which needs the models in memory; load them as such, or average")
        out = run.folder / "merged"
        shutil.rmtree(out, ignore_errors=True)  # of a run that was killed after its merge
        merge_folders(
            self.recipe(run),
            base,
            experts,
            out,
            device=run.device,
            strict=self.strict,
            warn=run.warn,
            track=lambda names: run.track(names, "tensors"),
        )
        return ModelFolder(out, is_own=True)


@attrs.frozen(kw_only=True)
class SimpleAverage(ByWeights):
    """Mean of the experts' weights (Wortsman et al., ICML 2022)."""

    def recipe(self, run: Any) -> static.Recipe:
        return static.averaging()


@attrs.frozen(kw_only=True)
class Scaled(ByWeights):
    """What methods have in common that add a scaled task vector to the base."""

    scaling: float = field(0.3, "λ, factor of the merged task vector", in_range())


@attrs.frozen(kw_only=True)
class TaskArithmetic(Scaled):
    """Base plus scaled sum of the task vectors (Ilharco et al., ICLR 2023)."""

    def recipe(self, run: Any) -> static.Recipe:
        return static.arithmetic(self.scaling)


@attrs.frozen(kw_only=True)
class Trimming(Scaled):
    """What TIES and methods that may end in it have in common."""

    keep: float = field(20.0, "entries that TIES keeps, % (up to 1: a fraction)", in_range(0, 100, low_open=True))


@attrs.frozen(kw_only=True)
class Ties(Trimming):
    """Trim, elect sign, merge (Yadav et al., NeurIPS 2023)."""

    merge_function: Literal["sum", "mean", "max"] = field("sum", "how agreeing entries are joined; the paper: mean")
    keep_of: Literal["model", "tensor"] = field(
        "model", "what the share is of: all entries together, as in the paper, or every tensor, as in mergekit"
    )

    def recipe(self, run: Any) -> static.Recipe:
        return static.trimming(self.scaling, self.keep, self.merge_function, self.keep_of)


@attrs.frozen(kw_only=True)
class Dare(Trimming):
    """Randomly dropped and rescaled task vectors, then task arithmetic or TIES (Yu et al., ICML 2024)."""

    drop_rate: float = field(0.5, "share dropped", in_range(0, 1, high_open=True))
    then: Literal["task-arithmetic", "ties"] = field("task-arithmetic", "how the rest is merged")

    def recipe(self, run: Any) -> static.Recipe:
        ties = self.then == "ties"
        then = static.trimming(self.scaling, self.keep) if ties else static.arithmetic(self.scaling)
        return static.dropping(self.drop_rate, then, run.generator("drop"))


@attrs.frozen(kw_only=True)
class ByInputs(OneModel):
    """What methods have in common that weigh the experts by what some inputs do in them."""

    takes = BY_INPUTS

    num_examples: int = field(256, "inputs per task", in_range(1))
    batch_size: int = field(32, "inputs at a time", in_range(1))

    def experts_with_inputs(
        self, pool: Pool, data: Any, description: str, run: Any
    ) -> Iterator[tuple[str, torch.nn.Module, Iterator[Inputs]]]:
        """Task, a copy of its expert's encoder, and the first inputs of the task."""
        columns = self.columns(pool, data, run)
        for task, encoder in run.track(pool.encoders.items(), description):
            inputs = in_order(columns[task], self.batch_size, encoder, run, self.num_examples)
            yield task, with_state(encoder, encoder.state_dict()).eval(), inputs


@attrs.frozen(kw_only=True)
class Fisher(ByInputs):
    """Average weighted by diagonal Fisher information, from unlabelled inputs (Matena & Raffel, NeurIPS 2022)."""

    batch_size: int = field(32, "inputs whose gradients are summed before squaring", in_range(1))

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any, run: Any) -> torch.nn.Module:
        pool = self.pool(base, experts, data, run)
        information = {}
        for task, encoder, inputs in self.experts_with_inputs(pool, data, "Fisher information", run):
            found = static.fisher_information(Features(encoder).eval(), pool.heads[task], inputs)
            information[task] = {name.removeprefix("encoder."): value for name, value in found.items()}
        return self.merged(pool, static.fisher(pool.base_state, pool.states, information, pool.buffers), data, run)


@attrs.frozen(kw_only=True)
class RegMean(ByInputs):
    """Least squares for linear layers, average for the rest (Jin et al., ICLR 2023)."""

    off_diagonal: float = field(0.6, "factor of off-diagonals", in_range(0, 1))
    ridge: float = field(1e-6, "share of the mean diagonal that is added", in_range(0, low_open=True))

    @hookimpl
    def merge(self, base: Any, experts: Any, data: Any, run: Any) -> torch.nn.Module:
        pool = self.pool(base, experts, data, run)
        grams = {
            task: static.gram_matrices(encoder, inputs)
            for task, encoder, inputs in self.experts_with_inputs(pool, data, "inner products", run)
        }
        facts = (self.off_diagonal, self.ridge, pool.buffers)
        return self.merged(pool, static.regmean(pool.base_state, pool.states, grams, *facts), data, run)


def in_order(
    column: Column, batch_size: int, model: torch.nn.Module, run: Any, limit: int | None = None
) -> Iterator[Inputs]:
    """Batches of a column in its order, as the model takes them."""
    return (placed(inputs, run.device, input_dtype(model)) for inputs in column.batches(batch_size, limit))
