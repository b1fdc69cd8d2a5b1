"""An image-text model that restores every image before it looks at it, as one differentiable model (needs plait-clip)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from plait_clip import ImageTextModel
from torch import Tensor

from plait_semiddm_weather.model import WeatherRestorer, Weights, derived_seed

FACTS = "restore_first.json"


class RestoringModel(ImageTextModel):
    """``encode_image`` is the mean, over ``num_samples`` restorations, of the inner model's embedding.

    The noise of sample k is that of ``first_seed + k`` for every image, so an attack through this model takes the
    expectation over these samples, and a defender who draws others is not the one it saw.
    """

    def __init__(
        self, inner: ImageTextModel, restorer: WeatherRestorer, num_samples: int, first_seed: int, weights: Weights
    ) -> None:
        super().__init__()
        if inner.kind != "contrastive":
            raise ValueError(f"model is a {inner.kind} model; restore-first takes contrastive ones")
        self.inner, self.restorer = inner, restorer
        self.num_samples, self.first_seed, self.weights = num_samples, first_seed, weights
        self.image_prefixes = tuple(f"inner.{prefix}" for prefix in inner.image_prefixes)
        self.context_length = inner.context_length
        self.image_input = inner.image_input

    @property
    def logit_scale(self) -> torch.nn.Parameter:  # type: ignore[override]
        return self.inner.logit_scale

    @property
    def logit_bias(self) -> torch.nn.Parameter | None:  # type: ignore[override]
        return self.inner.logit_bias

    def encode_image(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] → [N, D]; gradients pass through the restorer."""
        total = None
        for number in range(self.num_samples):
            seed = derived_seed(self.first_seed + number)
            random = [torch.Generator().manual_seed(seed) for _ in range(len(images))]
            features = self.inner.encode_image(self.restorer.sample(images, random, self.weights))
            total = features if total is None else total + features
        assert total is not None
        return total / self.num_samples

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """As the inner model."""
        return self.inner.encode_tokens(tokens)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """As the inner model."""
        return self.inner.tokenize(texts)

    def too_long(self, texts: Sequence[str]) -> list[bool]:
        """As the inner model."""
        return self.inner.too_long(texts)

    def trim(self, tokens: Tensor) -> Tensor:
        """As the inner model."""
        return self.inner.trim(tokens)

    def save_pretrained(self, folder: str | Path) -> None:
        """Both models, each in its own folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.inner.save_pretrained(folder / "inner")
        self.restorer.save_pretrained(folder / "restorer")
        facts = {"num_samples": self.num_samples, "first_seed": self.first_seed, "weights": self.weights}
        (folder / FACTS).write_text(json.dumps(facts))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RestoringModel:
        """What :meth:`save_pretrained` wrote.

        Raises:
            ValueError: the folder holds no such model.
        """
        folder = Path(folder)
        if not (folder / FACTS).is_file():
            raise ValueError(f"{folder} holds no {FACTS}; it is not a folder that save_pretrained wrote")
        facts = json.loads((folder / FACTS).read_text())
        inner = ImageTextModel.from_pretrained(folder / "inner")
        return cls(inner, WeatherRestorer.from_pretrained(folder / "restorer"), **facts)

    @classmethod
    def _load(cls, folder: Path, about: dict[str, object]) -> RestoringModel:
        return cls.from_pretrained(folder)
