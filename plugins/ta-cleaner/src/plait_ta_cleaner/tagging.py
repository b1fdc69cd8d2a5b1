"""Parts of speech of a caption's words, by rules and a word list; any function of the same kind may take its place."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from plait_clip.backdoor import WordNet, open_wordnet

TAGS = ("NOUN", "VERB", "ADJ", "ADV", "ADP", "DET", "OTHER")
Tagger = Callable[[Sequence[str]], Sequence[str]]
"""Lower-case words of a caption → one of :data:`TAGS` for each."""

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def word_spans(caption: str) -> list[tuple[int, int]]:
    """Where the words of a caption begin and end; hyphenated ones stay whole."""
    return [found.span() for found in WORD.finditer(caption)]


def caption_words(caption: str) -> list[str]:
    """Lower-cased words."""
    return [caption[start:end].lower() for start, end in word_spans(caption)]


CLOSED: dict[str, str] = {
    word: tag
    for tag, words in {
        "DET": "a an the this that these those each every some any no all both another either neither my your his her its "
        "our their",
        "ADP": "in on at by of for with from to into onto over under above below across through near beside behind between "
        "among along against around about after before during inside outside off up down toward towards upon "
        "within without beneath underneath next past via amid atop",
        "ADV": "very quite too rather really so almost extremely brightly darkly partly fully highly slightly",
        "OTHER": "and or but nor yet while as if than because i you he she it we they me him them us who whom whose which "
        "what there here someone somebody something anyone everyone one's be am is are was were been being has "
        "have had do does did will would can could may might must shall should not n't where when how",
    }.items()
    for word in words.split()
}
CARDINALS = frozenset(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
)
COORDINATORS = frozenset({"and", "or"})
AUXILIARIES = frozenset({"be", "am", "is", "are", "was", "were", "been", "being", "has", "have", "had"})

WORDNET_TAGS = {"n": "NOUN", "v": "VERB", "a": "ADJ", "r": "ADV"}
# Endings of inflected forms and what they replace.
ENDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "NOUN": (("s", ""), ("es", ""), ("ies", "y"), ("men", "man")),
    "VERB": (("s", ""), ("es", ""), ("ies", "y"), ("ed", ""), ("ed", "e"), ("ing", ""), ("ing", "e"), ("ied", "y")),
    "ADJ": (("er", ""), ("er", "e"), ("est", ""), ("est", "e"), ("ier", "y"), ("iest", "y")),
}


class WordList:
    """Which parts of speech a word can be.

    Args:
        tags: base form → its tags, out of NOUN, VERB, ADJ, ADV.
        irregular: inflected form → its base form and tag.
    """

    def __init__(
        self, tags: Mapping[str, Collection[str]], irregular: Mapping[str, Collection[tuple[str, str]]]
    ) -> None:
        self.tags = tags
        self.irregular = irregular

    def bases(self, word: str) -> set[tuple[str, str]]:
        """(base form, tag) of everything that ``word`` may be a form of."""
        found = {(word, tag) for tag in self.tags.get(word, ())}
        found.update(self.irregular.get(word, ()))
        for tag, endings in ENDINGS.items():
            if tag == "ADJ" and word in self.tags:  # "number" is no form of "numb"
                continue
            for ending, replacement in endings:
                if len(word) > len(ending) + 1 and word.endswith(ending):
                    stem = word.removesuffix(ending) + replacement
                    undoubled = stem[:-1] if replacement == "" and len(stem) > 2 and stem[-1] == stem[-2] else stem
                    found.update((base, tag) for base in (stem, undoubled) if tag in self.tags.get(base, ()))
        return found

    def __call__(self, word: str) -> frozenset[str]:
        return frozenset(tag for _, tag in self.bases(word))


def wordnet_words(wordnet: WordNet) -> WordList:
    """The single words of WordNet, with its irregular forms.

    A part of speech in which a word never occurs in WordNet's tagged texts is left out where another one does.
    """
    occurs: dict[str, dict[str, bool]] = defaultdict(dict)
    irregular: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for pos, tag in WORDNET_TAGS.items():
        for word in wordnet.words(pos):
            if "_" not in word:
                occurs[word][tag] = word in wordnet.occurring[pos]
        for form, bases in wordnet.exceptions[pos].items():
            irregular[form].update((base, tag) for base in bases if base != form)
    tags = {
        word: frozenset(tag for tag, seen in by_tag.items() if seen or not any(by_tag.values()))
        for word, by_tag in occurs.items()
    }
    return WordList(tags, irregular)


@lru_cache(maxsize=4)
def open_words(folder: Path | None) -> WordList:
    """The words of WordNet's files in ``folder``; without one those of WordNet 3.0, which comes with plait-clip.

    Raises:
        FileNotFoundError: the folder lacks one of WordNet's files.
        ValueError: a file in it is not one of WordNet's.
    """
    return wordnet_words(open_wordnet(folder))


class LexiconTagger:
    """Closed-class words by list, the rest by what they can be and by their neighbours.

    A word that is no word of the list is a noun. Ambiguous words, in this order: a verb form in -s, -ed or -ing is
    a verb after "is", "has" and the like, and after a noun (in -s only before no noun); after a determiner or
    adjective and before no noun a word is a noun; directly before what can be a noun it is an adjective; else a noun.

    Args:
        words: word → the tags it can have; see :class:`WordList`.
    """

    def __init__(self, words: Callable[[str], frozenset[str]]) -> None:
        self.words = words

    def __call__(self, words: Sequence[str]) -> list[str]:
        candidates = [self._candidates(word) for word in words]
        # Whether a noun follows, directly or after what can be adjectives, also joined ones: "black and white dog".
        noun_follows = [False] * len(words)
        for i in reversed(range(len(words) - 1)):
            following = candidates[i + 1]
            joins = words[i + 1] in COORDINATORS and i + 2 < len(words) and "ADJ" in candidates[i + 2]
            noun_follows[i] = "NOUN" in following or (noun_follows[i + 1] and ("ADJ" in following or joins))
        tags: list[str] = []
        for i, (word, can_be) in enumerate(zip(words, candidates, strict=True)):
            before = "" if i == 0 else "AUX" if words[i - 1] in AUXILIARIES else tags[-1]
            tags.append(_resolve(word, can_be, before, noun_follows[i]))
        return tags

    def _candidates(self, word: str) -> frozenset[str]:
        if word in CLOSED:
            return frozenset({CLOSED[word]})
        if word in CARDINALS:
            return frozenset({"NOUN", "ADJ"})
        can_be = self.words(word)
        content = can_be - {"ADV"}
        return content or can_be or frozenset({"NOUN"})


def _resolve(word: str, can_be: frozenset[str], before: str, noun_follows: bool) -> str:
    if len(can_be) == 1:
        return next(iter(can_be))
    if "VERB" in can_be and (
        (before in ("AUX", "NOUN") and word.endswith(("ing", "ed")))
        or (before == "NOUN" and word.endswith("s") and not noun_follows)
    ):
        return "VERB"
    if "NOUN" in can_be and before in ("DET", "ADJ") and not noun_follows:
        return "NOUN"
    if "ADJ" in can_be and noun_follows:
        return "ADJ"
    if "NOUN" in can_be:
        return "NOUN"
    return "VERB" if before == "NOUN" else "ADJ"


def check_tags(words: Sequence[str], tags: Sequence[str], name: str) -> None:
    """Raises ValueError unless there is one known tag a word."""
    if len(tags) != len(words) or not set(tags) <= set(TAGS):
        raise ValueError(
            f"tagger {name!r} gave {list(tags)} for {list(words)}; it must give one of {', '.join(TAGS)} a word"
        )
