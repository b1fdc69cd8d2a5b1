"""Cleaning captions as the ALBEF family of retrieval benchmarks does."""

from __future__ import annotations

from collections.abc import Iterable

_DELETED = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})
MAX_WORDS = 30


def clean_caption(text: str, max_words: int = MAX_WORDS) -> str:
    """Lower case, no punctuation, single spaces, at most ``max_words`` words.

    ``, . ' ! ? " ( ) * # : ; ~`` are deleted, ``-`` and ``/`` become spaces, ``<person>`` becomes ``person``. Every
    run of white space becomes one space, so that words are what lies between single spaces.

    Raises:
        TypeError: ``text`` is not a string.
        ValueError: ``max_words`` is below 1.
    """
    if not isinstance(text, str):
        raise TypeError(f"a caption is {text!r}; give a string")
    if max_words < 1:
        raise ValueError(f"max_words is {max_words}; keep at least 1 word")
    return " ".join(_words(text)[:max_words])


def num_cut(texts: Iterable[str], max_words: int = MAX_WORDS) -> int:
    """How many of the texts have words that :func:`clean_caption` leaves out."""
    return sum(len(_words(text)) > max_words for text in texts)


def _words(text: str) -> list[str]:
    return text.lower().translate(_DELETED).replace("<person>", "person").split()
