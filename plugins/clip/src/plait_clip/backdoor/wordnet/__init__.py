"""WordNet's words and which of them mean the same: WordNet 3.0, which comes with the package, or a folder of its files.

The package holds what is needed of WordNet 3.0's ``data.*``, ``index.*`` and ``*.exc`` (``man wndb``) in the one file
``wordnet-3.0.txt.xz``, made by :func:`pack` and licensed by Princeton University (``LICENSE`` beside it). Its lines:
``= n`` opens a part of speech; ``+`` lists the words that occur in WordNet's tagged texts; ``~`` gives an irregular
form and its base forms; every other line holds the words of one sense, as WordNet writes them.
"""

from __future__ import annotations

import lzma
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

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
PACKED = "wordnet-3.0.txt.xz"
Parsed = TypeVar("Parsed")


class WordNet:
    """Words by part of speech (n, v, a, r) and sense.

    Attributes:
        occurring: part of speech → words, in lower case, that occur as it in WordNet's tagged texts.
        exceptions: part of speech → irregular form → its base forms.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        """``lines`` are of the format of the packed file, see above."""
        self.occurring: dict[str, frozenset[str]] = {}
        self.exceptions: dict[str, dict[str, list[str]]] = {pos: {} for pos in POS_FILES}
        self._senses: dict[str, list[tuple[str, ...]]] = {pos: [] for pos in POS_FILES}
        self._numbers: dict[str, dict[str, list[int]]] = {pos: defaultdict(list) for pos in POS_FILES}
        pos = "n"
        for line in lines:
            first, *rest = words = tuple(line.split(" "))
            if first == "=":
                (pos,) = rest
            elif first == "+":
                self.occurring[pos] = frozenset(rest)
            elif first == "~":
                self.exceptions[pos][rest[0]] = rest[1:]
            else:
                for word in {word.lower() for word in words}:
                    self._numbers[pos][word].append(len(self._senses[pos]))
                self._senses[pos].append(words)

    def words(self, pos: str) -> Iterable[str]:
        """All words of a part of speech, in lower case, with underscores for spaces."""
        return self._numbers[pos].keys()

    def base_forms(self, word: str, pos: str) -> list[str]:
        """Words of part of speech ``pos`` that ``word`` may be a form of; empty if it is none."""
        known = self._numbers[pos]
        forms = self.exceptions[pos].get(word, [])
        if not forms:
            forms = [word.removesuffix(end) + new for end, new in ENDINGS[pos] if word.endswith(end)]
        return list(dict.fromkeys(form for form in [word, *forms] if form in known))

    def senses(self, word: str) -> list[tuple[str, ...]]:
        """The words of every sense of ``word``."""
        word = word.lower().replace(" ", "_")
        found = [
            (pos, number)
            for pos in POS_FILES
            for base in self.base_forms(word, pos)
            for number in self._numbers[pos][base]
        ]
        return [self._senses[pos][number] for pos, number in dict.fromkeys(found)]


def open_wordnet(folder: Path | None = None) -> WordNet:
    """WordNet 3.0 of the package, or the files in ``folder`` (``index.noun``, ``data.noun`` …).

    Raises:
        FileNotFoundError: the folder lacks one of the files.
        ValueError: a file is not one of WordNet's.
    """
    return _bundled() if folder is None else WordNet(_lines_of_folder(folder))


def pack(folder: Path, path: Path) -> None:
    """Write what is needed of WordNet's files in ``folder`` into ``path``, as in this package; xz, about 0.8 MB."""
    text = "".join(f"{line}\n" for line in _lines_of_folder(folder))
    path.write_bytes(lzma.compress(text.encode(), preset=9))


@lru_cache(maxsize=1)
def _bundled() -> WordNet:
    packed = files(__package__).joinpath(PACKED).read_bytes()
    return WordNet(lzma.decompress(packed).decode().splitlines())


def _lines_of_folder(folder: Path) -> Iterator[str]:
    missing = [f"{kind}.{name}" for name in POS_FILES.values() for kind in ("index", "data")]
    missing = [name for name in missing if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"folder {folder} lacks {missing[0]}; name WordNet's dict folder")
    for pos, name in POS_FILES.items():
        yield f"= {pos}"
        yield " ".join(["+", *filter(None, _parsed(folder / f"index.{name}", _occurring_word))])
        exceptions = folder / f"{name}.exc"
        if exceptions.is_file():
            yield from (" ".join(["~", *fields]) for fields in _parsed(exceptions, list))
        yield from (" ".join(words) for words in _parsed(folder / f"data.{name}", _words_of_sense))


def _parsed(path: Path, parse: Callable[[list[str]], Parsed]) -> Iterator[Parsed]:
    with path.open(encoding="latin-1") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith(" "):  # the licence at the top is indented
                continue
            try:
                yield parse(line.split())
            except (IndexError, ValueError) as error:
                raise ValueError(f"{path}, line {number}, is not a line of WordNet's files (man wndb)") from error


def _occurring_word(fields: list[str]) -> str | None:
    """The word of a line of an index file, if it occurs in the tagged texts."""
    # lemma pos synset_cnt p_cnt pointers... sense_cnt tagsense_cnt offsets...
    return fields[0] if int(fields[5 + int(fields[3])]) > 0 else None


def _words_of_sense(fields: list[str]) -> list[str]:
    """The words of a line of a data file."""
    # offset lex_filenum ss_type w_cnt (word lex_id)... pointers... | gloss
    count = int(fields[3], 16)
    # Adjectives carry their position as a suffix: "galore(ip)".
    words = [word.partition("(")[0] for word in fields[4 : 4 + 2 * count : 2]]
    if len(words) != count or not count:
        raise ValueError("fewer words than announced")
    return words
