"""Zero-shot classification: a class is the mean of its prompts' embeddings."""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import plait_vision
import torch
import torch.nn.functional as F
from plait.fingerprints import fingerprint
from plait_vision import ImageRows
from torch import Tensor, nn

from plait_clip import prompts
from plait_clip.model import ImageTextModel
from plait_clip.pair_batches import image_batches

_HEADS: OrderedDict[str, Tensor] = OrderedDict()
_MAX_HEADS = 8


@contextlib.contextmanager
def evaluating(model: nn.Module, precision: str = "fp32") -> Iterator[None]:
    """Eval mode, no gradients, autocast for ``"bf16"``; every part has its own mode again afterwards."""
    device = next(model.parameters()).device
    with (
        plait_vision.evaluating(model),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, precision == "bf16"),
    ):
        yield


def zero_shot_head(
    model: ImageTextModel,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 2048,
    cache: bool = True,
    precision: str = "fp32",
) -> Tensor:
    """``w_k = norm(mean_j norm(f_T(template_j(k))))``: [K, D], rows of length 1, float32, on the model's device.

    Args:
        class_names: K names, put into the ``{}`` of every template.
        batch_size: prompts per forward pass.
        cache: return the head of the same text tower, names and templates again without computing it.

    Raises:
        ValueError: fewer than two classes, a duplicate name, or a template without ``{}``.
    """
    names, texts = tuple(class_names), prompts.templates(tuple(templates))
    if len(names) < 2:
        raise ValueError(f"there is {len(names)} class; zero-shot classification needs at least two")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate class name {twice!r}; names must differ")
    key = _head_key(model, names, texts, precision) if cache else ""
    if cache and key in _HEADS:
        _HEADS.move_to_end(key)
        return _HEADS[key].to(model.device)
    per_batch = max(1, batch_size // len(texts))
    parts = []
    with evaluating(model, precision):
        for start in range(0, len(names), per_batch):
            group = names[start : start + per_batch]
            filled = [prompts.fill(template, name) for name in group for template in texts]
            features = F.normalize(model.encode_text(filled).float(), dim=-1)
            parts.append(F.normalize(features.view(len(group), len(texts), -1).mean(dim=1), dim=-1))
    head = torch.cat(parts)
    if not bool(torch.isfinite(head).all()):
        raise ValueError("the text embeddings of the classes are not finite; load a sound model")
    if cache:
        _HEADS[key] = head.cpu()
        while len(_HEADS) > _MAX_HEADS:
            _HEADS.popitem(last=False)
    return head


def _head_key(model: ImageTextModel, names: Sequence[str], texts: Sequence[str], precision: str) -> str:
    tokens = model.tokenize(list(texts[:1])).tolist()
    facts = (type(model).__name__, names, texts, precision, tokens, fingerprint(model.text_state()))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def image_features(
    model: ImageTextModel, batches: Iterable[Tensor], *, normalise: bool = True, precision: str = "fp32"
) -> Iterator[Tensor]:
    """Batches of images (uint8 or float in [0, 1], [B, 3, H, W]) → [B, D] float32 each, on the model's device."""
    for images in batches:
        images = images.to(model.device, non_blocking=True)
        pixels = images if images.is_floating_point() else images.float() / 255
        with evaluating(model, precision):
            features = model.encode_image(pixels).float()
        yield F.normalize(features, dim=-1) if normalise else features


def top_classes(
    model: ImageTextModel, head: Tensor, batches: Iterable[Tensor], *, top: int = 10, precision: str = "fp32"
) -> Tensor:
    """The ``min(top, K)`` classes nearest to each image, nearest first: int64 [N, min(top, K)] on the CPU."""
    num = min(top, len(head))
    found = [(u @ head.T).topk(num, dim=1).indices.cpu() for u in image_features(model, batches, precision=precision)]
    return torch.cat(found) if found else torch.empty(0, num, dtype=torch.long)


def accuracy(top: Tensor, labels: Tensor, m: int) -> float:
    """Share of rows whose label is among their first ``m`` classes."""
    return float((top[:, :m] == labels[:, None]).any(dim=1).float().mean())


def classify(
    model: ImageTextModel,
    head: Tensor,
    dataset: datasets.Dataset,
    *,
    top: int = 10,
    batch_size: int = 256,
    precision: str = "fp32",
) -> Tensor:
    """:func:`top_classes` for the ``image`` column of a dataset."""
    batches = image_batches(dataset, model.image_input, batch_size=batch_size)
    return top_classes(model, head, batches, top=top, precision=precision)


def image_tensors(model: Any, dataset: datasets.Dataset, *, batch_size: int = 256) -> Iterator[Tensor]:
    """The images of a dataset in order, ``[B, 3, H, W]``: uint8 as an image-text model's own preprocessing has them.

    For any other model float in [0, 1]: as they are, or, of several sizes, brought to that of its ``preparation``.
    """
    own = getattr(model, "image_input", None)
    if own is not None:
        yield from image_batches(dataset, own, batch_size=batch_size)
        return
    images = ImageRows(dataset)
    for start in range(0, len(images), batch_size):
        rows = range(start, min(start + batch_size, len(images)))
        yield images.stacked(rows, getattr(model, "preparation", None))


def outputs(module: nn.Module, batches: Iterable[Tensor], device: Any, precision: str = "fp32") -> Tensor:
    """What a module of images in [0, 1] makes of all batches, in order, ``[N, ...]`` float32."""
    found = []
    for images in batches:
        images = images.to(device, non_blocking=True)
        with evaluating(module, precision):
            found.append(module(images if images.is_floating_point() else images.float() / 255).float())
    return torch.cat(found)
