"""Classical restorers: image → better image, 8 bit in and out. All other columns are kept."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import numpy as np
import pywt
import torch
from datasets import Dataset
from plait import Run, hookimpl
from plait.fields import field, in_range, method_field

from plait_imaging import filters
from plait_imaging.images import DATA, map_images, over_splits
from plait_imaging.transforms import MotionBlur


def _two_sides(instance: Any, attribute: Any, value: tuple[int, int]) -> None:
    if len(value) != 2 or any(side < 1 for side in value):
        raise ValueError(f"{attribute.name} is {value!r}; allowed is [height, width], both at least 1")


def _window(default: tuple[int, int]) -> Any:
    return field(default, "height and width of the window, in pixels", _two_sides)


@attrs.frozen(kw_only=True)
class _Restorer:
    """A filter of one image."""

    takes = {"data": DATA}
    columns_needed = ("image",)

    def filtered(self, image: np.ndarray) -> np.ndarray:
        """uint8 ``[H, W, 3]`` → uint8, or float in [0, 1]."""
        raise NotImplementedError

    @hookimpl
    def restore(self, data: Any, run: Run) -> Any:
        """The data with every image restored and rounded to 8 bit."""

        def restored(dataset: Dataset, split: str) -> Dataset:
            title = f"{type(self).__name__} {split}".strip()
            return map_images(run, dataset, lambda image, row: self._one(image), title)

        return over_splits(data, restored)

    def _one(self, image: torch.Tensor) -> torch.Tensor:
        result = self.filtered(image.permute(1, 2, 0).numpy())
        return torch.from_numpy(np.ascontiguousarray(result.transpose(2, 0, 1)))


@attrs.frozen(kw_only=True)
class Median(_Restorer):
    """Median filter in each channel."""

    size: tuple[int, int] = _window((3, 5))

    def filtered(self, image: np.ndarray) -> np.ndarray:
        """uint8 ``[H, W, 3]`` → uint8."""
        return filters.median(image, self.size)


@attrs.frozen(kw_only=True)
class GreyOpening(_Restorer):
    """Grey opening in each channel: takes away what is brighter than its surroundings and smaller than the window."""

    size: tuple[int, int] = _window((3, 5))

    def filtered(self, image: np.ndarray) -> np.ndarray:
        """uint8 ``[H, W, 3]`` → uint8."""
        return filters.grey_opening(image, self.size)


@attrs.frozen(kw_only=True)
class TotalVariation(_Restorer):
    """Total-variation denoising (Chambolle 2004), the channels together."""

    weight: float = field(0.15, "more is smoother; for images in [0, 1]", in_range(0, low_open=True))
    max_iterations: int = field(200, "of the dual algorithm", in_range(1))

    def filtered(self, image: np.ndarray) -> np.ndarray:
        """uint8 ``[H, W, 3]`` → float in [0, 1]."""
        return filters.total_variation(image / 255.0, self.weight, self.max_iterations)


def _known_wavelet(instance: Any, attribute: Any, value: str) -> None:
    if value not in pywt.wavelist(kind="discrete"):
        raise ValueError(f"wavelet is {value!r}; allowed is a discrete wavelet of PyWavelets, e.g. db2, sym4, bior4.4")


@attrs.frozen(kw_only=True)
class WaveletShrinkage(_Restorer):
    """Wavelet shrinkage: small wavelet coefficients are noise."""

    wavelet: str = field("db2", "discrete wavelet of PyWavelets", _known_wavelet)
    rule: Literal["BayesShrink", "VisuShrink"] = field("BayesShrink", "threshold from each subband, or one for all")
    mode: Literal["soft", "hard"] = field("soft", "kind of thresholding")
    sigma: float | None = field(
        None,
        "standard deviation of the noise in [0, 1] units; without it, estimated from each image",
        in_range(0, low_open=True),
    )
    levels: int | None = field(None, "of the decomposition; without it, three fewer than possible", in_range(1))

    def filtered(self, image: np.ndarray) -> np.ndarray:
        """uint8 ``[H, W, 3]`` → float in [0, 1]."""
        return filters.wavelet_shrinkage(image / 255.0, self.wavelet, self.rule, self.mode, self.sigma, self.levels)


@attrs.frozen(kw_only=True)
class _Deconvolution(_Restorer):
    """Undoes a known blur."""

    blur: Any = method_field("transform", "the blur to undo: motion-blur or gaussian-blur", default=MotionBlur())

    def __attrs_post_init__(self) -> None:
        if not hasattr(self.blur, "kernel"):
            raise ValueError(
                f"blur is {type(self.blur).__name__}, which has no kernel; name motion-blur or gaussian-blur"
            )


@attrs.frozen(kw_only=True)
class Wiener(_Deconvolution):
    """Wiener deconvolution of a known blur."""

    balance: float = field(
        0.01, "weight of smoothness against sharpness; grows with the noise", in_range(0, low_open=True)
    )

    def filtered(self, image: np.ndarray) -> np.ndarray:
        """uint8 ``[H, W, 3]`` → float in [0, 1]."""
        return filters.wiener(image / 255.0, self.blur.kernel(), self.balance)


@attrs.frozen(kw_only=True)
class RichardsonLucy(_Deconvolution):
    """Richardson–Lucy deconvolution of a known blur."""

    num_iterations: int = field(20, "more is sharper and noisier", in_range(1))

    def filtered(self, image: np.ndarray) -> np.ndarray:
        """uint8 ``[H, W, 3]`` → float in [0, 1]."""
        return filters.richardson_lucy(image / 255.0, self.blur.kernel(), self.num_iterations)
