"""``extract-feature``: gdf, dift, ddpm-seg; ``evaluate``: noise-report, activation-ranking."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs
import numpy as np
import torch
from plait import Report, hookimpl
from plait.fields import field, in_range
from plait_diffusion import (
    Backbone,
    DenoiserCall,
    FeatureSet,
    Origin,
    TimestepRule,
    backbone_in,
    image_tensors,
    linear_probe,
    write_features,
)
from torch import Tensor

from plait_gdf import baselines, pictures
from plait_gdf.gdf import (
    MAPS_OF_PRESET,
    Extraction,
    MapCategory,
    Presets,
    Ranked,
    choose,
    gdf,
    layers_of,
    noise_report,
    pool_of_names,
    rank_activations,
    seed_of_draw,
    stored,
)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
StoredDtype = Literal["float16", "bfloat16", "float32"]


@attrs.frozen(kw_only=True)
class _Extractor:
    """What the extractors have in common."""

    takes = {"model": "diffusion-model", "data": ("dataset", "clients")}
    gives = "feature-set"

    prompt: str = field("", "text for all images; for the small model the name of a class, or nothing")
    prompt_column: str | None = field(None, "column with a text for every image, in place of prompt")
    image_size: int | None = field(
        None, "side that images are resized to, pixels; default: the model's own", in_range(1)
    )
    noise_seed: int | None = field(
        None, "of noise and posterior; default: from the run's seed and the step", in_range(0)
    )
    batch_size: int = field(4, "images a pass", in_range(1))
    dtype: StoredDtype = field("float16", "in which features are stored")
    cache: str | None = field(None, "folder of VAE moments that steps and runs share; default: none")

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return ("image",) if self.prompt_column is None else ("image", self.prompt_column)

    @hookimpl
    def extract_feature(self, model: Any, data: Any, run: Any) -> FeatureSet | dict[str, FeatureSet]:
        """The feature set of a dataset, or one of each split of a mapping."""
        backbone = backbone_in(model).on(run.device)
        self._check(backbone)
        seed = self._seed(run)
        origin = self.origin(backbone, seed)

        def of(name: str, part: Any) -> FeatureSet:
            def batch(start: int, rows: Any) -> dict[str, Tensor]:
                images = image_tensors(rows, origin.more["image_size"])
                features = self._features(backbone, images, range(start, start + len(rows)), seed, self._prompts(rows))
                return {key: stored(key, value, DTYPES[self.dtype]) for key, value in features.items()}

            return write_features(
                run, self, part, origin, batch, batch_size=self.batch_size, inputs=origin.digest, description=name
            )

        if isinstance(data, Mapping):
            return {name: of(f"features of {name}", part) for name, part in data.items()}
        return of("features", data)

    def _seed(self, run: Any) -> int:
        return run.derived_seed("noise") if self.noise_seed is None else self.noise_seed

    def _prompts(self, rows: Any) -> list[str] | None:
        if self.prompt_column is None:
            return None
        if self.prompt_column not in rows.column_names:
            raise ValueError(
                f"prompt_column is {self.prompt_column!r}; the data has the columns {', '.join(rows.column_names)}"
            )
        return [str(cell[0] if isinstance(cell, list) else cell) for cell in rows[self.prompt_column]]

    def _origin(self, backbone: Backbone, seed: int, timestep: float | None, **more: Any) -> Origin:
        config = {name: value for name, value in backbone.scheduler.config.items() if name != "_diffusers_version"}
        size = self.image_size or backbone.default_size
        return Origin(
            model=backbone.name,
            digest=backbone.fingerprint(),
            revision=backbone.revision,
            dtype=str(backbone.dtype).removeprefix("torch."),
            timestep=timestep,
            scheduler=config,
            prompt=self.prompt if self.prompt_column is None else None,
            seed=seed,
            more={"image_size": size, "prompt_column": self.prompt_column, **more},
        )

    def origin(self, backbone: Backbone, seed: int) -> Origin:
        raise NotImplementedError

    def _check(self, backbone: Backbone) -> None:
        raise NotImplementedError

    def _features(
        self, backbone: Backbone, images: Tensor, rows: Sequence[int], seed: int, prompts: Sequence[str] | None
    ) -> dict[str, Tensor]:
        raise NotImplementedError


class _OfOneTimestep(_Extractor):
    """Features of passes at one timestep, averaged over draws of noise; a subclass has a field ``ensemble_size``."""

    ensemble_size: int

    def extraction(self, backbone: Backbone) -> Extraction:
        raise NotImplementedError

    def _check(self, backbone: Backbone) -> None:
        self.extraction(backbone).check(backbone, self.batch_size)

    def _features(
        self, backbone: Backbone, images: Tensor, rows: Sequence[int], seed: int, prompts: Sequence[str] | None
    ) -> dict[str, Tensor]:
        extraction = self.extraction(backbone)
        return gdf(
            backbone,
            images,
            extraction=extraction,
            rows=rows,
            seed=seed,
            ensemble_size=self.ensemble_size,
            prompts=prompts,
        )


@attrs.frozen(kw_only=True)
class GDF(_OfOneTimestep):
    """Generic diffusion features (Meng et al., NeurIPS 2024): chosen activations of a diffusion model at little noise."""

    preset: Presets = field(
        "auto",
        "which activations: auto (the published set of SD 1.5 or SDXL), a published set by name, legacy (outputs of the up "
        "stage's levels), pool (all that the three properties leave over), heuristic (transformers; not the paper's), all",
    )
    layers: tuple[str, ...] | None = field(
        None, "activations in place of a preset: official ids, module paths (up_blocks.1.attentions.0@out), globs"
    )
    timestep: int = field(50, "nominal timestep of 1000", in_range(0))
    timestep_rule: TimestepRule | None = field(
        None, "schedule_index: as the paper's code; exact; snr: equal noise-to-signal ratio; default: snr for flow and EDM models, "
        "else schedule_index"
    )  # fmt: skip
    ensemble_size: int = field(1, "draws of noise whose features are averaged", in_range(1))
    sample_posterior: bool = field(True, "draw from the VAE's posterior; false: its mode")
    feature_resize: int = field(1, "average pooling of the features by this factor", in_range(1))
    attention_maps: tuple[MapCategory, ...] | None = field(
        None, "maps that make up the feature attn; default: those of the preset"
    )
    attn_min_side: int | None = field(None, "smallest side of maps in attn; default: image_size / 32", in_range(1))
    attn_max_side: int | None = field(
        None, "largest side; default: image_size / 16, for transformers image_size / 8", in_range(1)
    )
    early_exit: bool = field(True, "stop every pass after its last wanted activation")
    map_gib: float = field(4.0, "what the attention maps of a batch may take, GiB", in_range(0, low_open=True))

    def __attrs_post_init__(self) -> None:
        if self.layers is not None and not self.layers:
            raise ValueError("layers is empty; name at least one activation, or leave it out")
        if self.layers is not None and self.preset != "auto":
            raise ValueError(f"layers and preset {self.preset} are both given; give one")
        if (self.attn_min_side is None) != (self.attn_max_side is None):
            raise ValueError("attn_min_side and attn_max_side go together; give both or none")

    def extraction(self, backbone: Backbone) -> Extraction:
        """The algorithm's settings for a model."""
        maps = MAPS_OF_PRESET.get(self.preset, ()) if self.attention_maps is None else self.attention_maps
        sides = None
        if self.attn_min_side is not None and self.attn_max_side is not None:
            sides = (self.attn_min_side, self.attn_max_side)
        return Extraction(
            layers=self.layers or layers_of(self.preset, backbone.denoiser),
            timestep=self.timestep,
            timestep_rule=self.timestep_rule,
            prompt=self.prompt,
            image_size=self.image_size,
            sample_posterior=self.sample_posterior,
            feature_resize=self.feature_resize,
            attention_maps=maps,
            attn_sides=sides,
            early_exit=self.early_exit,
            cache=self.cache,
            map_limit=int(self.map_gib * 2**30),
        )

    def prepare(self, backbone: Backbone, images: Tensor, **arguments: Any) -> DenoiserCall:
        """See :meth:`plait_gdf.gdf.Extraction.prepare`."""
        return self.extraction(backbone).prepare(backbone, images, **arguments)

    def capture(self, backbone: Backbone, call: DenoiserCall) -> dict[str, Tensor]:
        """See :meth:`plait_gdf.gdf.Extraction.capture`."""
        return self.extraction(backbone).capture(backbone, call)

    def origin(self, backbone: Backbone, seed: int) -> Origin:
        """What the features come from."""
        own = {
            name: getattr(self, name)
            for name in (
                "timestep_rule",
                "ensemble_size",
                "sample_posterior",
                "feature_resize",
                "attn_min_side",
                "attn_max_side",
            )
        }
        return self._origin(backbone, seed, float(self.timestep), **own)


