"""One decoder of images for the whole project.

:func:`decode` turns whatever holds an image into 8-bit RGB, upright, or says in one sentence that names the image why it
does not. :func:`size` reads the header alone, :func:`as_cell` makes a cell of a ``datasets.Image`` column,
:func:`encode_png` writes losslessly.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Source = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | Mapping[str, Any] | np.ndarray
Transparency = Literal["refuse", "drop"] | tuple[int, int, int]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm")
"""The kinds of file that count as images; whether one is, its content decides."""

# Others stay closed: Pillow hands PostScript to another program, and knows dozens of formats that no data set has.
_FORMATS = ("PNG", "JPEG", "MPO", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "PPM")
_DAMAGES = (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError)
_ORIENTATION = 0x0112
_CLUTTER = {"thumbs.db", "desktop.ini", "__macosx"}


def check_rules(transparency: object = "refuse", sixteen_bit: object = "refuse", greyscale: object = "repeat") -> None:
    """Whether these are rules that :func:`decode` knows.

    Raises:
        ValueError: one is not; says what is allowed.
    """
    is_colour = (
        isinstance(transparency, (tuple, list))
        and len(transparency) == 3
        and all(isinstance(level, int) and not isinstance(level, bool) and 0 <= level <= 255 for level in transparency)
    )
    if transparency not in ("refuse", "drop") and not is_colour:
        raise ValueError(
            f"transparency is {transparency!r}; allowed is 'refuse', 'drop' or a colour of three whole numbers from 0 to 255"
        )
    for name, value, choices in (
        ("sixteen_bit", sixteen_bit, ("refuse", "scale")),
        ("greyscale", greyscale, ("repeat", "refuse")),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; allowed is {' or '.join(map(repr, choices))}")


def is_image_name(name: str | os.PathLike[str]) -> bool:
    """Whether a file's path, inside its folder or archive, is one of an image: by suffix, and not hidden."""
    return not is_hidden(name) and PurePosixPath(name).suffix.lower() in SUFFIXES


def is_hidden(name: str | os.PathLike[str]) -> bool:
    """Whether a path inside a folder or archive is not for users: ``.x``, ``__MACOSX/._x.png``, ``Thumbs.db``."""
    return any(part.startswith(".") or part.lower() in _CLUTTER for part in PurePosixPath(name).parts)


def decode(
    source: Source | None,
    name: str = "",
    *,
    transparency: Transparency = "refuse",
    sixteen_bit: Literal["refuse", "scale"] = "refuse",
    greyscale: Literal["repeat", "refuse"] = "repeat",
) -> Image.Image:
    """Decode an image completely to 8-bit RGB, upright as its EXIF orientation says.

    Grey, two-level and palette images become RGB exactly; CMYK by (1 − C)(1 − K), YCbCr as JFIF has it. Colour profiles
    are not applied. Of an animation or a file of several pages the first picture counts.

    Args:
        source: a path, the bytes of a file, an open binary file (also one inside a zip or tar), a PIL image, a cell of
            an undecoded ``datasets.Image`` column (``{"bytes", "path"}``), or pixels, uint8 [H, W] or [H, W, 3].
        name: how messages call the image; default: its path, where the source has one.
        transparency: of an image that is not opaque everywhere: ``refuse`` it, ``drop`` the alpha channel, or composite
            it over this background, (R, G, B) in 0–255.
        sixteen_bit: ``scale`` maps 0–65535 to 0–255 and rounds (colour images: by their high byte, which is all that
            Pillow decodes).
        greyscale: ``repeat`` puts the one channel into R, G and B.

    Raises:
        ValueError: missing, not an image, cut off, of more than 8 bits, transparent or of another kind that is refused.
        ValueError: a rule that does not exist.
    """
    check_rules(transparency, sixteen_bit, greyscale)
    name = name or _name_of(source)
    picture = _open(source, name)
    bits = _bits(picture)
    try:
        # Users' own pictures are not to be changed, nor read from their files again: what was drawn into them counts.
        picture = ImageOps.exif_transpose(picture)
        picture.load()
    except _DAMAGES as error:
        raise _damaged(name, error) from error

    if picture.mode == "F":
        raise ValueError(f"{name} is a floating-point image and images are 8 bits here; convert it to 8-bit PNG")
    if bits == 12:
        raise ValueError(f"{name} is a 12-bit image and images are 8 bits here; convert it to 8-bit PNG")
    if bits > 8 or picture.mode.startswith("I"):
        if sixteen_bit == "refuse":
            raise ValueError(
                f"{name} is a 16-bit image and images are 8 bits here; convert it to 8-bit PNG or set sixteen_bit: scale"
            )
        picture = _scaled_to_8_bit(picture, name)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = _opaque(picture, name, transparency)
    if picture.mode in ("L", "1"):
        if greyscale == "refuse":
            raise ValueError(f"{name} is a greyscale image; convert it to RGB or set greyscale: repeat")
        return picture.convert("RGB")
    if picture.mode not in ("RGB", "P", "CMYK", "YCbCr", "HSV"):
        raise ValueError(f"{name} is an image of mode {picture.mode}, for which there is no one way to RGB; convert it")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def size(source: Source | None, name: str = "") -> tuple[int, int]:
    """Height and width of an image as :func:`decode` gives it, from its header alone.

    Raises:
        ValueError: missing, or not an image.
    """
    name = name or _name_of(source)
    picture = _open(source, name)
    try:
        turned = picture.getexif().get(_ORIENTATION, 1) >= 5
    except _DAMAGES as error:
        raise _damaged(name, error) from error
    return (picture.width, picture.height) if turned else (picture.height, picture.width)


