"""A backbone in a folder: diffusers' own layout, and nothing copied that did not change.

::

    plait.json                          what diffusers' layout does not say: dtypes, classes, where unchanged weights are
    model_index.json                    of a pipeline
    unet/ | transformer/, scheduler/, vae/, text_encoder/, tokenizer/, class_tokens/, controlnet/

Weights that are still those of the files they were read from are not written again when a step's result is stored:

* files of an earlier result are hard-linked, which nobody can change and whose removal takes nothing away;
* files of the user's own (a folder, the hub's cache) are referred to by path, size and SHA-256, and compared when the result
  is read. Linking them would let the store take the right to write from the user's files, and copying would take their size
  again in every step.

:meth:`Backbone.save_pretrained` writes everything.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import attrs
import torch
from plait.errors import StoreError
from safetensors import safe_open
from torch import nn

from plait_diffusion.backbone import Backbone, config_of, quiet_diffusers

ABOUT = "plait.json"
_INDEX_SUFFIX = ".safetensors.index.json"
_ALIGNED = 64  # bytes
_STEMS = ("diffusion_pytorch_model", "model")


@attrs.frozen
class WeightFiles:
    """The files that a component's weights were read from.

    Attributes:
        variant: of the files' names (``fp16``).
        config: the component's configuration as it was read.
        stored: they belong to an earlier result, which nobody changes.
    """

    folder: Path
    files: tuple[str, ...]
    variant: str | None = None
    stored: bool = False
    config: str = ""


def find_weights(folder: Path, variant: str | None = None, *, stored: bool = False) -> WeightFiles:
    """The files of a component; of another variant where there are no others."""
    folder = folder.absolute()
    if variant is not None and not _file_names(folder, variant):
        variant = None
    if variant is None and not _file_names(folder):
        names = {name.split(".")[1] for stem in _STEMS for name in map(_name, folder.glob(f"{stem}.*.safetensors"))}
        variant = names.pop() if len(names) == 1 else None
    return WeightFiles(folder, _file_names(folder, variant), variant, stored)


def _file_names(folder: Path, variant: str | None = None) -> tuple[str, ...]:
    """Names of the safetensors files that diffusers and transformers read a component from; none for other formats."""
    dotted = f".{variant}" if variant else ""
    for stem in _STEMS:
        for index in (
            folder / f"{stem}{_INDEX_SUFFIX.replace('.index', f'.index{dotted}')}",
            folder / f"{stem}{_INDEX_SUFFIX}",
        ):
            if index.is_file() and (dotted in index.name):
                return tuple(sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
        if (folder / f"{stem}{dotted}.safetensors").is_file():
            return (f"{stem}{dotted}.safetensors",)
    return ()


def write(backbone: Backbone, folder: Path, *, share: bool) -> None:
    """Write a backbone.

    Args:
        share: refer to unchanged weights, or link them, in place of writing them.
    """
    with quiet_diffusers():
        _write(backbone, folder, share)


def _write(backbone: Backbone, folder: Path, share: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {
        "pipeline": backbone.pipeline_name,
        "options": backbone.pipeline_options,
        "name": backbone.name,
        "revision": backbone.revision,
        "components": {},
    }
    for part, component in backbone.components.items():
        if component is None:
            about["components"][part] = None
            continue
        facts: dict[str, Any] = {"class": _class_name(component)}
        if isinstance(component, nn.Module):
            facts |= _dtypes(component)
            source = backbone.weight_files.get(part) if share else None
            if source is None or not is_unchanged(component, source):
                _check_can_be_built(part, component)
                component.save_pretrained(folder / part)
            else:
                component.save_config(folder / part) if hasattr(
                    component, "save_config"
                ) else component.config.save_pretrained(folder / part)
                facts |= _shared(source, folder / part)
        else:
            component.save_pretrained(folder / part)
        about["components"][part] = facts
    if backbone.pipeline_name is not None:
        backbone.pipeline().save_config(folder)
    (folder / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _check_can_be_built(part: str, component: nn.Module) -> None:
    """Adapters and fused projections are not in a configuration, and would be lost or leave weights unset.

    Raises:
        StoreError: the component's class builds another one from its configuration.
    """
    cls: Any = type(component)
    with torch.device("meta"):
        built = cls.from_config(component.config) if hasattr(cls, "load_config") else cls(component.config)
    here, there = component.state_dict(), built.state_dict()
    odd = [
        name
        for name in {**here, **there}
        if name not in here or name not in there or here[name].shape != there[name].shape
    ]
    if odd:
        raise StoreError(
            f"{part} cannot be stored: its configuration does not say how {odd[0]} comes about; merge or unload adapters and "
            "unfuse projections first"
        )


def _shared(source: WeightFiles, folder: Path) -> dict[str, Any]:
    if not source.stored:
        files = [_facts(source.folder / name) for name in source.files]
        return {"weights": {"folder": str(source.folder), "variant": source.variant, "files": files}}
    for name in [*source.files, *(p.name for p in source.folder.glob(f"*{_INDEX_SUFFIX}"))]:
        try:
            os.link(source.folder / name, folder / name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source.folder / name, folder / name)
    return {}


def is_unchanged(component: nn.Module, source: WeightFiles) -> bool:
    """Whether a component is what was read from its files, with the weights cast to its dtypes; a tensor at a time."""
    if config_of(component) != source.config:
        return False
    state = component.state_dict()
    seen: set[str] = set()
    if not source.files or not all((source.folder / name).is_file() for name in source.files):
        return False
    for name in source.files:
        with safe_open(source.folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if key not in state:
                    return False
                there, here = file.get_tensor(key), state[key].cpu()
                if there.shape != here.shape or not torch.equal(there.to(here.dtype), here):
                    return False
                seen.add(key)
    places = {state[key].data_ptr() for key in seen}
    return all(key in seen or value.data_ptr() in places for key, value in state.items())  # tied weights are saved once


def read(folder: Path, *, stored: bool, dtype: torch.dtype | None = None) -> Backbone:
    """Read what :func:`write` wrote.

    Args:
        stored: the folder is a step's result, so that its files may be linked.
        dtype: of all weights; default: as they were written.

    Raises:
        StoreError: weights that were referred to are gone or were changed.
    """
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    components: dict[str, Any] = {}
    sources: dict[str, WeightFiles] = {}
    for part, facts in about["components"].items():
        if facts is None:
            components[part] = None
            continue
        cls = _class_of(facts["class"])
        if "dtype" not in facts:
            components[part] = cls.from_pretrained(folder / part)
            continue
        if "weights" in facts:
            source = _checked_files(part, facts["weights"])
        else:
            source = find_weights(folder / part, stored=stored)
        components[part], sources[part] = load_module(cls, source, dtype or getattr(torch, facts["dtype"]))
        if dtype is None:
            _restore_dtypes(components[part], facts["other_dtypes"])
    return Backbone(
        components,
        pipeline=about["pipeline"],
        options=about["options"],
        name=about["name"],
        revision=about["revision"],
        weight_files=sources,
    )


def load_module(cls: Any, source: WeightFiles, dtype: torch.dtype) -> tuple[Any, WeightFiles]:
    """A component of diffusers or transformers from its folder, in eval mode, and its files with what its configuration was."""
    # Older diffusers know only the old name, which newer ones still take.
    name = "dtype" if cls.__module__.startswith("transformers") else "torch_dtype"
    variant = {"variant": source.variant} if source.variant else {}
    with quiet_diffusers(), torch.random.fork_rng(devices=[]):
        component = cls.from_pretrained(source.folder, **{name: dtype}, **variant).eval()
    for tensor in [*component.parameters(), *component.buffers()]:
        # As they lie in the file; kernels give other last bits where tensors begin at odd places.
        if tensor.data_ptr() % _ALIGNED:
            tensor.data = tensor.data.clone()
    return component, attrs.evolve(source, config=config_of(component))


def _name(path: Path) -> str:
    return path.name


def _checked_files(part: str, weights: dict[str, Any]) -> WeightFiles:
    folder = Path(weights["folder"])
    for one in weights["files"]:
        file = folder / one["name"]
        if not file.is_file():
            raise StoreError(
                f"the weights of {part} are not stored but referred to, and {file} is gone; put it back, or load the model again"
            )
        if _facts(file)["sha256"] != one["sha256"]:
            raise StoreError(
                f"the weights of {part} are not stored but referred to, and {file} was changed since; put the old file back, "
                "or load the model again"
            )
    return WeightFiles(folder, tuple(one["name"] for one in weights["files"]), weights["variant"])


def _facts(file: Path) -> dict[str, Any]:
    status = file.stat()
    return {"name": file.name, "size": status.st_size, "sha256": _digest(file, status.st_size, status.st_mtime_ns)}


@functools.lru_cache(maxsize=256)
def _digest(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _class_name(component: Any) -> str:
    return f"{type(component).__module__.partition('.')[0]}:{type(component).__qualname__}"


def _class_of(name: str) -> Any:
    import importlib

    module, _, cls = name.partition(":")
    found = getattr(importlib.import_module(module), cls, None)
    if found is None:
        raise StoreError(f"{module} has no class {cls} any more; install the version that the model was stored with")
    return found


def _dtypes(component: nn.Module) -> dict[str, Any]:
    names = {name: str(value.dtype).removeprefix("torch.") for name, value in component.state_dict().items()}
    floating = [name for name in names.values() if "float" in name]
    main = max(set(floating), key=floating.count) if floating else "float32"
    return {"dtype": main, "other_dtypes": {name: dtype for name, dtype in names.items() if dtype != main}}


def _restore_dtypes(component: nn.Module, dtypes: dict[str, str]) -> None:
    tensors = {**dict(component.named_buffers()), **dict(component.named_parameters())}
    for name, dtype in dtypes.items():
        if name in tensors:
            tensors[name].data = tensors[name].data.to(getattr(torch, dtype))


class BackboneCodec:
    """:class:`Backbone` in the store; see the top of this module for what is linked and referred to."""

    name = "diffusion-backbone"

    def handles(self, value: Any) -> bool:
        return type(value).__module__ == "plait_diffusion.backbone" and type(value).__name__ == "Backbone"

    def save(self, value: Any, folder: Path) -> None:
        write(value, folder, share=True)

    def load(self, folder: Path) -> Backbone:
        return read(folder, stored=True)
