"""Generation techniques as small objects on the pass of a denoiser (§4): none of them changes a weight.

A technique takes a :class:`plait_diffusion.DenoiserCall` and gives another. :class:`Bucket` is a combination of them.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from plait_diffusion import Backbone, DenoiserCall, expanded
from torch import Tensor, nn

from plait_content_shift.control_images import ControlImages, canny
from plait_content_shift.lora import LoraWeights, applied

_UNET_FIELDS = ("cross_attention_dim", "block_out_channels", "layers_per_block", "in_channels")
_BLOCK_FIELDS = ("attention_head_dim", "num_attention_heads", "joint_attention_dim", "in_channels", "patch_size")
MOST_DENOISING = 50  # nominal timesteps; from further away the image would be redrawn


@attrs.frozen(eq=False)
class Control:
    """A ControlNet that is shown the image's own edges (§4.2): adds residuals to every skip connection and to the middle.

    Args:
        model: a diffusers ``ControlNetModel`` of the U-Net's family, or ``SD3ControlNetModel`` for SD3.
        scale: of the residuals.
        image: images [B, 3, S, S] in [0, 1] → what the ControlNet is shown, in [0, 1].
    """

    model: nn.Module
    scale: float = 1.0
    image: ControlImages = canny

    @property
    def is_of_blocks(self) -> bool:
        """Whether it is for a transformer: adds to its blocks, and is shown the encoded control image."""
        return hasattr(self.model, "controlnet_blocks")

    def check(self, denoiser: Any) -> None:
        """Whether it fits a denoiser.

        Raises:
            ValueError: it is for another one.
        """
        kinds = {True: type(denoiser).__name__ == "SD3Transformer2DModel", False: hasattr(denoiser, "down_blocks")}
        known = self.is_of_blocks or hasattr(self.model, "controlnet_down_blocks")
        if not known or not kinds[self.is_of_blocks] or "Flux" in type(self.model).__name__:
            raise ValueError(
                f"a {type(self.model).__name__} for a {type(denoiser).__name__}: ControlNetModel is taken for U-Nets (SD 1.x, SDXL)"
                " and SD3ControlNetModel for SD3"
            )
        for name in _BLOCK_FIELDS if self.is_of_blocks else _UNET_FIELDS:
            own, needed = getattr(self.model.config, name, None), getattr(denoiser.config, name, None)
            if _listed(own) != _listed(needed):
                raise ValueError(
                    f"the ControlNet's {name} is {own} and the denoiser's {needed}; give a ControlNet of this very denoiser"
                )

    def residuals(self, call: DenoiserCall, shown: Tensor) -> dict[str, Any]:
        """Keyword arguments of the denoiser."""
        batch = len(call.sample)
        condition = {
            name: expanded(value, batch)
            for name, value in call.condition.items()
            if name in ("encoder_hidden_states", "added_cond_kwargs", "class_labels", "pooled_projections")
        }
        time = torch.full((batch,), float(call.timestep), device=call.sample.device)
        first = next(self.model.parameters())
        shared = {
            "controlnet_cond": shown.to(first),
            "conditioning_scale": self.scale,
            "return_dict": False,
            **condition,
        }
        if self.is_of_blocks:
            (blocks,) = self.model(call.sample.to(first.dtype), timestep=time, **shared)
            return {"block_controlnet_hidden_states": tuple(blocks)}
        down, middle = self.model(call.sample.to(first.dtype), time.long(), guess_mode=False, **shared)
        return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}

    def shown(self, backbone: Backbone, call: DenoiserCall) -> Tensor:
        """The control image; depends on the image alone, so that it is made once for all steps.

        Raises:
            ValueError: it is of another size than the image, or not in [0, 1].
        """
        shown = self.image(call.images)
        if shown.shape[-2:] != call.images.shape[-2:] or len(shown) != len(call.images):
            raise ValueError(
                f"the control image has shape {list(shown.shape)}; the images have {list(call.images.shape)}"
            )
        if float(shown.min()) < 0 or float(shown.max()) > 1:
            raise ValueError(
                f"the control image ranges from {float(shown.min()):.3g} to {float(shown.max()):.3g}; [0, 1] is needed"
            )
        return backbone.latents(backbone.moments(shown)) if self.is_of_blocks else shown


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
        loras: applied together.
        denoise_from: nominal timestep to denoise from before features are read; None: one pass.
        guidance: classifier-free guidance while denoising; 1: none. Features are of the conditional branch.
        functions: the user's own techniques, call → call, before each other.
    """

    prompt: str | None = None
    controls: tuple[Control, ...] = ()
    loras: tuple[Lora, ...] = ()
    denoise_from: int | None = None
    guidance: float = 1.0
    functions: tuple[Callable[[DenoiserCall], DenoiserCall], ...] = ()

    @property
    def steers(self) -> bool:
        """Whether something but noise and prompt changes a pass."""
        return bool(self.controls or self.loras or self.functions)

    def check(self, backbone: Backbone, timestep: float) -> None:
        """Refuse what does not fit, before the first pass.

        Raises:
            ValueError: a ControlNet of another model; ``denoise_from`` outside (t, t + 50].
        """
        for control in self.controls:
            control.check(backbone.denoiser)
        if self.denoise_from is not None and not timestep < self.denoise_from <= timestep + MOST_DENOISING:
            raise ValueError(
                f"denoise_from is {self.denoise_from}; with timestep {timestep:g} allowed is {timestep + 1:g} to"
                f" {timestep + MOST_DENOISING:g}"
            )

    @contextlib.contextmanager
    def weights(self, backbone: Backbone) -> Iterator[Backbone]:
        """The backbone with the LoRAs at work. Prompts are encoded anew, since a LoRA may touch the text encoder."""
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
        shown = [control.shown(backbone, call) for control in self.controls]
        if self.denoise_from is not None:
            call = self._denoised(backbone, call, nominal, shown)
        return self._steered(call, shown)

    def _steered(self, call: DenoiserCall, shown: Sequence[Tensor]) -> DenoiserCall:
        for function in self.functions:
            call = function(call)
        if not self.controls:
            return call
        residuals: dict[str, Any] = {}
        for control, image in zip(self.controls, shown, strict=True):
            own = control.residuals(call, image)
            residuals = own if not residuals else {name: _sum(residuals[name], own[name]) for name in own}
        return attrs.evolve(call, condition={**call.condition, **residuals})

    def predicted(self, backbone: Backbone, call: DenoiserCall, shown: Sequence[Tensor]) -> Tensor:
        """The network's output for a sample, guided where asked."""
        steered = self._steered(call, shown)
        out = backbone.denoise(steered.sample, steered.timestep, steered.condition)
        if self.guidance == 1:
            return out
        empty = attrs.evolve(call, condition=backbone.condition([""], call.images.shape[-1]))
        steered = self._steered(empty, shown)
        plain = backbone.denoise(steered.sample, steered.timestep, steered.condition)
        return plain + self.guidance * (out - plain)

    def _denoised(
        self, backbone: Backbone, call: DenoiserCall, nominal: float, shown: Sequence[Tensor]
    ) -> DenoiserCall:
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

    def _flowed(self, backbone: Backbone, call: DenoiserCall, nominal: float, shown: Sequence[Tensor]) -> DenoiserCall:
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


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, tuple):
        return tuple(a + b for a, b in zip(one, other, strict=True))
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
