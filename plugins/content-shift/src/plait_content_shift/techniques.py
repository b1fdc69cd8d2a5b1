"""Generation techniques as small objects on the pass of a denoiser (§4): none of them changes a weight.

A technique takes a :class:`plait_diffusion.DenoiserCall` and gives another. :class:`Bucket` is a combination of them.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from plait_diffusion import Backbone, DenoiserCall, expanded, flux_places, flux_tokens
from torch import Tensor, nn

from plait_content_shift.control_images import ControlImages, canny
from plait_content_shift.ip_adapter import IpAdapter, with_image_prompts
from plait_content_shift.lora import LoraWeights, applied

_UNET_FIELDS = ("cross_attention_dim", "block_out_channels", "layers_per_block", "in_channels")
_BLOCK_FIELDS = ("attention_head_dim", "num_attention_heads", "joint_attention_dim", "in_channels", "patch_size")
_FLUX_FIELDS = (
    *("attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim"),
    *("in_channels", "axes_dims_rope"),
)
_OF_BLOCKS = {"SD3ControlNetModel": "SD3Transformer2DModel", "FluxControlNetModel": "FluxTransformer2DModel"}
MOST_DENOISING = 50  # nominal timesteps; from further away the image would be redrawn


@attrs.frozen(eq=False)
class Control:
    """A ControlNet that is shown the image's own edges (§4.2): adds residuals to every skip connection and to the middle.

    Args:
        model: a diffusers ``ControlNetModel`` of the U-Net's family, ``SD3ControlNetModel`` for SD3, ``FluxControlNetModel``
            for Flux.
        scale: of the residuals.
        image: images [B, 3, S, S] in [0, 1] → what the ControlNet is shown, in [0, 1].
        mode: which kind of control image, for a union ControlNet of Flux.
    """

    model: nn.Module
    scale: float = 1.0
    image: ControlImages = canny
    mode: int | None = None

    @property
    def is_of_flux(self) -> bool:
        """Whether it is for Flux, whose image is a row of tokens."""
        return type(self.model).__name__ == "FluxControlNetModel"

    @property
    def is_of_blocks(self) -> bool:
        """Whether it is for a transformer: adds to its blocks, and is shown the encoded control image."""
        return hasattr(self.model, "controlnet_blocks")

    def check(self, denoiser: Any) -> None:
        """Whether it fits a denoiser.

        Raises:
            ValueError: it is for another one.
        """
        own_kind, kind = type(self.model).__name__, type(denoiser).__name__
        is_of_unet = hasattr(self.model, "controlnet_down_blocks") and hasattr(denoiser, "down_blocks")
        if not is_of_unet and _OF_BLOCKS.get(own_kind) != kind:
            raise ValueError(
                f"a {own_kind} for a {kind}: ControlNetModel is taken for U-Nets (SD 1.x, SDXL), SD3ControlNetModel for SD3 and"
                " FluxControlNetModel for Flux"
            )
        for name in _UNET_FIELDS if is_of_unet else _FLUX_FIELDS if self.is_of_flux else _BLOCK_FIELDS:
            own, needed = getattr(self.model.config, name, None), getattr(denoiser.config, name, None)
            if _listed(own) != _listed(needed):
                raise ValueError(
                    f"the ControlNet's {name} is {own} and the denoiser's {needed}; give a ControlNet of this very denoiser"
                )
        if self.is_of_blocks:
            # A deeper one has residuals that no block takes; of a shallower one each serves several blocks.
            for name in ("num_layers", "num_single_layers") if self.is_of_flux else ("num_layers",):
                own, needed = getattr(self.model.config, name), getattr(denoiser.config, name)
                if own > needed:
                    raise ValueError(
                        f"the ControlNet's {name} is {own}, more than the denoiser's {needed}; give one of this very denoiser"
                    )
        modes = getattr(self.model.config, "num_mode", None)
        if modes is None and self.mode is not None:
            raise ValueError(f"the mode is {self.mode}, but the {own_kind} is no union of several; leave the mode out")
        if modes is not None and (self.mode is None or not 0 <= self.mode < modes):
            raise ValueError(f"the mode is {self.mode}, and the union ControlNet needs one from 0 to {modes - 1}")

    def residuals(self, denoiser: Any, call: DenoiserCall, shown: Tensor) -> dict[str, Any]:
        """Keyword arguments of the denoiser."""
        batch = len(call.sample)
        condition = {
            name: expanded(value, batch)
            for name, value in call.condition.items()
            if name in ("encoder_hidden_states", "added_cond_kwargs", "class_labels", "pooled_projections")
        }
        time = torch.full((batch,), float(call.timestep), device=call.sample.device)
        first = next(self.model.parameters())
        sample = call.sample.to(first.dtype)
        shared = {
            "controlnet_cond": shown.to(first),
            "conditioning_scale": self.scale,
            "return_dict": False,
            **condition,
        }
        if self.is_of_flux:
            return self._of_flux(denoiser, sample, time, shared, call.condition.get("guidance"))
        if self.is_of_blocks:
            (blocks,) = self.model(sample, timestep=time, **shared)
            count = len(denoiser.transformer_blocks)
            # As the transformer gives them out, so that ControlNets with other numbers of blocks add up.
            return {"block_controlnet_hidden_states": tuple(blocks[i * len(blocks) // count] for i in range(count))}
        down, middle = self.model(sample, time.long(), guess_mode=False, **shared)
        return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}

    def _of_flux(
        self, denoiser: Any, sample: Tensor, time: Tensor, shared: dict[str, Any], guidance: Tensor | None
    ) -> dict[str, Any]:
        """One residual for every block: ControlNets with other numbers of blocks add up."""
        batch, device = len(sample), sample.device
        if self.model.config.guidance_embeds:
            shared["guidance"] = torch.ones(batch, device=device) if guidance is None else expanded(guidance, batch)
        if self.mode is not None:
            shared["controlnet_mode"] = torch.full((batch, 1), self.mode, device=device)
        double, single = self.model(
            hidden_states=flux_tokens(sample),
            timestep=time / 1000,
            img_ids=flux_places(sample),
            txt_ids=sample.new_zeros(shared["encoder_hidden_states"].shape[1], 3),
            **shared,
        )
        repeats = self.model.input_hint_block is not None
        placed = {
            "controlnet_block_samples": _placed(double, len(denoiser.transformer_blocks), repeats),
            "controlnet_single_block_samples": _placed(single, len(denoiser.single_transformer_blocks), False),
        }
        return {name: blocks for name, blocks in placed.items() if blocks}

    def shown(self, backbone: Backbone, call: DenoiserCall) -> Tensor:
        """The control image; depends on the image alone, so that it is made once for all steps.

        Raises:
            ValueError: it is of another size or number of channels than needed, or not in [0, 1].
        """
        shown = self.image(call.images)
        _check_control_image(shown, call.images, getattr(self.model.config, "conditioning_channels", 3))
        if not self.is_of_blocks:
            return shown
        if getattr(self.model, "input_hint_block", None) is not None:
            return shown * 2 - 1  # ControlNets with an encoder of their own see pixels
        latents = backbone.latents(backbone.moments(shown))
        return flux_tokens(latents) if self.is_of_flux else latents


@attrs.frozen(eq=False)
class Adapter:
    """A T2I-Adapter: features of the control image, added inside a U-Net's way down. It sees neither noise nor text.

    Args:
        model: a diffusers ``T2IAdapter``, full, light or of SDXL.
        scale: of its features.
        image: images [B, 3, S, S] in [0, 1] → what it is shown, in [0, 1]. One that takes a single channel is shown the mean.
    """

    model: nn.Module
    scale: float = 1.0
    image: ControlImages = canny

    def check(self, backbone: Backbone) -> None:
        """Whether it fits a backbone.

        Raises:
            ValueError: it is for another one.
        """
        own, kind = type(self.model).__name__, type(backbone.denoiser).__name__
        if own != "T2IAdapter" or kind != "UNet2DConditionModel":
            raise ValueError(f"a {own} for a {kind}: T2IAdapter is taken for U-Nets with text (SD 1.x, SDXL)")
        given, places = _levels(self.model), _places(backbone)
        # The last place, the middle, is left free by adapters of U-Nets with four levels.
        if given not in (places, places[:-1]):
            raise ValueError(
                f"the T2I-Adapter's features are {_said(given)}, and the U-Net takes {_said(places)}; give an adapter of this very"
                " U-Net"
            )

    def shown(self, backbone: Backbone, call: DenoiserCall) -> tuple[Tensor, ...]:
        """Its features, which depend on the image alone, so that they are made once for all steps.

        Raises:
            ValueError: the control image is of another size or number of channels than needed, or not in [0, 1].
        """
        channels = int(self.model.config.in_channels)
        shown = self.image(call.images)
        shown = shown.mean(1, keepdim=True) if channels == 1 else shown
        _check_control_image(shown, call.images, channels)
        features = self.model(shown.to(next(self.model.parameters())))
        return tuple(self.scale * feature.to(backbone.dtype) for feature in features)

    def residuals(self, denoiser: Any, call: DenoiserCall, shown: Sequence[Tensor]) -> dict[str, Any]:
        """Keyword arguments of the denoiser, for one pass: the U-Net empties the list."""
        return {"down_intrablock_additional_residuals": list(shown)}


@attrs.frozen(eq=False)
class ImagePrompts:
    """What a bucket's IP-Adapters make of the images: a prompt beside the text."""

    adapters: tuple[IpAdapter, ...]

    def shown(self, backbone: Backbone, call: DenoiserCall) -> SeenImages:
        """Of every IP-Adapter, once for all steps."""
        found = [adapter.shown(call.images) for adapter in self.adapters]
        return SeenImages(
            [seen.to(backbone.dtype) for seen, _ in found], [none.to(backbone.dtype) for _, none in found]
        )

    def residuals(self, denoiser: Any, call: DenoiserCall, shown: Sequence[Tensor]) -> dict[str, Any]:
        """Keyword arguments of the denoiser."""
        return {"added_cond_kwargs": {**(call.condition.get("added_cond_kwargs") or {}), "image_embeds": list(shown)}}


