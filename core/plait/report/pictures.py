"""Pictures for the HTML report: small enough that the page opens at once, and as they are where asked for."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import attrs

from plait.report.model import Image, Panel

SMALL = 96  # pixels: pictures up to here are data, whose pixels are to be seen as they are
# Quality of WebP and longest side in pixels, from good to small.
LEVELS = ((90, 4096), (82, 1024), (72, 640), (60, 384), (50, 224))
SAMPLES = 8


@attrs.frozen
class Picture:
    """A picture as the page shows it: a ``data:`` address, and its width and height in pixels."""

    caption: str
    url: str
    width: int
    height: int

    @property
    def pixels(self) -> bool:
        """Whether its pixels are to be seen as they are."""
        return max(self.width, self.height) <= SMALL


@attrs.frozen
class Gallery:
    """The pictures of a page: (label, title, rows) of each panel, and what was done to keep it small."""

    panels: Sequence[tuple[str, str, Sequence[Sequence[Picture]]]]
    note: str = ""


def gallery(panels: Sequence[tuple[str, Panel]], limit: int | None) -> Gallery:
    """The pictures of all panels.

    Args:
        limit: bytes that they may take in the page; ``None``: every picture as it is.
    """
    every = [picture for _, panel in panels for row in panel.images for picture in row]
    if limit is None or not every:
        return _arranged(panels, [_as_it_is(picture) for picture in every])
    try:
        import PIL  # noqa: F401
    except ImportError:
        return _first_that_fit(panels, [_as_it_is(picture) for picture in every], limit)
    made: list[Picture] = []
    for quality, side in LEVELS[_level(every, limit) :]:
        made = [_smaller(picture, quality, side) for picture in every]
        if sum(len(picture.url) for picture in made) <= limit:
            scaled = sum(_size(old)[0] > new.width for old, new in zip(every, made, strict=True))
            lossy = any("image/webp" in picture.url for picture in made)
            note = (
                f"{scaled} of {len(every)} pictures are scaled down"
                if scaled
                else "pictures are compressed"
                if lossy
                else ""
            )
            return attrs.evolve(_arranged(panels, made), note=note)
    return _first_that_fit(panels, made, limit)


def _level(every: Sequence[Image], limit: int) -> int:
    """The first level at which the pictures will fit, judged by a few of them."""
    some = every[:: max(1, len(every) // SAMPLES)]
    for level, (quality, side) in enumerate(LEVELS):
        if sum(len(_smaller(picture, quality, side).url) for picture in some) * len(every) <= limit * len(some):
            return level
    return len(LEVELS) - 1


def _first_that_fit(panels: Sequence[tuple[str, Panel]], made: Sequence[Picture], limit: int) -> Gallery:
    kept, used, taken = [], 0, 0
    for label, panel in panels:
        count = sum(map(len, panel.images))
        used += sum(len(picture.url) for picture in made[taken : taken + count])
        if used > limit:
            break
        kept.append((label, panel))
        taken += count
    left = len(panels) - len(kept)
    return attrs.evolve(_arranged(kept, made), note=f"{left} of {len(panels)} panels are left out" if left else "")


def _arranged(panels: Sequence[tuple[str, Panel]], made: Sequence[Picture]) -> Gallery:
    following = iter(made)
    arranged = [
        (label, panel.title, [[next(following) for _ in row] for row in panel.images]) for label, panel in panels
    ]
    return Gallery(arranged)


def _size(picture: Image) -> tuple[int, int]:
    width, height = (int.from_bytes(picture.data[start : start + 4], "big") for start in (16, 20))
    return width, height


def _as_it_is(picture: Image) -> Picture:
    return Picture(picture.caption, _url("png", picture.data), *_size(picture))


def _smaller(picture: Image, quality: int, side: int) -> Picture:
    import PIL.Image

    width, height = _size(picture)
    if max(width, height) <= SMALL:
        return _as_it_is(picture)
    image: Any = PIL.Image.open(io.BytesIO(picture.data))
    image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    image.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Drawings have few colours, and lose by what is good for photographs.
    image.save(buffer, format="WEBP", quality=quality, lossless=image.getcolors(2048) is not None)
    data = buffer.getvalue()
    if image.size == (width, height) and len(data) >= len(picture.data):
        return _as_it_is(picture)
    return Picture(picture.caption, _url("webp", data), *image.size)


def _url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
