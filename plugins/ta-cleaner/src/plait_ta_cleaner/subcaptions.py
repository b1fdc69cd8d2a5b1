"""Factual and counterfactual sub-captions of a caption (TA-Cleaner, section 3: sub-text construction).

Every draw is a function of (seed, epoch, row) alone, so batches may be made in any order and by any number of workers.
Both kinds keep the caption's case and punctuation, so that nothing but the words tells them apart.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import datasets
from plait_clip.backdoor import STOP_WORDS, Synonyms

from plait_ta_cleaner.tagging import COORDINATORS, Tagger, WordList, caption_words, check_tags, word_spans

PositiveMode = Literal["drop_adj", "first_relation", "mixed", "caption"]
Slot = Literal["noun", "verb", "adj"]
SLOT_TAGS = {"noun": "NOUN", "verb": "VERB", "adj": "ADJ"}


@dataclass(frozen=True)
class Tagged:
    """A caption taken apart.

    Attributes:
        words: lower-case; tags: their parts of speech.
        spelled: the words as the caption has them.
        between: what stands before the first word, between each two and after the last.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]
    spelled: tuple[str, ...]
    between: tuple[str, ...]

    def text(self, kept: Sequence[int], exchanged: Mapping[int, str] = MappingProxyType({})) -> str:
        """The caption with the words at ``kept`` (ascending) alone, in its own case and punctuation.

        Words that are left out leave a blank, or the end of a sentence where one stood between them, and take the
        brackets around them along.

        Args:
            exchanged: place → the lower-case word that stands there instead; it is spelled as the old one.
        """
        words = [_spelled_like(self.spelled[i], exchanged[i]) if i in exchanged else self.spelled[i] for i in kept]
        if kept[0] > 0 and self.spelled[0][0].isupper():
            words[0] = words[0][0].upper() + words[0][1:]
        start, end = self.between[0], self.between[-1]
        parts = [start if kept[0] == 0 else start.translate(_BRACKETS), words[0]]
        for (before, place), word in zip(itertools.pairwise(kept), words[1:], strict=True):
            parts += [_joined(self.between[before + 1 : place + 1]), word]
        return "".join([*parts, end if kept[-1] == len(self.words) - 1 else end.translate(_BRACKETS)])


_BRACKETS = str.maketrans("", "", "()[]{}")


def _spelled_like(old: str, new: str) -> str:
    if len(old) > 1 and old.isupper():
        return new.upper()
    return new[0].upper() + new[1:] if old[0].isupper() else new


def _joined(between: Sequence[str]) -> str:
    """What stands between two words, with words left out there or not."""
    if len(between) == 1:
        return between[0]
    return next((text for text in between if any(sign in text for sign in ".!?;:…。！？")), " ")


@dataclass(frozen=True)
class Subcaption:
    """What a caption was rewritten to.

    Attributes:
        positive: the factual text; the caption itself where ``identity``.
        negatives: counterfactual texts, all different; empty if no word of the caption can be exchanged.
    """

    positive: str
    negatives: tuple[str, ...]
    identity: bool


Draw = Callable[[str, int, int], Subcaption]
"""(caption, epoch, row) → its sub-captions in that epoch."""


# --- factual: the objects and their relation ---


def drop_adjectives(tagged: Tagged) -> list[int]:
    """Places of all words but adjectives, the adverbs that qualify them and the "and" between them."""
    words, tags = tagged.words, tagged.tags
    dropped = {i for i, tag in enumerate(tags) if tag == "ADJ"}
    for i in reversed(range(len(words) - 1)):
        qualifies = tags[i] == "ADV" and i + 1 in dropped
        joins = words[i] in COORDINATORS and i + 1 in dropped and i > 0 and tags[i - 1] == "ADJ"
        if qualifies or joins:
            dropped.add(i)
    return [i for i in range(len(words)) if i not in dropped]


def first_relation(tagged: Tagged, rng: random.Random) -> list[int]:
    """Places of "[DET] h1 r [DET] h2": first and last noun and the first verb, else preposition, between them.

    One of several conjuncts ("x and y") before r is kept, drawn at random; adjectives directly before a kept noun
    stay with probability 1/2. Without such a relation: all places.
    """
    tags = tagged.tags
    nouns = [i for i, tag in enumerate(tags) if tag == "NOUN"]
    relations = [i for i in range(nouns[0] + 1, nouns[-1]) if tags[i] in ("VERB", "ADP")] if nouns else []
    if not relations:
        return list(range(len(tags)))
    verb = next((i for i in relations if tags[i] == "VERB"), relations[0])
    head = rng.choice(_conjuncts(tagged, nouns[0], verb))
    return [*_noun_phrase(tagged, head, rng), verb, *_noun_phrase(tagged, nouns[-1], rng)]


def _conjuncts(tagged: Tagged, first: int, end: int) -> list[int]:
    """Nouns joined to the first one by "and" or "or" before the relation."""
    heads = [first]
    for i in range(first + 1, end):
        if tagged.tags[i] == "NOUN" and any(word in COORDINATORS for word in tagged.words[heads[-1] : i]):
            heads.append(i)
    return heads


