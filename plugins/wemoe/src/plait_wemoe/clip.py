"""Merging of image-text models: the image towers are merged, the classes' heads are zero-shot heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from plait_clip import ImageTextModel, prompts, zero_shot_head
from torch import Tensor, nn

from plait_wemoe.heads import CosineHead
from plait_wemoe.mixture import WeightEnsemblingMoE
from plait_wemoe.storing import load_module, save_module
from plait_wemoe.tasks import WithHeads, read_heads, write_heads


class ImageTower(nn.Module):
    """An image-text model called as an image encoder: (N, 3, H, W) in [0, 1] → (N, D)."""

    def __init__(self, model: ImageTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)

    def save_pretrained(self, folder: str | Path) -> None:
        self.model.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ImageTower:
        return cls(ImageTextModel.from_pretrained(folder))


class MergedImageText(ImageTextModel, WithHeads):
    """A merged image-text model, used wherever one is; it also has the experts' zero-shot heads.

    Args:
        encoder: an :class:`ImageTower`, or a WEMoE whose backbone is one.
    """

    stores_parts: ClassVar[bool] = True

    def __init__(self, encoder: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.set_heads(heads)
        inner = self.inner
        start = "encoder.backbone.model." if isinstance(encoder, WeightEnsemblingMoE) else "encoder.model."
        self.image_prefixes = (*(start + prefix for prefix in inner.image_prefixes), "encoder.routers.", "task_heads.")
        self.kind, self.image_input, self.context_length = inner.kind, inner.image_input, inner.context_length

    @property
    def inner(self) -> ImageTextModel:
        tower = self.encoder.backbone if isinstance(self.encoder, WeightEnsemblingMoE) else self.encoder
        return tower.model

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.inner.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.inner.logit_bias

    def encode_image(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return self.inner.encode_tokens(tokens)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return self.inner.tokenize(texts)

    def trim(self, tokens: Tensor) -> Tensor:
        return self.inner.trim(tokens)

    def too_long(self, texts: Sequence[str]) -> list[bool]:
        return self.inner.too_long(texts)

    def save_pretrained(self, folder: str | Path) -> None:
        save_module(self.encoder, Path(folder) / "encoder")
        write_heads(self.heads, Path(folder), {})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MergedImageText:
        _, heads = read_heads(folder)
        return cls(load_module(Path(folder) / "encoder"), heads)

    @classmethod
    def _load(cls, folder: Path, about: dict) -> MergedImageText:
        return cls.from_pretrained(folder)


def tower_of(model: ImageTextModel) -> nn.Module:
    """What is merged of an image-text model; of one that was merged before, what was merged then."""
    return model.encoder if isinstance(model, MergedImageText) else ImageTower(model)


def head_for(
    model: ImageTextModel, task: str, class_names: Sequence[str] | None, templates: Sequence[str] | str
) -> nn.Module:
    """The head of an expert for its task: that which it has, else the zero-shot one.

    Raises:
        KeyError: neither is there.
    """
    if isinstance(model, MergedImageText) and task in model.tasks:
        return model.heads[task]
    if class_names is None:
        raise KeyError(f"task {task!r} has no class names: give its data a ClassLabel column, or set class_names")
    return head_from_names(model, class_names, prompts.templates(templates))


def head_from_names(model: ImageTextModel, class_names: Sequence[str], templates: Sequence[str]) -> CosineHead:
    """The zero-shot head of an expert's own text tower, with its own logit scale."""
    with torch.no_grad():
        head = zero_shot_head(model, class_names, templates)
    return CosineHead(head, model.logit_scale.exp().item())
