"""IP-Adapter: an image as a prompt beside the text (a technique that the paper found weaker than ControlNet).

A U-Net with IP-Adapters is another one, made of the base's own weights: the base itself is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from plait.weights import read_weights
from plait_diffusion import Backbone
from torch import Tensor, nn

IMAGE_ENCODER = "image_encoder"  # folder beside the file, as on the hub
_PARTS = ("image_proj", "ip_adapter")
# What tells the projections apart: their name, and of the width of what they take the tensor and its dimension.
_PLAIN, _FULL, _PLUS = ("proj.weight", 1), ("proj.0.weight", 1), ("proj_in.weight", 1)


@attrs.frozen(eq=False)
class IpAdapter:
    """An IP-Adapter of a U-Net, plain, plus or full, with its image encoder.

    Args:
        weights: ``image_proj`` and ``ip_adapter`` → name → tensor, see :func:`read_ip_adapter`.
        encoder: a ``CLIPVisionModelWithProjection`` of transformers.
        scale: of what the image adds to the attention.
        image: [1, 3, H, W] in [0, 1], the prompt for all images; None: every image is its own.
        name: what it is called where it is refused.
    """

    weights: dict[str, dict[str, Tensor]]
    encoder: Any
    scale: float = 1.0
    image: Tensor | None = None
    name: str = "the IP-Adapter"

    @property
    def sees_patches(self) -> bool:
        """Whether its projection takes the encoder's last layer but one, not the one vector of an image."""
        return _PLAIN[0] not in self.weights["image_proj"]

    def check(self, backbone: Backbone) -> None:
        """Whether it fits a backbone.

        Raises:
            ValueError: it is for another one.
        """
        denoiser: Any = backbone.denoiser
        kind = type(denoiser).__name__
        if kind != "UNet2DConditionModel" or backbone.pipeline_name is None or not _takes_image_prompts(backbone):
            what = kind if backbone.pipeline_name is None else f"{kind} of a {backbone.pipeline_name}"
            raise ValueError(f"{self.name} for a {what}: IP-Adapter is taken for pipelines of SD 1.x and SDXL")
        if denoiser.encoder_hid_proj is not None:
            raise ValueError(
                f"{self.name} for a model that projects its condition already ({denoiser.config.encoder_hid_dim_type}); load the"
                " model without IP-Adapter"
            )
        needed = {
            f"{2 * number + 1}.to_{which}_ip.weight": tuple(
                getattr(denoiser.get_submodule(path), f"to_{which}").weight.shape
            )
            for number, path in enumerate(_cross_attention(denoiser))
            for which in "kv"
        }
        given = {name: tuple(value.shape) for name, value in self.weights["ip_adapter"].items()}
        for name in sorted(given.keys() ^ needed.keys(), key=_number):
            which = "lacks" if name in needed else "has besides"
            raise ValueError(
                f"{self.name} {which} ip_adapter.{name}, with {len(given)} tensors for the model's {len(needed)}; give an IP-Adapter of"
                " this very kind of model"
            )
        for name, shape in needed.items():
            if given[name] != shape:
                raise ValueError(
                    f"ip_adapter.{name} of {self.name} is {list(given[name])}, and the model needs {list(shape)}; give an IP-Adapter"
                    " of this very kind of model"
                )
        self._check_projection(needed)

    def _check_projection(self, needed: dict[str, tuple[int, ...]]) -> None:
        projection, config = self.weights["image_proj"], self.encoder.config
        name, dimension = next(one for one in (_PLAIN, _PLUS, _FULL) if one[0] in projection)
        own, width = (
            projection[name].shape[dimension],
            config.hidden_size if self.sees_patches else config.projection_dim,
        )
        if own != width:
            raise ValueError(
                f"{self.name} takes {own} numbers of an image and its image encoder gives {width}; give the image encoder that it"
                " was trained with"
            )
        condition = next(iter(needed.values()))[1]
        norms = [name for name in ("norm.weight", "norm_out.weight", "proj.3.weight") if name in projection]
        if norms and projection[norms[0]].shape != (condition,):
            raise ValueError(
                f"{self.name} gives tokens of {projection[norms[0]].shape[0]} numbers, and the model takes {condition}; give an"
                " IP-Adapter of this very kind of model"
            )

    @torch.no_grad()
    def shown(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the image prompts of images are projected from, and those of no image: [B, 1, …] each.

        Depends on the images alone, so that it is made once for all steps.

        Args:
            images: [B, 3, S, S] in [0, 1].
        """
        pixels = self._pixels(images if self.image is None else self.image)
        if self.sees_patches:
            seen, nothing = (
                self.encoder(one, output_hidden_states=True).hidden_states[-2]
                for one in (pixels, torch.zeros_like(pixels))
            )
        else:
            seen = self.encoder(pixels).image_embeds
            nothing = torch.zeros_like(seen)
        return tuple(one[:, None].expand(len(images), *(-1,) * one.ndim) for one in (seen, nothing))  # type: ignore[return-value]

    def _pixels(self, images: Tensor) -> Tensor:
        """As CLIP's image encoders see 8-bit images: resized, cropped to a square, normalised."""
        from transformers import CLIPImageProcessor

        side = self.encoder.config.image_size
        levels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        prepared = CLIPImageProcessor(size=side, crop_size=side)(images=list(levels), return_tensors="pt")
        return prepared["pixel_values"].to(next(self.encoder.parameters()))


def with_image_prompts(backbone: Backbone, adapters: Sequence[IpAdapter]) -> Backbone:
    """The backbone with IP-Adapters in a U-Net of its own, whose weights are the base's very tensors."""
    denoiser = backbone.denoiser
    shared = {id(value): value for value in (*denoiser.parameters(), *denoiser.buffers())}
    steered = backbone.with_components(**{backbone.denoiser_name: copy.deepcopy(denoiser, shared)})
    pipeline = steered.pipeline()
    pipeline.load_ip_adapter(
        [adapter.weights for adapter in adapters],
        subfolder=[""] * len(adapters),
        weight_name=[""] * len(adapters),
        image_encoder_folder=None,
    )
    pipeline.set_ip_adapter_scale([adapter.scale for adapter in adapters])
    return steered.with_components()  # frozen and in eval mode, what was added too


def read_ip_adapter(path: Path | str) -> dict[str, dict[str, Tensor]]:
    """The two parts of an IP-Adapter's file.

    Raises:
        ValueError: it is none, or one that needs faces.
    """
    found: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    unexpected = []
    for key, value in read_weights(path).items():
        part, _, name = key.partition(".")
        if part in found and name:
            found[part][name] = value
        else:
            unexpected.append(key)
    if unexpected or not all(found.values()):
        listed = ", ".join(sorted(unexpected)[:3]) or f"it has no {next(part for part in _PARTS if not found[part])}"
        raise ValueError(
            f"{path} is no IP-Adapter, whose tensors are all below image_proj and ip_adapter: {listed}; give a file like"
            " ip-adapter_sd15.safetensors"
        )
    projection, keys = found["image_proj"], found["ip_adapter"]
    if any("lora" in name for name in keys) or "perceiver_resampler.proj_in.weight" in projection:
        raise ValueError(
            f"{path} is an IP-Adapter of faces, which needs a face recogniser; give a plain, plus or full one"
        )
    is_known = (
        _PLAIN[0] in projection or _PLUS[0] in projection or {"proj.0.weight", "proj.3.weight"} <= projection.keys()
    )
    if not is_known:
        raise ValueError(
            f"{path} projects images by {', '.join(sorted(projection)[:3])}, which is not known; give a plain, plus or full one"
        )
    return found


def read_image_encoder(folder: Path, backbone: Backbone) -> nn.Module:
    """The image encoder in a folder, in the backbone's dtype and on its device.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoConfig, CLIPVisionModelWithProjection

    try:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind not in ("clip_vision_model", "clip"):
            raise ValueError(
                f"image_encoder is {folder}, a model of kind {kind}; give CLIP's vision model with projection"
            )
        encoder, told = CLIPVisionModelWithProjection.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(
            f"image_encoder is {folder}, which cannot be read as CLIP's vision model: {str(error).splitlines()[0]}"
        ) from error
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"image_encoder is {folder}, which lacks {missing[0]}; give CLIP's vision model with projection"
        )
    return encoder.to(backbone.device, backbone.dtype).eval().requires_grad_(False)


def _takes_image_prompts(backbone: Backbone) -> bool:
    import diffusers
    from diffusers.loaders import IPAdapterMixin

    return issubclass(getattr(diffusers, str(backbone.pipeline_name)), IPAdapterMixin)


def _cross_attention(denoiser: Any) -> list[str]:
    """Paths of the U-Net's attention to the condition, in the order in which IP-Adapters number them."""
    return [
        name.removesuffix(".processor") for name in denoiser.attn_processors if not name.endswith("attn1.processor")
    ]


def _number(name: str) -> tuple[int, str]:
    first = name.partition(".")[0]
    return (int(first) if first.isdigit() else -1, name)
