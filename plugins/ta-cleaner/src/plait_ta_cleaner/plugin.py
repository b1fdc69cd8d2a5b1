"""TA-Cleaner as a method of plait: ``defend: ta-cleaner``, its sub-captions as a data step, and an ablation."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import datasets
from plait import PlaitError, Report, hookimpl
from plait.fields import doc, in_range, one_of
from plait_clip.backdoor.plugin.defences import (
    CLEAN,
    SUSPICIOUS,
    WORDNET,
    CleanClip,
    Training,
    copy_of,
    logger,
    part_of,
    restored_optimizer,
    scratch,
    synonyms_of,
)
from plait_clip.loader import check_captions, first_captions, undecoded
from plait_clip.plugin.errors import as_plait_errors

from plait_ta_cleaner import ta_cleaner as algorithm
from plait_ta_cleaner.subcaptions import PositiveMode, Subcaption, SubcaptionSource, WordPool, pool_words
from plait_ta_cleaner.tagging import load_tagger, open_words

__plait_api__ = "0.1"

NUM_SHOWN = 6
Slot = Literal["noun", "verb", "adj"]


# Without slots, so that it can be a second base of a class.
@attrs.frozen(kw_only=True, slots=False)
class SubcaptionRules:
    """How captions are rewritten."""

    n_negatives: int = attrs.field(
        default=1, validator=in_range(0, 8), metadata=doc("M, counterfactual texts a caption; 0 (an ablation): none")
    )
    positive_mode: PositiveMode = attrs.field(
        default="drop_adj",
        validator=one_of("drop_adj", "first_relation", "mixed", "caption"),
        metadata=doc(
            "factual text: the caption without adjectives, its first and last noun and their relation, either with "
            "probability 1/2, or (an ablation) the caption itself"
        ),
    )
    negative_slots: tuple[Slot, ...] = attrs.field(
        default=("noun", "verb", "adj"), metadata=doc("parts of speech of which one word is exchanged: noun, verb, adj")
    )
    min_pool_count: int | None = attrs.field(
        default=None,
        validator=in_range(1),
        metadata=doc("a word must occur so often to replace another; default 20, or 5 below 20,000 captions"),
    )
    pool_extra: tuple[str, ...] = attrs.field(
        default=(), metadata=doc("further nouns that may replace others, such as the names of classes")
    )
    pool_exclude_synonyms: bool = attrs.field(
        default=True, metadata=doc("never exchange a word for its synonym, by the source in synonyms")
    )
    synonyms: str = attrs.field(
        default=WORDNET,
        metadata=doc(
            "wordnet (WordNet 3.0, which comes with plait-clip), test-beds (of the small beds), or the path of a JSON file "
            "{word: [synonyms]} or of a folder with WordNet's files"
        ),
    )
    tagger: str = attrs.field(
        default="lexicon",
        metadata=doc("parts of speech: lexicon, or module:function that maps a list of words to a list of tags"),
    )
    word_list: Path | None = attrs.field(
        default=None,
        metadata=doc(
            "folder with WordNet's files for the lexicon tagger; default: WordNet 3.0, which comes with plait-clip"
        ),
    )

    def __attrs_post_init__(self) -> None:
        bad = set(self.negative_slots) - {"noun", "verb", "adj"}
        if not self.negative_slots or bad:
            raise PlaitError(f"negative_slots is {list(self.negative_slots)}; allowed is some of noun, verb, adj")

    def source(self, captions: Sequence[str], seed: int, run: Any) -> SubcaptionSource:
        """What draws sub-captions, with a pool of replacements made of ``captions``."""
        words = open_words(self.word_list)
        found = SubcaptionSource(
            tagger=load_tagger(self.tagger, words),
            pool=WordPool({}),
            seed=seed,
            positive_mode=self.positive_mode,
            num_negatives=self.n_negatives,
            tagger_name=self.tagger,
        )
        min_count = self.min_pool_count or (20 if len(captions) >= 20_000 else 5)
        tagged = (found.tag(caption) for caption in captions)
        pool = pool_words(tagged, min_count, self.pool_extra, self.negative_slots)
        found.pool = WordPool(
            pool,
            synonyms=synonyms_of(self.synonyms) if self.pool_exclude_synonyms else lambda word: (),
            bases=functools.lru_cache(maxsize=65536)(lambda word: frozenset(base for base, _ in words.bases(word))),
        )
        empty = [slot for slot, tag in _TAGS.items() if slot in self.negative_slots and not pool[tag]]
        if empty and self.n_negatives:
            run.warn(f"no {' and no '.join(empty)} occurs {min_count} times in the captions; none is exchanged")
        return found


_TAGS = {"noun": "NOUN", "verb": "VERB", "adj": "ADJ"}


@attrs.frozen(kw_only=True)
class Subcaptions(SubcaptionRules):
    """Factual and counterfactual sub-captions of captions as columns caption_pos and caption_neg_1 … (TA-Cleaner)."""

    @hookimpl
    def transform(self, data: Any, run: Any) -> datasets.Dataset:
        if not isinstance(data, datasets.Dataset):
            raise PlaitError(f"data is a {type(data).__name__}; a dataset of pairs is needed, such as a split")
        if not len(data):
            raise PlaitError("the data have no rows; give pairs with captions")
        with as_plait_errors():
            captions = first_captions(data)
            source = self.source(captions, run.derived_seed(), run)
            drawn = [source.draw(caption, 0, row) for row, caption in enumerate(run.track(captions, "sub-captions"))]
        columns = {"caption_pos": [texts.positive for texts in drawn]}
        for m in range(self.n_negatives):
            # Missing ones are empty: a caption may have fewer different counterfactuals than asked for.
            columns[f"caption_neg_{m + 1}"] = [
                texts.negatives[m] if m < len(texts.negatives) else "" for texts in drawn
            ]
        run.add(_samples(captions, drawn))
        data = data.remove_columns([name for name in columns if name in data.column_names])
        for name, values in columns.items():
            data = data.add_column(name, values)
        return data


@attrs.frozen(kw_only=True)
class TaCleaner(SubcaptionRules, CleanClip):
    """CleanCLIP with a contrast to factual and counterfactual sub-captions (Xun et al., 2024). Data: clean."""

    n_subtext: float = attrs.field(
        default=0.25,
        validator=in_range(0),
        metadata=doc("K, pairs with sub-captions, redrawn every epoch: a share up to 1, or a number of pairs"),
    )
    ta_weight: float = attrs.field(
        default=1.0, validator=in_range(0), metadata=doc("weight of the alignment with sub-captions")
    )
    negative_scope: algorithm.NegativeScope = attrs.field(
        default="batch",
        validator=one_of("batch", "own"),
        metadata=doc("an image is contrasted with the counterfactuals of the whole batch, or its own"),
    )
    negative_loss: Literal["softmax", "margin"] = attrs.field(
        default="softmax",
        validator=one_of("softmax", "margin"),
        metadata=doc("counterfactuals in the denominator, or held off by a margin of 0.1"),
    )
    augment_images: bool = attrs.field(default=True, metadata=doc("AutoAugment in the in-modal loss"))
    augment_texts: bool = attrs.field(default=True, metadata=doc("EDA in the in-modal loss"))
    subcaptions: Literal["generate", "columns"] = attrs.field(
        default="generate",
        validator=one_of("generate", "columns"),
        metadata=doc("make sub-captions, or take the columns of the transform subcaptions"),
    )
    allow_overlap: bool = attrs.field(
        default=False,
        metadata=doc("accept clean pairs whose images occur in the suspicious data, where both are given"),
    )

    def __attrs_post_init__(self) -> None:
        SubcaptionRules.__attrs_post_init__(self)
        CleanClip.__attrs_post_init__(self)
        _check_subtext(self.n_subtext)
        if self.ta_weight == self.clip_weight == self.self_supervised_weight == 0:
            raise PlaitError("ta_weight, clip_weight and self_supervised_weight are all 0; nothing would be learned")

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> Any:
        """A cleaned copy of the model, from the trusted pairs in ``data`` (a dataset, or its part ``clean``)."""
        pairs, model = part_of(data, CLEAN, "ta-cleaner"), copy_of(model, run)
        state = restored_optimizer(self.optimizer_checkpoint, model)
        notes = self._overlap_notes(data)
        with as_plait_errors():
            check_captions(pairs, model, run.warn)
            captions = first_captions(pairs)
            draw = self._draw(pairs, captions, run)
            n_subtext = _count(self.n_subtext, len(pairs))
            if self.ta_weight > 0 and 0 < n_subtext * self.batch_size < 2 * len(pairs):
                run.warn(f"a batch holds less than two of the {n_subtext} pairs with sub-captions; raise n_subtext")
            algorithm.ta_cleaner(
                model,
                pairs,
                draw,
                n_subtext,
                self.n_negatives > 0,
                algorithm.Augmentation(
                    images=self.augment_images,
                    text=self.eda_resample if self.augment_texts else "none",
                    synonyms=synonyms_of(self.synonyms) if self.augment_texts else None,
                ),
                algorithm.Alignment(
                    ta_weight=self.ta_weight,
                    clip_weight=self.clip_weight,
                    ss_weight=self.self_supervised_weight,
                    negative_scope=self.negative_scope,
                    negative_loss=self.negative_loss,
                ),
                self.options(official=self.compat == "cleanclip", optimizer_state=state),
                seed=run.derived_seed(),
                num_workers=self.workers,
                checkpoint=scratch(run, self, model, pairs) / "training.pt",
                on_step=logger(run, self.num_steps(len(pairs)), "TA-Cleaner"),
            )
        self._count_subcaptions(captions, draw, n_subtext, notes, run)
        return model.eval()

    def _draw(self, pairs: datasets.Dataset, captions: Sequence[str], run: Any) -> algorithm.Draw:
        if self.subcaptions == "columns":
            return _draw_from_columns(pairs, self.n_negatives)
        return self.source(captions, run.derived_seed(), run).draw

    def _overlap_notes(self, data: Any) -> list[str]:
        if not (isinstance(data, Mapping) and SUSPICIOUS in data):
            return []
        overlap = _overlap(data[CLEAN], data[SUSPICIOUS])
        if overlap and not self.allow_overlap:
            raise PlaitError(
                f"{overlap} clean images occur in the suspicious data, which makes cleaning easier than it is; give "
                "other clean pairs, or set allow_overlap"
            )
        return [f"{overlap} of {len(data[CLEAN])} clean images occur in the suspicious data."]

    def _count_subcaptions(
        self, captions: Sequence[str], draw: algorithm.Draw, n_subtext: int, notes: list[str], run: Any
    ) -> None:
        """The rows that were drawn, all epochs together; counted on the first caption of every row."""
        counts = dict.fromkeys(["rewritten", "positive = caption", "no counterfactual"], 0)
        shown: list[tuple[str, Subcaption]] = []
        for epoch in range(self.num_epochs):
            chosen = algorithm.subtext_rows(len(captions), n_subtext, run.derived_seed(), epoch)
            for row in chosen.nonzero().flatten().tolist():
                texts = draw(captions[row], epoch, row)
                if self.n_negatives and not texts.negatives:
                    counts["no counterfactual"] += 1
                else:
                    counts["positive = caption" if texts.identity else "rewritten"] += 1
                if len(shown) < NUM_SHOWN:
                    shown.append((captions[row], texts))
        total = sum(counts.values())
        if counts["no counterfactual"] > 0.2 * total:
            run.warn(
                f"{counts['no counterfactual']} of {total} captions have no word to exchange; check the language of the "
                "captions and the tagger"
            )
        samples = _samples([caption for caption, _ in shown], [texts for _, texts in shown])
        run.add(Report(title="TA-Cleaner", rows=[{"drawn": total, **counts}], notes=[*notes, *samples.notes]))


@attrs.frozen(kw_only=True)
class FtHardNegatives(SubcaptionRules, Training):
    """Plain fine-tuning with counterfactual captions as further negatives: TA-Cleaner without CleanCLIP. Data: clean."""

    n_subtext: float = attrs.field(
        default=0.25,
        validator=in_range(0),
        metadata=doc("pairs with counterfactuals, redrawn every epoch: a share up to 1, or a number of pairs"),
    )

    def __attrs_post_init__(self) -> None:
        SubcaptionRules.__attrs_post_init__(self)
        _check_subtext(self.n_subtext)

    @hookimpl
    def defend(self, model: Any, data: Any, reference: Any | None, run: Any) -> Any:
        pairs, model = part_of(data, CLEAN, "ft-hard-negatives"), copy_of(model, run)
        with as_plait_errors():
            check_captions(pairs, model, run.warn)
            source = self.source(first_captions(pairs), run.derived_seed(), run)
            algorithm.fine_tune_with_hard_negatives(
                model,
                pairs,
                source.draw,
                _count(self.n_subtext, len(pairs)),
                self.options(),
                seed=run.derived_seed(),
                num_workers=self.workers,
                checkpoint=scratch(run, self, model, pairs) / "training.pt",
                on_step=logger(run, self.num_steps(len(pairs)), "fine-tuning"),
            )
        return model.eval()


def _check_subtext(n_subtext: float) -> None:
    if n_subtext > 1 and n_subtext != int(n_subtext):
        raise PlaitError(f"n_subtext is {n_subtext}; allowed is a share up to 1 or a whole number of pairs")


def _count(n_subtext: float, num_pairs: int) -> int:
    count = int(n_subtext * num_pairs) if n_subtext <= 1 else int(n_subtext)
    if count > num_pairs:
        raise ValueError(f"n_subtext is {count}; allowed is up to the {num_pairs} clean pairs")
    return count


def _draw_from_columns(pairs: datasets.Dataset, n_negatives: int) -> algorithm.Draw:
    names = ["caption_pos", *(f"caption_neg_{m + 1}" for m in range(n_negatives))]
    missing = [name for name in names if name not in pairs.column_names]
    if missing:
        raise ValueError(f"the data have no column {missing[0]}; run the transform subcaptions on them first")
    table = pairs.with_format(None).select_columns(names)[:]

    def draw(caption: str, epoch: int, row: int) -> Subcaption:
        negatives = [table[name][row] for name in names[1:]]
        positive = table["caption_pos"][row]
        return Subcaption(positive, tuple(text for text in negatives if text), positive == caption)

    return draw


def _overlap(clean: datasets.Dataset, suspicious: datasets.Dataset) -> int:
    """How many image files of ``clean`` are in ``suspicious`` too, byte by byte."""
    seen = set(_hashes(suspicious))
    return sum(digest in seen for digest in _hashes(clean))


def _hashes(data: datasets.Dataset) -> Iterator[bytes]:
    for row in undecoded(data).select_columns("image"):
        image = row["image"]
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        yield hashlib.blake2b(content, digest_size=16).digest()


def _samples(captions: Sequence[str], drawn: Sequence[Subcaption]) -> Report:
    notes = [
        f"“{caption}” → factual “{texts.positive}”; counterfactual {', '.join(f'“{n}”' for n in texts.negatives) or 'none'}."
        for caption, texts in list(zip(captions, drawn, strict=True))[:NUM_SHOWN]
    ]
    return Report(notes=notes)
