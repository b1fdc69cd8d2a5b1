"""Small inputs on which ``plait check`` tries the methods of this package."""

from __future__ import annotations

from typing import Any

import torch
from plait.testing import Example
from plait_clip import digit_pairs, tiny_model, toy_data, toy_embeddings

WORDS: dict[str, Any] = {
    "generator": "synonyms",
    "synonyms": {word: tuple(others) for word, others in toy_data.SYNONYMS.items()},
}


def _attack(budget: float | None = 8 / 255, random: bool = True, **fields: Any) -> Example:
    data = digit_pairs(12)
    return Example(
        arguments={"model": tiny_model(), "data": data},
        fields=fields,
        random=random,
        keeps_rows=True,
        budget=budget,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("captions"), "model": torch.nn.Linear(2, 2)},
    )


def evolution() -> Example:
    return _attack(num_steps=3, corpus_fraction=1.0, **WORDS)


def both() -> Example:
    return _attack(num_steps=3, **WORDS)


def images() -> Example:
    return _attack(num_steps=3)


def captions() -> Example:
    return _attack(budget=0.0, random=False, **WORDS)


def transfer() -> Example:
    data = digit_pairs(12)
    return Example(
        arguments={"model": {"tiny": tiny_model()}, "data": {"tiny": data}, "reference": data},
        progress=False,
        empty={"data": {"tiny": data.select([])}},
        wrong={"data": data.remove_columns("captions"), "model": torch.nn.Linear(2, 2)},
    )


def digit_scenes() -> Example:
    return Example(arguments={}, fields={"num_train": 12, "num_test": 6}, random=True, progress=False, device=False)


def scene_encoder() -> Example:
    return Example(arguments={}, random=True, progress=False, outputs=_features)


def _features(model: Any) -> list[Any]:
    return toy_embeddings(model, ["a red two", "the blue nine stands"])