def _noun_phrase(tagged: Tagged, noun: int, rng: random.Random) -> list[int]:
    start = noun
    while start > 0 and tagged.tags[start - 1] in ("ADJ", "ADV"):
        start -= 1
    kept = [i for i in range(start, noun) if tagged.tags[i] == "ADJ" and rng.random() < 0.5]
    determiner = [start - 1] if start > 0 and tagged.tags[start - 1] == "DET" else []
    return [*determiner, *kept, noun]


def factual_text(tagged: Tagged, kept: Sequence[int]) -> str:
    """The words at ``kept``, with "a" or "an" to suit a word that did not follow it before."""
    articles = {
        place: article(tagged.words[following])
        for place, following in itertools.pairwise(kept)
        if tagged.words[place] in ("a", "an") and following != place + 1
    }
    return tagged.text(kept, articles)


def article(word: str) -> str:
    """ "a" or "an", by the spelling of the word that follows."""
    if word.startswith(("hour", "honest", "heir", "honour", "honor")):
        return "an"
    consonant_sound = word.startswith(("uni", "use", "usu", "eu", "one", "once"))
    return "an" if word[:1] in "aeiou" and not consonant_sound else "a"


# --- counterfactual: one word exchanged ---


@dataclass
class WordPool:
    """Words that may replace a word of the same part of speech.

    Args:
        words: tag → distinct words, sorted.
        synonyms: word → words that mean the same, which would leave the caption true.
        bases: word → its base forms; words with a common one are never exchanged.
    """

    words: Mapping[str, Sequence[str]]
    synonyms: Callable[[str], Collection[str]] = lambda word: ()
    bases: Callable[[str], Collection[object]] = lambda word: ()

    def draw(self, word: str, tag: str, caption: Collection[str], rng: random.Random) -> str | None:
        """Uniform among the allowed words of ``tag``; None where there is none."""
        candidates = self.words.get(tag, ())
        # Mostly the first draw will do; going through a large pool for every draw would take long.
        for _ in range(16 if candidates else 0):
            other = rng.choice(candidates)
            if self._allowed(word, other, caption):
                return other
        allowed = [other for other in candidates if self._allowed(word, other, caption)]
        return rng.choice(allowed) if allowed else None

    def _allowed(self, word: str, other: str, caption: Collection[str]) -> bool:
        return (
            other not in caption
            and other not in self.synonyms(word)
            and word not in self.synonyms(other)
            and set(self.bases(word)).isdisjoint(self.bases(other))
        )


def pool_words(
    tagged: Iterable[Tagged], min_count: int, extra: Sequence[str] = (), slots: Collection[str] = tuple(SLOT_TAGS)
) -> dict[str, list[str]]:
    """Words with one of the tags of ``slots`` at least ``min_count`` times, without stop words; ``extra`` are nouns."""
    counts = Counter((tag, word) for caption in tagged for word, tag in zip(caption.words, caption.tags, strict=True))
    tags = [SLOT_TAGS[slot] for slot in slots]
    pool = {tag: {word for (t, word), n in counts.items() if t == tag and n >= min_count} - STOP_WORDS for tag in tags}
    if "NOUN" in pool:
        pool["NOUN"].update(word for name in extra for word in caption_words(name))
    return {tag: sorted(words) for tag, words in pool.items()}


def exchange_word(tagged: Tagged, pool: WordPool, rng: random.Random) -> str | None:
    """The caption with the word of one slot exchanged, the slot drawn uniformly among those with a replacement."""
    slots = [i for i, tag in enumerate(tagged.tags) if pool.words.get(tag)]
    rng.shuffle(slots)
    for slot in slots:
        other = pool.draw(tagged.words[slot], tagged.tags[slot], tagged.words, rng)
        if other is not None:
            exchanged = {slot: other}
            if slot > 0 and tagged.words[slot - 1] in ("a", "an"):
                exchanged[slot - 1] = article(other)
            return tagged.text(range(len(tagged.words)), exchanged)
    return None


# --- both, for any row and epoch ---


