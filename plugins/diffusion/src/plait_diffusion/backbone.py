"""One object for every diffusion model: denoiser, scheduler, VAE, text encoders, and what extractors ask of them."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from plait.fingerprints import fingerprint
from torch import Tensor, nn

from plait_diffusion import families, noise, prompts, vae
from plait_diffusion.noise import NoiseLevel, TimestepRule
from plait_diffusion.vae import Moments, MomentsCache

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
OWN_PARTS = ("class_tokens", "controlnet")  # parts that no pipeline of diffusers takes here
_REMEMBERED_PROMPTS = 256


class Backbone(nn.Module):
    """A frozen diffusion model in eval mode.

    Args:
        components: diffusers' names → parts: ``unet`` or ``transformer``, ``scheduler``, and where there are such ``vae``,
            ``text_encoder`` (``_2``, ``_3``), ``tokenizer`` (…), ``class_tokens``, ``controlnet``; ``None`` for parts that
            a pipeline does without.
        pipeline: name of the diffusers pipeline that the components make up; ``None`` for a bare denoiser.
        options: of the pipeline besides its components, such as ``force_zeros_for_empty_prompt``.
        name: where it came from: a hub name, or the name of a folder.
        revision: of a hub model.
        weight_files: component → the files that its weights were read from; unchanged weights are not copied when a result is
            stored (see :mod:`plait_diffusion.storing`).

    Raises:
        ValueError: there is no denoiser or no scheduler, or the denoiser is of a kind that is not known.
    """

    def __init__(
        self,
        components: Mapping[str, Any],
        *,
        pipeline: str | None = None,
        options: Mapping[str, Any] | None = None,
        name: str = "",
        revision: str | None = None,
        weight_files: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._others: dict[str, Any] = {}
        self._names = list(components)
        for part, component in components.items():
            if isinstance(component, nn.Module):
                self.add_module(part, component)
            else:
                self._others[part] = component
        found = [part for part in DENOISERS if components.get(part) is not None]
        if not found or components.get("scheduler") is None:
            raise ValueError(
                f"a backbone needs a unet or a transformer, and a scheduler; it is given {', '.join(components)}"
            )
        self.denoiser_name = found[0]
        if families.kind_of(self.denoiser) not in families.KNOWN:
            raise ValueError(
                f"the denoiser is a {families.kind_of(self.denoiser)}; known are {', '.join(families.KNOWN)}"
            )
        latent = getattr(getattr(self.encoder, "config", None), "latent_channels", None)
        seen = families.latent_channels(self.denoiser)
        if latent is not None and latent != seen:
            raise ValueError(
                f"the denoiser takes {seen} channels and the VAE gives {latent}; models for inpainting and editing, which "
                "take more than the image, are not known"
            )
        self.pipeline_name, self.pipeline_options = pipeline, dict(options or {})
        self.name, self.revision = name, revision
        self.weight_files: dict[str, Any] = dict(weight_files or {})
        self._vae_digest: str | None = None
        self._conditions: dict[tuple[str, int], dict[str, Any]] = {}
        self.eval().requires_grad_(False)

    # Parts

    @property
    def components(self) -> dict[str, Any]:
        """diffusers' names → parts."""
        return {part: self._others[part] if part in self._others else getattr(self, part) for part in self._names}

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self, self.denoiser_name)

    @property
    def scheduler(self) -> Any:
        return self._others["scheduler"]

    @property
    def encoder(self) -> nn.Module | None:
        """The VAE; ``None`` for a model in pixel space."""
        return self.components.get("vae")

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        return {part: getattr(self, part) for part in TEXT_ENCODERS if self.components.get(part) is not None}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Classes of a small model's prompts; none for models with text encoders."""
        tokens = self.components.get("class_tokens")
        return () if tokens is None else tuple(tokens.config.names)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    def latent_channels(self) -> int:
        """Channels of latents; of pixels in pixel space."""
        return families.latent_channels(self.denoiser)

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels behind one latent value; 1 in pixel space."""
        return 1 if self.encoder is None else 2 ** (len(self.encoder.config.block_out_channels) - 1)

    @property
    def default_size(self) -> int:
        """Side of the images that the model was made for, pixels."""
        side = getattr(self.denoiser.config, "sample_size", None) or 128
        return int(side if isinstance(side, int) else side[0]) * self.pixels_per_latent

    @property
    def size_multiple(self) -> int:
        """What the side of an image has to be a multiple of, pixels."""
        grid = families.token_grid(self.denoiser, torch.empty(1, 1, 64, 64, device="meta"))
        halvings = len(getattr(self.denoiser.config, "block_out_channels", [0])) - 1
        return self.pixels_per_latent * (2**halvings if grid is None else 64 // grid[0])

    def fingerprint(self) -> str:
        """Digest of weights and configurations."""
        parts = self.components
        configs = {
            part: json.dumps(_plain_config(one), sort_keys=True, default=str) for part, one in sorted(parts.items())
        }
        weights = dict(sorted(self.state_dict().items()))
        return fingerprint("Backbone", weights, configs, self.pipeline_name)

    def with_components(self, **components: Any) -> Backbone:
        """The same backbone with some parts replaced or added; the others are shared."""
        unchanged = {part: files for part, files in self.weight_files.items() if part not in components}
        return Backbone(
            {**self.components, **components},
            pipeline=self.pipeline_name,
            options=self.pipeline_options,
            name=self.name,
            revision=self.revision,
            weight_files=unchanged,
        )

    def on(self, device: torch.device | str) -> Backbone:
        """Itself where it is on the device already, else a copy there. Text encoders follow only while they encode."""
        device = torch.device(device)
        if self.device == device or (self.device.type == device.type and device.index is None):
            return self
        moved = {
            part: copy.deepcopy(component).to(device)
            for part, component in self.components.items()
            if isinstance(component, nn.Module) and part not in TEXT_ENCODERS
        }
        again = self.with_components(**moved)
        again.weight_files = dict(self.weight_files)
        return again

    # What extractors ask

    def check_size(self, size: int) -> None:
        """Refuse a side that the model cannot halve often enough.

        Raises:
            ValueError: so it is.
        """
        if size < 1 or size % self.size_multiple:
            raise ValueError(f"image_size is {size}; the model takes multiples of {self.size_multiple}")

    @torch.no_grad()
    def moments(self, images: Tensor, cache: MomentsCache | None = None) -> Moments:
        """What the VAE says of images ``[B, 3, S, S]`` in [0, 1]; in pixel space the images themselves in [−1, 1].

        Raises:
            ValueError: the images are of another shape, of whole numbers, or outside [0, 1].
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; [B, 3, S, S] is needed")
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; floats in [0, 1] are needed, so divide 8-bit levels by 255")
        low, high = float(images.min()), float(images.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(f"images range from {low:.3g} to {high:.3g}; [0, 1] is needed")
        pixels = (images.to(self.device).float() * 2 - 1).to(self.dtype)
        if self.encoder is None and self.latent_channels == 1:
            pixels = pixels.mean(1, keepdim=True)
        return vae.encode(self.encoder, pixels) if cache is None else cache.moments(self.encoder, pixels)

    def moments_cache(self, folder: Path | str) -> MomentsCache:
        """A folder of moments that later calls, runs and models of the same VAE share."""
        if self._vae_digest is None:
            self._vae_digest = fingerprint(self.encoder, self.latent_channels)
        return MomentsCache(folder, self._vae_digest)

    def latents(self, moments: Moments, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """z0 of moments: a draw with one generator an image (on the CPU), or the mode; scaled for the denoiser."""
        return vae.scaled(self.encoder, moments.sample(generators)).to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, S, S]`` in [0, 1] of scaled latents."""
        pixels = vae.decode(self.encoder, latents).float() / 2 + 0.5
        return (pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels).clamp(0, 1)

    def noise_level(self, timestep: int, rule: TimestepRule | None = None) -> NoiseLevel:
        """See :func:`plait_diffusion.noise.noise_level`."""
        return noise.noise_level(self.scheduler, timestep, rule)

    def clean_level(self) -> NoiseLevel:
        """No noise, at the smallest timestep that the model has."""
        return noise.clean_level(self.scheduler)

    @torch.no_grad()
    def condition(self, texts: Sequence[str], size: int) -> dict[str, Any]:
        """Keyword arguments of the denoiser's ``forward`` besides sample and timestep, each text encoded once.

        Args:
            texts: one for every image, or a single one for all (its tensors then have one row).
            size: side of the images, pixels.

        Raises:
            ValueError: a text that the model cannot take; texts whose encodings are of different length.
        """
        distinct = list(dict.fromkeys(texts))
        encoded = {text: self._condition_of(text, size) for text in distinct}
        if len(distinct) == 1:
            return encoded[distinct[0]]
        return _stacked([encoded[text] for text in texts])

    def denoise(self, sample: Tensor, timestep: float, condition: Mapping[str, Any]) -> Tensor:
        """The network's prediction ``[B, C, h, w]`` for a noised sample."""
        return families.call_denoiser(self.denoiser, sample.to(self.dtype), timestep, condition)

    def _condition_of(self, text: str, size: int) -> dict[str, Any]:
        if (text, size) not in self._conditions:
            if len(self._conditions) >= _REMEMBERED_PROMPTS:
                self._conditions.clear()
            self._conditions[text, size] = self._encoded(text, size)
        return self._conditions[text, size]

    def _encoded(self, text: str, size: int) -> dict[str, Any]:
        tokens = self.components.get("class_tokens")
        if tokens is not None:
            return {"encoder_hidden_states": tokens.of_prompt(text).to(self.device, self.dtype)}
        if self.pipeline_name is not None and self.text_encoders:
            with self._encoders_here():
                encoded = prompts.encode_prompt(self.pipeline(), self.denoiser, text, size)
            return _moved(encoded, self.device, self.dtype)
        if text:
            raise ValueError(f"prompt is {text!r}, but the model has no text encoder; leave the prompt empty")
        return families.empty_condition(self.denoiser, size, self.device, self.dtype)

    def pipeline(self) -> Any:
        """The diffusers pipeline of these components, with a copy of the scheduler, which some pipelines change.

        Raises:
            ValueError: a bare denoiser makes up none.
        """
        import diffusers

        if self.pipeline_name is None:
            raise ValueError("a bare denoiser makes up no pipeline of diffusers")
        cls = getattr(diffusers, self.pipeline_name)
        own = {part: component for part, component in self.components.items() if part not in OWN_PARTS}
        own["scheduler"] = copy.deepcopy(self.scheduler)
        with quiet_diffusers():
            return cls(**own, **self.pipeline_options)

    @contextlib.contextmanager
    def _encoders_here(self) -> Iterator[None]:
        places = {part: next(encoder.parameters()).device for part, encoder in self.text_encoders.items()}
        try:
            for encoder in self.text_encoders.values():
                encoder.to(self.device)
            yield
        finally:
            for part, place in places.items():
                getattr(self, part).to(place)

    # Saving and loading

    def save_pretrained(self, folder: Path | str) -> None:
        """Write everything into a folder of diffusers' own layout, weights as safetensors."""
        from plait_diffusion import storing

        storing.write(self, Path(folder), share=False)

    @classmethod
    def from_pretrained(cls, source: Path | str, **options: Any) -> Backbone:
        """See :func:`plait_diffusion.loading.load_backbone`."""
        from plait_diffusion import loading

        return loading.load_backbone(str(source), **options)


def backbone_in(model: Any) -> Backbone:
    """The model, where it is a diffusion backbone.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(model, Backbone):
        raise ValueError(
            f"a diffusion backbone is needed (load-model: diffusion), and the model is a {type(model).__name__}"
        )
    return model


def _plain_config(component: Any) -> dict[str, Any]:
    """A component's configuration without what says where and by which version it was made."""
    config = getattr(component, "config", None)
    if config is None:
        return {}
    found = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    return {name: value for name, value in found.items() if not name.startswith("_") and name != "transformers_version"}


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(item, device, dtype) for name, item in value.items()}
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return value


def _stacked(conditions: Sequence[Any]) -> Any:
    first = conditions[0]
    if isinstance(first, Mapping):
        return {name: _stacked([one[name] for one in conditions]) for name in first}
    if not isinstance(first, Tensor):
        return first
    if len({one.shape[1:] for one in conditions}) > 1:
        lengths = ", ".join(str(one.shape[1]) for one in conditions)
        raise ValueError(
            f"the prompts of a batch are encoded in {lengths} tokens; give prompts of equal length, or one"
        )
    return torch.cat(list(conditions))


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """No advice about components that are left out on purpose, and no bars for every file."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    level = of_diffusers.get_verbosity()
    of_diffusers.set_verbosity_error()
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        of_diffusers.set_verbosity(level)
        for library in libraries:
            library.enable_progress_bar()
