"""Texts as what a denoiser is conditioned on, encoded by the pipeline's own text encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plait_diffusion.families import empty_condition, kind_of, pixart_sizes, with_sizes

LONG_PROMPT_WORDS = 70  # longer ones are encoded in pieces, as the paper's code does


def encode_prompt(pipeline: Any, denoiser: nn.Module, prompt: str, size: int) -> dict[str, Any]:
    """Keyword arguments of the denoiser's ``forward`` for one prompt, conditional branch only; tensors of one row.

    Args:
        pipeline: the diffusers pipeline whose ``encode_prompt`` is asked.
        size: side of the images, pixels; SDXL and PixArt are told it.

    Raises:
        ValueError: the prompt is longer than 70 words and the model also wants one vector for the whole text.
    """
    kind, device = kind_of(denoiser), _device(pipeline)
    is_long = len(prompt.split()) > LONG_PROMPT_WORDS
    if kind == "UNet2DConditionModel" and denoiser.config.addition_embed_type is None:
        if is_long:
            return {"encoder_hidden_states": encode_long_prompt(pipeline.tokenizer, pipeline.text_encoder, prompt)}
        embeds, _ = pipeline.encode_prompt(prompt, device, 1, False)
        return {"encoder_hidden_states": embeds}
    if is_long and kind != "PixArtTransformer2DModel":
        raise ValueError(
            f"the prompt has {len(prompt.split())} words, and a model with pooled text takes at most {LONG_PROMPT_WORDS}; "
            "shorten it"
        )
    if kind == "UNet2DConditionModel":
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "added_cond_kwargs": with_sizes(pooled, size)}
    if kind == "PixArtTransformer2DModel":
        embeds, mask, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, device=device)
        sizes = pixart_sizes(denoiser, size, embeds.device, embeds.dtype)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, **sizes}
    if kind == "SD3Transformer2DModel":
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt, prompt_2=None, prompt_3=None, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
    if kind == "FluxTransformer2DModel":
        embeds, pooled, _ = pipeline.encode_prompt(prompt, prompt_2=None, device=device)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
    return empty_condition(denoiser, size, device, next(denoiser.parameters()).dtype)


def encode_long_prompt(tokenizer: Any, text_encoder: nn.Module, prompt: str) -> Tensor:
    """A prompt without truncation: pieces of as many tokens as the encoder takes, one after the other, ``[1, T, D]``."""
    ids = tokenizer(prompt, truncation=False, return_tensors="pt", verbose=False).input_ids
    device = next(text_encoder.parameters()).device
    pieces = ids.split(tokenizer.model_max_length, dim=1)
    return torch.cat([text_encoder(piece.to(device))[0] for piece in pieces], dim=1)


def _device(pipeline: Any) -> torch.device:
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder = getattr(pipeline, name, None)
        if encoder is not None:
            return next(encoder.parameters()).device
    return torch.device("cpu")
