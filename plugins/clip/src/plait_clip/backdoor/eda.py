"""Easy Data Augmentation of captions (Wei and Zou 2019) as CleanCLIP uses it: one augmented caption, all rates 0.1."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

Synonyms = Callable[[str], Sequence[str]]

_STOP_WORDS = """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it
    its itself they them their theirs themselves what which who whom this that these those am is are was were be been
    being have has had having do does did doing a an the and but if or because as until while of at by for with about
    against between into through during before after above below to from up down in out on off over under again further
    then once here there when where why how all any both each few more most other some such no nor not only own same so
    than too very s t can will just don should now
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def eda(caption: str, synonyms: Synonyms, rng: random.Random, rate: float = 0.1) -> str:
    """One augmented caption: a replacement, insertion, swap or deletion of about ``rate`` of the words.

    Args:
        caption: any text; without a letter a–z it is returned unchanged.
        synonyms: word → its synonyms in a fixed order, possibly none; see :mod:`.synonyms`.
        rng: a private generator; the caption is a function of its state.
        rate: share of words changed (at least one word), and the probability of a deletion.
    """
    words = clean(caption).split()
    if not words:
        return caption
    changes = max(1, int(rate * len(words)))
    candidates = [
        replace_synonyms(words, changes, synonyms, rng),
        insert_synonyms(words, changes, synonyms, rng),
        swap_words(words, changes, rng),
        delete_words(words, rate, rng),
    ]
    rng.shuffle(candidates)
    return clean(" ".join(candidates[0]))


def clean(text: str) -> str:
    """Lower-case letters a–z and single spaces; apostrophes vanish, everything else becomes a space."""
    text = text.replace("’", "").replace("'", "").lower()
    return re.sub(" +", " ", re.sub("[^a-z ]", " ", text)).removeprefix(" ")


def replace_synonyms(words: Sequence[str], changes: int, synonyms: Synonyms, rng: random.Random) -> list[str]:
    """Replace all occurrences of ``changes`` random words, no stop words, by a random synonym of each."""
    # Sorted: the order of a set differs between processes.
    candidates = sorted({word for word in words if word not in STOP_WORDS})
    rng.shuffle(candidates)
    result, replaced = list(words), 0
    for word in candidates:
        choices = synonyms(word)
        if choices:
            synonym = rng.choice(choices)
            result = [synonym if other == word else other for other in result]
            replaced += 1
        if replaced >= changes:
            break
    return result


def insert_synonyms(words: Sequence[str], changes: int, synonyms: Synonyms, rng: random.Random) -> list[str]:
    """``changes`` times: insert the first synonym of a random word before a random word (10 tries to find one)."""
    result = list(words)
    for _ in range(changes):
        for _ in range(10):
            choices = synonyms(rng.choice(result))
            if choices:
                result.insert(rng.randrange(len(result)), choices[0])
                break
    return result


def swap_words(words: Sequence[str], changes: int, rng: random.Random) -> list[str]:
    """``changes`` times: swap two random words (4 draws of the second to find a different place)."""
    result = list(words)
    for _ in range(changes):
        first = rng.randrange(len(result))
        second = next((place for _ in range(4) if (place := rng.randrange(len(result))) != first), first)
        result[first], result[second] = result[second], result[first]
    return result


def delete_words(words: Sequence[str], probability: float, rng: random.Random) -> list[str]:
    """Drop each word with ``probability``; a single word stays, and one random word if all would go."""
    if len(words) == 1:
        return list(words)
    return [word for word in words if rng.random() > probability] or [rng.choice(words)]
