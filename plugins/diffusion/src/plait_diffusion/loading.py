"""Diffusion models of diffusers from a folder or a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from plait_diffusion import families, storing
from plait_diffusion.backbone import DENOISERS, Backbone, quiet_diffusers
from plait_diffusion.noise import SD_BETAS

# Parts of pipelines that say nothing about an image that is given.
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float32}


def load_backbone(
    source: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    scheduler: str | None = None,
) -> Backbone:
    """A backbone from a folder, or from the hub by name.

    Args:
        source: a pipeline of diffusers (``model_index.json``), a bare denoiser (``config.json``), a folder with a bare
            denoiser in ``unet/`` or ``transformer/``, or what :meth:`Backbone.save_pretrained` wrote.
        revision: branch, tag or commit of a hub model.
        dtype: of all weights; default: as the denoiser is stored.
        variant: ``fp16``, to read ``*.fp16.safetensors``.
        scheduler: folder of the scheduler of a bare denoiser; default: beside it, else Stable Diffusion's noise schedule
            (flow-matching Euler for Flux and SD3).

    Raises:
        ValueError: there is no such model, it is not of diffusers, or of a kind that is not known.
    """
    folder = Path(source).expanduser()
    name = folder.name if folder.is_dir() else source
    if not folder.is_dir():
        folder = _downloaded(source, revision, variant)
    if (folder / storing.ABOUT).is_file():
        return storing.read(folder, stored=False, dtype=dtype)
    facts: dict[str, Any] = {"name": name, "revision": revision}
    try:
        if (folder / "model_index.json").is_file():
            return _pipeline(folder, dtype, variant, facts)
        return _bare(folder, dtype, variant, scheduler, facts)
    except (OSError, KeyError, TypeError, RuntimeError, AttributeError, ImportError, SafetensorError) as error:
        raise ValueError(f"diffusers cannot load {source}: {_first_line(error)}") from error


def _pipeline(folder: Path, dtype: torch.dtype | None, variant: str | None, facts: dict[str, Any]) -> Backbone:
    import diffusers

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    cls = getattr(diffusers, index["_class_name"], None)
    if cls is None:
        raise ValueError(f"{folder} is a {index['_class_name']}, which diffusers does not have")
    parts = {part: entry for part, entry in index.items() if isinstance(entry, list) and not part.startswith("_")}
    denoiser = next((part for part in DENOISERS if part in parts), None)
    if denoiser is None:
        raise ValueError(f"{folder} is a {index['_class_name']}, which has neither a unet nor a transformer")
    dtype = dtype or stored_dtype(storing.find_weights(folder / denoiser, variant))
    components: dict[str, Any] = {}
    sources: dict[str, Any] = {}
    for part, (library, class_name) in parts.items():
        if part in _LEFT_OUT or class_name is None:
            components[part] = None
            continue
        part_class = _class_of(library, class_name)
        if not hasattr(part_class, "forward"):
            components[part] = part_class.from_pretrained(folder / part)
            continue
        files = storing.find_weights(folder / part, variant)
        components[part], sources[part] = storing.load_module(part_class, files, dtype)
    options = {name: value for name, value in index.items() if not name.startswith("_") and not isinstance(value, list)}
    if "requires_safety_checker" in options:
        options["requires_safety_checker"] = False
    return Backbone(components, pipeline=cls.__name__, options=options, weight_files=sources, **facts)


def _bare(
    folder: Path, dtype: torch.dtype | None, variant: str | None, scheduler: str | None, facts: dict[str, Any]
) -> Backbone:
    import diffusers

    place = next((folder / part for part in ("", *DENOISERS) if (folder / part / "config.json").is_file()), None)
    if place is None:
        raise ValueError(f"{folder} holds no model of diffusers: neither model_index.json nor config.json")
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    kind = config.get("_class_name")
    if kind not in families.KNOWN:
        raise ValueError(f"{place} holds a {kind}; known denoisers are {', '.join(families.KNOWN)}")
    part = "unet" if kind in families.UNETS else "transformer"
    files = storing.find_weights(place, variant)
    denoiser, source_files = storing.load_module(getattr(diffusers, kind), files, dtype or stored_dtype(files))
    found = _scheduler(folder, scheduler, kind)
    return Backbone({part: denoiser, "scheduler": found}, weight_files={part: source_files}, **facts)


def _scheduler(folder: Path, given: str | None, kind: str) -> Any:
    import diffusers

    places = [Path(given).expanduser()] if given else [folder / "scheduler", folder]
    for place in (inner for outer in places for inner in (outer, outer / "scheduler")):
        file = place / "scheduler_config.json"
        if file.is_file():
            cls = getattr(diffusers, json.loads(file.read_text(encoding="utf-8"))["_class_name"])
            return cls.from_pretrained(place)
    if given:
        raise ValueError(f"scheduler is {given!r}, a folder without scheduler_config.json")
    return default_scheduler(kind)


def default_scheduler(kind: str) -> Any:
    """Stable Diffusion's noise schedule under DDIM, or flow matching for models of that kind."""
    import diffusers

    if kind in families.JOINT:
        return diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.DDIMScheduler(
        beta_start=SD_BETAS[0], beta_end=SD_BETAS[1], beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )


def stored_dtype(source_files: storing.WeightFiles) -> torch.dtype:
    """The dtype of a component's largest tensor on disk; float32 where that cannot be seen."""
    for name in source_files.files[:1]:
        with safe_open(source_files.folder / name, framework="pt") as file:
            slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118 - not a mapping
            largest = max(slices, key=lambda one: _size(one.get_shape()))
            return _DTYPES.get(largest.get_dtype(), torch.float32)
    return torch.float32


def _size(shape: list[int]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def _class_of(library: str, name: str) -> Any:
    import importlib

    try:
        return getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError):
        import diffusers

        if hasattr(diffusers, name):
            return getattr(diffusers, name)
        raise ValueError(f"the pipeline has a {name} of {library}, which is not installed") from None


def _downloaded(source: str, revision: str | None, variant: str | None) -> Path:
    """The hub's own copy of a model: what diffusers needs of it."""
    import diffusers
    from huggingface_hub import snapshot_download

    if "/" not in source or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"source is {source!r}, which is neither a folder nor owner/name on the hub")
    try:
        with quiet_diffusers():
            download = diffusers.DiffusionPipeline.download  # all but a part of 1.2 GB that is not used
            return Path(download(source, revision=revision, variant=variant, safety_checker=None))
    except Exception as pipeline_error:  # of many kinds: no network, no such model, no pipeline
        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:
            raise ValueError(f"{source} cannot be fetched from the hub: {_first_line(error)}") from error
        if not any(folder.rglob("config.json")):
            raise ValueError(f"{source} holds no model of diffusers: {_first_line(pipeline_error)}") from pipeline_error
        return folder


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
