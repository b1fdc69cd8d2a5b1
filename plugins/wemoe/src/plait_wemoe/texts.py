"""Text models: classifiers of transformers, and token columns of datasets as the padded batches that these are called with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait_wemoe.heads import head_places

TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


def text_classifier(source: str, names: Sequence[str] | None = None, seed: int = 0) -> nn.Module:
    """A classifier of transformers, in evaluation mode.

    Args:
        source: a local folder, or a name on the hub.
        names: of the classes of a fresh head; ``None``: the head is the one that is stored, if there is one.
        seed: of the fresh head.

    Raises:
        ValueError: no classifier of texts can be read there, or not all of its body.
    """
    from transformers import AutoModelForSequenceClassification

    options: dict[str, Any] = {"output_loading_info": True}
    if names is not None:
        labels = dict(enumerate(names))
        options |= {"num_labels": len(names), "id2label": labels, "label2id": {v: k for k, v in labels.items()}}
        options |= {"ignore_mismatched_sizes": True}
    place = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, found = AutoModelForSequenceClassification.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{source} holds no classifier of texts that transformers can read ({error})") from error
    fresh = [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]
    heads = tuple(f"{place}." for place in head_places(model))
    if lacking := sorted(name for name in fresh if not name.startswith(heads)):
        raise ValueError(f"{source} lacks {lacking[0]}, or has it in another shape than its configuration says")
    return model.eval()


class TokenColumn:
    """Tokens of texts, padded on the right to the longest of a batch; all other columns are dropped.

    Args:
        columns: name → one list of integers per sample; ``input_ids``, and others of :data:`TOKEN_COLUMNS`.
        pad_id: token that padding is made of. It counts for nothing: an ``attention_mask`` goes along.
        vocabulary: number of tokens that the model knows; ``None``: not known.

    Raises:
        ValueError: no sample, a sample without tokens, columns of other lengths, a token that the model does not know.
    """

    def __init__(
        self, columns: Mapping[str, Sequence[Sequence[int]]], pad_id: int = 0, vocabulary: int | None = None
    ) -> None:
        held = {name: [list(map(int, cell)) for cell in columns[name]] for name in TOKEN_COLUMNS if name in columns}
        ids = held["input_ids"]
        if not ids:
            raise ValueError("the data has no sample")
        for row, tokens in enumerate(ids):
            if not tokens:
                raise ValueError(f"row {row} has no token")
            if min(tokens) < 0 or (vocabulary is not None and max(tokens) >= vocabulary):
                raise ValueError(
                    f"row {row} holds token {max(tokens) if min(tokens) >= 0 else min(tokens)}; the model knows "
                    f"{vocabulary or 'those from 0 on'}: tokenise with the tokenizer that it was trained with"
                )
            for name, cells in held.items():
                if len(cells[row]) != len(tokens):
                    raise ValueError(f"row {row} has {len(tokens)} input_ids and {len(cells[row])} values of {name}")
        held.setdefault("attention_mask", [[1] * len(tokens) for tokens in ids])
        self._held, self.pad_id = held, pad_id

    @classmethod
    def of_texts(
        cls,
        texts: Sequence[Any],
        tokenizer: Any,
        max_length: int | None,
        vocabulary: int | None = None,
        pad_id: int | None = None,
    ) -> tuple[TokenColumn, int]:
        """Tokenise; also the number of texts that are longer than ``max_length`` tokens and were cut.

        Raises:
            ValueError: a cell that is no text, or is blank.
        """
        for row, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"row {row} of column 'text' is {text!r}; expected a text")
        if not texts:
            raise ValueError("the data has no sample")
        whole = tokenizer(list(texts))["input_ids"]
        cut = 0 if max_length is None else sum(len(tokens) > max_length for tokens in whole)
        found = tokenizer(list(texts), truncation=cut > 0, max_length=max_length if cut else None)
        # Models that read their answer at the last token find it by their own padding token.
        pad = tokenizer.pad_token_id if pad_id is None else pad_id
        return cls(dict(found), 0 if pad is None else pad, vocabulary), cut

    def __len__(self) -> int:
        return len(self._held["input_ids"])

    @property
    def fingerprint(self) -> str:
        """Which tokens these are."""
        return hashlib.sha256(repr((sorted(self._held.items()), self.pad_id)).encode()).hexdigest()

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Column → int64 (N, longest of these)."""
        batch = {name: [cells[row] for row in rows] for name, cells in self._held.items()}
        return self._padded({name: [torch.tensor(cell) for cell in cells] for name, cells in batch.items()})

    def join(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Batches one after the other as one."""
        return self._padded({name: [row for part in parts for row in part[name]] for name in parts[0]})

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The first ``limit`` samples (``None``: all) in order."""
        end = len(self) if limit is None else min(limit, len(self))
        for start in range(0, end, batch_size):
            yield self.read(range(start, min(start + batch_size, end)))

    def _padded(self, batch: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        fill = {"input_ids": self.pad_id}
        return {
            name: torch.nn.utils.rnn.pad_sequence(list(cells), batch_first=True, padding_value=fill.get(name, 0))
            for name, cells in batch.items()
        }
