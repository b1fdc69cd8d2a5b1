"""Generic diffusion features: which activations of a diffusion backbone to use.

Meng, Xu, Wang, Cao, Huang: "Not All Diffusion Model Activations Have Been Evaluated as Discriminative Features", NeurIPS 2024
(arXiv 2410.03558). In the paper's order: the taxonomy of activations (§3), the recommended sets (§5, App. B), the filter that
three properties give (§4), extraction (§5), the attention feature (App. B.3), the properties as measured scores
(:func:`noise_report`), and the quantitative ranking (:func:`rank_activations`). :func:`gdf` runs the extraction.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
import torch.nn.functional as F
from plait_diffusion import (
    Backbone,
    DenoiserCall,
    Moments,
    Tap,
    TimestepRule,
    capture,
    official_ids,
    resolve,
    shapes,
)
from torch import Tensor, nn

# --- Taxonomy (§3, Table 1): stage, place and family of an activation, read off its id ---------------------------------------

Family = Literal[
    "latent",
    "inter-module",
    "increment",
    "self-attention",
    "cross-attention",
    "score map",
    "ViT block output",
    "noise prediction",
]
MapCategory = Literal["down_cross", "mid_cross", "up_cross", "down_self", "mid_self", "up_self"]
Presets = Literal[
    "auto",
    "sd15",
    "sdxl",
    "sd15_amalgam",
    "pgv2_amalgam",
    "pgv2_seg",
    "sdxl_seg",
    "legacy",
    "vpd_sd15",
    "pool_sd15",
    "pool_sdxl",
    "pool",
    "heuristic",
    "all",
]

_FAMILIES: tuple[tuple[str, Family], ...] = (
    (r"^unet-in$", "latent"),
    (r"^unet-out$", "noise prediction"),
    (r"-map$", "score map"),
    (r"(res-increment|ffn-inner|self-v|vit-block\d+-v)$", "increment"),
    (r"(-self-[qk]|vit-block\d+-[qk])$", "self-attention"),
    (r"-cross-[qkv]$", "cross-attention"),
    (r"vit-block\d+-out$", "ViT block output"),
)


def family_of(name: str) -> Family:
    """The family of an official id; self-v counts as an increment, as in the paper."""
    return next((family for pattern, family in _FAMILIES if re.search(pattern, name)), "inter-module")


@attrs.frozen
class Place:
    """Where an activation lies: stage ``down``, ``mid`` or ``up``, level and repeat in order of execution, block of its ViT."""

    stage: str
    level: int | None
    repeat: int | None
    block: int | None


def place_of(name: str) -> Place:
    """What an official id says of the place; empty for native paths and the ends of the network."""

    def number(part: str) -> int | None:
        found = re.search(rf"(?:^|-){part}(\d+)", name)
        return int(found[1]) if found else None

    stage = re.match(r"(down|mid|up)-", name)
    return Place(stage[1] if stage else "", number("level"), number("repeat"), number("block"))


# --- Recommended sets (§5, App. B) and the baselines that they are compared with ------------------------------------------------

PRESETS: Mapping[str, tuple[str, ...]] = {
    "sd15": (
        "up-level1-repeat1-vit-block0-cross-q",
        "up-level1-repeat2-res-out",
        "up-level2-repeat1-vit-block0-cross-q",
        "up-level3-repeat0-vit-block0-self-k",
    ),
    "sdxl": (
        "up-level0-repeat0-vit-block5-out",
        "up-level0-repeat0-vit-block7-out",
        "up-level1-repeat0-vit-block0-cross-q",
        "up-level1-repeat0-vit-block0-out",
    ),
    "sd15_amalgam": (
        "up-level1-repeat1-vit-block0-cross-q",
        "up-level2-repeat1-vit-block0-cross-q",
        "up-level2-upsampler-out",
        "up-level3-repeat0-vit-block0-self-k",
    ),
    "pgv2_amalgam": ("up-level0-repeat0-vit-block3-out",),
    "sdxl_seg": (
        "up-level0-repeat0-vit-block5-out",
        "up-level0-repeat0-vit-block7-out",
        "up-level1-repeat0-vit-block0-cross-q",
        "up-level1-repeat0-vit-block0-out",
        "up-level1-upsampler-out",
    ),
    "pgv2_seg": (
        "up-level0-repeat0-vit-block5-out",
        "up-level1-repeat0-vit-block0-cross-q",
        "up-level1-upsampler-out",
    ),
    "vpd_sd15": ("up-level0-repeat1-res-out", "up-level1-repeat1-vit-out", "up-level2-repeat1-vit-out"),
}
# Sets that take the attention feature too (App. B.3).
MAPS_OF_PRESET: Mapping[str, tuple[MapCategory, ...]] = {"sd15_amalgam": ("up_cross",)}
# XL-t joins these sets of three models in this order: 8154 channels; its variant for ADE20K and Cityscapes two.
XL_T: tuple[tuple[str, str], ...] = (("sdxl", "sdxl"), ("sd15", "sd15_amalgam"), ("pgv2", "pgv2_amalgam"))
XL_T_SEG: tuple[tuple[str, str], ...] = (("sdxl", "sdxl_seg"), ("pgv2", "pgv2_seg"))

LONG_VIT = 10
BLOCKS_OF_LONG_VIT = (0, 1, 3, 5, 7, 9)


def _three(level: int, blocks: Sequence[int]) -> list[str]:
    found = []
    for repeat in range(3):
        start = f"up-level{level}-repeat{repeat}-"
        found.append(f"{start}res-out")
        found += [f"{start}vit-block{block}-{part}" for block in blocks for part in ("cross-q", "out")]
        found.append(f"{start}vit-out")
    return found


# The pools as published (Tables 4-6): 63 and 33; no rule gives exactly these.
POOL_SDXL: tuple[str, ...] = (
    *_three(0, BLOCKS_OF_LONG_VIT),
    "up-level0-upsampler-out",
    *_three(1, (0, 1)),
    "up-level1-repeat2-vit-block0-self-k",
    "up-level1-repeat2-vit-block1-self-k",
)
POOL_SD15: tuple[str, ...] = (
    *_three(1, (0,)),
    *_three(2, (0,)),
    "up-level2-repeat2-vit-block0-self-q",
    "up-level2-repeat2-vit-block0-self-k",
    "up-level2-upsampler-out",
    *(f"up-level3-repeat{repeat}-vit-block0-self-{part}" for repeat in range(3) for part in "qk"),
)

POOLS: Mapping[str, tuple[str, ...]] = {"pool_sd15": POOL_SD15, "pool_sdxl": POOL_SDXL}

# --- The filter of the three properties (§4) ---------------------------------------------------------------------------------


def candidate_pool(denoiser: nn.Module) -> tuple[str, ...]:
    """The activations of a U-Net that the three properties leave over: 66 of SDXL's 612, 34 of SD 1.5's 197.

    Kept are those of the up stage, without increments and score maps; without the lowest resolution where it has no ViT;
    without self-attention queries and keys in the clean half; of the highest resolution only these. The late half begins
    with the last repeat of the second-highest resolution. Of ViTs of 10 blocks, blocks 0, 1, 3, 5, 7, 9 stand for all.

    For transformers there is no published rule; see :func:`heuristic_set`.
    """
    return pool_of_names(official_ids(denoiser)) if hasattr(denoiser, "up_blocks") else heuristic_set(denoiser)


def pool_of_names(names: Iterable[str]) -> tuple[str, ...]:
    """As :func:`candidate_pool`, of the official ids of a U-Net; none of other names."""
    up = [name for name in names if place_of(name).stage == "up"]
    if not up:
        return ()
    levels = max(place_of(name).level or 0 for name in up) + 1
    with_vit = {place_of(name).level for name in up if "-vit-" in name}
    late = (levels - 2, max(place_of(name).repeat or 0 for name in up))
    lengths = _vit_lengths(up)
    return tuple(name for name in up if _is_kept(name, levels, with_vit, late, lengths))


def _is_kept(
    name: str, levels: int, with_vit: set[int | None], late: tuple[int, int], lengths: Mapping[tuple[Any, Any], int]
) -> bool:
    place, family = place_of(name), family_of(name)
    level = place.level or 0
    if family in ("increment", "score map"):
        return False
    if level not in with_vit and level in (0, levels - 1):
        return False
    if level == levels - 1 and family != "self-attention":
        return False
    if family == "self-attention" and (level, place.repeat or 0) < late:
        return False
    is_long = lengths.get((place.level, place.repeat)) == LONG_VIT
    return not (is_long and place.block is not None and place.block not in BLOCKS_OF_LONG_VIT)


def _vit_lengths(names: Iterable[str]) -> dict[tuple[Any, Any], int]:
    lengths: dict[tuple[Any, Any], int] = {}
    for name in names:
        place = place_of(name)
        if place.block is not None:
            at = (place.level, place.repeat)
            lengths[at] = max(lengths.get(at, 0), place.block + 1)
    return lengths


def legacy_set(denoiser: nn.Module) -> tuple[str, ...]:
    """The conventional choice: what each level of the up stage gives to the next one."""
    up = [name for name in official_ids(denoiser) if place_of(name).stage == "up"]
    chosen = {}
    for name in up:  # the last one of a level is its output
        if family_of(name) == "inter-module":
            chosen[place_of(name).level] = name
    if not chosen:
        raise ValueError("preset is legacy, which is of U-Nets; name layers for a transformer")
    return tuple(chosen.values())


def heuristic_set(denoiser: nn.Module) -> tuple[str, ...]:
    """Outputs and self-attention queries of the middle third of a transformer's blocks. Not the paper's: nothing is
    published for transformers, and its authors do not know whether their properties hold there."""
    ids = list(official_ids(denoiser))
    blocks = 1 + max((place_of(name).block or 0 for name in ids), default=0)
    wanted = range(blocks // 3, max(blocks // 3 + 1, -(-2 * blocks // 3)))
    return tuple(
        name for name in ids if place_of(name).block in wanted and re.search(r"vit-block\d+-(out|self-q|q)$", name)
    )


def layers_of(preset: Presets, denoiser: nn.Module) -> tuple[str, ...]:
    """The activations of a preset for a model.

    Raises:
        ValueError: ``auto`` for a model without a published recipe.
    """
    if preset in PRESETS:
        return PRESETS[preset]
    if preset in POOLS:
        return POOLS[preset]
    if preset == "pool":
        return candidate_pool(denoiser)
    if preset == "legacy":
        return legacy_set(denoiser)
    if preset == "heuristic":
        return heuristic_set(denoiser)
    if preset == "all":
        return tuple(name for name in official_ids(denoiser) if family_of(name) != "score map")
    count = len(official_ids(denoiser))
    recipe = {197: "sd15", 612: "sdxl"}.get(count) if hasattr(denoiser, "up_blocks") else None
    if recipe == "sd15" and denoiser.config.cross_attention_dim == 1024:  # SD 2 has the same blocks
        recipe = None
    if recipe is None:
        raise ValueError(
            "no recipe is published for this model; name layers, or take preset pool (all that may be good), legacy, or for "
            "transformers heuristic, and rank them (evaluate: activation-ranking)"
        )
    return PRESETS[recipe]


@attrs.frozen
class Listed:
    """One activation of a model, as :func:`list_activations` tells of it."""

    name: str
    path: str
    family: Family
    shape: tuple[int, ...]
    in_pool: bool


def list_activations(backbone: Backbone, pattern: str = "*", size: int | None = None) -> list[Listed]:
    """Every activation that a glob or name stands for, in the order of execution, with its shape for one image.

    Nothing is computed: the shapes are those of a pass on the meta device.
    """
    size = size or backbone.default_size
    taps = list(official_ids(backbone.denoiser).values()) if pattern == "*" else resolve(backbone.denoiser, [pattern])
    pool = set(candidate_pool(backbone.denoiser))
    found = shapes(backbone.denoiser, taps, _empty_sample(backbone, 1, size), backbone.condition([""], size))
    paths = {tap.name: tap.path for tap in taps}
    return [Listed(name, paths[name], family_of(name), shape, name in pool) for name, shape in found.items()]


# --- Extraction (§5) ----------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Extraction:
    """How features are taken: encode, add a little noise, one pass without guidance, take activations on the way.

    Attributes:
        layers: names of activations, official ids or module paths, globs too.
        timestep: nominal; 50 of 1000 in the paper.
        timestep_rule: see :class:`plait_diffusion.NoiseLevel`; ``None``: the paper's, and ``snr`` for flow and EDM models.
        prompt: one text for all images.
        image_size: side, pixels; ``None``: the model's own.
        sample_posterior: draw from the VAE's posterior, as the paper does, in place of its mode.
        feature_resize: average pooling of the features by this factor.
        attention_maps: which cross- and self-attention maps make up the feature ``attn``.
        attn_sides: smallest and largest side of the maps; ``None``: S/32 to S/16, to S/8 for transformers.
        early_exit: stop the pass after the last wanted activation.
        cache: folder of VAE moments that passes and runs share.
        map_limit: bytes that the requested maps of a batch may take.
        shared_noise: one noise for all images (DDPM-seg).
    """

    layers: tuple[str, ...]
    timestep: int = 50
    timestep_rule: TimestepRule | None = None
    prompt: str = ""
    image_size: int | None = None
    sample_posterior: bool = True
    feature_resize: int = 1
    attention_maps: tuple[MapCategory, ...] = ()
    attn_sides: tuple[int, int] | None = None
    early_exit: bool = True
    cache: Path | str | None = None
    map_limit: int = 4 << 30
    shared_noise: bool = False

    def check(self, backbone: Backbone, batch_size: int = 1) -> dict[str, tuple[int, ...]]:
        """Refuse what cannot be, before the first pass; what each activation of one image will be, in the order of execution.

        Raises:
            ValueError: no layers, a size or timestep that the model does not have, a prompt that it cannot take.
            KeyError: an unknown activation.
            RuntimeError: one that is never produced, fused projections.
            MemoryError: maps above ``map_limit``.
        """
        size = self.size(backbone)
        backbone.check_size(size)
        backbone.noise_level(self.timestep, self.timestep_rule)
        if self.feature_resize < 1:
            raise ValueError(f"feature_resize is {self.feature_resize}; a whole number from 1 on is needed")
        taps, own = resolve(backbone.denoiser, self.layers), map_taps(backbone.denoiser, self.attention_maps)
        condition, sample = backbone.condition([self.prompt], size), _empty_sample(backbone, 1, size)
        found = shapes(backbone.denoiser, [*taps, *own], sample, condition)
        if own:
            several = [torch.empty(found.pop(tap.name), device="meta") for tap in own]
            found["attn"] = tuple(
                attention_feature(several, sample.shape[-2:], self._sides(backbone, size), size // 8).shape
            )
        maps = {name: shape for name, shape in found.items() if _is_map(name)}
        needed = sum(_product(shape) for shape in maps.values()) * batch_size * backbone.dtype.itemsize
        if needed > self.map_limit:
            raise MemoryError(
                f"the maps {', '.join(list(maps)[:3])} … of {batch_size} images take {needed / 2**30:.3g} GiB, and the limit is "
                f"{self.map_limit / 2**30:.3g}; ask for fewer, for @mean-map, for a smaller batch, or raise the limit"
            )
        return found

    def size(self, backbone: Backbone) -> int:
        return self.image_size or backbone.default_size

    @torch.no_grad()
    def prepare(
        self,
        backbone: Backbone,
        images: Tensor,
        *,
        rows: Sequence[int],
        seed: int,
        prompts: Sequence[str] | None = None,
        timestep: float | None = None,
        noise: bool = True,
        latents: Tensor | None = None,
    ) -> DenoiserCall:
        """Everything that a pass is given (resize, encode, noise, text).

        Args:
            images: ``[B, 3, H, W]`` in [0, 1]; resized to a square, bilinearly, without antialiasing.
            rows: numbers of the images; with ``seed`` they decide the draws of each image, whatever its batch.
            prompts: one for every image; ``None``: the prompt for all.
            timestep: nominal; ``None``: the one of this extraction.
            noise: ``False``: the clean image at the smallest timestep that the model has.
            latents: clean ones, to skip the encoder.
        """
        size = self.size(backbone)
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        nominal = self.timestep if timestep is None else timestep
        level = backbone.noise_level(int(nominal), self.timestep_rule) if noise else backbone.clean_level()
        if latents is None:
            generators = _generators(seed, rows, "posterior") if self.sample_posterior else None
            latents = backbone.latents(self._moments(backbone, images), generators)
        drawn = _generators(seed, [0] * len(rows) if self.shared_noise else rows, "noise")
        eps = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in drawn]).to(latents)
        texts = tuple(prompts) if prompts is not None else (self.prompt,) * len(rows)
        return DenoiserCall(
            sample=level.signal * latents + level.noise * eps,
            timestep=level.timestep,
            nominal=float(nominal),
            condition=backbone.condition(texts if prompts is not None else texts[:1], size),
            images=images,
            latents=latents,
            noise=eps,
            prompts=texts,
            rows=tuple(rows),
        )

    def _moments(self, backbone: Backbone, images: Tensor) -> Moments:
        return backbone.moments(images, None if self.cache is None else backbone.moments_cache(self.cache))

    @torch.no_grad()
    def capture(self, backbone: Backbone, call: DenoiserCall) -> dict[str, Tensor]:
        """One pass of exactly this call: name → ``[B, C, h, w]`` in the order of execution, ``attn`` last."""
        taps = resolve(backbone.denoiser, self.layers)
        wanted = {tap.name for tap in taps}
        size = call.images.shape[-1]
        maps = map_taps(backbone.denoiser, self.attention_maps)
        found = capture(
            backbone.denoiser,
            [*taps, *maps],
            call.sample.to(backbone.dtype),
            float(call.timestep),
            call.condition,
            early_exit=self.early_exit,
        )
        features = {name: self._reduced(name, value) for name, value in found.items() if name in wanted}
        if self.attention_maps:
            own = [found[tap.name] for tap in sorted(maps, key=lambda tap: list(found).index(tap.name))]
            features["attn"] = attention_feature(own, call.sample.shape[-2:], self._sides(backbone, size), size // 8)
        return features

    def _reduced(self, name: str, value: Tensor) -> Tensor:
        return value if _is_map(name) else pooled(value, self.feature_resize)

    def _sides(self, backbone: Backbone, size: int) -> tuple[int, int]:
        return self.attn_sides or (size // 32, size // (16 if hasattr(backbone.denoiser, "up_blocks") else 8))


def pooled(value: Tensor, factor: int) -> Tensor:
    """A feature ``[B, C, h, w]`` averaged to ``[B, C, h // factor, w // factor]``."""
    return (
        value if factor == 1 else F.adaptive_avg_pool2d(value, (value.shape[-2] // factor, value.shape[-1] // factor))
    )


def gdf(
    backbone: Backbone,
    images: Tensor,
    *,
    extraction: Extraction | None = None,
    rows: Sequence[int] | None = None,
    seed: int = 0,
    ensemble_size: int = 1,
    dtype: torch.dtype | None = None,
    prompts: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Features of a batch of images: the method from first to last step.

    Args:
        images: ``[B, 3, H, W]`` in [0, 1].
        extraction: default: the published set of the model at t = 50.
        rows: numbers of the images; default: their places in the batch.
        ensemble_size: draws of noise whose features are averaged.
        dtype: of the features; default: as computed.
        prompts: one for every image; default: the prompt of the extraction.

    Returns:
        name → ``[B, C, h, w]``, each at its own side, in the order of execution.

    Raises:
        FloatingPointError: an activation is NaN or infinite, or does not fit into ``dtype``.
    """
    if extraction is None:
        extraction = Extraction(layers=layers_of("auto", backbone.denoiser))
    rows = range(len(images)) if rows is None else rows
    total: dict[str, Tensor] = {}
    for draw in range(ensemble_size):
        call = extraction.prepare(backbone, images, rows=rows, seed=seed_of_draw(seed, draw), prompts=prompts)
        for name, value in extraction.capture(backbone, call).items():
            total[name] = total[name] + value if name in total else value
    return {name: stored(name, value / ensemble_size, dtype) for name, value in total.items()}


def seed_of_draw(seed: int, draw: int) -> int:
    """The seed of one of several draws of noise; the first is the seed itself."""
    return seed if draw == 0 else _digest(f"{seed}/draw {draw}")


def stored(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """An activation in the dtype that it is kept in.

    Raises:
        FloatingPointError: it is NaN or infinite, or would become so.
    """
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(
            f"activation {name!r} holds NaN or infinity; with a half-precision VAE, load the model with dtype float32 or bfloat16"
        )
    if dtype is None or value.dtype == dtype:
        return value
    largest = float(value.abs().max())
    if largest > torch.finfo(dtype).max:
        raise FloatingPointError(
            f"activation {name!r} reaches {largest:.4g}, which {str(dtype).removeprefix('torch.')} cannot hold; store bfloat16 or float32"
        )
    return value.to(dtype)


def aggregate(
    features: Mapping[str, Tensor], side: int | None = None, mode: Literal["nearest", "bilinear"] = "nearest"
) -> Tensor:
    """All activations as one map ``[B, ΣC, side, side]`` (App. B.4): resized to the largest side, or ``side``, and concatenated.

    The paper saves features with ``nearest`` and matches with ``bilinear`` at 128.
    """
    target = side or max(max(value.shape[-2:]) for value in features.values())
    options: dict[str, Any] = {} if mode == "nearest" else {"align_corners": False}
    return torch.cat(
        [F.interpolate(value, (target, target), mode=mode, **options) for value in features.values()], dim=1
    )


# --- The attention feature (App. B.3) ------------------------------------------------------------------------------------------


def map_taps(denoiser: nn.Module, categories: Sequence[MapCategory]) -> list[Tap]:
    """Where the maps of some categories are produced, averaged over heads.

    Raises:
        ValueError: the model has none of a category.
    """
    found = []
    for category in categories:
        stage, _, kind = category.partition("_")
        names = [
            tap
            for name, tap in official_ids(denoiser).items()
            if name.endswith(f"{kind}-map") and place_of(name).stage in (stage, "") and tap.kind == "map"
        ]
        if not names:
            raise ValueError(f"attention_maps names {category}, and the model has no such maps")
        found += [attrs.evolve(tap, name=f"{tap.name}@mean", kind="mean-map") for tap in names]
    return found


def attention_feature(maps: Sequence[Tensor], latent_sides: Sequence[int], sides: tuple[int, int], side: int) -> Tensor:
    """Maps ``[B, N, T]`` as one feature ``[B, ΣT, side, side]``.

    Those whose side is within ``sides`` are averaged over all layers of equal size, upsampled (nearest) and concatenated in the
    order in which the sizes appear.

    Raises:
        ValueError: no map has a side within the bounds.
    """
    by_size: dict[tuple[int, int, int], list[Tensor]] = {}
    for one in maps:
        height, width = _grid(one.shape[1], latent_sides)
        if sides[0] <= height <= sides[1]:
            by_size.setdefault((height, width, one.shape[2]), []).append(one)
    if not by_size:
        raise ValueError(f"no attention map has a side between {sides[0]} and {sides[1]}; set attn_sides")
    parts = []
    for (height, width, tokens), several in by_size.items():
        mean = torch.stack(several).mean(0)
        image = mean.transpose(1, 2).reshape(len(mean), tokens, height, width)
        parts.append(F.interpolate(image, (side, side), mode="nearest"))
    return torch.cat(parts, dim=1)


def _grid(count: int, latent_sides: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of so many tokens of a latent: its sides over a common factor."""
    for factor in range(1, max(latent_sides) + 1):
        height, width = -(-latent_sides[0] // factor), -(-latent_sides[1] // factor)
        if height * width == count:
            return height, width
    raise ValueError(f"a map of {count} tokens is no grid of a latent of {latent_sides[0]}×{latent_sides[1]}")


# --- The three properties as measured scores (§4) --------------------------------------------------------------------------------


@attrs.frozen
class Properties:
    """What was measured of one activation; each value is a mean over channels, in [0, 1].

    Attributes:
        noise: share of the variance that comes from the draw of noise (asymmetric diffusion noise).
        coarse: share of the spatial variance that 2×2 average pooling keeps (granularity); NaN on a single value.
        locality: share of the variance that the position alone explains (tracking of position).
    """

    name: str
    family: Family
    side: int
    channels: int
    noise: float
    coarse: float
    locality: float


def noise_report(features: Callable[[int], Iterable[Mapping[str, Tensor]]], draws: int = 4) -> list[Properties]:
    """The properties of activations, in the order of execution; the features are held one batch at a time.

    Args:
        features: number of a draw of noise → the features of all images, batch after batch, the same images every time.
        draws: of noise, 2 or more.

    Raises:
        ValueError: fewer than two draws.
    """
    if draws < 2:
        raise ValueError(f"draws is {draws}; two or more are needed to tell noise from image")
    sums: dict[str, _Sums] = {}
    for batches in zip(*(features(draw) for draw in range(draws)), strict=True):
        for name in batches[0]:
            if batches[0][name].ndim == 4 and not _is_map(name):
                values = torch.stack([batch[name].double() for batch in batches])
                sums.setdefault(name, _Sums()).add(values)
    return [one.properties(name) for name, one in sums.items()]


class _Sums:
    """Running sums over images of ``[K, B, C, h, w]``: K draws of noise."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0
        self.square: Any = 0
        self.within: Any = 0
        self.pooled: Any = 0
        self.of_image: Any = 0
        self.of_image_square: Any = 0

    def add(self, values: Tensor) -> None:
        self.shape = tuple(values.shape[2:])
        self.count += values.shape[1]
        self.total = self.total + values.mean(0).sum(0)  # [C, h, w]
        self.square = self.square + values.pow(2).mean((0, 3, 4)).sum(0)  # [C]
        self.within = self.within + values.var(0).mean((2, 3)).sum(0)
        clean = values.mean(0)  # over the draws
        centred = clean - clean.mean((2, 3), keepdim=True)
        self.of_image_square = self.of_image_square + centred.pow(2).mean((2, 3)).sum(0)
        if min(clean.shape[-2:]) >= 2:
            self.pooled = self.pooled + F.avg_pool2d(centred, 2).pow(2).mean((2, 3)).sum(0)

    def properties(self, name: str) -> Properties:
        mean = self.total / self.count
        overall = mean.mean((1, 2))
        variance = (self.square / self.count - overall**2).clamp(min=1e-30)
        position = (mean - overall.view(-1, 1, 1)).pow(2).mean((1, 2))
        spatial = self.of_image_square.clamp(min=1e-30)
        coarse = float((self.pooled / spatial).mean()) if isinstance(self.pooled, Tensor) else float("nan")
        channels, side = self.shape[0], self.shape[1]
        noise = float((self.within / self.count / variance).clamp(0, 1).mean())
        return Properties(
            name, family_of(name), side, channels, noise, coarse, float((position / variance).clamp(0, 1).mean())
        )


# --- The quantitative ranking (§4.4, App. B.1) --------------------------------------------------------------------------------------


@attrs.frozen
class Ranked:
    """One candidate: its size, and its score on each data set."""

    name: str
    side: int
    channels: int
    scores: Mapping[str, float]


def rank_activations(
    sizes: Mapping[str, tuple[int, int]], scorers: Mapping[str, Callable[[str], float]]
) -> list[Ranked]:
    """Score every candidate alone, and order them within each resolution, best first; small sides come first.

    Args:
        sizes: candidate → (side, channels).
        scorers: data set → function from a candidate's name to its score there, higher is better: the pixel classifier of
            the paper, a linear probe, a share of right keypoints. The paper takes a simple and a complex scene.
    """
    if not sizes or not scorers:
        raise ValueError("there is nothing to rank; give candidates and at least one scorer")
    ranked = [
        Ranked(name, side, channels, {data: float(score(name)) for data, score in scorers.items()})
        for name, (side, channels) in sizes.items()
    ]
    return sorted(ranked, key=lambda one: (one.side, -_mean(one.scores.values())))


def choose(ranking: Sequence[Ranked], max_channels: int | None = None) -> tuple[str, ...]:
    """Of each resolution the best on every data set; where that is too many channels, those that cost least are left out.

    Args:
        max_channels: about as many as the conventional set has; ``None``: no bound.
    """
    chosen: dict[str, Ranked] = {}
    for side in dict.fromkeys(one.side for one in ranking):
        level = [one for one in ranking if one.side == side]
        for data in level[0].scores:
            best = max(level, key=lambda one: one.scores[data])
            chosen[best.name] = best
    while max_channels is not None and len(chosen) > 1 and sum(one.channels for one in chosen.values()) > max_channels:
        worst = min(chosen.values(), key=lambda one: _mean(one.scores.values()))
        del chosen[worst.name]
    return tuple(chosen)


# --- Small helpers of this module ------------------------------------------------------------------------------------------------


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _generators(seed: int, rows: Sequence[int], what: str) -> list[torch.Generator]:
    """One generator an image, the same whatever batch it is in."""
    return [torch.Generator().manual_seed(_digest(f"{seed}/{row}/{what}")) for row in rows]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _is_map(name: str) -> bool:
    return name.endswith(("-map", "@map", "@mean-map", "@mean"))


def _product(shape: Sequence[int]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def _empty_sample(backbone: Backbone, batch: int, size: int) -> Tensor:
    side = size // backbone.pixels_per_latent
    return torch.empty(batch, backbone.latent_channels, side, side, device="meta")
