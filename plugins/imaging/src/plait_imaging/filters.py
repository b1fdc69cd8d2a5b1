"""Classical restorers of one image: plain SciPy, scikit-image and PyWavelets (through scikit-image)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy  # whose large parts it imports when they are used, as scikit-image does
import skimage


def median(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Median over windows of ``size`` (height, width) in each channel of uint8 ``[H, W, 3]``; mirrored border."""
    result: np.ndarray = scipy.ndimage.median_filter(image, size=(*size, 1), mode="reflect")
    return result


def grey_opening(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Minimum, then maximum over windows of ``size`` in each channel: removes brighter things that are smaller."""
    result: np.ndarray = scipy.ndimage.grey_opening(image, size=(*size, 1), mode="reflect")
    return result


def total_variation(image: np.ndarray, weight: float, max_iterations: int) -> np.ndarray:
    """Chambolle's dual algorithm for total-variation denoising (J. Math. Imaging Vis. 20, 2004) of ``[H, W, 3]``."""
    result: np.ndarray = skimage.restoration.denoise_tv_chambolle(
        image, weight=weight, max_num_iter=max_iterations, channel_axis=-1
    )
    return result


def wavelet_shrinkage(
    image: np.ndarray, wavelet: str, rule: str, mode: str, sigma: float | None, levels: int | None
) -> np.ndarray:
    """Shrink the wavelet coefficients of float ``[H, W, 3]`` in [0, 1], in YCbCr.

    Args:
        rule: of the threshold: ``BayesShrink`` (one a subband) or ``VisuShrink`` (one for all).
        mode: ``soft`` or ``hard``.
        sigma: standard deviation of the noise; ``None`` estimates it from the finest coefficients.
        levels: of the decomposition; ``None`` takes three fewer than possible.
    """
    result: np.ndarray = skimage.restoration.denoise_wavelet(
        image,
        sigma=sigma,
        wavelet=wavelet,
        mode=mode,
        wavelet_levels=levels,
        convert2ycbcr=True,
        method=rule,
        rescale_sigma=True,
        channel_axis=-1,
    )
    return result


def wiener(image: np.ndarray, kernel: np.ndarray, balance: float) -> np.ndarray:
    """Wiener–Hunt deconvolution of float ``[H, W, 3]`` with a Laplacian prior of weight ``balance``."""
    return _per_channel(image, kernel, lambda channel: skimage.restoration.wiener(channel, kernel, balance, clip=False))


def richardson_lucy(image: np.ndarray, kernel: np.ndarray, num_iterations: int) -> np.ndarray:
    """Richardson–Lucy deconvolution of float ``[H, W, 3]`` in [0, 1]."""
    return _per_channel(
        image,
        kernel,
        # The floor keeps the quotient finite where the estimate has gone black.
        lambda channel: skimage.restoration.richardson_lucy(
            channel, kernel, num_iterations, clip=False, filter_epsilon=1e-6
        ),
    )


def _per_channel(image: np.ndarray, kernel: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Deconvolve each channel with the image mirrored around it, so that the border does not ring."""
    rows, columns = 2 * kernel.shape[0], 2 * kernel.shape[1]
    padded = np.pad(image, ((rows, rows), (columns, columns), (0, 0)), mode="symmetric")
    channels = [function(padded[..., c])[rows:-rows, columns:-columns] for c in range(image.shape[-1])]
    return np.stack(channels, axis=-1)
