"""``defend``: CleanCLIP and the baselines.

They take ``data`` as one dataset, or as a mapping with the parts ``clean`` (trusted pairs) and ``suspicious`` (the
pairs that the model was trained on); each method says which part it uses, and a lone dataset is that part. All accept
``reference``, a model trusted to be clean, so that one pipeline serves every defence; none of these needs it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import datasets
import torch
from plait import PlaitError, hookimpl
from plait.configuration import plain
from plait.fields import doc, in_range, one_of
from plait.weights import read_checkpoint

from plait_clip import beds
from plait_clip.backdoor import baselines
from plait_clip.backdoor.clean_clip import FineTuning, clean_clip, official_optimizer_state, steps_of_epoch
from plait_clip.backdoor.eda import Synonyms
from plait_clip.backdoor.poison import IS_BACKDOOR, flags_of
from plait_clip.backdoor.synonyms import mapped_synonyms, open_synonyms
from plait_clip.fingerprint import fingerprint
from plait_clip.loader import Pairs, check_captions
from plait_clip.model import ImageTextModel
from plait_clip.plugin.errors import as_plait_errors
from plait_clip.training import check_weights

__plait_api__ = "0.1"

CLEAN, SUSPICIOUS = "clean", "suspicious"
TEST_BEDS, WORDNET = "test-beds", "wordnet"


def part_of(data: Any, part: str, method: str) -> datasets.Dataset:
    """The dataset that a defence uses: ``data`` itself, or its part of that name.

    Raises:
        PlaitError: there is no such part.
    """
    if isinstance(data, Mapping):
        if part not in data:
            raise PlaitError(
                f"{method} needs the {part} pairs; give data as {{{part}: step}}, it has {', '.join(data)}"
            )
        data = data[part]
    if not isinstance(data, datasets.Dataset):
        raise PlaitError(f"the {part} data of {method} are a {type(data).__name__}; give a dataset, such as step.train")
    return data


def copy_of(model: Any, run: Any) -> ImageTextModel:
    """A copy of the model to be trained, on the device of the run.

    Raises:
        PlaitError: it is no image-text model, has weights that are not finite, or was trained with another loss than
            the softmax loss of the defences.
    """
    copied = sound_copy(model, run)
    if copied.logit_bias is not None:
        raise PlaitError(
            "the model has a logit bias, as SigLIP's, which are trained with the sigmoid loss; this defence trains with "
            "CLIP's softmax loss and would make another model of it; give a model without a logit bias"
        )
    return copied


def sound_copy(model: Any, run: Any) -> ImageTextModel:
    """A copy of the model on the device of the run, to be looked at.

    Raises:
        PlaitError: it is no image-text model, or has weights that are not finite.
    """
    if not isinstance(model, ImageTextModel):
        raise PlaitError(f"model is a {type(model).__name__}; an image-text model of plait-clip is needed")
    with as_plait_errors():
        check_weights(model)
    return copy.deepcopy(model).to(run.device)


def prepared(
    method: Any, model: Any, data: Any, part: str, name: str, run: Any
) -> tuple[ImageTextModel, datasets.Dataset, Path]:
    """What every defence begins with: a copy of the model, its part of the data with checked captions, its scratch.

    Raises:
        PlaitError: as :func:`part_of` and :func:`copy_of`; a caption is missing or blank; names the row.
    """
    pairs, copied = part_of(data, part, name), copy_of(model, run)
    with as_plait_errors():
        check_captions(pairs, copied, run.warn)
    return copied, pairs, scratch(run, method, copied, pairs)


def synonyms_of(source: str) -> Synonyms:
    """Synonyms by the name or path that a field ``synonyms`` gives.

    Raises:
        PlaitError: there are none.
    """
    if source == TEST_BEDS:
        return mapped_synonyms(beds.SYNONYMS)
    with as_plait_errors():
        return open_synonyms(None if source == WORDNET else Path(source))


def scratch(run: Any, method: Any, model: torch.nn.Module, data: datasets.Dataset) -> Path:
    """A folder for the state of this training: of this method, model, data and seed, and of no other."""
    facts = (plain(method), run.seed, run.step, data._fingerprint, fingerprint(model.state_dict()))
    folder = run.folder / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder


def logger(run: Any, total: int, description: str) -> Callable[[int, dict[str, float]], None]:
    """A callback for every step that logs its losses and moves the progress bar."""
    progress = run.track(range(total), description, total=total)

    def on_step(step: int, values: dict[str, float]) -> None:
        run.log(step=step, **values)
        next(progress, None)

    return on_step


@attrs.frozen(kw_only=True)
class NoDefence:
    """No defence: the model as it is, to compare with."""

    @hookimpl
    def defend(self, model: Any, data: Any | None, reference: Any | None, run: Any) -> Any:
        return copy.deepcopy(model)


@attrs.frozen(kw_only=True)
class Training:
    """How a defence trains: AdamW, linear warm-up, cosine to 0."""

    num_epochs: int = attrs.field(default=10, validator=in_range(1), metadata=doc("passes over the data"))
    batch_size: int = attrs.field(default=64, validator=in_range(2), metadata=doc("pairs contrasted with one another"))
    learning_rate: float = attrs.field(default=1e-5, validator=in_range(0, low_open=True), metadata=doc("peak rate"))
    warmup_steps: float = attrs.field(
        default=50, validator=in_range(0), metadata=doc("optimiser steps up to the peak; below 1: share of all steps")
    )
    weight_decay: float = attrs.field(
        default=0.1, validator=in_range(0), metadata=doc("AdamW decay of weights with two or more axes")
    )
    betas: tuple[float, float] = attrs.field(
        default=(0.9, 0.999), validator=in_range(0, 1, high_open=True), metadata=doc("AdamW averaging of moments")
    )
    epsilon: float = attrs.field(
        default=1e-8, validator=in_range(0, low_open=True), metadata=doc("AdamW divisor floor")
    )
    precision: Literal["fp32", "bf16"] = attrs.field(
        default="fp32", validator=one_of("fp32", "bf16"), metadata=doc("bf16: mixed precision, fp32 weights and losses")
    )
    workers: int = attrs.field(
        default=0, validator=in_range(0, 256), metadata=doc("processes that decode and augment images")
    )

    def options(self, **more: Any) -> FineTuning:
        """The same settings for the plain functions."""
        return FineTuning(
            num_epochs=self.num_epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            betas=self.betas,
            eps=self.epsilon,
            precision=self.precision,
            **more,
        )

    def num_steps(self, num_pairs: int, batch_size: int | None = None) -> int:
        """Optimiser steps on so many pairs.

        Raises:
            ValueError: they do not fill a batch.
        """
        return self.num_epochs * steps_of_epoch(range(num_pairs), batch_size or self.batch_size)


@attrs.frozen(kw_only=True)
class FineTune(Training):
    """Fine-tuning on clean pairs with CLIP's own loss. Data: clean."""

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> ImageTextModel:
        model, pairs, folder = prepared(self, model, data, CLEAN, "fine-tune", run)
        with as_plait_errors():
            on_step = logger(run, self.num_steps(len(pairs)), "fine-tuning")
            baselines.plain_fine_tuning(
                model,
                Pairs(pairs, model, workers=self.workers),
                self.options(),
                seed=run.derived_seed(),
                checkpoint=folder / "training.pt",
                on_step=on_step,
            )
        return model.eval()


