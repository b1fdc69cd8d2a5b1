"""A small classifier for the built-in examples."""

from __future__ import annotations

from typing import Any

from plait.optional import require

nn: Any = require("torch.nn")
mixin: Any = require("huggingface_hub").PyTorchModelHubMixin


class Classifier(nn.Module, mixin):  # type: ignore[misc]
    """Two layers, ``[N, 3, 8, 8]`` in [0, 1] → ``[N, 10]`` logits."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, images: Any) -> Any:
        """Logits."""
        return self.layers(images)


def make_classifier(seed: int) -> Classifier:
    """A classifier with seeded weights, in eval mode."""
    torch = require("torch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Classifier = Classifier().eval()
        return model
