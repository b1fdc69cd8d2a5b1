"""Where synonyms come from: nltk's WordNet, the text files of WordNet itself, or a JSON file ``{word: [synonyms]}``.

A source is a function word → sorted list of synonyms, lower-case letters and spaces only, without the word.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from .eda import Synonyms

POS_FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
# Endings that WordNet's own look-up strips ("morphy"): part of speech → (ending, replacement).
ENDINGS = {
    "n": [
        ("s", ""),
        ("ses", "s"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ],
    "v": [("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")],
    "a": [("er", ""), ("est", ""), ("er", "e"), ("est", "e")],
    "r": [],
}


class MissingSynonymsError(FileNotFoundError):
    """No synonym source was found; CleanCLIP's text augmentation cannot run without one."""


def open_synonyms(path: Path | None) -> Synonyms:
    """The synonyms in ``path``: a JSON file or a folder of WordNet files (``index.noun``, ``data.noun`` …).

    Without a path: nltk's WordNet where its data are installed, else the folder named by ``WNSEARCHDIR`` or
    ``/usr/share/wordnet`` (Debian's wordnet-base).

    Raises:
        MissingSynonymsError: there is none of these.
        ValueError: the JSON file does not map words to lists of words.
    """
    if path is not None:
        path = Path(path)
        if path.is_dir():
            return WordNet(path).synonyms
        if path.is_file():
            return json_synonyms(path)
        raise MissingSynonymsError(
            f"synonyms is {path}, which is neither a JSON file nor a folder with WordNet's files"
        )
    nltk = nltk_synonyms()
    if nltk is not None:
        return nltk
    for folder in filter(None, [os.environ.get("WNSEARCHDIR"), "/usr/share/wordnet"]):
        if (Path(folder) / "index.noun").is_file():
            return WordNet(Path(folder)).synonyms
    raise MissingSynonymsError(
        "no synonyms were found: install WordNet (nltk's data or the package wordnet-base), or name a JSON file "
        "{word: [synonyms]} or a folder with WordNet's files in `synonyms`"
    )


def json_synonyms(path: Path) -> Synonyms:
    """Synonyms of a JSON file ``{word: [synonyms]}``."""
    table = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or not all(
        isinstance(words, list) and all(isinstance(word, str) for word in words) for words in table.values()
    ):
        raise ValueError(f"{path} is no JSON object of the form {{word: [synonyms]}}")
    return mapped_synonyms(table)


def mapped_synonyms(table: Mapping[str, Sequence[str]]) -> Synonyms:
    """Synonyms of a mapping word → synonyms, in the order given."""

    def synonyms(word: str) -> Sequence[str]:
        return [letters for synonym in table.get(word, ()) if (letters := letters_only(synonym)) and letters != word]

    return synonyms


def nltk_synonyms() -> Synonyms | None:
    """Synonyms from nltk's WordNet; ``None`` where nltk or its WordNet data are not installed."""
    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
    except (ImportError, LookupError):
        return None

    @lru_cache(maxsize=65536)
    def synonyms(word: str) -> tuple[str, ...]:
        return distinct_synonyms(word, (lemma.name() for synset in wordnet.synsets(word) for lemma in synset.lemmas()))

    return synonyms


class WordNet:
    """A reader of WordNet's text files (``man wndb``) in ``folder``: index and exceptions in memory, data by offset."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offsets: dict[str, dict[str, tuple[int, ...]]] = {}
        self._exceptions: dict[str, dict[str, list[str]]] = {}
        for pos, name in POS_FILES.items():
            index = folder / f"index.{name}"
            if not index.is_file() or not (folder / f"data.{name}").is_file():
                raise MissingSynonymsError(
                    f"folder {folder} lacks index.{name} or data.{name}; name WordNet's dict folder"
                )
            self._offsets[pos] = dict(map(_index_entry, _lines(index)))
            exceptions = folder / f"{name}.exc"
            lines = _lines(exceptions) if exceptions.is_file() else ()
            self._exceptions[pos] = {form: bases for form, *bases in map(str.split, lines)}
        self.synonyms = lru_cache(maxsize=65536)(self._synonyms)

    def base_forms(self, word: str, pos: str) -> list[str]:
        """Lemmas of part of speech ``pos`` (n, v, a, r) that ``word`` may be a form of; empty if it is none."""
        known = self._offsets[pos]
        forms = self._exceptions[pos].get(word, [])
        if not forms:
            endings = ENDINGS[pos]
            forms = [word.removesuffix(end) + new for end, new in endings if word.endswith(end)]
        return list(dict.fromkeys(form for form in [word, *forms] if form in known))

    def synsets(self, word: str) -> list[tuple[str, int]]:
        """All senses of ``word`` as (part of speech, offset in the data file)."""
        word = word.lower().replace(" ", "_")
        found = [
            (pos, at) for pos in POS_FILES for base in self.base_forms(word, pos) for at in self._offsets[pos][base]
        ]
        return list(dict.fromkeys(found))

    def lemmas(self, pos: str, offset: int) -> list[str]:
        """The words of one sense."""
        with (self.folder / f"data.{POS_FILES[pos]}").open("rb") as file:
            file.seek(offset)
            fields = file.readline().decode("latin-1").split()
        count = int(fields[3], 16)
        # Adjectives carry their position as a suffix: "galore(ip)".
        return [word.partition("(")[0] for word in fields[4 : 4 + 2 * count : 2]]

    def _synonyms(self, word: str) -> tuple[str, ...]:
        return distinct_synonyms(word, (lemma for sense in self.synsets(word) for lemma in self.lemmas(*sense)))


def distinct_synonyms(word: str, lemmas: Iterable[str]) -> tuple[str, ...]:
    """The lemmas in letters, without ``word`` and without repetition, sorted."""
    return tuple(sorted({letters for lemma in lemmas if (letters := letters_only(lemma)) and letters != word}))


def letters_only(text: str) -> str:
    """Lower-case letters and spaces of ``text``; underscores and hyphens count as spaces."""
    text = text.replace("_", " ").replace("-", " ").lower()
    return "".join(letter for letter in text if letter == " " or "a" <= letter <= "z")


def _lines(path: Path) -> Iterable[str]:
    with path.open(encoding="latin-1") as file:
        # The licence at the top is indented.
        yield from (line for line in file if line.strip() and not line.startswith(" "))


def _index_entry(line: str) -> tuple[str, tuple[int, ...]]:
    fields = line.split()
    return fields[0], tuple(map(int, fields[-int(fields[2]) :]))
