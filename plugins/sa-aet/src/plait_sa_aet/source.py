"""The white-box model as the attacks see it: unit features, gradients with respect to the pixels only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NotDifferentiableError(RuntimeError):
    """No gradient reaches the pixels."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode and no parameter gradients inside; afterwards everything is as it was.

    Restored are ``requires_grad`` and ``.grad`` of every parameter, the mode of every submodule and the
    values of every buffer.
    """
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        model.eval().requires_grad_(False)
        yield model
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, grad in gradients:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):  # writing would spoil graphs that saved the buffer
                    buffer.copy_(before)


class Source:
    """An image-text model with the surface an attack needs. The weights must not change while it is in use.

    Args:
        model: module with ``encode_image`` ([B, 3, H, W] in [0, 1] → [B, D], differentiable; it resizes and
            normalises), ``encode_text`` (M strings → [M, D]) and ``image_size``.
        precision: ``"bf16"`` runs both encoders under autocast. Features are float32 either way.
        channels_last: hand images over in that memory format; helps convolutions on GPUs.
        compile: compile ``encode_image`` with static shapes. bf16 and compiling change the sign of a few
            near-zero gradients, so a few pixels of the result.
        text_batch_size: sentences per call of ``encode_text``.
        memory: sentences whose features are kept, the oldest go first.

    Attributes:
        num_forwards, num_backwards: single images that went through the image encoder, and back.

    Raises:
        ValueError: unknown precision, or a number below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: Literal["fp32", "bf16"] = "fp32",
        channels_last: bool = False,
        compile: bool = False,
        text_batch_size: int = 256,
        memory: int = 16384,
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision {precision!r}; allowed are fp32 and bf16")
        if text_batch_size < 1 or memory < 1:
            raise ValueError(f"text_batch_size {text_batch_size} and memory {memory} have to be at least 1")
        self.model = model
        self.rewrite: Callable[[str], str] = str  # what a sentence goes through before the encoder reads it
        self.precision = precision
        self.channels_last = channels_last
        self.text_batch_size = text_batch_size
        self.memory = memory
        self.num_forwards = 0
        self.num_backwards = 0
        self._encode_image: Any = model.encode_image
        if compile:
            self._encode_image = torch.compile(model.encode_image, dynamic=False)
        self._rows: dict[str, Tensor] = {}
        self._image_width: int | None = None
        self._text_width: int | None = None

    @property
    def image_size(self) -> int:
        """Side of the square image the model takes, in pixels."""
        return self.model.image_size

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def image_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] → float32 [B, D], rows of length 1, differentiable.

        Raises:
            NotDifferentiableError, ValueError: see :meth:`raw_image_features`.
        """
        return F.normalize(self.raw_image_features(images), dim=-1)

    def raw_image_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] → float32 [B, D] as the encoder gives them, differentiable.

        Raises:
            NotDifferentiableError: gradients are wanted and the features do not depend on the images.
            ValueError: features not finite, not [B, D], or of another width than the text's.
        """
        wants_gradient = torch.is_grad_enabled() and images.requires_grad
        images = images.to(self.device)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self._evaluating(), self._autocast():
            features = self._encode_image(images)
        if wants_gradient and not features.requires_grad:
            raise NotDifferentiableError(
                "the image features do not depend differentiably on the images, so no gradient reaches the pixels; "
                "the source must be differentiable: no inference mode, no detach, no 8-bit preprocessing, no "
                "frozen trace"
            )
        features = features.float()
        self._image_width = self._checked_width(features, len(images), "image")
        self.num_forwards += len(images)
        if wants_gradient:
            features.register_hook(self._count_backward)
        return features

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """M sentences → float32 [M, D], rows of length 1, no gradient.

        Raises:
            ValueError: see :meth:`raw_text_features`.
        """
        return F.normalize(self.raw_text_features(texts), dim=-1)

    def raw_text_features(self, texts: Sequence[str]) -> Tensor:
        """M sentences → float32 [M, D] as the encoder gives them, no gradient.

        Sentences go through the encoder in chunks, each once as long as it is remembered.

        Raises:
            ValueError: no sentence; features not finite, not [M, D], or of another width than the images'.
        """
        if not texts:
            raise ValueError("no sentence to encode")
        unique = dict.fromkeys(texts)
        rows = {text: self._rows[text] for text in unique if text in self._rows}
        missing = [text for text in unique if text not in rows]
        for start in range(0, len(missing), self.text_batch_size):
            chunk = missing[start : start + self.text_batch_size]
            with torch.no_grad(), self._evaluating(), self._autocast():
                features = self.model.encode_text([self.rewrite(text) for text in chunk])
            features = features.detach().float()
            self._text_width = self._checked_width(features, len(chunk), "text")
            rows.update(zip(chunk, features, strict=True))
        self._rows.update((text, rows[text]) for text in missing)
        for text in list(islice(self._rows, max(0, len(self._rows) - self.memory))):
            del self._rows[text]
        return torch.stack([rows[text] for text in texts])

    def _evaluating(self) -> Any:
        return frozen(self.model) if any(module.training for module in self.model.modules()) else nullcontext()

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def _count_backward(self, gradient: Tensor) -> None:
        self.num_backwards += len(gradient)

    def _checked_width(self, features: Tensor, count: int, kind: str) -> int:
        if features.ndim != 2 or len(features) != count:
            raise ValueError(f"{kind} features of shape {tuple(features.shape)}; expected [{count}, D]")
        if not features.isfinite().all():
            row = int((~features.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"the source's {kind} features are not finite, first in row {row} of the batch")
        width = features.shape[1]
        other = self._text_width if kind == "image" else self._image_width
        if other is not None and other != width:
            raise ValueError(f"the source's {kind} features have {width} dimensions, those of the other side {other}")
        return width
