"""CLIP, SigLIP and BLIP image-text matching of transformers behind the common interface."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait_clip.model.image_input import ImageInput, ProcessorInput
from plait_clip.model.interface import ImageTextModel, write_about


class TransformersModel(ImageTextModel):
    """A transformers model with its tokenizer and its preprocessing.

    Args:
        model: a model with ``get_image_features`` and ``get_text_features`` (CLIP, SigLIP, ...), or
            ``BlipForImageTextRetrieval``, which is a fusion model.
        tokenizer: the transformers tokenizer of the model.
        image_input: resizing and normalising.
        log_scale: start of ``logit_scale`` for models without one of their own (BLIP).

    Raises:
        TypeError: the model lacks one of the two towers.
    """

    image_prefixes = ("model.vision_model.", "model.visual_projection.", "model.vision_proj.")

    def __init__(
        self, model: nn.Module, tokenizer: Any, image_input: ImageInput, *, log_scale: float = 2.6592600369
    ) -> None:
        super().__init__()
        self.kind = "fusion" if _is_blip(model) else "contrastive"
        missing = [name for name in ("get_image_features", "get_text_features") if not hasattr(model, name)]
        if self.kind == "contrastive" and missing:
            raise TypeError(f"{type(model).__name__} has no {' and no '.join(missing)}; both towers are needed")
        self.model = model
        self.tokenizer = tokenizer
        self.image_input = image_input
        text_config = model.config.text_config
        self.context_length = int(text_config.max_position_embeddings)
        self._own_scale = not hasattr(model, "logit_scale")
        if self._own_scale:
            self.log_scale = nn.Parameter(torch.tensor(log_scale, dtype=next(model.parameters()).dtype))

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.log_scale if self._own_scale else self.model.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return getattr(self.model, "logit_bias", None)

    def encode_image(self, images: Tensor) -> Tensor:
        pixels = self._pixels(images)
        if self.kind == "fusion":
            return self.model.vision_proj(self._patches(pixels)[:, 0])
        return _features(self.model.get_image_features(pixel_values=pixels))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        mask = self._mask(tokens)
        if self.kind == "fusion":
            states = self.model.text_encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
            return self.model.text_proj(states[:, 0])
        return _features(self.model.get_text_features(input_ids=tokens, attention_mask=mask))

    def image_states(self, images: Tensor) -> Tensor:
        if self.kind != "fusion":
            return super().image_states(images)
        return self._patches(self._pixels(images))

    def match_states(self, states: Tensor, texts: Sequence[str]) -> Tensor:
        """Log-odds that image i and text i belong together, [N]."""
        if self.kind != "fusion":
            return super().match_states(states, texts)
        if len(states) != len(texts):
            raise ValueError(f"{len(states)} images and {len(texts)} texts; give as many")
        tokens = self.trim(self.tokenize(texts)).to(states.device)
        joint = self.model.text_encoder(
            input_ids=tokens,
            attention_mask=self._mask(tokens),
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
        ).last_hidden_state
        no, yes = self.model.itm_head(joint[:, 0]).unbind(dim=1)
        return yes - no

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        encoded = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        return encoded["input_ids"]

    def too_long(self, texts: Sequence[str]) -> list[bool]:
        return [len(ids) > self.context_length for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]]

    def trim(self, tokens: Tensor) -> Tensor:
        """Cut to the longest text where padding has no influence (causal or masked towers)."""
        model_type = self.model.config.model_type
        if len(tokens) == 0 or (self.kind != "fusion" and model_type != "clip"):
            return tokens
        if self.kind == "fusion":
            used = (tokens != self.tokenizer.pad_token_id).sum(dim=1)
        elif self.model.text_model.eos_token_id == 2:  # old configurations read at the largest id
            used = tokens.argmax(dim=1) + 1
        else:
            used = (tokens == self.model.text_model.eos_token_id).int().argmax(dim=1) + 1
        return tokens[:, : int(used.max())]

    def _patches(self, pixels: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values=pixels).last_hidden_state

    def _mask(self, tokens: Tensor) -> Tensor | None:
        # CLIP is causal and often pads with its end token, SigLIP was trained to see its padding.
        return (tokens != self.tokenizer.pad_token_id).long() if self.kind == "fusion" else None

    @classmethod
    def from_source(cls, source: str, revision: str | None = None) -> TransformersModel:
        """A model of the hub or of a local folder, with the tokenizer and the image processor next to it.

        Raises:
            ValueError: it is not there, or transformers cannot load it.
            TypeError: it lacks one of the towers.
        """
        import transformers

        try:
            kind = transformers.AutoConfig.from_pretrained(source, revision=revision).model_type
            loader = transformers.BlipForImageTextRetrieval if kind == "blip" else transformers.AutoModel
            with _no_progress_bars(), torch.random.fork_rng(devices=[]):
                model = loader.from_pretrained(source, revision=revision)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
            processor = transformers.AutoImageProcessor.from_pretrained(source, revision=revision)
        except Exception as error:  # of many kinds: of files, of JSON, of safetensors
            reason = _lfs_pointer(Path(source)) or (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"transformers cannot load {source}: {reason}") from error
        _check_tokenizer(tokenizer, source)
        return cls(model, tokenizer, ProcessorInput(processor))

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        with _no_progress_bars():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        about: dict[str, Any] = {"library": "transformers", "class": type(self.model).__name__}
        if isinstance(self.image_input, ProcessorInput):
            self.image_input.processor.save_pretrained(folder)
            # Its class too: transformers would choose between its implementations, which differ by some levels.
            about["image_processor"] = type(self.image_input.processor).__name__
        else:
            about["image"] = self.image_input.config()
        if self._own_scale:
            about["log_scale"] = self.log_scale.item()
        write_about(folder, about)

    @classmethod
    def _load(cls, folder: Path, about: dict[str, Any]) -> TransformersModel:
        import transformers

        with _no_progress_bars():
            model = getattr(transformers, about["class"]).from_pretrained(folder, dtype="auto")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        extra = {"log_scale": about["log_scale"]} if "log_scale" in about else {}
        if "image_processor" in about:
            processor = getattr(transformers, about["image_processor"]).from_pretrained(folder)
            return cls(model, tokenizer, ProcessorInput(processor), **extra)
        return cls(model, tokenizer, ImageInput(**about["image"]), **extra)


def _check_tokenizer(tokenizer: Any, source: str) -> None:
    """Where a folder lacks the files of its tokenizer, transformers makes one that knows no word.

    Raises:
        ValueError: so it is.
    """
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise ValueError(
            f"{source} holds no tokenizer, so that all texts would be equal; add the model's own tokenizer files "
            "(tokenizer.json, or vocab.json and merges.txt)"
        )


def _lfs_pointer(folder: Path) -> str | None:
    """What to say of a folder in which a file was not fetched."""
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
            return f"{path.name} is a Git LFS pointer, not the file; fetch it with 'git lfs pull'"
    return None


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _features(output: Any) -> Tensor:
    """transformers 5 returns an output object whose pooler_output is projected, 4 the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _is_blip(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("vision_proj", "text_proj", "itm_head", "text_encoder"))
