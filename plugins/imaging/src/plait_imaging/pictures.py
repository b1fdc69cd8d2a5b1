"""Panels of a report: the images, zoomed crops and error maps side by side."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from plait.report import Image, Panel, png

MAX_SIDE = 320
ZOOMED_SIDE = 224
FRAME = (1.0, 0.85, 0.0)


def comparison(
    name: str,
    shown: Mapping[str, torch.Tensor],
    captions: Mapping[str, str],
    target: torch.Tensor,
    crop_size: int,
) -> Panel:
    """Three rows: images with the crop framed, the crops enlarged, error maps on a common scale.

    Args:
        shown: name → image in [0, 1]; float ``[3, H, W]`` of the target's size (input and candidates).
        captions: what to write under each of them.
        target: the truth, ``[3, H, W]``.
        crop_size: side of the zoomed crop, in pixels; it is put where the images differ most.
    """
    images = {**shown, "target": target}
    size = min(crop_size, *target.shape[1:])
    top, left = _most_different(torch.stack(list(images.values())), size)
    whole = [
        Image(caption=captions.get(key, key), data=png(_framed(image, top, left, size)))
        for key, image in images.items()
    ]
    crops = [
        Image(caption=f"{key}, zoomed", data=png(_enlarged(image[:, top : top + size, left : left + size])))
        for key, image in images.items()
    ]
    errors = {key: (image - target).abs().mean(dim=0) for key, image in shown.items()}
    # The brightest per mille would make everything else dark.
    brightest = max(_high_quantile(error) for error in errors.values())
    scale = max(brightest, 1 / 255)
    maps = [
        Image(caption=f"{key}, error 0 … {round(scale * 255)} levels", data=png(_reduced(_heat(error / scale))))
        for key, error in errors.items()
    ]
    return Panel(title=name, images=[whole, crops, maps])


def _high_quantile(error: torch.Tensor) -> float:
    values = error.flatten()
    return float(values.kthvalue(max(1, int(0.995 * values.numel()))).values)


def _most_different(images: torch.Tensor, size: int) -> tuple[int, int]:
    """Top left of the window in which the images ``[K, 3, H, W]`` differ most, on a grid of quarter windows."""
    spread = images.std(dim=0).mean(dim=0)
    step = max(1, size // 4)
    means = F.avg_pool2d(spread[None, None], size, stride=step)[0, 0]
    place = int(means.argmax())
    return place // means.shape[1] * step, place % means.shape[1] * step


def _reduced(image: torch.Tensor) -> torch.Tensor:
    factor = MAX_SIDE / max(image.shape[1:])
    if factor >= 1:
        return image
    size = [max(1, round(side * factor)) for side in image.shape[1:]]
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def _framed(image: torch.Tensor, top: int, left: int, size: int) -> torch.Tensor:
    reduced = _reduced(image).clone()
    factor = reduced.shape[1] / image.shape[1]
    first_row, first_column = int(top * factor), int(left * factor)
    last_row = min(int((top + size) * factor), reduced.shape[1]) - 1
    last_column = min(int((left + size) * factor), reduced.shape[2]) - 1
    colour = torch.tensor(FRAME)[:, None]
    for row in (first_row, last_row):
        reduced[:, row, first_column : last_column + 1] = colour
    for column in (first_column, last_column):
        reduced[:, first_row : last_row + 1, column] = colour
    return reduced


def _enlarged(crop: torch.Tensor) -> torch.Tensor:
    factor = max(1, ZOOMED_SIDE // max(crop.shape[1:]))
    return crop.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _heat(values: torch.Tensor) -> torch.Tensor:
    """``[H, W]`` in [0, 1] → black, red, yellow, white ``[3, H, W]``."""
    return torch.stack([(3 * values - offset).clamp(0, 1) for offset in range(3)])
