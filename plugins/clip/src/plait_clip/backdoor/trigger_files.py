"""Triggers that come from files: pictures, optimised patches and steganographic encoders."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from plait_vision.images import decode
from torch import Tensor

from plait_clip.backdoor.poison import encoded, pixels
from plait_clip.backdoor.triggers import to_uint8


@functools.lru_cache(maxsize=4)
def read_picture(path: Path) -> Tensor:
    """A picture as ``[3, H, W]`` in [0, 1]."""
    return pixels(decode(path, f"picture {path}")).float() / 255


def read_patch(path: Path) -> Tensor:
    """A patch ``[3, k, k]`` in [0, 1], from a picture or an .npy file.

    Raises:
        ValueError: it cannot be read, or has another shape.
    """
    if path.suffix != ".npy":
        return read_picture(path)
    try:
        patch = torch.from_numpy(np.load(path, allow_pickle=False)).float()
    except (OSError, ValueError) as error:
        raise ValueError(f"patch {path} cannot be read: {error}") from error
    if patch.ndim != 3 or patch.shape[0] != 3 or patch.shape[1] != patch.shape[2]:
        raise ValueError(f"patch {path} has shape {tuple(patch.shape)}; it must be [3, k, k]")
    return patch


def patch_to_png(patch: Tensor) -> bytes:
    """A patch ``[3, k, k]`` in [0, 1] as a PNG file."""
    return encoded(to_uint8(patch, wrap=False), "png")


def patch_to_text(patch: Tensor) -> str:
    """A patch as PNG in base64."""
    return base64.b64encode(patch_to_png(patch)).decode()


@functools.lru_cache(maxsize=8)
def patch_from_text(text: str) -> Tensor:
    """The patch that :func:`patch_to_text` wrote, ``[3, k, k]`` in [0, 1]."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return pixels(image).float() / 255


@functools.lru_cache(maxsize=4)
def read_encoder(path: str) -> Any:
    """A callable (bits ``[N, 100]``, images ``[N, 3, H, W]``) → images, from a file that torch.export has saved.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"encoder {path} does not exist; give a file that torch.export has saved")
    try:
        return torch.export.load(path).module()
    except Exception as error:
        raise ValueError(
            f"encoder {path} cannot be loaded ({error}); give a file that torch.export has saved"
        ) from error
