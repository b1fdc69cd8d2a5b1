"""``defend``: CleanCLIP and the baselines.

Each says which part of the data it uses (see :mod:`plait_clip.backdoor.defence`). All accept ``reference``, a model
trusted to be clean, so that one pipeline serves every defence; none of these needs it.
"""

from __future__ import annotations

import copy
from typing import Any

import attrs
from plait import hookimpl
from plait.fields import field, in_range
from plait_vision import IS_BACKDOOR, flags_of

from plait_clip.backdoor import baselines
from plait_clip.backdoor.clean_clip import clean_clip
from plait_clip.backdoor.defence import (
    CLEAN,
    SUSPICIOUS,
    CleanClipFields,
    FineTuningFields,
    model_and_pairs,
    synonyms_of,
)
from plait_clip.model import ImageTextModel
from plait_clip.pair_batches import PairLoader
from plait_clip.training import as_given


@attrs.frozen(kw_only=True)
class NoDefence:
    """No defence: the model as it is, to compare with."""

    @hookimpl
    def defend(self, model: Any, data: Any | None, reference: Any | None, run: Any) -> Any:
        return copy.deepcopy(model)


@attrs.frozen(kw_only=True)
class FineTune(FineTuningFields):
    """Fine-tuning on clean pairs with CLIP's own loss. Data: clean."""

    takes = {"model": "image-text-model", "data": "dataset"}
    columns_needed = ("image",)

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> ImageTextModel:
        trained, pairs = model_and_pairs(model, data, CLEAN, "fine-tune", run.device, run.warn)
        with run.loop(self, "fine-tuning", inputs=(trained, pairs), total=self.num_steps(len(pairs))) as loop:
            baselines.plain_fine_tuning(
                trained,
                PairLoader(pairs, trained, workers=self.workers),
                self.options(),
                seed=run.derived_seed(),
                checkpoint=loop,
                on_step=loop.done,
            )
        return as_given(trained, model)


@attrs.frozen(kw_only=True)
class CleanClip(CleanClipFields):
    """Fine-tuning on clean pairs with an in-modal contrast to augmented views (Bansal et al., ICCV 2023). Data: clean."""

    takes = {"model": "image-text-model", "data": "dataset"}
    columns_needed = ("image",)

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> ImageTextModel:
        trained, pairs = model_and_pairs(model, data, CLEAN, "clean-clip", run.device, run.warn)
        options = self.options_for(trained)
        with run.loop(self, "CleanCLIP", inputs=(trained, pairs), total=self.num_steps(len(pairs))) as loop:
            clean_clip(
                trained,
                pairs,
                synonyms_of(self.synonyms),
                options,
                clip_weight=self.clip_weight,
                self_supervised_weight=self.self_supervised_weight,
                resample_captions=self.eda_resample == "epoch",
                num_workers=self.workers,
                seed=run.derived_seed(),
                checkpoint=loop,
                on_step=loop.done,
            )
        return as_given(trained, model)


@attrs.frozen(kw_only=True)
class Abl(FineTuningFields):
    """Anti-backdoor learning: unlearn the pairs that the model finds most similar (Li et al., NeurIPS 2021). Data: suspicious."""

    takes = {"model": "image-text-model", "data": "dataset"}
    columns_needed = ("image",)

    num_epochs: int = field(1, "passes over the pairs that are kept", in_range(1))
    isolation_share: float = field(
        0.02,
        "share of the pairs, by similarity under the given model, that is unlearned",
        in_range(0, 0.5, low_open=True),
    )
    num_isolated: int = field(8, "unlearned pairs in every batch; the others of it are kept ones", in_range(1))

    def __attrs_post_init__(self) -> None:
        if self.num_isolated > self.batch_size - 2:
            raise ValueError(
                f"num_isolated is {self.num_isolated}; allowed is up to batch_size − 2 = {self.batch_size - 2}"
            )

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> ImageTextModel:
        trained, table = model_and_pairs(model, data, SUSPICIOUS, "abl", run.device, run.warn)
        pairs = PairLoader(table, trained, workers=self.workers)
        similarities = baselines.pair_similarities(trained, pairs, precision=self.precision)
        isolated = baselines.top_share(similarities, self.isolation_share)
        steps = self.num_steps(len(pairs) - len(isolated), self.batch_size - self.num_isolated)
        with run.loop(self, "ABL", inputs=(trained, table), total=steps) as loop:
            baselines.anti_backdoor_learning(
                trained,
                pairs,
                isolated,
                self.num_isolated,
                self.options(),
                seed=run.derived_seed(),
                checkpoint=loop,
                on_step=loop.done,
            )
        return as_given(trained, model)


