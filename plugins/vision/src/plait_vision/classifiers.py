"""One shape for all that tells classes apart: images in [0, 1] → logits.

:func:`as_classifier` brings any module that gives logits, an image-text model with the names of the classes, and a model of
several tasks with one of them into it. :class:`Classifier` is a network together with what it wants done to images.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait_vision.kinds import ALL_TASKS, TEMPLATES

_TEXTS_AT_ONCE = 1024
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError)


def as_classifier(
    model: Any,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    task: str | None = None,
    prepared: bool = False,
    embeddings: Tensor | None = None,
) -> AnyClassifier:
    """Any model that can tell classes apart, as a module: images ``[N, 3, H, W]`` in [0, 1] → logits ``[N, C]``, float32.

    It is differentiable, shares its weights with the model (nothing is copied), and is in the model's mode. What the model wants
    done to images is part of it: of a :class:`Classifier`, an image-text model, a network of timm (its data configuration),
    and a classifier of transformers whose folder holds an image processor. All others get the images as they are.

    Args:
        model: a module that gives logits, or an object with ``.logits``; an image-text model (``encode_image``,
            ``encode_text`` and ``logit_scale``); or one of several tasks (``tasks`` and ``logits(images, task)``).
        class_names: of an image-text model, in the order of the labels; of others, what :attr:`AnyClassifier.class_names`
            is to say.
        templates: of an image-text model: texts with {} for the name of the class; their embeddings are averaged
            (Radford et al., ICML 2021).
        task: of a model of several tasks; ``"*"`` takes the mean of the logits of all.
        prepared: what the classifier gets is prepared for the network already, or is no image; what a network of timm or
            transformers says of itself is passed over.
        embeddings: of an image-text model: those of its classes, ``[C, D]`` of length 1, where they are known; no template is
            embedded then.

    Raises:
        TypeError: the model is none of these.
        ValueError: names, templates or task do not fit the model.
    """
    if isinstance(model, AnyClassifier):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is of type {type(model).__name__}; expected a torch module that gives logits")
    if is_image_text_model(model):
        return _OfTexts(model, class_names, templates, embeddings)
    if is_multi_task_model(model):
        return _OfTask(model, task, class_names, prepared)
    if task is not None and task != ALL_TASKS:
        raise ValueError(f"task is {task!r}, and a {type(model).__name__} has no tasks; leave task out")
    return _OfModule(model, class_names, prepared)


def is_image_text_model(model: Any) -> bool:
    """Whether images are compared with texts."""
    return callable(getattr(model, "encode_image", None)) and callable(getattr(model, "encode_text", None))


def is_multi_task_model(model: Any) -> bool:
    """Whether there are logits for each of several tasks."""
    return isinstance(getattr(model, "tasks", None), (tuple, list)) and callable(getattr(model, "logits", None))


def as_logits(output: Any) -> Any:
    """What a model returns, or its ``logits`` where it is an object that has some."""
    return getattr(output, "logits", output)


class Preparation(nn.Module):
    """What a network wants done to images: ``[N, 3, H, W]`` in [0, 1], any size → resized, cropped and normalised.

    It is differentiable; pixels differ from those of a library's own resizing by the rounding of 8-bit arithmetic.

    Args:
        size: height and width after the crop; one number is both; ``None`` takes images as they are.
        mean, std: of each channel, of images in [0, 1].
        resize: ``crop`` brings the shorter side to ``shorter`` and crops the centre, ``squash`` ignores the ratio of the sides.
        shorter: the shorter side before the crop; default: as large as the crop.
        interpolation: ``bicubic`` or ``bilinear``, both with antialiasing.
    """

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        *,
        resize: Literal["crop", "squash"] = "crop",
        shorter: int | None = None,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    ) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean is {list(mean)} and std {list(std)}; give three numbers each, std above 0")
        self.size = (size, size) if isinstance(size, int) else tuple(size) if size else None
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.resize, self.shorter, self.interpolation = resize, shorter, interpolation

    def to_size(self, images: Tensor) -> Tensor:
        """Resized and cropped, still in [0, 1]."""
        height, width = images.shape[-2:]
        if self.size is None or self.size == (height, width):
            return images
        target = self.size
        if self.resize == "crop":
            shorter = max(self.shorter or 0, *self.size)
            scale = shorter / min(height, width)
            target = (max(shorter, int(height * scale)), max(shorter, int(width * scale)))
        if target != (height, width):
            images = F.interpolate(images, target, mode=self.interpolation, antialias=True, align_corners=False)
            images = images.clamp(0, 1)  # bicubic weights overshoot
        top, left = ((have - wanted) // 2 for have, wanted in zip(target, self.size, strict=True))
        return images[..., top : top + self.size[0], left : left + self.size[1]]

    def forward(self, images: Tensor) -> Tensor:
        images = self.to_size(images)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std


class AnyClassifier(nn.Module):
    """Images ``[N, 3, H, W]`` in [0, 1] → logits ``[N, C]``; :func:`as_classifier` makes one of any model.

    Attributes:
        class_names: in the order of the logits; ``None`` where they are not known.
        preparation: what is done to images before the model, where it has a size of its own; else ``None``.
    """

    class_names: tuple[str, ...] | None
    preparation: Preparation | None

    def scores(self, images: Tensor) -> Any:
        """What the model makes of images: logits, or an object that has some."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32.

        Raises:
            ValueError: the model fails on the images, or gives something else.
        """
        shape = tuple(images.shape)
        try:
            logits = as_logits(self.scores(images))
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            raise ValueError(
                f"the model fails on inputs of shape {shape} ({type(error).__name__}: {reason})"
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != shape[0]:
            given = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(
                f"the model gives {given} for inputs of shape {shape}; expected logits ({shape[0]}, classes)"
            )
        return logits.float()


class Classifier(AnyClassifier):
    """A network with what it wants done to images, and the names of its classes.

    ``plait.build_module`` builds one that a step can return: give it a function that builds both. See
    :mod:`plait_vision.networks` for those of torchvision, timm and transformers.
    """

    def __init__(
        self, network: nn.Module, preparation: Preparation | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.preparation = preparation or Preparation()
        self.class_names = tuple(class_names) if class_names else None

    def scores(self, images: Tensor) -> Any:
        prepared = images if self.preparation is None else self.preparation(images)
        return self.network(in_dtype_of(self.network, prepared))


class _OfModule(AnyClassifier):
    def __init__(self, model: nn.Module, class_names: Sequence[str] | None, prepared: bool) -> None:
        super().__init__()
        self.model = model
        self.preparation = None if prepared else preparation_of(model)
        self.class_names = tuple(class_names) if class_names else None
        self.training = model.training

    def scores(self, images: Tensor) -> Any:
        prepared = images if self.preparation is None else self.preparation(images)
        return self.model(in_dtype_of(self.model, prepared))


class _OfTask(AnyClassifier):
    def __init__(self, model: Any, task: str | None, class_names: Sequence[str] | None, prepared: bool) -> None:
        super().__init__()
        tasks = tuple(model.tasks)
        if task is None and len(tasks) != 1:
            raise ValueError(f"the model has the tasks {', '.join(tasks)}; name one of them by task")
        if task not in (None, ALL_TASKS, *tasks):
            raise ValueError(f"task is {task!r}; the model has the tasks {', '.join(tasks)}")
        self.model = model
        self.tasks = tasks if task in (None, ALL_TASKS) else (task,)
        self.preparation = None if prepared else preparation_of(model)
        self.class_names = tuple(class_names) if class_names else None
        self.training = model.training

    def scores(self, images: Tensor) -> Any:
        model: Any = self.model
        prepared = in_dtype_of(model, images if self.preparation is None else self.preparation(images))
        return torch.stack([model.logits(prepared, task) for task in self.tasks]).mean(0)


class _OfTexts(AnyClassifier):
    """exp(logit_scale) · cos(image, class) + logit_bias; a class is the mean of the embeddings of its texts, which stay fixed."""

    def __init__(
        self, model: Any, class_names: Sequence[str] | None, templates: Sequence[str], embeddings: Tensor | None
    ) -> None:
        super().__init__()
        names = tuple(class_names or ())
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(
                f"class_names is {', '.join(names) or 'empty'}; an image-text model tells two classes and more apart by names "
                "that differ"
            )
        if not templates or any("{}" not in template for template in templates):
            raise ValueError("templates are texts with {} in each, and at least one; write 'a photo of a {}.'")
        self.model, self.class_names, self.preparation = model, names, None
        self.training = model.training
        known = self._embedded(model, names, templates) if embeddings is None else embeddings
        self.register_buffer("classes", known, persistent=False)

    @staticmethod
    def _embedded(model: Any, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        texts = [template.replace("{}", name) for name in names for template in templates]
        with evaluating(model), torch.no_grad():
            parts = [
                model.encode_text(texts[start : start + _TEXTS_AT_ONCE]).float()
                for start in range(0, len(texts), _TEXTS_AT_ONCE)
            ]
        embedded = F.normalize(torch.cat(parts), dim=-1).view(len(names), len(templates), -1)
        return F.normalize(embedded.mean(1), dim=-1)

    def scores(self, images: Tensor) -> Tensor:
        model: Any = self.model
        features = F.normalize(model.encode_image(images).float(), dim=-1)
        scale = getattr(model, "logit_scale", None)
        bias = getattr(model, "logit_bias", None)
        logits = features @ self.get_buffer("classes").T
        logits = logits if scale is None else logits * scale.float().exp()
        return logits if bias is None else logits + bias.float()


def on_device(model: Any, device: Any) -> Any:
    """The model itself where it is on the device already, else a copy there: the one that was given stays where it is."""
    if not isinstance(model, nn.Module):
        return model  # as_classifier says what is wrong with it
    wanted = torch.empty(0, device=device).device  # cuda → cuda:0
    tensors = [*model.parameters(), *model.buffers()]
    return model if all(tensor.device == wanted for tensor in tensors) else copy.deepcopy(model).to(wanted)


@contextlib.contextmanager
def own_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every part has the mode again, train or eval, that it came with."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every part has its own mode again afterwards."""
    with own_modes(model):
        model.eval()
        yield


