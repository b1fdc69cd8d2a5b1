"""Factual and counterfactual sub-captions of a caption (TA-Cleaner, section 3: sub-text construction).

Every draw is a function of (seed, epoch, row) alone, so batches may be made in any order and by any number of workers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from plait_clip.backdoor.eda import STOP_WORDS

from plait_ta_cleaner.tagging import COORDINATORS, Tagger, caption_words, check_tags

PositiveMode = Literal["drop_adj", "first_relation", "mixed", "caption"]
SLOT_TAGS = {"noun": "NOUN", "verb": "VERB", "adj": "ADJ"}


@dataclass(frozen=True)
class Tagged:
    """The words of a caption and their parts of speech."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


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


# --- factual: the objects and their relation ---


def drop_adjectives(tagged: Tagged) -> list[str]:
    """Without adjectives, the adverbs that qualify them and the "and" between them; "a"/"an" repaired."""
    words, tags = tagged.words, tagged.tags
    dropped = {i for i, tag in enumerate(tags) if tag == "ADJ"}
    for i in reversed(range(len(words) - 1)):
        qualifies = tags[i] == "ADV" and i + 1 in dropped
        joins = words[i] in COORDINATORS and i + 1 in dropped and i > 0 and tags[i - 1] == "ADJ"
        if qualifies or joins:
            dropped.add(i)
    return repair_articles(words, [i for i in range(len(words)) if i not in dropped])


def first_relation(tagged: Tagged, rng: random.Random) -> list[str]:
    """ "[DET] h1 r [DET] h2": first and last noun and the first verb, else preposition, between them.

    One of several conjuncts ("x and y") before r is kept, drawn at random; adjectives directly before a kept noun
    stay with probability 1/2. Without such a relation: the caption.
    """
    words, tags = tagged.words, tagged.tags
    nouns = [i for i, tag in enumerate(tags) if tag == "NOUN"]
    relations = [i for i in range(nouns[0] + 1, nouns[-1]) if tags[i] in ("VERB", "ADP")] if nouns else []
    if not relations:
        return list(words)
    verb = next((i for i in relations if tags[i] == "VERB"), relations[0])
    head = rng.choice(_conjuncts(tagged, nouns[0], verb))
    kept = [*_noun_phrase(tagged, head, rng), verb, *_noun_phrase(tagged, nouns[-1], rng)]
    return repair_articles(words, kept)


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


def repair_articles(words: Sequence[str], kept: Sequence[int]) -> list[str]:
    """The words at ``kept``, with "a" or "an" to suit a word that did not follow it before."""
    result = [words[i] for i in kept]
    for place in range(len(result) - 1):
        if result[place] in ("a", "an") and kept[place + 1] != kept[place] + 1:
            result[place] = article(result[place + 1])
    return result


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
            words = [*tagged.words[:slot], other, *tagged.words[slot + 1 :]]
            if slot > 0 and words[slot - 1] in ("a", "an"):
                words[slot - 1] = article(other)
            return " ".join(words)
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
        positive = self._positive(tagged, random.Random(f"positive/{self.seed}/{epoch}/{row}"))
        identity = positive == list(tagged.words) or "NOUN" not in tagged.tags
        return Subcaption(
            positive=caption if identity else " ".join(positive),
            negatives=tuple(self._negatives(tagged, epoch, row)),
            identity=identity,
        )

    def _positive(self, tagged: Tagged, rng: random.Random) -> list[str]:
        mode = self.positive_mode
        if mode == "mixed":
            mode = rng.choice(["drop_adj", "first_relation"])
        if mode == "caption":
            return list(tagged.words)
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
    words = caption_words(caption)
    tags = list(tagger(words)) if words else []
    check_tags(words, tags, tagger_name)
    return Tagged(tuple(words), tuple(tags))