def as_cell(source: Source | None, name: str = "", **rules: Any) -> tuple[dict[str, Any], Image.Image]:
    """A cell of a ``datasets.Image`` column, and the decoded image, checked by ``rules`` as in :func:`decode`.

    The cell has the source's own bytes where every decoder reads the same from them (8-bit RGB, upright), else a PNG of
    what :func:`decode` gives. Its ``path`` is None: ``datasets`` would read a file of that name instead.
    """
    name = name or _name_of(source)
    content = _bytes_of(source, name)
    picture = decode(source if content is None else content, name, **rules)
    if content is None or not _is_plain(content):
        content = encode_png(picture)
    return {"bytes": content, "path": None}, picture


def encode_png(pixels: Image.Image | np.ndarray) -> bytes:
    """A PIL image, or uint8 [H, W] or [H, W, 3] → PNG bytes, without loss.

    Raises:
        ValueError: pixels of another type or shape.
    """
    buffer = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else _from_array(pixels, "the image")
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _open(source: Source | None, name: str) -> Image.Image:
    """The picture, its header read."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    content = _bytes_of(source, name)
    if content is None:
        raise ValueError(f"{name} is missing; expected a path, bytes, an open file or a picture")
    if not content:
        raise ValueError(f"{name} is empty; remove it or copy it again")
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{name} is a Git LFS pointer, not the image; fetch it with 'git lfs pull'")
    Image.init()
    try:
        return Image.open(io.BytesIO(content), formats=[kind for kind in _FORMATS if kind in Image.OPEN])
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is not an image of a known kind ({', '.join(_FORMATS)}); remove it or convert it to PNG"
        ) from error
    except _DAMAGES as error:
        raise _damaged(name, error) from error


def _bytes_of(source: Any, name: str) -> bytes | None:
    """The encoded image, or None where there is none (a picture, nothing)."""
    if isinstance(source, Mapping):
        if source.get("bytes") is not None:
            return bytes(source["bytes"])
        source = source.get("path") or None
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    try:
        if isinstance(source, (str, os.PathLike)):
            return Path(source).read_bytes()
        if hasattr(source, "read"):
            content = source.read()
            if not isinstance(content, bytes):
                raise ValueError(f"{name} is opened as text; open it in binary mode")
            return content
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error
    return None


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
        raise ValueError(
            f"{name} has pixels of type {pixels.dtype} and shape {list(pixels.shape)}; expected uint8 of shape [H, W] or "
            "[H, W, 3]"
        )
    return Image.fromarray(pixels)


def _name_of(source: Any) -> str:
    if isinstance(source, Mapping):
        source = source.get("path")
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    own = getattr(source, "filename", None) or getattr(source, "name", None)
    return own if isinstance(own, str) and own else "the image"


def _damaged(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} cannot be decoded ({error}); the file is damaged or cut off, copy it again")


def _bits(picture: Image.Image) -> int:
    """How many bits a channel of the file has, also where Pillow reduces them silently: 8 (or fewer), 12 or 16."""
    for tile in getattr(picture, "tile", []):
        raw = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        text = " ".join(part for part in raw if isinstance(part, str))
        if ";12" in text:
            return 12
        if ";16" in text and picture.format != "BMP":  # there it is the bits of all channels
            return 16
        if picture.format == "PPM" and any(isinstance(part, int) and part > 255 for part in raw):
            return 16
    return 8


def _scaled_to_8_bit(picture: Image.Image, name: str) -> Image.Image:
    if not picture.mode.startswith("I"):
        return picture  # Pillow has reduced 16-bit colour to its high byte already
    levels = np.asarray(picture).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"{name} has values outside 0–65535; convert it to 8-bit PNG")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))


def _opaque(picture: Image.Image, name: str, transparency: Transparency) -> Image.Image:
    grey = picture.mode in ("LA", "La", "L", "1")
    rgba = picture.convert("RGBA")
    if np.asarray(rgba)[..., 3].min(initial=255) < 255:
        if transparency == "refuse":
            raise ValueError(f"{name} is partly transparent; flatten it, or say by transparency what lies behind it")
        if transparency != "drop":
            behind = Image.new("RGBA", rgba.size, (*transparency, 255))
            return Image.alpha_composite(behind, rgba).convert("RGB")
    return rgba.convert("L" if grey else "RGB")


def _is_plain(content: bytes) -> bool:
    picture = Image.open(io.BytesIO(content))
    upright = picture.getexif().get(_ORIENTATION, 1) == 1
    return picture.mode == "RGB" and upright and _bits(picture) == 8 and "transparency" not in picture.info
