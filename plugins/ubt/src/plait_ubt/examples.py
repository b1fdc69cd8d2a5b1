"""Small inputs on which ``plait check`` tries UBT."""

from __future__ import annotations

from typing import Any

import torch
from plait.testing import Example
from plait_clip import digit_pairs, tiny_model, toy_embeddings

FIELDS = {
    "n_suspicious": 32, "n_top": 8, "n_unlearn": 8, "num_overfit_epochs": 2, "overfit_batch_size": 8, "force": True, "token_selection": "all",
}  # fmt: skip


def _example(arguments: dict[str, Any], **more: Any) -> Example:
    data = digit_pairs(60)
    return Example(
        arguments={**arguments, "data": data},
        fields=FIELDS,
        random=True,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("captions"), "model": torch.nn.Linear(2, 2)},
        **more,
    )


def defence() -> Example:
    return _example({"model": tiny_model(), "reference": tiny_model()}, outputs=toy_embeddings)


def scores() -> Example:
    return _example({"model": {"suspected": tiny_model(), "reference": tiny_model()}})
