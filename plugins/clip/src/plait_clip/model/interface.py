"""The one interface that training, evaluation, attacks and defences use."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait_clip.model.image_input import ImageInput

ABOUT = "plait.json"


class ImageTextModel(nn.Module, ABC):
    """An image tower and a text tower with a common space of D dimensions.

    Embeddings are not normalised; the cosine of an image and a text is the product of the normalised ones.

    Attributes:
        kind: ``"contrastive"`` (two towers) or ``"fusion"`` (two towers and :meth:`match`, which
            scores an image and a text together).
        image_prefixes: how the names of the image tower's weights begin in ``state_dict()``.
        logit_scale: log of the factor of the cosine in the contrastive loss, ``nn.Parameter``.
        logit_bias: what SigLIP adds to the logits, ``nn.Parameter`` or None.
        image_input: resizing and normalising, part of :meth:`encode_image`.
        context_length: tokens a text is cut to.
    """

    kind: str = "contrastive"
    image_prefixes: tuple[str, ...] = ()
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    image_input: ImageInput
    context_length: int

    @property
    def image_size(self) -> int:
        """Side of the square image that the image tower takes, in pixels."""
        return self.image_input.size

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.logit_scale.device

    def _pixels(self, images: Tensor) -> Tensor:
        return self.image_input(images).to(self.logit_scale.dtype)

    @abstractmethod
    def encode_image(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] → [N, D], not normalised; differentiable; resizes and normalises."""

    @abstractmethod
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """[N, L] token ids, L up to ``context_length`` → [N, D], not normalised."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """N texts → [N, context_length] token ids, int64, on the CPU; longer texts are cut."""

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Which of the texts :meth:`tokenize` cuts."""
        # A token stands for at least one byte, so short texts need no second look.
        long = [i for i, text in enumerate(texts) if len(text.encode()) >= self.context_length - 3]
        cut = dict(zip(long, self.too_long([texts[i] for i in long]), strict=True)) if long else {}
        return [cut.get(i, False) for i in range(len(texts))]

    @abstractmethod
    def too_long(self, texts: Sequence[str]) -> list[bool]:
        """Which of the texts have more tokens than ``context_length``; :meth:`truncated` asks for few texts only."""

    def text_state(self) -> dict[str, Tensor]:
        """The weights that text embeddings may depend on: all but the image tower's and the logit scale."""
        outside = self.image_prefixes
        state = self.state_dict()
        return {
            n: t
            for n, t in state.items()
            if not n.startswith(outside) and not n.endswith(("logit_scale", "logit_bias", "log_scale"))
        }

    def trim(self, tokens: Tensor) -> Tensor:
        """Drop the last columns where that changes no embedding; here: none."""
        return tokens

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """N texts → [N, D], not normalised; equal texts are encoded once."""
        unique = list(dict.fromkeys(texts))
        features = self.encode_tokens(self.trim(self.tokenize(unique)).to(self.device))
        if len(unique) == len(texts):
            return features
        position = {text: i for i, text in enumerate(unique)}
        return features[torch.tensor([position[text] for text in texts], device=features.device)]

    def match(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """[N, 3, H, W] and N texts → [N] scores of each pair; fusion models only.

        Raises:
            TypeError: the model has two towers and nothing that joins them.
            ValueError: there are not as many texts as images.
        """
        return self.match_states(self.image_states(images), texts)

    def image_states(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] → [N, P, C], what :meth:`match_states` sees of an image; fusion models only."""
        raise TypeError(f"a {self.kind} {type(self).__name__} does not score pairs; use a fusion model")

    def match_states(self, states: Tensor, texts: Sequence[str]) -> Tensor:
        """[N, P, C] and N texts → [N] scores of each pair; fusion models only."""
        raise TypeError(f"a {self.kind} {type(self).__name__} does not score pairs; use a fusion model")

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Both embeddings, not normalised: [N, D] and [M, D]."""
        return self.encode_image(images), self.encode_tokens(tokens)

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in its library's own format, and ``plait.json``."""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ImageTextModel:
        """Read a folder that :meth:`save_pretrained` wrote, with whichever class wrote it.

        Raises:
            ValueError: the folder holds no such model.
        """
        from plait_clip import model

        about = read_about(folder)
        classes: dict[str, type[ImageTextModel]] = {
            "open_clip": model.OpenClipModel,
            "transformers": model.TransformersModel,
            "callable": model.CallableModel,
        }
        if about.get("library") not in classes:
            raise ValueError(
                f"{Path(folder) / ABOUT} names library {about.get('library')!r}; known are {', '.join(classes)}"
            )
        with torch.random.fork_rng(devices=[]):  # libraries draw fresh weights before they read the saved ones
            return classes[about["library"]]._load(Path(folder), about)

    @classmethod
    @abstractmethod
    def _load(cls, folder: Path, about: dict[str, Any]) -> ImageTextModel: ...


def image_text_model(model: object) -> ImageTextModel:
    """The model itself.

    Raises:
        TypeError: it is not an image-text model.
    """
    if not isinstance(model, ImageTextModel):
        raise TypeError(f"model is a {type(model).__name__}; expected an image-text model of plait-clip")
    return model


def on_device(model: object, device: Any) -> ImageTextModel:
    """The model on a device: itself where it is there already, else a copy, so that the input stays where it is.

    Raises:
        TypeError: it is not an image-text model.
    """
    model = image_text_model(model)
    device = torch.empty(0, device=device).device  # cuda → cuda:0
    return model if model.device == device else copy.deepcopy(model).to(device)


def write_about(folder: str | Path, about: dict[str, Any]) -> None:
    (Path(folder) / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def read_about(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / ABOUT
    if not path.is_file():
        raise ValueError(f"{folder} holds no {ABOUT}; it is not a folder that save_pretrained wrote")
    return json.loads(path.read_text(encoding="utf-8"))