@attrs.frozen(kw_only=True)
class Dift(_OfOneTimestep):
    """DIFT (Tang et al., NeurIPS 2023): one block output at a late timestep, averaged over draws of noise."""

    layer: str = field(baselines.DIFT_LAYER, "activation")
    timestep: int = field(baselines.DIFT_TIMESTEP, "the network's own timestep", in_range(0))
    ensemble_size: int = field(baselines.DIFT_DRAWS, "draws of noise whose features are averaged", in_range(1))

    def origin(self, backbone: Backbone, seed: int) -> Origin:
        """What the features come from."""
        return self._origin(
            backbone, seed, float(self.timestep), timestep_rule="exact", ensemble_size=self.ensemble_size
        )

    def extraction(self, backbone: Backbone) -> Extraction:
        """The algorithm's settings for a model."""
        options = {"prompt": self.prompt, "image_size": self.image_size, "cache": self.cache}
        return baselines.dift(self.layer, self.timestep, **options)


@attrs.frozen(kw_only=True)
class DDPMSeg(_Extractor):
    """DDPM-seg (Baranchuk et al., ICLR 2022): decoder blocks of a DDPM at three timesteps, one noise for all images."""

    blocks: tuple[int, ...] = field(baselines.DDPM_BLOCKS, "decoder blocks, from the lowest resolution on", in_range(0))
    timesteps: tuple[int, ...] = field(baselines.DDPM_TIMESTEPS, "the network's own timesteps", in_range(0))

    def origin(self, backbone: Backbone, seed: int) -> Origin:
        """What the features come from."""
        return self._origin(backbone, seed, None, timesteps=list(self.timesteps), timestep_rule="exact")

    def _check(self, backbone: Backbone) -> None:
        names = baselines.decoder_blocks(backbone.denoiser, self.blocks)
        for timestep in self.timesteps:
            Extraction(
                layers=names, timestep=timestep, timestep_rule="exact", prompt=self.prompt, image_size=self.image_size
            ).check(backbone, self.batch_size)

    def _features(
        self, backbone: Backbone, images: Tensor, rows: Sequence[int], seed: int, prompts: Sequence[str] | None
    ) -> dict[str, Tensor]:
        if prompts is not None:
            raise ValueError("ddpm-seg is of unconditional models; leave prompt_column out")
        return baselines.ddpm_seg(
            backbone, images, blocks=self.blocks, timesteps=self.timesteps, seed=seed,
            prompt=self.prompt, image_size=self.image_size, cache=self.cache,
        )  # fmt: skip