@attrs.frozen(kw_only=True)
class CleanClip(Training):
    """Fine-tuning on clean pairs with an in-modal contrast to augmented views (Bansal et al., ICCV 2023). Data: clean."""

    clip_weight: float = attrs.field(default=1.0, validator=in_range(0), metadata=doc("weight of CLIP's loss"))
    self_supervised_weight: float = attrs.field(
        default=1.0, validator=in_range(0), metadata=doc("weight of the in-modal losses")
    )
    synonyms: str = attrs.field(
        default=WORDNET,
        metadata=doc(
            "for augmented captions: wordnet (WordNet 3.0, which comes with plait-clip), test-beds (of the small beds), or the "
            "path of a JSON file {word: [synonyms]} or of a folder with WordNet's files"
        ),
    )
    eda_resample: Literal["once", "epoch"] = attrs.field(
        default="once", validator=one_of("once", "epoch"), metadata=doc("when captions are augmented anew")
    )
    compat: Literal["none", "cleanclip"] = attrs.field(
        default="none",
        validator=one_of("none", "cleanclip"),
        metadata=doc("cleanclip: the schedule and the weight decay of the authors' code, quirks included"),
    )
    optimizer_checkpoint: Path | None = attrs.field(
        default=None,
        metadata=doc(
            "with compat cleanclip: a checkpoint of the authors' training (.pt with state_dict and optimizer), from whose "
            "optimizer's state training starts"
        ),
    )

    def __attrs_post_init__(self) -> None:
        if self.optimizer_checkpoint is not None and self.compat == "none":
            raise PlaitError("optimizer_checkpoint is only used with compat: cleanclip; set that, or leave it out")

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> ImageTextModel:
        model, pairs, folder = prepared(self, model, data, CLEAN, "clean-clip", run)
        state = restored_optimizer(self.optimizer_checkpoint, model)
        with as_plait_errors():
            on_step = logger(run, self.num_steps(len(pairs)), "CleanCLIP")
            clean_clip(
                model,
                pairs,
                synonyms_of(self.synonyms),
                self.options(official=self.compat == "cleanclip", optimizer_state=state),
                clip_weight=self.clip_weight,
                self_supervised_weight=self.self_supervised_weight,
                resample_captions=self.eda_resample == "epoch",
                num_workers=self.workers,
                seed=run.derived_seed(),
                checkpoint=folder / "training.pt",
                on_step=on_step,
            )
        return model.eval()


