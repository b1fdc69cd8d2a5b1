"""One shape for all that sees something in images: images in [0, 1] → features, what a linear layer can be put on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from plait_vision.classifiers import as_classifier, in_dtype_of, is_multi_task_model, preparation_of
from plait_vision.kinds import ALL_TASKS


def as_features(model: Any) -> nn.Module:
    """Any model of images as a module: images ``[N, 3, H, W]`` in [0, 1] → features ``[N, D]``, float32, of any length.

    They are what an image-text model makes of images (``encode_image``, not normalised), what a model of several tasks has before
    its heads (``features``), and of any other classifier, as :func:`plait_vision.as_classifier` takes them, what enters its last
    linear layer. It shares its weights with the model, and is in the model's mode.

    Raises:
        TypeError: the model is none of these.
    """
    if isinstance(model, nn.Module) and callable(getattr(model, "encode_image", None)):
        return _Encoded(model)
    if is_multi_task_model(model) and callable(getattr(model, "features", None)):
        return _BeforeHeads(model)
    return _BeforeLastLayer(model)


class _Encoded(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.preparation = None
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.model
        return _checked(model.encode_image(images), images)


class _BeforeHeads(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.preparation = preparation_of(model)
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.model
        prepared = images if self.preparation is None else self.preparation(images)
        return _checked(model.features(in_dtype_of(model, prepared)), images)


class _BeforeLastLayer(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.classifier = as_classifier(model, task=ALL_TASKS if is_multi_task_model(model) else None)
        self.preparation = self.classifier.preparation
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        seen: list[tuple[Tensor, Tensor]] = []
        with _watched(self.classifier, seen):
            logits = self.classifier(images)
        if not seen or seen[-1][1].shape != logits.shape:
            raise ValueError("the model does not end in a linear layer, so that there are no features before it")
        return _checked(seen[-1][0], images)


@contextmanager
def _watched(model: nn.Module, seen: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """What enters and leaves the linear layer that was run last."""

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = [(inputs[0], output)]

    hooks = [part.register_forward_hook(keep) for part in model.modules() if isinstance(part, nn.Linear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _checked(features: Any, images: Tensor) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
        given = f"a tensor {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise ValueError(f"the model gives {given} for {len(images)} images; expected features ({len(images)}, D)")
    return features.float()
