"""Any module with an image function and a text function behind the common interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from plait.importing import makes, stored_object
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from plait_clip.model.image_input import ImageInput
from plait_clip.model.interface import ImageTextModel, write_about
from plait_clip.model.tokenizer import WordTokenizer


class CallableModel(ImageTextModel):
    """Wraps ``module`` with two callables.

    Args:
        module: holds all parameters.
        image_encoder: ``(module, pixels [N, 3, S, S] normalised) -> [N, D]``.
        text_encoder: ``(module, tokens [N, L]) -> [N, D]``.
        tokenizer: ``(texts, context_length) -> [N, L]``; shorter texts end in zeros.
        image_input: resizing and normalising.
        log_scale: start of ``logit_scale`` where the module has none.
        image_prefixes: how the names of the image tower's weights begin, ``module.`` first; needed to train one tower.
        factory: ``"package.module:function"`` that makes an equal object and says so (``-> CallableModel``); needed to load a saved one.

    Raises:
        TypeError: an encoder is missing.
    """

    def __init__(
        self,
        module: nn.Module,
        image_encoder: Callable[[nn.Module, Tensor], Tensor],
        text_encoder: Callable[[nn.Module, Tensor], Tensor],
        tokenizer: Callable[..., Tensor],
        image_input: ImageInput,
        *,
        context_length: int = 77,
        log_scale: float = 2.6592600369,
        image_prefixes: Sequence[str] = (),
        factory: str | None = None,
    ) -> None:
        super().__init__()
        for name, encoder in (("image_encoder", image_encoder), ("text_encoder", text_encoder)):
            if not callable(encoder):
                raise TypeError(
                    f"{name} is {encoder!r}; both towers are needed, give a callable (module, batch) -> [N, D]"
                )
        self.module = module
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.image_input = image_input
        self.context_length = context_length
        self.image_prefixes = tuple(image_prefixes)
        self.factory = factory
        self._own_scale = not isinstance(getattr(module, "logit_scale", None), nn.Parameter)
        if self._own_scale:
            self.log_scale = nn.Parameter(torch.tensor(log_scale))

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.log_scale if self._own_scale else self.module.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return getattr(self.module, "logit_bias", None)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image_encoder(self.module, self._pixels(images))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return self.text_encoder(self.module, tokens)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer(list(texts), context_length=self.context_length)

    def too_long(self, texts: Sequence[str]) -> list[bool]:
        return (self.tokenizer(list(texts), context_length=self.context_length + 1)[:, -1] != 0).tolist()

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights and the factory's name.

        Raises:
            ValueError: the model has no factory, so nothing could load it again.
        """
        if self.factory is None:
            raise ValueError(
                "a CallableModel is saved by name: give it factory='package.module:function', a function that makes it"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, str(folder / "model.safetensors"))
        if isinstance(self.tokenizer, WordTokenizer):
            self.tokenizer.save_pretrained(folder)
        write_about(folder, {"library": "callable", "factory": self.factory})

    @classmethod
    def _load(cls, folder: Path, about: dict[str, Any]) -> CallableModel:
        make = stored_object(
            about["factory"], None, makes(CallableModel), "a function annotated to return a CallableModel"
        )
        model: CallableModel = make()
        load_model(model, str(folder / "model.safetensors"))
        return model