def preparation_of(model: nn.Module) -> Preparation | None:
    """What a network says of itself: timm's data configuration, or the image processor beside a model of transformers.

    ``None`` where it says nothing: it gets images in [0, 1].

    Raises:
        ValueError: an image processor does what no :class:`Preparation` can.
    """
    for part in model.modules():
        config = getattr(part, "pretrained_cfg", None)
        if isinstance(config, Mapping) and {"mean", "std", "input_size"} <= config.keys():
            return _of_timm(part)
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    if isinstance(name, str) and name and (Path(name) / "preprocessor_config.json").is_file():
        return preparation_of_processor(name)
    return None


def _of_timm(model: nn.Module) -> Preparation:
    from timm.data import resolve_model_data_config

    facts = resolve_model_data_config(model)
    # The configuration tells the size of the pre-trained weights, whatever the network was made for.
    side = getattr(getattr(model, "patch_embed", None), "img_size", None) or facts["input_size"][1:]
    return Preparation(
        tuple(side),
        facts["mean"],
        facts["std"],
        resize="squash" if facts.get("crop_mode") == "squash" else "crop",
        shorter=int(min(side) / facts.get("crop_pct", 1.0)),
        interpolation="bilinear" if facts.get("interpolation") == "bilinear" else "bicubic",
    )