@attrs.frozen(kw_only=True)
class DropTop(FineTuningFields):
    """Train on, and remove the pairs that the model finds most similar (CleanCLIP's `progressive`). Data: suspicious."""

    takes = {"model": "image-text-model", "data": "dataset"}
    columns_needed = ("image",)

    removal_epochs: tuple[int, ...] = field((1, 2, 3), "epochs, counted from 1, that begin with a removal", in_range(1))
    removal_share: float = field(0.02, "share of what is left, removed each time", in_range(0, 0.5, low_open=True))

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> ImageTextModel:
        trained, table = model_and_pairs(model, data, SUSPICIOUS, "drop-top", run.device, run.warn)
        with run.loop(self, "drop-top", inputs=(trained, table), total=self.num_steps(len(table))) as loop:
            removed = baselines.drop_top(
                trained,
                PairLoader(table, trained, workers=self.workers),
                [epoch - 1 for epoch in self.removal_epochs],
                self.removal_share,
                self.options(),
                seed=run.derived_seed(),
                checkpoint=loop,
                on_step=loop.done,
            )
        run.log(removed=len(removed))
        return as_given(trained, model)


@attrs.frozen(kw_only=True)
class SquareUnlearn(FineTuningFields):
    """Unlearn flagged pairs by their squared cosine; an oracle where the flags are the truth. Data: suspicious."""

    takes = {"model": "image-text-model", "data": "dataset"}
    columns_needed = ("image",)

    flags: str = field(
        IS_BACKDOOR, "boolean column with the pairs to unlearn; is_backdoor is the truth, which no real defender has"
    )
    unlearn_weight: float = field(1.0, "weight w of the flagged pairs", in_range(0))
    unlearn_target: float = field(
        0.0, "τ of (c + τ)²: flagged pairs are driven to cosine −τ; below 0 strengthens the backdoor", in_range(-1, 1)
    )

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> ImageTextModel:
        trained, table = model_and_pairs(model, data, SUSPICIOUS, "square-unlearn", run.device, run.warn)
        if self.unlearn_target < 0:
            run.warn(f"unlearn_target is {self.unlearn_target}: below 0 flagged pairs are pulled together, not apart")
        with run.loop(self, "square-unlearn", inputs=(trained, table), total=self.num_steps(len(table))) as loop:
            baselines.square_unlearning(
                trained,
                PairLoader(table, trained, workers=self.workers),
                flags_of(table, self.flags),
                self.unlearn_weight,
                self.unlearn_target,
                self.options(),
                seed=run.derived_seed(),
                checkpoint=loop,
                on_step=loop.done,
            )
        return as_given(trained, model)


@attrs.frozen(kw_only=True)
class Par(FineTuningFields):
    """Perturb and recover: away from the given model, while augmented clean pairs are relearned. Data: clean."""

    takes = {"model": "image-text-model", "data": "dataset"}
    columns_needed = ("image",)

    batch_size: int = field(256, "pairs contrasted with one another", in_range(2))
    learning_rate: float = field(3e-6, "peak rate", in_range(0, low_open=True))
    weight_decay: float = field(1e-4, "AdamW decay of weights with two or more axes", in_range(0))
    betas: tuple[float, float] = field((0.9, 0.98), "AdamW averaging of moments", in_range(0, 1, high_open=True))
    limit: float = field(
        2.15, "squared distance of unit embeddings from the given model's, at which the push ends", in_range(0, 4)
    )

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> ImageTextModel:
        trained, pairs = model_and_pairs(model, data, CLEAN, "par", run.device, run.warn)
        with run.loop(self, "PAR", inputs=(trained, pairs), total=self.num_steps(len(pairs))) as loop:
            baselines.perturb_and_recover(
                trained,
                pairs,
                self.limit,
                self.options(),
                num_workers=self.workers,
                seed=run.derived_seed(),
                checkpoint=loop,
                on_step=loop.done,
            )
        return as_given(trained, model)