@attrs.frozen(kw_only=True)
class NoiseReport:
    """The three properties of a model's activations on the images of ``data``: noise, granularity, tracking of position."""

    takes = {"model": "diffusion-model", "data": "dataset"}
    columns_needed = ("image",)

    layers: tuple[str, ...] = field(("*",), "activations: official ids, module paths, globs; default: all but maps")
    timestep: int = field(50, "nominal timestep", in_range(0))
    timestep_rule: TimestepRule | None = field(None, "see extract-feature: gdf")
    prompt: str = field("", "text for all images")
    image_size: int | None = field(None, "side of the images, pixels; default: the model's own", in_range(1))
    draws: int = field(4, "of noise", in_range(2))
    num_images: int = field(128, "the first ones of the data are measured on", in_range(2))
    batch_size: int = field(32, "images a pass", in_range(1))
    pictures: bool = field(True, "draw bars along the network, and principal components of activations")

    @hookimpl
    def evaluate(self, model: Any, data: Any, run: Any) -> Report:
        backbone = backbone_in(model).on(run.device)
        if not hasattr(data, "column_names") or not len(data):
            raise ValueError("evaluate: noise-report needs a dataset with images; the data has none")
        rows = data.select(range(min(self.num_images, len(data))))
        layers = layers_of("all", backbone.denoiser) if self.layers == ("*",) else self.layers
        extraction = Extraction(
            layers=layers,
            timestep=self.timestep,
            timestep_rule=self.timestep_rule,
            prompt=self.prompt,
            image_size=self.image_size,
        )
        extraction.check(backbone, self.batch_size)
        seed = run.derived_seed("noise")
        total = -(-len(rows) // self.batch_size) * self.draws
        passes = iter(run.track(range(total), "passes", total))

        def features(draw: int) -> Iterator[Mapping[str, Tensor]]:
            for start in range(0, len(rows), self.batch_size):
                batch = rows.select(range(start, min(start + self.batch_size, len(rows))))
                images = image_tensors(batch, extraction.size(backbone))
                numbers = range(start, start + len(batch))
                next(passes, None)
                yield gdf(backbone, images, extraction=extraction, rows=numbers, seed=seed_of_draw(seed, draw))

        found = noise_report(features, self.draws)
        next(passes, None)
        table: list[dict[str, Any]] = [
            {
                "activation": one.name,
                "family": one.family,
                "noise / variance": one.noise,
                "coarse / spatial": one.coarse,
                "position / variance": one.locality,
                "side": one.side,
                "channels": one.channels,
            }
            for one in found
        ]
        formats = {
            "noise / variance": ".3f",
            "coarse / spatial": ".3f",
            "position / variance": ".3f",
            "side": ".0f",
            "channels": ".0f",
        }
        panels = []
        if self.pictures:
            first = next(iter(features(0)))
            panels = [pictures.noise_bars(found), pictures.principal_components(first)]
        notes = [f"t = {self.timestep}, {len(rows)} images, {self.draws} draws of noise"]
        return Report(rows=[*table, *_by_stage(found)], formats=formats, panels=panels, notes=notes)


def _by_stage(found: Sequence[Any]) -> list[dict[str, Any]]:
    """Medians of the noise along the network, one row a level."""
    levels: dict[str, list[float]] = {}
    for one in found:
        levels.setdefault(pictures.level_name(one.name), []).append(one.noise)
    return [
        {"activation": f"median of {level}", "family": "level", "noise / variance": float(np.median(values))}
        for level, values in levels.items()
    ]


@attrs.frozen(kw_only=True)
class ActivationRanking:
    """Ranks activations within each resolution by a probe on few labels, chooses, and tests the choice against other sets.

    ``data`` is a labelled feature set of training images, ``reference`` one of test images.
    """

    takes = {"data": "feature-set", "reference": "feature-set"}

    candidates: tuple[str, ...] | None = field(
        None,
        "activations to choose from, globs too; default: those of the features that the three properties leave over",
    )
    against: dict[str, tuple[str, ...]] = field(
        attrs.Factory(dict), "name → activations of a set to compare with; gains are over the first"
    )
    singles: dict[str, tuple[str, ...]] = field(
        attrs.Factory(dict), "name → activations, globs too, of which the best alone is compared with"
    )
    num_labels: int = field(200, "labelled images that a probe learns from", in_range(2))
    num_validation: int = field(300, "further images that candidates are scored on", in_range(1))
    max_channels: int | None = field(
        None, "about as many channels as the choice may have; default: no bound", in_range(1)
    )
    max_side: int | None = field(None, "largest side of candidates; default: all", in_range(1))
    strength: float = field(1.0, "C of the logistic regression", in_range(0, low_open=True))

    @hookimpl
    def evaluate(self, data: Any, reference: Any, run: Any) -> Report:
        train, test = _labelled(data, "data"), _labelled(reference, "reference")
        names = self._candidates(train)
        pooled, labels = _pooled(train)
        test_pooled, test_labels = _pooled(test)
        order = run.numpy_generator("labels").permutation(len(train))
        if len(order) < self.num_labels + self.num_validation:
            raise ValueError(
                f"num_labels {self.num_labels} and num_validation {self.num_validation} are more than the {len(order)} images"
            )
        fit, hold = order[: self.num_labels], order[self.num_labels : self.num_labels + self.num_validation]
        progress = iter(run.track(names, "ranking"))

        def on_validation(name: str) -> float:
            next(progress, None)
            values = pooled[name]
            return linear_probe(values[fit], labels[fit], values[hold], labels[hold], self.strength)

        def on_test(several: Sequence[str]) -> float:
            values = np.concatenate([pooled[name] for name in several], axis=1)
            tested = np.concatenate([test_pooled[name] for name in several], axis=1)
            return linear_probe(values[fit], labels[fit], tested, test_labels, self.strength)

        sizes = {name: (train[name].shape[-1], train[name].shape[0]) for name in names}
        ranking = rank_activations(sizes, {"validation": on_validation})
        chosen = choose(ranking, self.max_channels)
        sets = {
            "chosen": chosen,
            **{name: _matching(train, several, "against") for name, several in self.against.items()},
        }
        for name, patterns in self.singles.items():
            several = _matching(train, patterns, "singles")
            scores = {
                one: linear_probe(pooled[one][fit], labels[fit], pooled[one][hold], labels[hold], self.strength)
                for one in several
            }
            sets[name] = (max(scores, key=lambda one: scores[one]),)
        rows: list[dict[str, Any]] = []
        for name, several in sets.items():
            channels = sum(pooled[one].shape[1] for one in several)
            rows.append({"activations": name, "test accuracy, %": 100 * on_test(several), "channels": float(channels)})
        for row in rows if self.against else ():
            gain = row["test accuracy, %"] - rows[1]["test accuracy, %"]
            row |= {"gain, points": gain, "share of draws with a gain": float(gain > 0)}
        run.add(_table(ranking, chosen))
        notes = [f"chosen of {len(names)}: {', '.join(chosen)}"]
        return Report(
            rows=rows,
            better={"test accuracy, %": "higher"},
            formats={
                "test accuracy, %": ".1f",
                "channels": ".0f",
                "gain, points": "+.1f",
                "share of draws with a gain": ".1f",
            },
            notes=notes,
        )

    def _candidates(self, features: FeatureSet) -> list[str]:
        if self.candidates is not None:
            wanted = _matching(features, self.candidates, "candidates")
        else:
            wanted = pool_of_names(features.names) or features.names
        found = [name for name in wanted if self.max_side is None or features[name].shape[-1] <= self.max_side]
        if not found:
            raise ValueError(f"no candidate has a side of at most {self.max_side}; raise max_side")
        return found


def _matching(features: FeatureSet, patterns: Sequence[str], field_name: str) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for pattern in patterns:
        names = fnmatch.filter(features.names, pattern)
        if not names:
            raise ValueError(f"{field_name} names {pattern!r}, which the features do not have")
        found.update(dict.fromkeys(names))
    return tuple(found)


def _labelled(features: Any, argument: str) -> FeatureSet:
    if not isinstance(features, FeatureSet) or "label" not in features.rows.column_names:
        raise ValueError(f"{argument} of activation-ranking has to be a feature set whose rows have a column 'label'")
    if not len(features):
        raise ValueError(f"{argument} of activation-ranking has no rows")
    return features


def _pooled(features: FeatureSet) -> tuple[dict[str, np.ndarray], np.ndarray]:
    pooled = features.pooled().read()
    return {name: value.double().numpy() for name, value in pooled.items()}, np.asarray(features.rows["label"])


def _table(ranking: Sequence[Ranked], chosen: Sequence[str]) -> Report:
    """Every candidate's score, best first within each resolution."""
    rows: list[dict[str, Any]] = [
        {
            "activation": one.name,
            "side": f"{one.side}",
            "validation accuracy, %": 100 * one.scores["validation"],
            "channels": one.channels,
            "share of draws that choose it": float(one.name in chosen),
        }
        for one in ranking
    ]
    formats = {"validation accuracy, %": ".1f", "channels": ".0f", "share of draws that choose it": ".1f"}
    return Report(title="candidates", rows=rows, formats=formats)
