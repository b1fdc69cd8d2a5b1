"""One id per word: a tokenizer for toy data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_WORD = re.compile(r"[a-z0-9]+")
FILE = "word_tokenizer.json"


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    return _WORD.findall(text.lower())


class WordTokenizer:
    """``<pad>`` = 0, the words in alphabetical order, ``<sot>``, ``<eot>``.

    ``<eot>`` has the largest id, since CLIP's text tower reads its output at the position of the
    largest id. Words outside the vocabulary are left out of the text.

    Args:
        vocabulary: the words; duplicates and order do not matter.
        context_length: ids per text, with ``<sot>`` and ``<eot>``; longer texts are cut and keep ``<eot>``.
    """

    def __init__(self, vocabulary: Iterable[str], context_length: int = 14) -> None:
        self.words = sorted({word for text in vocabulary for word in words(text)})
        if not self.words:
            raise ValueError("the vocabulary is empty; give at least one word")
        if context_length < 3:
            raise ValueError(f"context_length is {context_length}; it must hold <sot>, a word and <eot>, so at least 3")
        self.context_length = context_length
        self._ids = {word: i for i, word in enumerate(self.words, start=1)}
        self.sot_id = len(self.words) + 1
        self.eot_id = len(self.words) + 2

    @property
    def vocab_size(self) -> int:
        return len(self.words) + 3

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        """N texts → [N, context_length] int64."""
        length = context_length or self.context_length
        rows = []
        for text in texts:
            ids = [self._ids[word] for word in words(text) if word in self._ids][: length - 2]
            rows.append([self.sot_id, *ids, self.eot_id] + [0] * (length - 2 - len(ids)))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)

    def save_pretrained(self, folder: str | Path) -> None:
        state = {"words": self.words, "context_length": self.context_length}
        (Path(folder) / FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> WordTokenizer:
        state = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
        return cls(state["words"], state["context_length"])