def restored_optimizer(path: Path | None, model: ImageTextModel) -> dict[str, Any] | None:
    """The optimizer's state that a field ``optimizer_checkpoint`` names, for :class:`FineTuning`.

    Raises:
        PlaitError: the file cannot be read, or belongs to another model.
    """
    if path is None:
        return None
    content = read_checkpoint(path)
    try:
        return official_optimizer_state(content, model)
    except ValueError as error:
        raise PlaitError(f"optimizer_checkpoint {path} cannot be used: {error}") from error


@attrs.frozen(kw_only=True)
class Abl(Training):
    """Anti-backdoor learning: unlearn the pairs that the model finds most similar (Li et al., NeurIPS 2021). Data: suspicious."""

    num_epochs: int = attrs.field(default=1, validator=in_range(1), metadata=doc("passes over the pairs that are kept"))
    isolation_share: float = attrs.field(
        default=0.02,
        validator=in_range(0, 0.5, low_open=True),
        metadata=doc("share of the pairs, by similarity under the given model, that is unlearned"),
    )
    num_isolated: int = attrs.field(
        default=8, validator=in_range(1), metadata=doc("unlearned pairs in every batch; the others of it are kept ones")
    )

    def __attrs_post_init__(self) -> None:
        if self.num_isolated > self.batch_size - 2:
            raise PlaitError(
                f"num_isolated is {self.num_isolated}; allowed is up to batch_size − 2 = {self.batch_size - 2}"
            )

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> ImageTextModel:
        model, table, folder = prepared(self, model, data, SUSPICIOUS, "abl", run)
        with as_plait_errors():
            pairs = Pairs(table, model, workers=self.workers)
            similarities = baselines.pair_similarities(model, pairs, precision=self.precision)
            isolated = baselines.top_share(similarities, self.isolation_share)
            steps = self.num_steps(len(pairs) - len(isolated), self.batch_size - self.num_isolated)
            baselines.anti_backdoor_learning(
                model,
                pairs,
                isolated,
                self.num_isolated,
                self.options(),
                seed=run.derived_seed(),
                checkpoint=folder / "training.pt",
                on_step=logger(run, steps, "ABL"),
            )
        return model.eval()


