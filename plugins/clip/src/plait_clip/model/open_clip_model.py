"""open_clip's CLIP and CustomTextCLIP behind the common interface."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plait_clip.model.image_input import ImageInput
from plait_clip.model.interface import ImageTextModel, write_about
from plait_clip.model.tokenizer import WordTokenizer

if TYPE_CHECKING:  # open_clip takes seconds to import: only what works on a model of it does
    from open_clip import CLIP

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


class OpenClipModel(ImageTextModel):
    """An open_clip model with its tokenizer and its preprocessing.

    Args:
        model: ``open_clip.CLIP`` or ``open_clip.CustomTextCLIP``.
        config: what the model was built from: ``embed_dim``, ``vision_cfg``, ``text_cfg``, ...
        tokenizer: ``(texts, context_length) -> [N, L]``; open_clip's, or a :class:`WordTokenizer`.
        image_input: resizing and normalising.

    Raises:
        TypeError: the model lacks one of the two towers.
    """

    image_prefixes = ("model.visual.",)

    def __init__(
        self, model: nn.Module, config: Mapping[str, Any], tokenizer: Callable[..., Tensor], image_input: ImageInput
    ) -> None:
        super().__init__()
        missing = [name for name in ("encode_image", "encode_text", "logit_scale") if not hasattr(model, name)]
        if missing:
            raise TypeError(f"{type(model).__name__} has no {' and no '.join(missing)}; both towers are needed")
        self.model = model
        self.config = copy.deepcopy(dict(config))
        self.tokenizer = tokenizer
        self.image_input = image_input
        self.context_length = int(self.config.get("text_cfg", {}).get("context_length", 77))

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.model.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return getattr(self.model, "logit_bias", None)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.model.encode_image(self._pixels(images))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        from open_clip.model import CLIP

        if isinstance(self.model, CLIP) and tokens.shape[1] < self.context_length:
            return _encode_short(self.model, tokens)
        return self.model.encode_text(tokens)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer(list(texts), context_length=self.context_length)

    def too_long(self, texts: Sequence[str]) -> list[bool]:
        inner = getattr(self.tokenizer, "tokenizer", None)  # a transformers tokenizer inside open_clip's
        if inner is not None:
            return [len(ids) > self.context_length for ids in inner(list(texts), verbose=False)["input_ids"]]
        return (self.tokenizer(list(texts), context_length=self.context_length + 1)[:, -1] != 0).tolist()

    def trim(self, tokens: Tensor) -> Tensor:
        """Cut to the longest text: under the causal mask nothing after ``<eot>`` reaches its output."""
        from open_clip.model import CLIP
        from open_clip.transformer import TextTransformer

        text = self.model if isinstance(self.model, CLIP) else getattr(self.model, "text", None)
        pool = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", None)
        causal = isinstance(text, (CLIP, TextTransformer)) and text.attn_mask is not None
        if not causal or pool != "argmax" or getattr(text, "cls_emb", None) is not None or len(tokens) == 0:
            return tokens
        return tokens[:, : int(tokens.argmax(dim=1).max()) + 1]

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in self.model.state_dict().items()}, folder / WEIGHTS
        )
        image = self.image_input.config()
        resize_mode = {"crop": "shortest", "squash": "squash"}[image["resize"]]
        preprocess = {key: image[key] for key in ("size", "mean", "std", "interpolation")} | {
            "resize_mode": resize_mode
        }
        config = {"model_cfg": self.config, "preprocess_cfg": preprocess}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)
        words = isinstance(self.tokenizer, WordTokenizer)
        write_about(folder, {"library": "open_clip", "tokenizer": "words" if words else "open_clip"})

    @classmethod
    def _load(cls, folder: Path, about: dict[str, Any]) -> OpenClipModel:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if about.get("tokenizer") == "words":
            tokenizer: Callable[..., Tensor] = WordTokenizer.from_pretrained(folder)
        else:
            from open_clip import get_tokenizer

            tokenizer = get_tokenizer(f"local-dir:{folder}")
        model = build(config["model_cfg"])
        # The stored dtype of every tensor is kept, hence assign.
        weights = load_file(folder / WEIGHTS)
        trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.load_state_dict(weights, assign=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
        return cls(model, config["model_cfg"], tokenizer, image_input(config["preprocess_cfg"], model))


def build(config: Mapping[str, Any]) -> nn.Module:
    """An open_clip model with fresh weights (drawn from torch's global generator).

    Args:
        config: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and the other keys of an open_clip JSON.

    Raises:
        ValueError: a key is missing or unknown.
    """
    from open_clip.model import CLIP, CustomTextCLIP

    own = copy.deepcopy(dict(config))
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(own)
    if missing:
        raise ValueError(
            f"the model configuration lacks {', '.join(sorted(missing))}; it takes the keys of an open_clip JSON"
        )
    if "multimodal_cfg" in own:
        raise ValueError("CoCa models (multimodal_cfg) are not supported; use a CLIP configuration")
    hf_text = "hf_model_name" in own["text_cfg"]
    if hf_text:
        own["text_cfg"]["hf_model_pretrained"] = False
    if own["vision_cfg"].get("timm_model_name"):
        own["vision_cfg"]["timm_model_pretrained"] = False
    custom = own.pop("custom_text", False) or hf_text
    try:
        return (CustomTextCLIP if custom else CLIP)(**own)
    except TypeError as error:
        raise ValueError(f"the model configuration has a key that open_clip does not know: {error}") from error


def image_input(preprocess: Mapping[str, Any], model: nn.Module) -> ImageInput:
    """The :class:`ImageInput` of an open_clip ``preprocess_cfg``."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    size = getattr(model.visual, "image_size", preprocess.get("size", 224))
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"the model takes images of {size}; only square ones are supported")
    given = {key: value for key, value in preprocess.items() if value is not None}
    resize = {"shortest": "crop", "squash": "squash"}.get(given.get("resize_mode", "shortest"))
    if resize is None:
        raise ValueError(f"resize_mode {given['resize_mode']!r} is not supported; use shortest or squash")
    mean = given.get("mean", OPENAI_DATASET_MEAN)
    std = given.get("std", OPENAI_DATASET_STD)
    # "random" is for training; open_clip evaluates with bicubic then.
    interpolation = "bilinear" if given.get("interpolation") == "bilinear" else "bicubic"
    return ImageInput(sides.pop(), mean, std, resize=resize, interpolation=interpolation)


def _encode_short(model: CLIP, tokens: Tensor) -> Tensor:
    """``CLIP.encode_text`` for fewer tokens than its context; the library adds all positions at once."""
    from open_clip.transformer import text_global_pool

    length = tokens.shape[1]
    dtype = model.transformer.get_cast_dtype()
    x = model.token_embedding(tokens).to(dtype) + model.positional_embedding[:length].to(dtype)
    mask = model.attn_mask
    x = model.transformer(x, attn_mask=None if mask is None else mask[:length, :length])
    x = text_global_pool(
        model.ln_final(x), tokens, model.text_pool_type, eos_token_id=getattr(model, "text_eos_id", None)
    )
    if model.text_projection is None:
        return x
    return model.text_projection(x) if isinstance(model.text_projection, nn.Linear) else x @ model.text_projection
