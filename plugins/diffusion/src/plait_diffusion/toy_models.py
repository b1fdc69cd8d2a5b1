"""Diffusion models in miniature, of the shapes of the well-known ones and with random weights, for tests and examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from plait_diffusion.backbone import Backbone

Kind = Literal["sd15", "sdxl", "sd3", "pixart", "flux", "ddpm", "dit"]
_WORDS = [
    "<pad>",
    "<start>",
    "<end>",
    "<unknown>",
    *["a", "the", "of", "photo", "painting", "cat", "dog", "horse", "digit", "red", "blue", "small", "large"],
]
_WIDTH = 16


def tiny_backbone(kind: Kind, seed: int = 0) -> Backbone:
    """A backbone with the blocks, names and text encoders of a well-known model, a few channels wide.

    ``sd15`` has its 197 activations, ``sdxl`` its 612; images are 64×64 (``ddpm``: 32×32, in pixel space).
    """
    builders: dict[str, Callable[[], Backbone]] = {
        "sd15": _sd15,
        "sdxl": _sdxl,
        "sd3": _sd3,
        "pixart": _pixart,
        "flux": _flux,
        "ddpm": _ddpm,
        "dit": _dit,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = builders[kind]()
    backbone.name = f"tiny-{kind}"
    return backbone


def _sd15() -> Backbone:
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        cross_attention_dim=_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    parts = {
        "vae": _vae(0.18215),
        "text_encoder": _clip(),
        "tokenizer": _tokenizer(),
        "unet": unet,
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
    }
    return Backbone(parts, pipeline="StableDiffusionPipeline", options={"requires_safety_checker": False})


def _sdxl() -> Backbone:
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2 * _WIDTH,
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + _WIDTH,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    parts = {
        "vae": _vae(0.13025, force_upcast=True),
        "text_encoder": _clip(),
        "text_encoder_2": _clip(projected=True),
        "tokenizer": _tokenizer(),
        "tokenizer_2": _tokenizer(),
        "unet": unet,
        "scheduler": scheduler,
        "image_encoder": None,
        "feature_extractor": None,
    }
    return Backbone(parts, pipeline="StableDiffusionXLPipeline", options={"force_zeros_for_empty_prompt": True})


def _sd3() -> Backbone:
    import diffusers

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * _WIDTH,
        caption_projection_dim=_WIDTH,
        pooled_projection_dim=2 * _WIDTH,
        out_channels=16,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    parts = {
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": _vae(1.5305, channels=16, shift_factor=0.0609),
        "text_encoder": _clip(projected=True),
        "tokenizer": _tokenizer(),
        "text_encoder_2": _clip(projected=True),
        "tokenizer_2": _tokenizer(),
        "text_encoder_3": _t5(2 * _WIDTH),
        "tokenizer_3": _tokenizer(),
        "image_encoder": None,
        "feature_extractor": None,
    }
    return Backbone(parts, pipeline="StableDiffusion3Pipeline")


def _pixart() -> Backbone:
    import diffusers

    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=_WIDTH,
        caption_channels=_WIDTH,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(steps_offset=1)
    parts = {
        "tokenizer": _tokenizer(),
        "text_encoder": _t5(),
        "vae": _vae(0.18215),
        "transformer": transformer,
        "scheduler": scheduler,
    }
    return Backbone(parts, pipeline="PixArtAlphaPipeline")


def _flux() -> Backbone:
    import diffusers

    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": _vae(0.3611, shift_factor=0.1159),
        "text_encoder": _clip(),
        "tokenizer": _tokenizer(),
        "text_encoder_2": _t5(),
        "tokenizer_2": _tokenizer(),
        "transformer": transformer,
        "image_encoder": None,
        "feature_extractor": None,
    }
    return Backbone(parts, pipeline="FluxPipeline")


def _ddpm() -> Backbone:
    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return Backbone({"unet": unet, "scheduler": diffusers.DDPMScheduler()}, pipeline="DDPMPipeline")


def _dit() -> Backbone:
    import diffusers

    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    return Backbone({"transformer": transformer, "scheduler": diffusers.DDIMScheduler(), "vae": _vae(0.18215)})


def _vae(factor: float, channels: int = 4, **options: Any) -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=64,
        scaling_factor=factor,
        **{"force_upcast": False, **options},
    )


def _clip(*, projected: bool = False) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(_WORDS),
        hidden_size=_WIDTH,
        intermediate_size=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=_WIDTH,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def _t5(width: int = _WIDTH) -> Any:
    import transformers

    config = transformers.T5Config(
        vocab_size=len(_WORDS), d_model=width, d_kv=8, d_ff=width, num_layers=2, num_heads=2, pad_token_id=0
    )
    return transformers.T5EncoderModel(config)


def _tokenizer() -> Any:
    """A tokenizer of whole words, with CLIP's start and end."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(_WORDS)}, unk_token="<unknown>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        model_max_length=77,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unknown>",
    )