@attrs.frozen(kw_only=True)
class DropTop(Training):
    """Train on, and remove the pairs that the model finds most similar (CleanCLIP's `progressive`). Data: suspicious."""

    removal_epochs: tuple[int, ...] = attrs.field(
        default=(1, 2, 3), validator=in_range(1), metadata=doc("epochs, counted from 1, that begin with a removal")
    )
    removal_share: float = attrs.field(
        default=0.02,
        validator=in_range(0, 0.5, low_open=True),
        metadata=doc("share of what is left, removed each time"),
    )

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> ImageTextModel:
        model, table, folder = prepared(self, model, data, SUSPICIOUS, "drop-top", run)
        with as_plait_errors():
            removed = baselines.drop_top(
                model,
                Pairs(table, model, workers=self.workers),
                [epoch - 1 for epoch in self.removal_epochs],
                self.removal_share,
                self.options(),
                seed=run.derived_seed(),
                folder=folder,
                on_step=logger(run, self.num_steps(len(table)), "drop-top"),
            )
        run.log(removed=len(removed))
        return model.eval()


@attrs.frozen(kw_only=True)
class SquareUnlearn(Training):
    """Unlearn flagged pairs by their squared cosine; an oracle where the flags are the truth. Data: suspicious."""

    flags: str = attrs.field(
        default=IS_BACKDOOR,
        metadata=doc("boolean column with the pairs to unlearn; is_backdoor is the truth, which no real defender has"),
    )
    unlearn_weight: float = attrs.field(
        default=1.0, validator=in_range(0), metadata=doc("weight w of the flagged pairs")
    )
    unlearn_target: float = attrs.field(
        default=0.0,
        validator=in_range(-1, 1),
        metadata=doc("τ of (c + τ)²: flagged pairs are driven to cosine −τ; below 0 strengthens the backdoor"),
    )

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> ImageTextModel:
        model, table, folder = prepared(self, model, data, SUSPICIOUS, "square-unlearn", run)
        if self.unlearn_target < 0:
            run.warn(f"unlearn_target is {self.unlearn_target}: below 0 flagged pairs are pulled together, not apart")
        with as_plait_errors():
            flags = flags_of(table, self.flags)
            baselines.square_unlearning(
                model,
                Pairs(table, model, workers=self.workers),
                flags,
                self.unlearn_weight,
                self.unlearn_target,
                self.options(),
                seed=run.derived_seed(),
                checkpoint=folder / "training.pt",
                on_step=logger(run, self.num_steps(len(table)), "square-unlearn"),
            )
        return model.eval()


@attrs.frozen(kw_only=True)
class Par(Training):
    """Perturb and recover: away from the given model, while augmented clean pairs are relearned. Data: clean."""

    batch_size: int = attrs.field(default=256, validator=in_range(2), metadata=doc("pairs contrasted with one another"))
    learning_rate: float = attrs.field(default=3e-6, validator=in_range(0, low_open=True), metadata=doc("peak rate"))
    weight_decay: float = attrs.field(
        default=1e-4, validator=in_range(0), metadata=doc("AdamW decay of weights with two or more axes")
    )
    betas: tuple[float, float] = attrs.field(
        default=(0.9, 0.98), validator=in_range(0, 1, high_open=True), metadata=doc("AdamW averaging of moments")
    )
    limit: float = attrs.field(
        default=2.15,
        validator=in_range(0, 4),
        metadata=doc("squared distance of unit embeddings from the given model's, at which the push ends"),
    )

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> ImageTextModel:
        model, pairs, folder = prepared(self, model, data, CLEAN, "par", run)
        with as_plait_errors():
            baselines.perturb_and_recover(
                model,
                pairs,
                self.limit,
                self.options(),
                num_workers=self.workers,
                seed=run.derived_seed(),
                checkpoint=folder / "training.pt",
                on_step=logger(run, self.num_steps(len(pairs)), "PAR"),
            )
        return model.eval()
