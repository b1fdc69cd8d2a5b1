"""The model: student, teacher, discriminator and scorer in one module, and how it restores."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plait_semiddm_weather import baselines
from plait_semiddm_weather.diffusion import Diffusion, Random
from plait_semiddm_weather.networks import Discriminator, Generator
from plait_semiddm_weather.scorers import NaturalStatistics, Ranker, checked
from plait_semiddm_weather.settings import Architecture
from plait_semiddm_weather.tiling import restore_tiled
from plait_semiddm_weather.wavelets import SubBands

Weights = Literal["student", "teacher"]
CONFIG, TENSORS = "config.json", "model.safetensors"
STORED_SCORERS: Mapping[str, type[nn.Module]] = {"ranker": Ranker, "nss": NaturalStatistics}


class WeatherRestorer(nn.Module):
    """Restores images; stochastic, so that several samples of one image can be drawn.

    Args:
        architecture: of the networks.
        seed: of their first weights; the global random state stays as it is.
    """

    def __init__(self, architecture: Architecture | None = None, seed: int = 0) -> None:
        super().__init__()
        self.architecture = architecture or Architecture()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.student = _network(self.architecture)
            self.discriminator = _discriminator(self.architecture)
        self.teacher = copy.deepcopy(self.student)
        self.scorer: nn.Module | None = None
        self.bands = SubBands(self.architecture.wavelet)
        self.diffusion = Diffusion(
            self.architecture.num_train_timesteps, self.architecture.beta_min, self.architecture.beta_max
        )
        self.teacher.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.student.parameters()).device

    def to_bands(self, images: Tensor) -> Tensor:
        """``c = W(x)``, ``[B, 12, H/2, W/2]``; a clean target is half of it."""
        return self.bands(images)

    def to_image(self, bands: Tensor, scale: float = 2.0) -> Tensor:
        """``Wi(2 s_0)``, ``[B, 3, H, W]``."""
        return self.bands.inverse(scale * bands)

    def sample(self, images: Tensor, random: Random, weights: Weights = "teacher") -> Tensor:
        """One restoration of each image, clipped to [0, 1]; gradients flow where they are enabled.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1], any size from 2 × 2.
            random: a generator on the CPU, or one an image.

        Raises:
            ValueError: an image of less than 2 × 2 pixels.
        """
        network = self.student if weights == "student" else self.teacher
        height, width = images.shape[-2:]
        padded = pad_to_multiple(images, self.architecture.multiple_of)
        return self._sample(network, padded, random)[..., :height, :width].clamp(0, 1)

    def _sample(self, network: nn.Module, images: Tensor, random: Random) -> Tensor:
        if self.architecture.kind == "patch-ddim":
            return baselines.patch_ddim(network, images, random, self.architecture.patch_size)
        condition = self.to_bands(images)
        if self.architecture.kind == "regression":
            return self.to_image(baselines.wavelet_regression(network, condition))
        bands = self.diffusion.sample(
            lambda state, t, latent: network(state, condition, t, latent),
            tuple(condition.shape),
            self.architecture.latent_dim,
            random,
            condition,
        )
        return self.to_image(bands)

    def restore(
        self,
        images: Tensor,
        seeds: Sequence[int],
        *,
        num_samples: int = 1,
        weights: Weights = "teacher",
        tile: int | None = None,
        stride: int = 16,
        average: bool = False,
        batch_size: int = 16,
    ) -> Tensor:
        """Samples of images, ``[B, 3, H, W]`` in [0, 1] → ``[num_samples, B, 3, H, W]``.

        Args:
            seeds: one an image; sample k of an image depends on its seed and on k only.
            tile: side of tiles, each of which is sampled by itself, ``stride`` pixels apart and blended with Hann
                weights (or the plain ``average``); ``None``, or not smaller than the image: the whole at once.
            batch_size: images or tiles that go through the network together.
        """
        if len(seeds) != len(images):
            raise ValueError(f"there are {len(seeds)} seeds for {len(images)} images; give one an image")
        numbers = [(number, row) for number in range(num_samples) for row in range(len(images))]
        with torch.inference_mode():
            if tile is None or tile >= max(images.shape[-2:]):
                parts = []
                for start in range(0, len(numbers), batch_size):
                    chunk = numbers[start : start + batch_size]
                    random = _generators([derived_seed(seeds[row], number) for number, row in chunk])
                    parts.append(self.sample(images[[row for _, row in chunk]], random, weights))
                restored = torch.cat(parts)
            else:
                restored = torch.stack(
                    [
                        self._tiled(images[row], (seeds[row], number), weights, tile, stride, average, batch_size)
                        for number, row in numbers
                    ]
                )
        return restored.unflatten(0, (num_samples, len(images)))

    def _tiled(
        self,
        image: Tensor,
        seed: tuple[int, int],
        weights: Weights,
        tile: int,
        stride: int,
        average: bool,
        batch_size: int,
    ) -> Tensor:
        def one(tiles: Tensor, numbers: list[int]) -> Tensor:
            return self.sample(tiles, _generators([derived_seed(*seed, number) for number in numbers]), weights)

        return restore_tiled(one, image, tile, stride, average=average, batch_size=batch_size)

    def forward(self, images: Tensor) -> Tensor:
        """One restoration by the teacher with fixed noise: ``[B, 3, H, W]`` → the same, differentiable."""
        return self.sample(images, _generators([derived_seed(0, row) for row in range(len(images))]))

    def score(self, images: Tensor) -> Tensor:
        """The fitted scorer's opinion of ``[N, 3, H, W]``, ``[N]``; higher is better.

        Raises:
            ValueError: no scorer has been fitted.
        """
        if self.scorer is None:
            raise ValueError("the model has no scorer; train it with scorer ranker or nss")
        return checked(self.scorer, images, str(self.scorer.kind))

    def save_pretrained(self, folder: Path | str) -> None:
        """``config.json`` and ``model.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        scorer = None if self.scorer is None else self.scorer.kind
        config = {"architecture": self.architecture.to_config(), "scorer": scorer}
        (folder / CONFIG).write_text(json.dumps(config, indent=2))
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / TENSORS)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> WeatherRestorer:
        """The model of :meth:`save_pretrained`.

        Raises:
            ValueError: files are missing, or do not fit together.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
            raise ValueError(f"{folder} holds no saved model: it needs {CONFIG} and {TENSORS}")
        config = json.loads((folder / CONFIG).read_text())
        if "architecture" not in config:
            raise ValueError(f"{folder / CONFIG} has no architecture; it is not a model of this package")
        model = cls(Architecture.from_config(config["architecture"]))
        if config.get("scorer") is not None:
            model.scorer = new_scorer(config["scorer"])
        try:
            model.load_state_dict(load_file(folder / TENSORS))
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"{folder / TENSORS} does not fit {CONFIG}: {first}") from error
        return model.eval()


def new_scorer(kind: str) -> nn.Module:
    """An unfitted scorer of a kind that is stored with the model; the global random state stays as it is.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in STORED_SCORERS:
        raise ValueError(f"scorer is {kind!r}; a model holds {' or '.join(STORED_SCORERS)}")
    with torch.random.fork_rng(devices=[]):
        scorer: nn.Module = STORED_SCORERS[kind]()
    return scorer.eval().requires_grad_(False)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Mirrored at the bottom and right until the sides are multiples.

    Raises:
        ValueError: an image of less than 2 × 2 pixels.
    """
    height, width = images.shape[-2:]
    if min(height, width) < 2:
        raise ValueError(f"an image is {height}×{width} pixels; 2×2 is the least that can be restored")
    while height % multiple or width % multiple:
        below, right = -height % multiple, -width % multiple
        below, right = min(below, height - 1), min(right, width - 1)  # mirroring needs more pixels than it adds
        images = F.pad(images, (0, right, 0, below), mode="reflect")
        height, width = images.shape[-2:]
    return images


def derived_seed(*parts: Any) -> int:
    """A seed in [0, 2**63) from any plain values."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _generators(seeds: Iterable[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _network(architecture: Architecture) -> nn.Module:
    if architecture.kind == "patch-ddim":
        return baselines.patch_network(
            architecture.base_channels, architecture.channel_mult, architecture.layers_per_block
        )
    return Generator(
        in_channels=24 if architecture.kind == "diffusion" else 12,
        base_channels=architecture.base_channels,
        channel_mult=architecture.channel_mult,
        layers_per_block=architecture.layers_per_block,
        attention_levels=architecture.attention_levels,
        latent_dim=architecture.latent_dim,
        latent_embed_dim=architecture.latent_embed_dim,
        mapping_layers=architecture.mapping_layers,
        output=architecture.output,
        dropout=architecture.dropout,
    )


def _discriminator(architecture: Architecture) -> nn.Module | None:
    if architecture.kind != "diffusion":
        return None
    return Discriminator(
        in_channels=36 if architecture.conditional_discriminator else 24,
        base_channels=architecture.disc_base_channels,
        num_layers=architecture.disc_num_layers,
        time_embed_dim=architecture.time_embed_dim,
    )
