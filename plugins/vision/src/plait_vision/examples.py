"""Small inputs on which ``plait check`` tries the methods."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from plait.demo.pictures import digits
from plait.testing import Example
from plait.testing.examples import classifier


def labelled_images() -> Example:
    """Four PNG files in two class folders."""
    folder = Path(tempfile.mkdtemp(prefix="plait-example-"))
    generator = np.random.default_rng(0)
    for name in ("cat/a", "cat/b", "dog/a", "dog/b"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return Example(arguments={}, fields={"source": str(folder)}, device=False)


def select() -> Example:
    return _on_rows({"where": {"label": ["cat", "dog"]}, "draw": 3}, random=True)


def concat() -> Example:
    data = _rows()
    return Example(
        arguments={"data": {"a": data, "b": data.select([1, 0])}},
        fields={"origin": "source"},
        progress=False,
        device=False,
        empty={"data": {}},
        wrong={"data": {"a": data, "b": data.remove_columns("label")}},
    )


def relabel() -> Example:
    return _on_rows({"classes": {"cat": "pet", "dog": "pet"}})


def caption() -> Example:
    return _on_rows({"shift": 1})


def resize() -> Example:
    return _on_rows({"size": 4}, progress=True)


def torchvision() -> Example:
    return _network({"architecture": "shufflenet_v2_x0_5"})


def timm() -> Example:
    return _network({"architecture": "test_resnet"})


def transformers_classifier() -> Example:
    """A folder with a small ViT and its image processor."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = Path(tempfile.mkdtemp(prefix="plait-example-"))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.2] * 3).save_pretrained(folder)
    return Example(arguments={}, fields={"folder": str(folder)}, progress=False, device=False, outputs=_logits)


def classifier_training() -> Example:
    return _on_classifier(
        {"num_epochs": 2, "batch_size": 4, "flip": True, "crop_padding": 1}, random=True, outputs=_logits
    )


def accuracy() -> Example:
    return _on_classifier({"top": [1, 3], "target": "0"})


def fgsm() -> Example:
    return _on_classifier({}, keeps_rows=True, budget=8 / 255)


def pgd_logits() -> Example:
    return _on_classifier({"num_steps": 2}, keeps_rows=True, budget=8 / 255, random=True)


def _on_classifier(fields: dict[str, Any], **facts: Any) -> Example:
    data = digits()
    return Example(
        arguments={"model": classifier(), "data": data},
        fields=fields,
        empty={"data": data.select([])},
        wrong={"model": object(), "data": data.remove_columns("image")},
        **facts,
    )


def _network(fields: dict[str, Any]) -> Example:
    data = _rows()
    return Example(
        arguments={"data": data},
        fields=fields,
        random=True,
        progress=False,
        device=False,
        empty={"data": data.select([])},
        wrong={"data": data.remove_columns("label")},
        outputs=_logits,
    )


def _logits(model: Any) -> Any:
    """What a model says about two images."""
    import torch

    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(images)


def _rows() -> datasets.Dataset:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (8, 6, 3), dtype=np.uint8)) for _ in range(6)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "tree"])}
    )
    return datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 2, 0, 1, 2]}, features=features)


def _on_rows(fields: dict[str, Any], **facts: Any) -> Example:
    data = _rows()
    return Example(
        arguments={"data": data},
        fields=fields,
        device=False,
        empty={"data": data.select([])},
        wrong={"data": [1, 2, 3]},
        **{"progress": False, **facts},
    )
