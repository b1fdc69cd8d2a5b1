"""How each kind of denoiser of diffusers is called, and where the tokens of an image lie in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNETS = ("UNet2DConditionModel", "UNet2DModel")
JOINT = ("FluxTransformer2DModel", "SD3Transformer2DModel")  # text and image tokens attend to each other
KNOWN = (*UNETS, *JOINT, "PixArtTransformer2DModel", "Transformer2DModel", "DiTTransformer2DModel")


def kind_of(denoiser: nn.Module) -> str:
    """The name of a denoiser's class, also below ``torch.compile`` and adapters."""
    inner = getattr(denoiser, "_orig_mod", denoiser)
    return type(inner).__name__


def latent_channels(denoiser: Any) -> int:
    """Channels of the noised image that a denoiser takes."""
    channels = int(denoiser.config.in_channels)
    return channels // 4 if kind_of(denoiser) == "FluxTransformer2DModel" else channels  # packed: 2×2 values a token


def call_denoiser(denoiser: nn.Module, sample: Tensor, timestep: float, condition: Mapping[str, Any]) -> Tensor:
    """One pass.

    Args:
        sample: ``[B, C, h, w]``, noised and scaled as the network expects it.
        timestep: as :class:`plait_diffusion.NoiseLevel` has it: 0 to 1000, also for flow models.
        condition: keyword arguments of the denoiser's ``forward`` besides these two; tensors of one row serve all images.

    Returns:
        the network's prediction, ``[B, C, h, w]``.
    """
    batch = len(sample)
    arguments = {name: expanded(value, batch) for name, value in condition.items()}
    time = torch.full((batch,), float(timestep), device=sample.device)
    kind = kind_of(denoiser)
    if kind == "FluxTransformer2DModel":
        return _call_flux(denoiser, sample, time, arguments)
    if kind in UNETS:
        # A whole timestep as a whole number: some embeddings look it up.
        when = time.long() if float(timestep).is_integer() else time
        return denoiser(sample, when, **arguments).sample
    if kind != "SD3Transformer2DModel":
        time = time.long()
    return denoiser(hidden_states=sample, timestep=time, **arguments).sample


def _call_flux(denoiser: Any, sample: Tensor, time: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Flux sees tokens, with their places beside them, and time in [0, 1]."""
    text = arguments["encoder_hidden_states"]
    arguments = {"txt_ids": sample.new_zeros(text.shape[1], 3), **arguments}
    if denoiser.config.guidance_embeds and "guidance" not in arguments:
        arguments["guidance"] = torch.ones(len(sample), device=sample.device)
    tokens, places = flux_tokens(sample), flux_places(sample)
    out = denoiser(hidden_states=tokens, timestep=time / 1000, img_ids=places, **arguments).sample
    rows, columns = (side // 2 for side in sample.shape[-2:])
    return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (rows, columns)), 2)


def flux_tokens(sample: Tensor) -> Tensor:
    """[B, C, h, w] as Flux sees it: a token for every 2×2 values, [B, h w / 4, 4 C]."""
    return F.pixel_unshuffle(sample, 2).flatten(2).transpose(1, 2)


def flux_places(sample: Tensor) -> Tensor:
    """Where the tokens of a sample lie, [h w / 4, 3]: 0, row, column."""
    rows, columns = (torch.arange(side // 2, device=sample.device) for side in sample.shape[-2:])
    return torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns).to(sample)


def expanded(value: Any, batch: int) -> Any:
    """A condition of one row, for every image of a batch; mappings and lists of them too."""
    if isinstance(value, Mapping):
        return {name: expanded(item, batch) for name, item in value.items()}
    if isinstance(value, list):  # a list of its own for every call: U-Nets take residuals out of it
        return [expanded(item, batch) for item in value]
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == 1 != batch:
        return value.expand(batch, *value.shape[1:])
    if isinstance(value, Tensor) and value.ndim == 1 and len(value) == 1 != batch:
        return value.expand(batch)
    return value


def token_grid(denoiser: Any, sample: Tensor) -> tuple[int, int] | None:
    """Rows and columns of a transformer's image tokens; ``None`` for U-Nets, whose blocks know their own."""
    kind = kind_of(denoiser)
    if kind in UNETS:
        return None
    patch = 2 if kind == "FluxTransformer2DModel" else int(getattr(denoiser.config, "patch_size", None) or 1)
    return sample.shape[-2] // patch, sample.shape[-1] // patch


def empty_condition(
    denoiser: Any, size: int, device: Any, dtype: torch.dtype, *, num_tokens: int = 77
) -> dict[str, Any]:
    """What a denoiser without text encoders is given in place of a text: zeros, and the size of the image where it asks."""
    kind, config = kind_of(denoiser), denoiser.config

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(1, *shape, device=device, dtype=dtype)

    if kind == "UNet2DModel":
        classes = getattr(config, "num_class_embeds", None)
        return {} if classes is None else {"class_labels": torch.full((1,), classes - 1, device=device)}
    if kind == "UNet2DConditionModel":
        condition: dict[str, Any] = {"encoder_hidden_states": zeros(num_tokens, _first(config.cross_attention_dim))}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            condition["added_cond_kwargs"] = with_sizes(zeros(pooled), size)
        return condition
    if kind == "PixArtTransformer2DModel":
        return {
            "encoder_hidden_states": zeros(num_tokens, config.caption_channels),
            **pixart_sizes(denoiser, size, device, dtype),
        }
    if kind == "SD3Transformer2DModel":
        return {
            "encoder_hidden_states": zeros(num_tokens, config.joint_attention_dim),
            "pooled_projections": zeros(config.pooled_projection_dim),
        }
    if kind == "FluxTransformer2DModel":
        return {
            "encoder_hidden_states": zeros(num_tokens, config.joint_attention_dim),
            "pooled_projections": zeros(config.pooled_projection_dim),
        }
    if getattr(config, "num_embeds_ada_norm", None):
        return {"class_labels": torch.full((1,), config.num_embeds_ada_norm, device=device)}
    raise ValueError(f"a {kind} is not known; known are {', '.join(KNOWN)}")


def with_sizes(pooled: Tensor, size: int) -> dict[str, Tensor]:
    """SDXL's second condition: the pooled text, and ``[S, S, 0, 0, S, S]`` for original size, crop and target size."""
    times = torch.tensor([[size, size, 0, 0, size, size]], device=pooled.device, dtype=pooled.dtype)
    return {"text_embeds": pooled, "time_ids": times}


def pixart_sizes(denoiser: Any, size: int, device: Any, dtype: torch.dtype) -> dict[str, Any]:
    """PixArt's second condition: size and aspect ratio, where it was trained with them."""
    resolution = aspect = None
    if denoiser.config.sample_size == 128:
        resolution = torch.tensor([[size, size]], device=device, dtype=dtype)
        aspect = torch.ones(1, 1, device=device, dtype=dtype)
    return {"added_cond_kwargs": {"resolution": resolution, "aspect_ratio": aspect}}


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)
