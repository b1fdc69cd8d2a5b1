"""Pairs, and their unit embeddings under a model.

A model is a ``torch.nn.Module`` with ``encode_image(images [B, 3, H, W] in [0, 1]) -> [B, D]``,
``encode_text(list of B strings) -> [B, D]`` (neither normalised) and the log-parameter ``logit_scale``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from plait_clip import clip_loss
from torch import Tensor, nn

MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class CaptionedImages:
    """Captions, and a way to get the images [B, 3, H, W] in [0, 1] of some row numbers."""

    captions: Sequence[str]
    images: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.captions)

    def in_memory(self, rows: Sequence[int]) -> CaptionedImages:
        """The given rows with their images held as 8-bit values: they are read in every epoch."""
        chunks = [self.images([int(row) for row in part]) for part in parts(rows, 256)]
        images = torch.cat([(chunk * 255).round().byte().cpu() for chunk in chunks])
        return CaptionedImages([self.captions[row] for row in rows], lambda batch: images[list(batch)].float() / 255)


def parts(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """The rows in pieces of ``size``, the last of which may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def unit_images(model: Any, images: Tensor) -> Tensor:
    """Unit image embeddings ``[B, D]``."""
    return F.normalize(model.encode_image(images).float(), dim=-1)


def unit_texts(model: Any, texts: Sequence[str]) -> Tensor:
    """Unit text embeddings ``[B, D]``."""
    return F.normalize(model.encode_text(list(texts)).float(), dim=-1)


def unit_pairs(model: Any, pairs: CaptionedImages, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """u and v ``[B, D]`` of some rows, in bfloat16 on a GPU."""
    device = device_of(model)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return unit_images(model, pairs.images(rows).to(device)), unit_texts(model, [pairs.captions[i] for i in rows])


def pair_loss(model: Any, pairs: CaptionedImages, rows: Sequence[int]) -> Tensor:
    """L_clip of a batch of rows."""
    u, v = unit_pairs(model, pairs, rows)
    return clip_loss(u, v, model.logit_scale.exp())


def encode_together(encode: Callable[[Any], Tensor], groups: Sequence[list[Any]]) -> list[Tensor]:
    """Encode several groups in one forward pass: normalisation layers then see all rows of a step together."""
    rows = [row for group in groups for row in group]
    if not rows:
        return [torch.empty(0) for _ in groups]
    encoded = encode(torch.stack(rows) if isinstance(rows[0], Tensor) else rows)
    return list(encoded.split([len(group) for group in groups]))


def clamp_logit_scale(model: Any) -> None:
    with torch.no_grad():
        model.logit_scale.clamp_(max=MAX_LOG_SCALE)
