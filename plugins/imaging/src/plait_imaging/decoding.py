"""Encoded image → 8-bit RGB, or a sentence that says why not."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from plait import PlaitError


def decode_rgb(
    data: bytes,
    label: str,
    *,
    greyscale: str = "repeat",
    sixteen_bit: str = "refuse",
    transparency: str = "refuse",
) -> Image.Image:
    """Decode ``data`` completely to 8-bit RGB, upright as its EXIF orientation says.

    Args:
        label: how messages name the image (a file's name).
        greyscale: ``repeat`` puts the one channel into R, G and B.
        sixteen_bit: ``scale`` maps 0–65535 to 0–255 (colour images: by their high byte).
        transparency: ``drop`` ignores an alpha channel that is not opaque everywhere.

    Raises:
        PlaitError: not an image, cut off, or of a kind that the arguments refuse.
    """
    if not data:
        raise PlaitError(f"{label} is empty; remove it or copy it again")
    try:
        picture = Image.open(io.BytesIO(data))
        wide = any(";16" in str(tile[3]) for tile in picture.tile)
        picture.load()
    except UnidentifiedImageError as error:
        raise PlaitError(f"{label} is not an image that Pillow can read; remove it or convert it to PNG") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PlaitError(
            f"{label} cannot be decoded ({error}); the file is damaged or cut off, copy it again"
        ) from error
    picture = ImageOps.exif_transpose(picture)

    if wide or picture.mode.startswith("I") or picture.mode == "F":
        if sixteen_bit == "refuse" or picture.mode == "F":
            kind = "floating-point" if picture.mode == "F" else "16-bit"
            remedy = "" if picture.mode == "F" else " or set sixteen_bit: scale"
            raise PlaitError(f"{label} is a {kind} image and images are 8 bits here; convert it to 8-bit PNG{remedy}")
        picture = _scaled_to_8_bit(picture, label)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        if transparency == "refuse" and rgba.getextrema()[3][0] < 255:
            raise PlaitError(f"{label} is partly transparent; flatten it or set transparency: drop")
        picture = rgba.convert("L" if picture.mode in ("LA", "La") else "RGB")
    if picture.mode in ("L", "1"):
        if greyscale == "refuse":
            raise PlaitError(f"{label} is a greyscale image; convert it to RGB or set greyscale: repeat")
        return picture.convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _scaled_to_8_bit(picture: Image.Image, label: str) -> Image.Image:
    if not picture.mode.startswith("I"):
        return picture  # Pillow has reduced 16-bit colour to its high byte already
    levels = np.asarray(picture).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise PlaitError(f"{label} has values outside 0–65535; convert it to 8-bit PNG")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
