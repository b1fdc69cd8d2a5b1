"""TA-Cleaner as a method of plait: ``defend: ta-cleaner``, its sub-captions as a data step, and an ablation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import datasets
from plait import Report, hookimpl
from plait.fields import code_field, field, in_range, path_or_name_field
from plait.importing import named_object
from plait_clip import as_given, first_captions
from plait_clip.backdoor import (
    CLEAN,
    SUSPICIOUS,
    WORDNET,
    CleanClipFields,
    FineTuningFields,
    model_and_pairs,
    synonyms_of,
)

from plait_ta_cleaner import ta_cleaner as algorithm
from plait_ta_cleaner.baselines import fine_tune_with_hard_negatives
from plait_ta_cleaner.overlap import shared_images
from plait_ta_cleaner.subcaptions import (
    Draw,
    PositiveMode,
    Slot,
    Subcaption,
    SubcaptionSource,
    as_columns,
    column_names,
    draw_from_columns,
    subcaption_source,
)
from plait_ta_cleaner.tagging import LexiconTagger, Tagger, WordList, open_words


# Without slots, so that it can be a second base of a class.
@attrs.frozen(kw_only=True, slots=False)
class SubcaptionFields:
    """How captions are rewritten."""

    n_negatives: int = field(1, "M, counterfactual texts a caption; 0 (an ablation): none", in_range(0, 8))
    positive_mode: PositiveMode = field(
        "drop_adj",
        "factual text: the caption without adjectives, its first and last noun and their relation, either with "
        "probability 1/2, or (an ablation) the caption itself",
    )
    negative_slots: tuple[Slot, ...] = field(
        ("noun", "verb", "adj"), "parts of speech of which one word is exchanged: noun, verb, adj"
    )
    min_pool_count: int | None = field(
        None, "a word must occur so often to replace another; default 20, or 5 below 20,000 captions", in_range(1)
    )
    pool_extra: tuple[str, ...] = field((), "further nouns that may replace others, such as the names of classes")
    pool_exclude_synonyms: bool = field(True, "never exchange a word for its synonym, by the source in synonyms")
    synonyms: str = path_or_name_field(
        WORDNET,
        "wordnet (WordNet 3.0, which comes with plait-clip), toy-data (of the digits and Fashion-MNIST), or the path of a "
        "JSON file {word: [synonyms]} or of a folder with WordNet's files",
    )
    tagger: str = code_field(
        "lexicon",
        "parts of speech: lexicon, or module:function or ./file.py:function that maps a list of words to a list of tags",
        words=("lexicon",),
    )
    word_list: Path | None = field(
        None, "folder with WordNet's files for the lexicon tagger; default: WordNet 3.0, which comes with plait-clip"
    )

    def __attrs_post_init__(self) -> None:
        if not self.negative_slots:
            raise ValueError("negative_slots is empty; allowed is some of noun, verb, adj")

    def source(self, captions: Sequence[str], run: Any) -> SubcaptionSource:
        """What draws sub-captions of ``captions``."""
        words = open_words(self.word_list)
        return subcaption_source(
            captions,
            _tagger(self.tagger, words),
            words,
            seed=run.derived_seed(),
            num_negatives=self.n_negatives,
            positive_mode=self.positive_mode,
            negative_slots=self.negative_slots,
            min_pool_count=self.min_pool_count,
            pool_extra=self.pool_extra,
            synonyms=synonyms_of(self.synonyms) if self.pool_exclude_synonyms else lambda word: (),
            tagger_name=self.tagger,
            warn=run.warn,
        )


@attrs.frozen(kw_only=True)
class Subcaptions(SubcaptionFields):
    """Factual and counterfactual sub-captions of captions as columns caption_pos and caption_neg_1 … (TA-Cleaner)."""

    takes = {"data": "dataset"}
    gives = "data"

    @property
    def columns_made(self) -> tuple[str, ...]:
        return tuple(column_names(self.n_negatives))

    @hookimpl
    def transform(self, data: Any, run: Any) -> datasets.Dataset:
        if not isinstance(data, datasets.Dataset):
            raise TypeError(f"data is a {type(data).__name__}; expected a dataset of pairs, such as a split")
        if not len(data):
            raise ValueError("the data have no rows; give pairs with captions")
        captions = first_captions(data)
        source = self.source(captions, run)
        drawn = [source.draw(caption, 0, row) for row, caption in enumerate(run.track(captions, "sub-captions"))]
        run.add(Report(notes=_examples(zip(captions, drawn, strict=True))))
        columns = as_columns(drawn, self.n_negatives)
        data = data.remove_columns([name for name in columns if name in data.column_names])
        for name, values in columns.items():
            data = data.add_column(name, values)
        return data


# Without slots, so that it can be a second base of a class.
@attrs.frozen(kw_only=True, slots=False)
class SubtextFields(SubcaptionFields):
    """How captions are rewritten, and which."""

    n_subtext: float = field(
        0.25, "K, pairs with sub-captions, redrawn every epoch: a share up to 1, or a number of pairs", in_range(0)
    )

    def __attrs_post_init__(self) -> None:
        SubcaptionFields.__attrs_post_init__(self)
        if self.n_subtext > 1:
            algorithm.num_subtext_rows(self.n_subtext, int(self.n_subtext))


@attrs.frozen(kw_only=True)
class TaCleaner(SubtextFields, CleanClipFields):
    """CleanCLIP with a contrast to factual and counterfactual sub-captions (Xun et al., 2024). Data: clean."""

    takes = {"model": "image-text-model", "data": "dataset"}
    columns_needed = ("image",)

    ta_weight: float = field(1.0, "weight of the alignment with sub-captions", in_range(0))
    negative_scope: algorithm.NegativeScope = field(
        "batch", "an image is contrasted with the counterfactuals of the whole batch, or its own"
    )
    negative_loss: algorithm.NegativeLoss = field(
        "softmax", "counterfactuals in the denominator, or held off by a margin of 0.1"
    )
    augment_images: bool = field(True, "AutoAugment in the in-modal loss")
    augment_texts: bool = field(True, "EDA in the in-modal loss")
    subcaptions: Literal["generate", "columns"] = field(
        "generate", "make sub-captions, or take the columns of the transform subcaptions"
    )
    allow_overlap: bool = field(
        False, "accept clean pairs whose images occur in the suspicious data, where both are given"
    )

    def __attrs_post_init__(self) -> None:
        SubtextFields.__attrs_post_init__(self)
        CleanClipFields.__attrs_post_init__(self)
        self.alignment()

    def alignment(self) -> algorithm.Alignment:
        """The same settings for the plain function.

        Raises:
            ValueError: nothing would be learned.
        """
        return algorithm.Alignment(
            n_subtext=self.n_subtext,
            negatives_required=self.n_negatives > 0,
            ta_weight=self.ta_weight,
            clip_weight=self.clip_weight,
            ss_weight=self.self_supervised_weight,
            negative_scope=self.negative_scope,
            negative_loss=self.negative_loss,
        )

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> Any:
        """A cleaned copy of the model, from the trusted pairs in ``data`` (a dataset, or its part ``clean``)."""
        trained, pairs = model_and_pairs(model, data, CLEAN, "ta-cleaner", run.device, run.warn)
        notes = self._overlap_notes(data)
        captions, training, seed = first_captions(pairs), self.options_for(trained), run.derived_seed()
        draw = self._draw(pairs, captions, run)
        with run.loop(self, "TA-Cleaner", inputs=(trained, pairs), total=self.num_steps(len(pairs))) as loop:
            algorithm.ta_cleaner(
                trained,
                pairs,
                draw,
                training,
                self.alignment(),
                algorithm.Augmentation(
                    images=self.augment_images,
                    text=self.eda_resample if self.augment_texts else "none",
                    synonyms=synonyms_of(self.synonyms) if self.augment_texts else None,
                ),
                seed=seed,
                num_workers=self.workers,
                checkpoint=loop,
                on_step=loop.done,
                warn=run.warn,
            )
        counts, shown = algorithm.subcaption_counts(captions, draw, self.alignment(), self.num_epochs, seed)
        if counts["no counterfactual"] > 0.2 * counts["drawn"]:
            run.warn(
                f"{counts['no counterfactual']} of {counts['drawn']} captions have no word to exchange; check the language "
                "of the captions and the tagger"
            )
        run.add(Report(title="TA-Cleaner", rows=[counts], notes=[*notes, *_examples(shown)]))
        return as_given(trained, model)

    def _draw(self, pairs: datasets.Dataset, captions: Sequence[str], run: Any) -> Draw:
        if self.subcaptions == "columns":
            return draw_from_columns(pairs, self.n_negatives)
        return self.source(captions, run).draw

    def _overlap_notes(self, data: Any) -> list[str]:
        if not (isinstance(data, Mapping) and SUSPICIOUS in data):
            return []
        overlap = shared_images(data[CLEAN], data[SUSPICIOUS])
        if overlap and not self.allow_overlap:
            raise ValueError(
                f"{overlap} clean images occur in the suspicious data, which makes cleaning easier than it is; give "
                "other clean pairs, or set allow_overlap"
            )
        return [f"{overlap} of {len(data[CLEAN])} clean images occur in the suspicious data."]


@attrs.frozen(kw_only=True)
class FtHardNegatives(SubtextFields, FineTuningFields):
    """Plain fine-tuning with counterfactual captions as further negatives: TA-Cleaner without CleanCLIP. Data: clean."""

    takes = {"model": "image-text-model", "data": "dataset"}
    columns_needed = ("image",)

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> Any:
        trained, pairs = model_and_pairs(model, data, CLEAN, "ft-hard-negatives", run.device, run.warn)
        source = self.source(first_captions(pairs), run)
        with run.loop(self, "fine-tuning", inputs=(trained, pairs), total=self.num_steps(len(pairs))) as loop:
            fine_tune_with_hard_negatives(
                trained,
                pairs,
                source.draw,
                self.n_subtext,
                self.options(),
                seed=run.derived_seed(),
                num_workers=self.workers,
                checkpoint=loop,
                on_step=loop.done,
            )
        return as_given(trained, model)


def _tagger(name: str, words: WordList) -> Tagger:
    """``lexicon``, or the function that a field ``tagger`` names.

    Raises:
        ValueError: it does not name one.
    """
    if name == "lexicon":
        return LexiconTagger(words)
    tagger: Tagger = named_object(name, inspect.isfunction, "a function of a list of words")
    return tagger


def _examples(drawn: Any) -> list[str]:
    """Sentences on a few (caption, sub-captions)."""
    pairs: list[tuple[str, Subcaption]] = list(drawn)[: algorithm.NUM_SHOWN]
    return [
        f"“{caption}” → factual “{texts.positive}”; counterfactual {', '.join(f'“{n}”' for n in texts.negatives) or 'none'}."
        for caption, texts in pairs
    ]