def preparation_of_processor(folder: str | Path) -> Preparation:
    """What the image processor of transformers in a local folder does.

    Raises:
        ValueError: it holds none, or one that does something else than resizing, cropping and normalising.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no image processor that transformers can read ({error})") from error
    facts = processor.to_dict()
    if facts.get("do_pad") or abs(float(facts.get("rescale_factor") or 1 / 255) - 1 / 255) > 1e-6:
        raise ValueError(f"the image processor in {folder} pads images or scales them to another range than [0, 1]")
    size, crop = facts.get("size") or {}, facts.get("crop_size") if facts.get("do_center_crop") else None
    shorter = size.get("shortest_edge")
    if crop and shorter is None and size:
        raise ValueError(f"the image processor in {folder} squeezes images and crops them, which is not supported")
    sides = crop or size
    final: Any = (sides.get("height", shorter), sides.get("width", shorter)) if sides else None
    if facts.get("do_resize") is False and not crop:
        final = None
    normalises = facts.get("do_normalize", True)
    return Preparation(
        final,
        facts["image_mean"] if normalises else (0.0,) * 3,
        facts["image_std"] if normalises else (1.0,) * 3,
        resize="squash" if shorter is None else "crop",
        shorter=shorter,
        interpolation="bilinear" if int(facts.get("resample") or 3) == 2 else "bicubic",
    )


def in_dtype_of(model: nn.Module, images: Tensor) -> Tensor:
    """Images in the type of the model's first weight; image-text models inside convert by themselves."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    if dtype == images.dtype or not images.is_floating_point() or torch.is_autocast_enabled(images.device.type):
        return images
    return images if any(hasattr(part, "encode_image") for part in model.modules()) else images.to(dtype)
