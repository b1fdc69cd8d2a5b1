"""What backdoor defences share: the part of the data and the copy of the model that they work on, and the fields of
those that fine-tune.

Data are one dataset, or a mapping with the parts ``clean`` (trusted pairs) and ``suspicious`` (the pairs that the model
was trained on); a lone dataset is whichever part the defence uses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import datasets
from plait.fields import field, in_range, path_or_name_field
from plait.freezing import thawed
from plait.weights import read_checkpoint

from plait_clip import toy_data
from plait_clip.backdoor.clean_clip import FineTuning, released_optimizer_state, steps_of_epoch
from plait_clip.backdoor.eda import Synonyms
from plait_clip.backdoor.synonyms import mapped_synonyms, open_synonyms
from plait_clip.model import ImageTextModel, image_text_model
from plait_clip.pair_batches import check_captions
from plait_clip.training import check_weights

CLEAN, SUSPICIOUS = "clean", "suspicious"
TOY_DATA, WORDNET = "toy-data", "wordnet"


def part_of(data: Any, part: str, method: str) -> datasets.Dataset:
    """The dataset that a defence uses: ``data`` itself, or its part of that name.

    Raises:
        ValueError: there is no such part.
    """
    if isinstance(data, Mapping):
        if part not in data:
            raise ValueError(
                f"{method} needs the {part} pairs; give data as {{{part}: step}}, it has {', '.join(data)}"
            )
        data = data[part]
    if not isinstance(data, datasets.Dataset):
        raise ValueError(f"the {part} data of {method} are a {type(data).__name__}; give a dataset, such as step.train")
    return data


def sound_copy(model: Any, device: Any) -> ImageTextModel:
    """A copy of the model on the device, to be looked at.

    Raises:
        TypeError: it is not an image-text model.
        ValueError: it has weights that are not finite.
    """
    check_weights(image_text_model(model))
    return copy.deepcopy(model).to(device)


def trainable_copy(model: Any, device: Any) -> ImageTextModel:
    """A copy of the model on the device, to be trained with CLIP's loss; of one that comes frozen, every weight learns.

    Raises:
        TypeError: it is not an image-text model.
        ValueError: it has weights that are not finite, or was trained with another loss than CLIP's.
    """
    copied = sound_copy(model, device)
    if copied.logit_bias is not None:
        raise ValueError(
            "the model has a logit bias, as SigLIP's, which are trained with the sigmoid loss; this defence trains with "
            "CLIP's softmax loss and would make another model of it; give a model without a logit bias"
        )
    learning: ImageTextModel = thawed(copied)
    return learning


def model_and_pairs(
    model: Any, data: Any, part: str, method: str, device: Any, warn: Callable[[str], None]
) -> tuple[ImageTextModel, datasets.Dataset]:
    """What every defence that trains begins with: a copy of the model, and its part of the data with checked captions.

    It ends with :func:`plait_clip.as_given`.

    Args:
        method: name of the defence, for messages.
        warn: called with a sentence on captions that are cut or not English.

    Raises:
        TypeError, ValueError: as :func:`part_of` and :func:`trainable_copy`; a caption is missing or blank (names the
            row).
    """
    pairs, copied = part_of(data, part, method), trainable_copy(model, device)
    check_captions(pairs, copied, warn)
    return copied, pairs


def synonyms_of(source: str) -> Synonyms:
    """Synonyms by the name or path that a field ``synonyms`` gives: ``wordnet``, ``toy-data``, or a path.

    Raises:
        FileNotFoundError, ValueError: as :func:`plait_clip.backdoor.open_synonyms`.
    """
    if source == TOY_DATA:
        return mapped_synonyms(toy_data.SYNONYMS)
    return open_synonyms(None if source == WORDNET else Path(source))


@attrs.frozen(kw_only=True)
class FineTuningFields:
    """How a defence trains: AdamW, linear warm-up, cosine to 0."""

    num_epochs: int = field(10, "passes over the data", in_range(1))
    batch_size: int = field(64, "pairs contrasted with one another", in_range(2))
    learning_rate: float = field(1e-5, "peak rate", in_range(0, low_open=True))
    warmup_steps: float = field(50, "optimiser steps up to the peak; below 1: share of all steps", in_range(0))
    weight_decay: float = field(0.1, "AdamW decay of weights with two or more axes", in_range(0))
    betas: tuple[float, float] = field((0.9, 0.999), "AdamW averaging of moments", in_range(0, 1, high_open=True))
    epsilon: float = field(1e-8, "AdamW divisor floor", in_range(0, low_open=True))
    precision: Literal["fp32", "bf16"] = field("fp32", "bf16: mixed precision, fp32 weights and losses")
    workers: int = field(0, "processes that decode and augment images", in_range(0, 256))

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
class CleanClipFields(FineTuningFields):
    """The fields of CleanCLIP, and of a method that extends it (as a subclass of this)."""

    clip_weight: float = field(1.0, "weight of CLIP's loss", in_range(0))
    self_supervised_weight: float = field(1.0, "weight of the in-modal losses", in_range(0))
    synonyms: str = path_or_name_field(
        WORDNET,
        "for augmented captions: wordnet (WordNet 3.0, which comes with plait-clip), toy-data (of the digits and "
        "Fashion-MNIST), or the path of a JSON file {word: [synonyms]} or of a folder with WordNet's files",
    )
    eda_resample: Literal["once", "epoch"] = field("once", "when captions are augmented anew")
    as_released: bool = field(False, "the schedule and the weight decay of the authors' code, quirks included")
    optimizer_checkpoint: Path | None = field(
        None,
        "with as_released: a checkpoint of the authors' training (.pt with state_dict and optimizer), from whose "
        "optimizer's state training starts",
    )

    renamed_fields: ClassVar[dict[str, str]] = {"compat": "as_released"}

    def __attrs_post_init__(self) -> None:
        if self.optimizer_checkpoint is not None and not self.as_released:
            raise ValueError("optimizer_checkpoint is only used with as_released: true; set that, or leave it out")

    def options_for(self, model: ImageTextModel) -> FineTuning:
        """The settings for the plain functions, with the optimizer's state that ``optimizer_checkpoint`` holds.

        Raises:
            ValueError: the file cannot be read, or belongs to another model.
        """
        if self.optimizer_checkpoint is None:
            return self.options(as_released=self.as_released)
        content = read_checkpoint(self.optimizer_checkpoint)
        try:
            state = released_optimizer_state(content, model)
        except ValueError as error:
            raise ValueError(f"optimizer_checkpoint {self.optimizer_checkpoint} cannot be used: {error}") from error
        return self.options(as_released=self.as_released, optimizer_state=state)