@attrs.frozen(eq=False)
class SeenImages:
    """By IP-Adapter, [B, 1, …]: of the images, and of none, for the unconditional pass of guidance."""

    seen: Sequence[Tensor]
    of_nothing: Sequence[Tensor]


@attrs.frozen(eq=False)
class Lora:
    """Low-rank weights of one data set (§4.3), while a context lasts."""

    weights: LoraWeights
    scale: float = 1.0


@attrs.frozen(eq=False, kw_only=True)
class Bucket:
    """A combination of techniques (§5.3: one feature set of the amalgamation).

    Attributes:
        prompt: for all images (§4.1); None: the extractor's own.
        controls: several ControlNets: their residuals are added up.
        adapters: several T2I-Adapters: their features are added up.
        ip_adapters: several IP-Adapters: what they add to the attention is added up.
        loras: applied together.
        denoise_from: nominal timestep to denoise from before features are read; None: one pass.
        guidance: classifier-free guidance while denoising; 1: none. Features are of the conditional branch.
        functions: the user's own techniques, call → call, before each other.
    """

    prompt: str | None = None
    controls: tuple[Control, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    ip_adapters: tuple[IpAdapter, ...] = ()
    loras: tuple[Lora, ...] = ()
    denoise_from: int | None = None
    guidance: float = 1.0
    functions: tuple[Callable[[DenoiserCall], DenoiserCall], ...] = ()
    # The backbone with the IP-Adapters, once for all batches.
    _prompted: weakref.WeakKeyDictionary[Backbone, Backbone] = attrs.field(
        factory=weakref.WeakKeyDictionary, init=False, repr=False
    )

    @property
    def steers(self) -> bool:
        """Whether something but noise and prompt changes a pass."""
        return bool(self.controls or self.adapters or self.ip_adapters or self.loras or self.functions)

    def check(self, backbone: Backbone, timestep: float) -> None:
        """Refuse what does not fit, before the first pass.

        Raises:
            ValueError: a ControlNet, T2I-Adapter or IP-Adapter of another model; ``denoise_from`` outside (t, t + 50].
        """
        for control in self.controls:
            control.check(backbone.denoiser)
        for adapter in self.adapters:
            adapter.check(backbone)
        for ip_adapter in self.ip_adapters:
            ip_adapter.check(backbone)
        if self.denoise_from is not None and not timestep < self.denoise_from <= timestep + MOST_DENOISING:
            raise ValueError(
                f"denoise_from is {self.denoise_from}; with timestep {timestep:g} allowed is {timestep + 1:g} to"
                f" {timestep + MOST_DENOISING:g}"
            )

    @contextlib.contextmanager
    def weights(self, backbone: Backbone) -> Iterator[Backbone]:
        """The backbone with the LoRAs and IP-Adapters at work. Under a LoRA, which may touch the text encoder, prompts are
        encoded anew.
        """
        if self.ip_adapters:
            if backbone not in self._prompted:
                self._prompted[backbone] = with_image_prompts(backbone, self.ip_adapters)
            backbone = self._prompted[backbone]
        if not self.loras:
            yield backbone
            return
        with contextlib.ExitStack() as stack:
            for lora in self.loras:
                stack.enter_context(applied(backbone.components, lora.weights, lora.scale))
            yield backbone.with_components()

    def __call__(self, backbone: Backbone, call: DenoiserCall, nominal: float) -> DenoiserCall:
        """The pass that features are read from.

        Args:
            call: at ``denoise_from`` where it is given, else at ``nominal``.
        """
        shown = self.shown(backbone, call)
        if self.denoise_from is not None:
            call = self._denoised(backbone, call, nominal, shown)
        return self._steered(backbone.denoiser, call, shown)

    @property
    def shown_images(self) -> tuple[Control | Adapter | ImagePrompts, ...]:
        """The techniques that are shown an image."""
        prompts = (ImagePrompts(self.ip_adapters),) if self.ip_adapters else ()
        return (*self.controls, *self.adapters, *prompts)

    def shown(self, backbone: Backbone, call: DenoiserCall) -> list[Any]:
        """What each of :attr:`shown_images` makes of the images, once for all steps."""
        return [one.shown(backbone, call) for one in self.shown_images]

    def _steered(
        self, denoiser: nn.Module, call: DenoiserCall, shown: Sequence[Any], is_unconditional: bool = False
    ) -> DenoiserCall:
        for function in self.functions:
            call = function(call)
        residuals: dict[str, Any] = {}
        for one, image in zip(self.shown_images, shown, strict=True):
            if isinstance(one, ImagePrompts):
                image = image.of_nothing if is_unconditional else image.seen
            for name, own in one.residuals(denoiser, call, image).items():
                residuals[name] = _sum(residuals[name], own) if name in residuals else own
        return attrs.evolve(call, condition={**call.condition, **residuals})

    def predicted(self, backbone: Backbone, call: DenoiserCall, shown: Sequence[Any]) -> Tensor:
        """The network's output for a sample, guided where asked."""
        steered = self._steered(backbone.denoiser, call, shown)
        out = backbone.denoise(steered.sample, steered.timestep, steered.condition)
        if self.guidance == 1:
            return out
        empty = attrs.evolve(call, condition=backbone.condition([""], call.images.shape[-1]))
        steered = self._steered(backbone.denoiser, empty, shown, is_unconditional=True)
        plain = backbone.denoise(steered.sample, steered.timestep, steered.condition)
        return plain + self.guidance * (out - plain)

    def _denoised(self, backbone: Backbone, call: DenoiserCall, nominal: float, shown: Sequence[Any]) -> DenoiserCall:
        """Steps of the model's own scheduler down to the first timestep that is not above the nominal one (App. A.2)."""
        if hasattr(backbone.scheduler, "scale_noise") and not hasattr(backbone.scheduler, "alphas_cumprod"):
            return self._flowed(backbone, call, nominal, shown)
        scheduler = copy.deepcopy(backbone.scheduler)
        if not hasattr(scheduler, "step"):
            raise ValueError(f"denoise_from needs a scheduler with steps; a {type(scheduler).__name__} has none")
        scheduler.set_timesteps(scheduler.config.num_train_timesteps)
        times = scheduler.timesteps
        begin = int((times.double() - float(call.timestep)).abs().argmin())
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        x = call.sample / _scale(scheduler, times[begin])
        for time in times[begin:]:
            call = attrs.evolve(call, sample=scheduler.scale_model_input(x, time), timestep=float(time))
            if float(time) <= nominal:
                return call
            x = scheduler.step(self.predicted(backbone, call, shown), time, x, return_dict=False)[0].to(x.dtype)
        return call

    def _flowed(self, backbone: Backbone, call: DenoiserCall, nominal: float, shown: Sequence[Any]) -> DenoiserCall:
        """Flow models: Euler steps of one nominal timestep."""
        assert self.denoise_from is not None
        for at in range(self.denoise_from, int(nominal), -1):
            here, there = backbone.noise_level(at), backbone.noise_level(at - 1)
            velocity = self.predicted(backbone, call, shown)
            sample = call.sample + (there.noise - here.noise) * velocity
            call = attrs.evolve(call, sample=sample, timestep=there.timestep)
        return call


def _scale(scheduler: Any, time: Any) -> float:
    """What a scheduler multiplies a sample by before the network sees it."""
    return float(copy.deepcopy(scheduler).scale_model_input(torch.ones(1, 1, 1, 1), time))


def _check_control_image(shown: Tensor, images: Tensor, channels: int) -> None:
    if shown.shape[-2:] != images.shape[-2:] or len(shown) != len(images):
        raise ValueError(f"the control image has shape {list(shown.shape)}; the images have {list(images.shape)}")
    if shown.shape[1] != channels:
        raise ValueError(
            f"the control image has {shown.shape[1]} channels and the model takes {channels}; show it what it was trained with"
        )
    low, high = float(shown.min()), float(shown.max())
    if low < 0 or high > 1:
        raise ValueError(f"the control image ranges from {low:.3g} to {high:.3g}; [0, 1] is needed")


def _placed(blocks: Sequence[Tensor] | None, count: int, repeats: bool) -> tuple[Tensor, ...]:
    """Residuals of a few blocks for all ``count``: each for its share of successive blocks, or one after the other."""
    if not blocks:
        return ()
    share = math.ceil(count / len(blocks))
    return tuple(blocks[number % len(blocks) if repeats else number // share] for number in range(count))


def _levels(adapter: Any) -> list[tuple[int, int]]:
    """Channels of an adapter's features and pixels that one value stands for, found without computing them."""
    with torch.device("meta"):
        shape_only = type(adapter).from_config(adapter.config)
    side = adapter.total_downscale_factor
    features = shape_only(torch.empty(1, adapter.config.in_channels, side, side, device="meta"))
    return [(feature.shape[1], side // feature.shape[-1]) for feature in features]


def _places(backbone: Backbone) -> list[tuple[int, int]]:
    """The same of where a U-Net adds them: in its blocks with attention, behind those without, behind the middle."""
    denoiser: Any = backbone.denoiser
    pixels, places = backbone.pixels_per_latent, []
    for block, channels in zip(denoiser.down_blocks, denoiser.config.block_out_channels, strict=True):
        after = pixels * (1 if block.downsamplers is None else 2)
        places.append((channels, pixels if getattr(block, "has_cross_attention", False) else after))
        pixels = after
    return [*places, (denoiser.config.block_out_channels[-1], pixels)]


def _said(levels: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{channels} channels at 1/{pixels}" for channels, pixels in levels)


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, (tuple, list)):
        return type(one)(a + b for a, b in zip(one, other, strict=True))
    return one + other


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def leaked_labels(captions: Sequence[str], labels: Sequence[str]) -> list[int]:
    """Rows whose caption names their own class as a word."""
    return [
        row
        for row, (caption, label) in enumerate(zip(captions, labels, strict=True))
        if label and re.search(rf"(?<!\w){re.escape(label)}(?!\w)", caption, re.IGNORECASE)
    ]
