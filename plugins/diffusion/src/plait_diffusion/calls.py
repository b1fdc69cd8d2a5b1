"""One pass of a denoiser, before it is made: what stands between preparing images and capturing activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs
from torch import Tensor

from plait_diffusion.feature_sets import Origin


@attrs.frozen(kw_only=True)
class DenoiserCall:
    """Everything that a denoiser is given for a batch of B images, and what it was made from.

    Attributes:
        sample: [B, c, h, w], exactly as the network sees it (noised and scaled).
        timestep: as the network sees it.
        nominal: the timestep that was asked for.
        condition: keyword arguments of the denoiser besides sample and timestep.
        images: [B, 3, S, S] in [0, 1], the pixels that were encoded.
        latents: [B, c, h, w], clean; the pixels themselves, in [-1, 1], for a model without encoder.
        noise: [B, c, h, w], what was added.
        prompts: one an image.
        rows: number of every image in its dataset.
    """

    sample: Tensor
    timestep: Any
    nominal: float
    condition: Mapping[str, Any]
    images: Tensor
    latents: Tensor
    noise: Tensor
    prompts: tuple[str, ...]
    rows: tuple[int, ...]


class Extractor(Protocol):
    """A method of ``extract-feature`` whose two halves may be called one by one, with something done in between."""

    def prepare(
        self,
        backbone: Any,
        images: Tensor,
        *,
        rows: Sequence[int],
        seed: int,
        prompts: Sequence[str] | None = None,
        timestep: float | None = None,
        noise: bool = True,
        latents: Tensor | None = None,
    ) -> DenoiserCall:
        """Resize, encode, add noise, encode the prompts.

        Args:
            images: [B, 3, H, W] in [0, 1].
            rows: the image's numbers; together with ``seed`` they decide the noise.
            prompts: one an image; None: the extractor's own.
            timestep: nominal; None: the extractor's own.
            noise: False: the clean latent at the smallest timestep that the model has.
            latents: clean ones, to skip the encoder.
        """

    def capture(self, backbone: Any, call: DenoiserCall) -> dict[str, Tensor]:
        """One pass: name → [B, C, H, W], each at its own side, in the order of execution."""

    def origin(self, backbone: Any, seed: int) -> Origin:
        """What the features come from."""
