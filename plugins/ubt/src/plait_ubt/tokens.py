"""Which words of a caption carry the shortcut (Steps 3 and 4): word lift, forget and keep texts."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

# Chinese characters: their words have no blanks between them, so each counts as a word.
_HAN = re.compile("([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f])")


def caption_words(caption: str) -> list[str]:
    """Lower-cased runs of letters of any alphabet, each Chinese character; blank-separated parts where there is no letter.

    Words are in Unicode's composed form, so that "é" is the same letter however it is written.
    """
    text = unicodedata.normalize("NFC", caption.lower())
    letters = "".join(letter if unicodedata.category(letter)[0] in "LM" else " " for letter in text)
    return _HAN.sub(r" \1 ", letters).split() or text.split()


def has_letters(caption: str) -> bool:
    """Whether :func:`caption_words` finds words by letters (false for numbers and signs alone)."""
    return any(letter.isalpha() for letter in caption)


def plural_folding(captions: Collection[str]) -> dict[str, str]:
    """Map a word with a trailing "s" to the word without it where both occur in ``captions``."""
    vocabulary = {word for caption in captions for word in caption_words(caption)}
    return {word: word[:-1] for word in vocabulary if word.endswith("s") and word[:-1] in vocabulary}


@dataclass(frozen=True)
class WordLift:
    """How much more often a word occurs in the top captions than in the normal ones."""

    top_share: float
    lift: float


def word_lifts(top: Sequence[str], normal: Sequence[str], folding: Mapping[str, str]) -> dict[str, WordLift]:
    """Log ratio of smoothed document frequencies of every word of the top captions.

    ``lift(w) = ln((n_top f_top + 1/2) / (n_top + 1)) - ln((n_norm f_norm + 1/2) / (n_norm + 1))``
    with ``f`` the share of captions that contain ``w``.
    """

    def document_frequency(captions: Sequence[str]) -> Counter[str]:
        return Counter(word for caption in captions for word in {folding.get(w, w) for w in caption_words(caption)})

    in_top, in_normal = document_frequency(top), document_frequency(normal)
    return {
        word: WordLift(
            top_share=count / len(top),
            lift=math.log((count + 0.5) / (len(top) + 1)) - math.log((in_normal[word] + 0.5) / (len(normal) + 1)),
        )
        for word, count in sorted(in_top.items())
    }


def concentration(lifts: Mapping[str, WordLift]) -> float:
    """κ, the largest ``f_top(w) * lift(w)``: low where the top captions share no unusual word."""
    return max(word.top_share * word.lift for word in lifts.values())


def select_forget_words(lifts: Mapping[str, WordLift], max_words: int) -> list[str]:
    """At most ``max_words`` words in at least half of the top captions, with lift >= max(ln 2, half the largest).

    The largest lift is taken over the words in half of the top captions: a word that occurs once
    would otherwise set the bar for all.
    """
    common = {word: value.lift for word, value in lifts.items() if value.top_share >= 0.5}
    bar = max(math.log(2), max(common.values(), default=0.0) / 2)
    chosen = [word for word, lift in common.items() if lift >= bar]
    return sorted(chosen, key=lambda word: (-common[word], word))[:max_words]


@dataclass(frozen=True)
class CaptionSplit:
    """A caption's words in two texts, both in the order of the caption."""

    forget: str
    keep: str


def split_caption(words: Sequence[str], forget: Collection[int]) -> CaptionSplit:
    """The words at the positions ``forget`` and the other ones."""
    return CaptionSplit(
        forget=" ".join(word for i, word in enumerate(words) if i in forget),
        keep=" ".join(word for i, word in enumerate(words) if i not in forget),
    )


def whole_caption(caption: str) -> CaptionSplit:
    """Everything is forgotten."""
    words = caption_words(caption)
    return split_caption(words, range(len(words)))


def split_at_words(caption: str, forget_words: Collection[str], folding: Mapping[str, str]) -> CaptionSplit:
    """The occurrences of ``forget_words`` (plurals folded) against the rest; "forget" is empty where none occurs."""
    words = caption_words(caption)
    return split_caption(words, {i for i, word in enumerate(words) if folding.get(word, word) in forget_words})


def split_at_random_span(caption: str, generator: torch.Generator) -> CaptionSplit:
    """A contiguous span [a, b), uniform over all 0 <= a < b <= number of words."""
    words = caption_words(caption)
    ends = torch.combinations(torch.arange(len(words) + 1), 2)
    a, b = ends[torch.randint(len(ends), (), generator=generator)].tolist()
    return split_caption(words, range(a, b))


def without_each_word(caption: str) -> list[str]:
    """The caption with one word left out, for every word in turn."""
    words = caption_words(caption)
    return [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
