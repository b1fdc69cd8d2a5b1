"""Images ↔ their four wavelet sub-bands, one level, orthonormal (WaveDiff, CVPR 2023).

The filters are PyWavelets'; its transform is what the tests compare with, and is never called here.
"""

from __future__ import annotations

from typing import Literal

import pywt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Order = Literal["image", "generator"]
# Where LL, LH (pywt's cH), HL (cV) and HH (cD) stand. WaveDiff's generator swaps the middle two.
_PLACES: dict[Order, tuple[int, int, int, int]] = {"image": (0, 1, 2, 3), "generator": (0, 2, 1, 3)}


class SubBands(nn.Module):
    """The transform W and its inverse. Bands lie one after the other, each with all channels of the image.

    Args:
        wavelet: an orthogonal or biorthogonal wavelet of PyWavelets; the image is continued periodically.
        order: ``image``: LL, LH, HL, HH; ``generator``: LL, HL, LH, HH, as inside WaveDiff's network.

    Raises:
        ValueError: PyWavelets does not know the wavelet, or it has no inverse filters.
    """

    analysis: Tensor
    synthesis: Tensor

    def __init__(self, wavelet: str = "haar", order: Order = "image") -> None:
        super().__init__()
        if wavelet not in pywt.wavelist(kind="discrete"):
            raise ValueError(
                f"wavelet is {wavelet!r}; allowed is a discrete wavelet of PyWavelets, e.g. haar, db2, bior2.2"
            )
        self.wavelet, self.order = wavelet, order
        low, high, low_back, high_back = pywt.Wavelet(wavelet).filter_bank
        self.length = len(low)
        self.places = _PLACES[order]
        # A correlation with reversed filters is the convolution; the inverse is the adjoint of the dual transform.
        self.register_buffer("analysis", _bank(low[::-1], high[::-1]), persistent=False)
        self.register_buffer("synthesis", _bank(low_back, high_back), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, C, H, W]`` with even sides → ``[B, 4 C, H/2, W/2]``.

        Raises:
            ValueError: an odd side, or one shorter than the filter.
        """
        height, width = image.shape[-2:]
        if height % 2 or width % 2:
            raise ValueError(f"the image is {height}×{width} pixels; the transform needs even sides, so pad it first")
        if self.length == 2:
            return self._in_order(_haar(image))
        pad = self.length // 2 - 1
        if pad > min(height, width):
            raise ValueError(f"the image is {height}×{width} pixels; {self.wavelet} needs sides of at least {pad}")
        batch, channels = image.shape[:2]
        padded = F.pad(image, (pad, pad, pad, pad), mode="circular").flatten(0, 1).unsqueeze(1)
        bands = F.conv2d(padded, self.analysis.to(image.dtype), stride=2)
        bands = bands.unflatten(0, (batch, channels)).transpose(1, 2)
        return self._in_order(list(bands.unbind(1)))

    def inverse(self, bands: Tensor) -> Tensor:
        """``[B, 4 C, h, w]`` → ``[B, C, 2 h, 2 w]``."""
        parts = bands.chunk(4, dim=1)
        ordered = [parts[place] for place in self.places]
        if self.length == 2:
            return _inverse_haar(*ordered)
        batch, channels, height, width = ordered[0].shape
        stacked = torch.stack(ordered, dim=2).flatten(0, 1)
        spread = F.conv_transpose2d(stacked, self.synthesis.to(bands.dtype), stride=2)
        pad = self.length // 2 - 1
        folded = _folded(_folded(spread, pad, 2 * height, 2), pad, 2 * width, 3)
        return folded.reshape(batch, channels, 2 * height, 2 * width)

    def _in_order(self, bands: list[Tensor]) -> Tensor:
        return torch.cat([bands[place] for place in self.places], dim=1)


def _bank(low: list[float], high: list[float]) -> Tensor:
    """Filters of LL, LH, HL, HH as ``[4, 1, k, k]``; LH is low along a row and high along a column."""
    one, two = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    pairs = ((one, one), (two, one), (one, two), (two, two))
    return torch.stack([torch.outer(down, across) for down, across in pairs]).unsqueeze(1).float()


def _haar(image: Tensor) -> list[Tensor]:
    """LL, LH, HL, HH of the blocks ``[[a, b], [c, d]]``, as sums and differences: eight additions a block."""
    top, bottom = image[..., 0::2, :], image[..., 1::2, :]
    total, change = (top + bottom) * 0.5, (top - bottom) * 0.5
    left, right = (slice(0, None, 2), slice(1, None, 2))
    return [
        total[..., left] + total[..., right],
        change[..., left] + change[..., right],
        total[..., left] - total[..., right],
        change[..., left] - change[..., right],
    ]


def _inverse_haar(ll: Tensor, lh: Tensor, hl: Tensor, hh: Tensor) -> Tensor:
    total_left, total_right = (ll + hl) * 0.5, (ll - hl) * 0.5
    change_left, change_right = (lh + hh) * 0.5, (lh - hh) * 0.5
    top = torch.stack([total_left + change_left, total_right + change_right], dim=-1).flatten(-2)
    bottom = torch.stack([total_left - change_left, total_right - change_right], dim=-1).flatten(-2)
    return torch.stack([top, bottom], dim=-2).flatten(-3, -2)


def _folded(spread: Tensor, pad: int, length: int, dim: int) -> Tensor:
    """What lies ``pad`` beyond either end of ``length`` is added where the periodic continuation has it."""
    if pad == 0:
        return spread
    places = (torch.arange(length + 2 * pad, device=spread.device) - pad) % length
    shape = list(spread.shape)
    shape[dim] = length
    return spread.new_zeros(shape).index_add(dim, places, spread)
