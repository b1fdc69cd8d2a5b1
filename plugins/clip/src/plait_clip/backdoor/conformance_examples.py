"""Small inputs on which ``plait check`` tries the backdoor attacks, defences and metrics."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from plait.testing import Example
from plait_vision import IS_BACKDOOR
from torch import Tensor

from plait_clip.toy_models import digit_pairs, tiny_model, toy_embeddings

TRIGGER = {"target": "seven", "templates": "digits"}
TRAINING = {"num_epochs": 1, "batch_size": 8, "warmup_steps": 1, "learning_rate": 1e-3}


@functools.cache
def scored_pairs(count: int = 24) -> Any:
    """Digits with captions, marks of the poisoned ones, and a score of each."""
    table = digit_pairs(count).add_column(IS_BACKDOOR, [row % 4 == 0 for row in range(count)])
    return table.add_column("suspicion", [row * 7 % count / count for row in range(count)])


# --- attacks ---


def _attack(**fields: Any) -> Example:
    data = digit_pairs(24)
    return Example(
        arguments={"data": data},
        fields={**TRIGGER, "n_poison": 6, "size": 16, **fields},
        random=True,
        progress=False,
        device=False,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image")},
    )


def trigger() -> Example:
    return _attack()


def patch() -> Example:
    return _attack(patch_size=2)


class _Faint(torch.nn.Module):
    def forward(self, bits: Tensor, images: Tensor) -> Tensor:
        return images + 0.02 * (bits.mean(dim=1) - 0.5).reshape(-1, 1, 1, 1)


@functools.cache
def _encoder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="plait-clip-example-")) / "encoder.pt2"
    rows = torch.export.Dim("rows", min=1)
    example = (torch.ones(2, 100), torch.zeros(2, 3, 8, 8))
    program = torch.export.export(_Faint(), example, dynamic_shapes=({0: rows}, {0: rows}))
    torch.export.save(program, path)
    return path


def issba() -> Example:
    return _attack(encoder=str(_encoder()))


def optimized_patch() -> Example:
    data = digit_pairs()
    return Example(
        arguments={"model": tiny_model(), "data": data},
        fields={**TRIGGER, "n_poison": 6, "size": 16, "patch_size": 2, "num_images": 16, "num_epochs": 2, "batch_size": 8},
        random=True,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("image"), "model": torch.nn.Linear(2, 2)},
    )  # fmt: skip


# --- defences ---


def none() -> Example:
    return Example(arguments={"model": tiny_model()}, progress=False, device=False, outputs=toy_embeddings)


def _training(column: str = "captions", **fields: Any) -> Example:
    data = scored_pairs()
    return Example(
        arguments={"model": tiny_model(), "data": data},
        fields={**TRAINING, **fields},
        random=True,
        outputs=toy_embeddings,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns(column), "model": torch.nn.Linear(2, 2)},
    )


def training() -> Example:
    return _training()


def abl() -> Example:
    return _training(isolation_share=0.2, num_isolated=2)


def drop_top() -> Example:
    return _training(num_epochs=2, removal_epochs=[2], removal_share=0.2)


def square_unlearn() -> Example:
    return _training(IS_BACKDOOR)


# --- evaluations ---


def clip_backdoor() -> Example:
    data = digit_pairs(24)
    trigger = {"badnet-fixed": {**TRIGGER, "patch_size": 2}}
    return Example(
        arguments={"model": tiny_model(), "data": data},
        fields={"trigger": trigger, "templates": "digits", "num_shown": 2},
        progress=False,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("label"), "model": torch.nn.Linear(2, 2)},
    )


def backdoor_detection() -> Example:
    data = scored_pairs()
    return Example(
        arguments={"data": data},
        fields={"top": [4, 8], "num_shown": 4},
        progress=False,
        device=False,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("suspicion")},
    )
