"""From images of any size to what an image tower expects: the library's own preprocessing, to the pixel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

_RESIZE_MODES = {"crop": "shortest", "squash": "squash"}


class ImageInput(nn.Module):
    """Resize, crop and normalise, as open_clip does.

    An image is prepared in one of two ways: :meth:`from_pil` is open_clip's own transform, to the pixel;
    calling the object is the same geometry on floats, differentiable, for attacks and patches that are optimised.
    An image of ``size`` × ``size`` is what the tower sees and passes either unchanged.

    Args:
        size: side of the square that the image tower takes, in pixels.
        mean, std: per channel, of images in [0, 1].
        resize: ``"crop"`` brings the shorter side to ``size`` and crops the centre, ``"squash"``
            ignores the aspect ratio.
        interpolation: ``"bicubic"`` or ``"bilinear"``, both with antialiasing.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        resize: str = "crop",
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        if resize not in _RESIZE_MODES or interpolation not in ("bicubic", "bilinear"):
            raise ValueError(
                f"resize {resize!r}, interpolation {interpolation!r}; allowed are crop or squash, bicubic or bilinear"
            )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {mean} and std {std}: give three numbers each, std above 0")
        self.size = size
        self.resize = resize
        self.interpolation = interpolation
        self._mean, self._std = tuple(map(float, mean)), tuple(map(float, std))
        # No buffers: a model cast to bf16 would round them.
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def _transform(self) -> Callable[[Image.Image], Image.Image]:
        return _open_clip_resizing(self.size, self.resize, self.interpolation)

    def config(self) -> dict[str, Any]:
        """The arguments that make an equal object."""
        return {
            "size": self.size,
            "mean": list(self._mean),
            "std": list(self._std),
            "resize": self.resize,
            "interpolation": self.interpolation,
        }

    def from_pil(self, image: Image.Image) -> np.ndarray:
        """A PIL image → uint8 [3, size, size]: the library's own transform up to its scaling and normalising."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        sized = image if image.size == (self.size, self.size) else self._resized(image)
        return np.asarray(sized).transpose(2, 0, 1)

    def _resized(self, image: Image.Image) -> Image.Image | np.ndarray:
        """An RGB image → one of ``size`` × ``size``: PIL, or uint8 [size, size, 3]."""
        return self._transform(image)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] → [N, 3, size, size], normalised."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)}; expected [N, 3, H, W]")
        images = self.to_size(images)
        if images.device not in self._on_device:
            mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self._mean, self._std))
            self._on_device[images.device] = (mean, std)
        mean, std = self._on_device[images.device]
        return (images - mean) / std

    def to_size(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, 3, size, size], still in [0, 1]; differentiable.

        Sides and crop are those of :meth:`from_pil`; pixels differ by the rounding of 8-bit arithmetic.
        """
        height, width = images.shape[-2:]
        if (height, width) == (self.size, self.size):
            return images
        target = self._target(height, width)
        if target != (height, width):
            images = F.interpolate(images, target, mode=self.interpolation, antialias=True, align_corners=False)
            images = images.clamp(0, 1)  # bicubic weights overshoot
        top, left = (self._offset(side - self.size) for side in target)
        return images[..., top : top + self.size, left : left + self.size]

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width before the crop; both libraries cut the longer side to a whole number."""
        if self.resize == "squash":
            return self.size, self.size
        edge = self._shorter_side()
        if height <= width:
            return edge, int(edge * width / height)
        return int(edge * height / width), edge

    def _shorter_side(self) -> int:
        return self.size

    def _offset(self, excess: int) -> int:
        """First row or column of the crop; torchvision rounds half to even."""
        return round(excess / 2)


class ProcessorInput(ImageInput):
    """As a transformers image processor does; arguments and ways as of :class:`ImageInput`.

    Raises:
        ValueError: the processor makes other than square, normalised RGB images of one size.
    """

    def __init__(self, processor: Any) -> None:
        crop = bool(getattr(processor, "do_center_crop", None)) and processor.crop_size
        sides = _sides(crop or processor.size)
        if sides[0] != sides[1]:
            raise ValueError(f"the model takes images of {sides[0]} × {sides[1]}; only square ones are supported")
        shorter = _value(processor.size, "shortest_edge")
        if not getattr(processor, "do_resize", True) or (shorter is not None and not crop):
            raise ValueError("the image processor leaves images at different sizes; only square ones are supported")
        if getattr(processor, "do_pad", None):
            raise ValueError("the image processor pads images (do_pad), which is not supported; give one that does not")
        normalises = getattr(processor, "do_normalize", True)
        super().__init__(
            sides[0],
            processor.image_mean if normalises else [0.0] * 3,
            processor.image_std if normalises else [1.0] * 3,
            resize="squash" if shorter is None else "crop",
            interpolation={2: "bilinear", 3: "bicubic"}.get(int(processor.resample), "bicubic"),  # PIL's numbers
        )
        self.processor = processor
        self._edge = sides[0] if shorter is None else shorter

    def _resized(self, image: Image.Image) -> np.ndarray:
        # Its own resizing and cropping; what comes out is uint8.
        found = self.processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt")
        return found["pixel_values"][0].to(torch.uint8).permute(1, 2, 0).numpy()

    def _shorter_side(self) -> int:
        return self._edge

    def _offset(self, excess: int) -> int:
        return excess // 2


def _open_clip_resizing(size: int, resize: str, interpolation: str) -> Callable[[Image.Image], Image.Image]:
    """open_clip's evaluation transform without its last steps: to a tensor, normalising."""
    import open_clip

    transform = open_clip.image_transform(
        size, is_train=False, resize_mode=_RESIZE_MODES[resize], interpolation=interpolation
    )
    return type(transform)(transform.transforms[:-2])


def _sides(size: Any) -> tuple[int, int]:
    height, width, shorter = (_value(size, key) for key in ("height", "width", "shortest_edge"))
    if height is not None and width is not None:
        return height, width
    if shorter is None:
        raise ValueError(f"the image processor's size is {size}; give height and width, or shortest_edge")
    return shorter, shorter


def _value(size: Any, key: str) -> int | None:
    """transformers keeps sizes as a mapping or as an object."""
    return size.get(key) if isinstance(size, Mapping) else getattr(size, key, None)
