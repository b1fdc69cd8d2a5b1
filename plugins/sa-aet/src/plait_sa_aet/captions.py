"""Cleaning captions as the ALBEF family of retrieval benchmarks does."""

from __future__ import annotations

_DELETED = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})


def clean_caption(text: str, max_words: int = 30) -> str:
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
    cleaned = text.lower().translate(_DELETED).replace("<person>", "person")
    return " ".join(cleaned.split()[:max_words])