@dataclass
class SubcaptionSource:
    """Draws the sub-captions of a caption; tags every distinct caption once.

    Args:
        num_negatives: M; 0 for none.
        positive_mode: ``mixed`` takes ``drop_adj`` or ``first_relation`` with probability 1/2; ``caption`` keeps it.
    """

    tagger: Tagger
    pool: WordPool
    seed: int = 0
    positive_mode: PositiveMode = "drop_adj"
    num_negatives: int = 1
    tagger_name: str = "lexicon"
    _tagged: dict[str, Tagged] = field(default_factory=dict)

    def tag(self, caption: str) -> Tagged:
        if caption not in self._tagged:
            self._tagged[caption] = tag_caption(caption, self.tagger, self.tagger_name)
        return self._tagged[caption]

    def draw(self, caption: str, epoch: int, row: int) -> Subcaption:
        tagged = self.tag(caption)
        kept = self._kept(tagged, random.Random(f"positive/{self.seed}/{epoch}/{row}"))
        identity = len(kept) == len(tagged.words) or "NOUN" not in tagged.tags
        return Subcaption(
            positive=caption if identity else factual_text(tagged, kept),
            negatives=tuple(self._negatives(tagged, epoch, row)),
            identity=identity,
        )

    def _kept(self, tagged: Tagged, rng: random.Random) -> list[int]:
        """The places of the words of the factual text."""
        mode = self.positive_mode
        if mode == "mixed":
            mode = rng.choice(["drop_adj", "first_relation"])
        if mode == "caption":
            return list(range(len(tagged.words)))
        return drop_adjectives(tagged) if mode == "drop_adj" else first_relation(tagged, rng)

    def _negatives(self, tagged: Tagged, epoch: int, row: int) -> list[str]:
        found: list[str] = []
        for m in range(self.num_negatives):
            rng = random.Random(f"negative/{self.seed}/{epoch}/{row}/{m}")
            for _ in range(6):  # a text that was drawn before is drawn again, up to 5 times
                text = exchange_word(tagged, self.pool, rng)
                if text is None:
                    return found
                if text not in found:
                    found.append(text)
                    break
        return found


def tag_caption(caption: str, tagger: Tagger, tagger_name: str = "lexicon") -> Tagged:
    """Words and tags of a caption.

    Raises:
        ValueError: the tagger does not give one known tag a word.
    """
    spans = word_spans(caption)
    spelled = [caption[start:end] for start, end in spans]
    words = [word.lower() for word in spelled]
    tags = list(tagger(words)) if words else []
    check_tags(words, tags, tagger_name)
    edges = [0, *(edge for span in spans for edge in span), len(caption)]
    between = [caption[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return Tagged(tuple(words), tuple(tags), tuple(spelled), tuple(between))


# --- where sub-captions come from ---


def subcaption_source(
    captions: Sequence[str],
    tagger: Tagger,
    words: WordList,
    *,
    seed: int = 0,
    num_negatives: int = 1,
    positive_mode: PositiveMode = "drop_adj",
    negative_slots: Sequence[Slot] = ("noun", "verb", "adj"),
    min_pool_count: int | None = None,
    pool_extra: Sequence[str] = (),
    synonyms: Synonyms = lambda word: (),
    tagger_name: str = "lexicon",
    warn: Callable[[str], None] = lambda sentence: None,
) -> SubcaptionSource:
    """What draws sub-captions, with a pool of replacements made of ``captions``.

    Args:
        words: tells the base forms of a word.
        min_pool_count: how often a word must occur to replace another; None: 20, or 5 below 20,000 captions.
        pool_extra: further nouns of the pool. synonyms: a word is never exchanged for one of its own.
    """
    found = SubcaptionSource(
        tagger=tagger,
        pool=WordPool({}),
        seed=seed,
        positive_mode=positive_mode,
        num_negatives=num_negatives,
        tagger_name=tagger_name,
    )
    min_count = min_pool_count or (20 if len(captions) >= 20_000 else 5)
    pool = pool_words(map(found.tag, captions), min_count, pool_extra, negative_slots)
    bases = functools.lru_cache(maxsize=65536)(lambda word: frozenset(base for base, _ in words.bases(word)))
    found.pool = WordPool(pool, synonyms=synonyms, bases=bases)
    empty = [slot for slot, tag in SLOT_TAGS.items() if slot in negative_slots and not pool[tag]]
    if empty and num_negatives:
        warn(f"no {' and no '.join(empty)} occurs {min_count} times in the captions; none is exchanged")
    return found


def column_names(num_negatives: int) -> list[str]:
    """The columns of written sub-captions: the factual one, then the counterfactual ones."""
    return ["caption_pos", *(f"caption_neg_{m + 1}" for m in range(num_negatives))]


def as_columns(drawn: Sequence[Subcaption], num_negatives: int) -> dict[str, list[str]]:
    """Column → its texts; a caption may have fewer different counterfactuals than asked for, the others are empty."""
    positive, *negatives = column_names(num_negatives)
    columns = {positive: [texts.positive for texts in drawn]}
    for m, name in enumerate(negatives):
        columns[name] = [texts.negatives[m] if m < len(texts.negatives) else "" for texts in drawn]
    return columns


def draw_from_columns(pairs: datasets.Dataset, num_negatives: int) -> Draw:
    """The sub-captions that :func:`as_columns` wrote, the same in every epoch.

    Raises:
        ValueError: a column is missing.
    """
    names = column_names(num_negatives)
    missing = [name for name in names if name not in pairs.column_names]
    if missing:
        raise ValueError(f"the data have no column {missing[0]}; run the transform subcaptions on them first")
    table = pairs.with_format(None).select_columns(names)[:]

    def draw(caption: str, epoch: int, row: int) -> Subcaption:
        positive, *negatives = (table[name][row] for name in names)
        return Subcaption(positive, tuple(text for text in negatives if text), positive == caption)

    return draw
