"""A small classifier that saves itself, its training and its score."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from plait.freezing import thawed
from plait.optional import require

torch: Any = require("torch")
mixin: Any = require("huggingface_hub").PyTorchModelHubMixin


class Classifier(torch.nn.Module, mixin):  # type: ignore[misc]
    """Two layers, ``[N, 3, 8, 8]`` in [0, 1] → ``[N, 10]`` logits."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        nn = torch.nn
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, images: Any) -> Any:
        """Logits."""
        return self.layers(images)


def make_classifier(seed: int, width: int = 8) -> Classifier:
    """A classifier with seeded weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Classifier = Classifier(width=width).eval()
    return model


def images_of(data: Any, column: str = "image") -> Any:
    """The images of a small dataset as one float tensor ``[N, 3, H, W]`` in [0, 1].

    Raises:
        ValueError: the column is missing, or there are no rows.
    """
    if column not in data.column_names:
        raise ValueError(f"the data has no column {column!r}; it has {', '.join(data.column_names)}")
    if not len(data):
        raise ValueError("the data has no rows; give at least one")
    numpy = require("numpy")
    levels = numpy.stack([numpy.asarray(image.convert("RGB")) for image in data[column]])
    return torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 255


def labels_of(data: Any) -> Any:
    """The classes, int64 ``[N]``."""
    if "label" not in data.column_names:
        raise ValueError(f"the data has no column 'label'; it has {', '.join(data.column_names)}")
    return torch.tensor(data["label"])


def train(model: Any, images: Any, labels: Any, steps: Iterable[int], learning_rate: float, device: Any) -> Any:
    """A trained copy of a model: full-batch Adam on the cross-entropy."""
    trained = copy.deepcopy(thawed(model)).to(device).train()
    images, labels = images.to(device), labels.to(device)
    optimizer = torch.optim.Adam(trained.parameters(), lr=learning_rate)
    for _ in steps:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(trained(images), labels).backward()
        optimizer.step()
    for parameter in trained.parameters():
        parameter.grad = None
    return trained.cpu().eval()


def accuracy(model: Any, images: Any, labels: Any) -> float:
    """Share of images whose class has the largest logit."""
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).float().mean())
