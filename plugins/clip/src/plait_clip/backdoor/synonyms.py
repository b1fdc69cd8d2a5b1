"""Where synonyms come from: WordNet, the package's or a folder of its files, or a JSON file ``{word: [synonyms]}``.

A source is a function word → sorted list of synonyms, lower-case letters and spaces only, without the word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from .eda import Synonyms
from .wordnet import WordNet, open_wordnet


def open_synonyms(path: Path | None) -> Synonyms:
    """The synonyms in ``path``: a JSON file or a folder of WordNet files (``index.noun``, ``data.noun`` …).

    Without a path: WordNet 3.0, which comes with the package, so that a seed draws the same words everywhere.

    Raises:
        FileNotFoundError: the path is neither, or the folder lacks one of WordNet's files.
        ValueError: the JSON file does not map words to lists of words, or a file in the folder is not one of WordNet's.
    """
    if path is None or path.is_dir():
        return wordnet_synonyms(open_wordnet(path))
    if path.is_file():
        return json_synonyms(path)
    raise FileNotFoundError(f"synonyms is {path}, which is neither a JSON file nor a folder with WordNet's files")


def json_synonyms(path: Path) -> Synonyms:
    """Synonyms of a JSON file ``{word: [synonyms]}``."""
    table = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or not all(
        isinstance(words, list) and all(isinstance(word, str) for word in words) for words in table.values()
    ):
        raise ValueError(f"{path} is not a JSON object of the form {{word: [synonyms]}}")
    return mapped_synonyms(table)


def mapped_synonyms(table: Mapping[str, Sequence[str]]) -> Synonyms:
    """Synonyms of a mapping word → synonyms, in the order given."""

    def synonyms(word: str) -> Sequence[str]:
        return [letters for synonym in table.get(word, ()) if (letters := letters_only(synonym)) and letters != word]

    return synonyms


def wordnet_synonyms(wordnet: WordNet) -> Synonyms:
    """Synonyms of WordNet: the words of all senses of a word and of its base forms."""

    @lru_cache(maxsize=65536)
    def synonyms(word: str) -> tuple[str, ...]:
        return distinct_synonyms(word, (lemma for sense in wordnet.senses(word) for lemma in sense))

    return synonyms


def distinct_synonyms(word: str, lemmas: Iterable[str]) -> tuple[str, ...]:
    """The lemmas in letters, without ``word`` and without repetition, sorted."""
    return tuple(sorted({letters for lemma in lemmas if (letters := letters_only(lemma)) and letters != word}))


def letters_only(text: str) -> str:
    """Lower-case letters and spaces of ``text``; underscores and hyphens count as spaces."""
    text = text.replace("_", " ").replace("-", " ").lower()
    return "".join(letter for letter in text if letter == " " or "a" <= letter <= "z")
