"""Small inputs on which ``plait check`` tries TA-Cleaner."""

from __future__ import annotations

import torch
from plait.testing import Example
from plait_clip import digit_pairs, tiny_model, toy_embeddings


def training() -> Example:
    data = digit_pairs(24)
    return Example(
        arguments={"model": tiny_model(), "data": data},
        fields={"num_epochs": 1, "batch_size": 8, "warmup_steps": 1, "min_pool_count": 1},
        random=True,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("captions"), "model": torch.nn.Linear(2, 2)},
        outputs=toy_embeddings,
    )


def subcaptions() -> Example:
    data = digit_pairs(24)
    return Example(
        arguments={"data": data},
        fields={"min_pool_count": 1},
        random=True,
        progress=False,
        device=False,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("captions")},
    )
