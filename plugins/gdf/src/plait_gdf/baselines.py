"""What generic diffusion features are compared with: DIFT and DDPM-seg (legacy sets and VPD's activations are presets)."""

from __future__ import annotations

from collections.abc import Sequence

from plait_diffusion import Backbone, official_ids
from torch import Tensor, nn

from plait_gdf.gdf import Extraction, gdf, place_of

DIFT_LAYER = "up_blocks.1"
DIFT_TIMESTEP = 261
DIFT_DRAWS = 8
DDPM_BLOCKS = (5, 6, 7, 8, 12)
DDPM_TIMESTEPS = (50, 150, 250)


def dift(layer: str = DIFT_LAYER, timestep: int = DIFT_TIMESTEP, **options: object) -> Extraction:
    """DIFT (Tang et al., NeurIPS 2023): one block output of Stable Diffusion 2.1 at 768², at a late timestep.

    The timestep is the network's own, without offset; features are averaged over 8 draws of noise (:data:`DIFT_DRAWS`), and
    the prompt is ``a photo of a {category}``.
    """
    return Extraction(layers=(layer,), timestep=timestep, timestep_rule="exact", **options)  # type: ignore[arg-type]


def ddpm_seg(
    backbone: Backbone,
    images: Tensor,
    *,
    blocks: Sequence[int] = DDPM_BLOCKS,
    timesteps: Sequence[int] = DDPM_TIMESTEPS,
    seed: int = 0,
    **options: object,
) -> dict[str, Tensor]:
    """DDPM-seg (Baranchuk et al., ICLR 2022): decoder blocks of an unconditional DDPM in pixel space at three timesteps.

    All images and timesteps share one noise.

    Args:
        images: ``[B, 3, H, W]`` in [0, 1].
        blocks: numbers of decoder blocks from the lowest resolution on, counted as the paper does: every residual block with
            what follows it (attention, upsampling) is one.

    Returns:
        ``t{timestep}/{activation}`` → ``[B, C, h, w]``.

    Raises:
        ValueError: the decoder has fewer blocks.
    """
    names = decoder_blocks(backbone.denoiser, blocks)
    found = {}
    for timestep in timesteps:
        extraction = Extraction(
            layers=names,
            timestep=timestep,
            timestep_rule="exact",
            shared_noise=True,
            **options,  # type: ignore[arg-type]
        )
        features = gdf(backbone, images, extraction=extraction, seed=seed)
        found.update({f"t{timestep}/{name}": value for name, value in features.items()})
    return found


def decoder_blocks(denoiser: nn.Module, blocks: Sequence[int]) -> tuple[str, ...]:
    """The activations that are the outputs of a U-Net's decoder blocks."""
    outputs: dict[tuple[int, int], str] = {}
    last: dict[int, tuple[int, int]] = {}
    for name in official_ids(denoiser):
        place = place_of(name)
        if place.stage != "up" or place.level is None:
            continue
        if place.repeat is not None and name.endswith(("-res-out", "-vit-out")):
            last[place.level] = (place.level, place.repeat)
            outputs[last[place.level]] = name
        elif name.endswith("-upsampler-out"):
            outputs[last[place.level]] = name
    ordered = [outputs[at] for at in sorted(outputs)]
    outside = [block for block in blocks if not 0 <= block < len(ordered)]
    if outside:
        raise ValueError(f"blocks names {outside[0]}; the decoder has blocks 0 to {len(ordered) - 1}")
    return tuple(ordered[block] for block in blocks)
