"""Images as a model wants them, by the library that the model comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class Preprocessing:
    """Resizing, cropping and normalising.

    Attributes:
        name: all that it does; the same for two that do the same.
        apply: an 8-bit RGB image → float32 [3, H, W], as the model is called with it.
    """

    name: str
    apply: Callable[[Image.Image], Tensor]


def preprocessing_of(model: nn.Module) -> Preprocessing | None:
    """What a model that ``timm.create_model`` made says of itself; ``None`` for any other."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or not {"mean", "std", "input_size"} <= config.keys():
        return None
    from timm.data import create_transform, resolve_model_data_config

    facts = resolve_model_data_config(model)
    side = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if side is not None:  # the configuration tells that of the pre-trained weights, whatever the model was made for
        facts["input_size"] = (facts["input_size"][0], *side)
    transform = create_transform(**facts, is_training=False)
    return Preprocessing(repr(transform), transform)


def image_processor_of(folder: Path | None) -> Preprocessing | None:
    """The image processor of transformers in a local folder.

    Raises:
        ValueError: it holds none.
    """
    if folder is None:
        return None
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no image processor that transformers can read ({error})") from error

    def apply(image: Image.Image) -> Tensor:
        return torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"][0])

    return Preprocessing(processor.to_json_string(), apply)
