"""From pixels to what a denoiser sees, and back."""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@attrs.frozen
class Moments:
    """What an encoder says of images: mean and log-variance ``[B, c, h, w]`` (``None``: it is certain)."""

    mean: Tensor
    logvar: Tensor | None

    def sample(self, generators: Sequence[torch.Generator] | None) -> Tensor:
        """One draw an image, each from its own generator; without generators the mode."""
        if self.logvar is None or generators is None:
            return self.mean
        noise = torch.stack([torch.randn(self.mean.shape[1:], generator=one) for one in generators])
        std = torch.exp(0.5 * self.logvar.float().clamp(-30, 20))
        return self.mean + (std * noise.to(std.device)).to(self.mean.dtype)


def encode(vae: nn.Module | None, images: Tensor) -> Moments:
    """Moments of images ``[B, 3, S, S]`` in [−1, 1]; without a VAE the pixels themselves."""
    if vae is None:
        return Moments(images, None)
    vae = _in_needed_precision(vae)
    out = vae.encode(images.to(next(vae.parameters()).dtype))
    if hasattr(out, "latent_dist"):
        # Contiguous, as they come from the cache: convolutions give other last bits for other layouts.
        return Moments(out.latent_dist.mean.contiguous(), out.latent_dist.logvar.contiguous())
    return Moments(out.latents, None)


def scaled(vae: nn.Module | None, latents: Tensor) -> Tensor:
    """Latents as the denoiser was trained on them: shifted and scaled as the VAE's configuration says."""
    if vae is None:
        return latents
    config = vae.config
    factor = config.scaling_factor
    mean, std = _per_channel(config, "latents_mean", latents), _per_channel(config, "latents_std", latents)
    if mean is not None and std is not None:
        return (latents - mean) * factor / std
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * factor


def decode(vae: nn.Module | None, latents: Tensor) -> Tensor:
    """Images in [−1, 1] of scaled latents."""
    if vae is None:
        return latents
    config = vae.config
    mean, std = _per_channel(config, "latents_mean", latents), _per_channel(config, "latents_std", latents)
    if mean is not None and std is not None:
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    vae = _in_needed_precision(vae)
    return vae.decode(latents.to(next(vae.parameters()).dtype)).sample


def _per_channel(config: Any, name: str, latents: Tensor) -> Tensor | None:
    values = getattr(config, name, None)
    return (
        None if values is None else torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
    )


def _in_needed_precision(vae: nn.Module) -> nn.Module:
    """SDXL's VAE overflows in half precision and says so: a copy in fp32, kept beside the module."""
    first = next(vae.parameters())
    if not getattr(vae.config, "force_upcast", False) or first.dtype == torch.float32:
        return vae
    kept = vae.__dict__.get("_in_float32")
    if kept is None or next(kept.parameters()).device != first.device:
        plain = copy.copy(vae)
        plain.__dict__.pop("_in_float32", None)
        kept = vae.__dict__["_in_float32"] = copy.deepcopy(plain).float()
    return kept


class MomentsCache:
    """Moments on disk, by image, size and VAE: further timesteps, prompts and layers skip the encoder.

    Args:
        folder: may be shared by backbones and runs; a file an image.
        vae_id: digest of the VAE's weights.
    """

    def __init__(self, folder: Path | str, vae_id: str) -> None:
        self.folder = Path(folder) / vae_id[:16]

    def moments(self, vae: nn.Module | None, images: Tensor) -> Moments:
        """As :func:`encode`; only images that are not there yet go through the VAE."""
        files = [self._file(image) for image in images]
        missing = [row for row, file in enumerate(files) if not file.exists()]
        if missing:
            fresh = encode(vae, images[missing])
            for row, place in enumerate(missing):
                parts = {"mean": fresh.mean[row]} | ({} if fresh.logvar is None else {"logvar": fresh.logvar[row]})
                _write_whole(files[place], {name: part.cpu().contiguous() for name, part in parts.items()})
        read = [load_file(file) for file in files]
        stacked = {name: torch.stack([one[name] for one in read]).to(images.device) for name in read[0]}
        return Moments(stacked["mean"], stacked.get("logvar"))

    def _file(self, image: Tensor) -> Path:
        pixels = image.detach().float().cpu().contiguous()
        digest = hashlib.sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()
        return self.folder / digest[:2] / f"{digest[:32]}.safetensors"


def _write_whole(file: Path, tensors: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=file.parent)
    os.close(handle)
    save_file(tensors, unfinished)
    os.replace(unfinished, file)
