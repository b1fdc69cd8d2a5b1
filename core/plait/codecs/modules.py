"""Models: those that save themselves (``save_pretrained``), and any other module whose builder is known."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from plait.building import NOTE, Recipe, recipe_of
from plait.errors import PlaitError, StoreError, shortened
from plait.importing import FILE_ATTRIBUTE, reading_own_results, stored_object
from plait.optional import require

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
SIMPLE = (bool, int, float, str, type(None))
# Attributes that say where a model came from or how it is run, not what it computes.
INCIDENTAL = ("training", "name_or_path", "is_compiled", "warnings_issued", "hf_device_map", "loss_type")


class ModuleCodec:
    """``torch.nn.Module`` (open_clip, transformers, diffusers, PyTorchModelHubMixin, …): config + safetensors.

    Restores the class, the dtype of parameters and buffers, ``requires_grad`` flags and train/eval mode. A model is
    read back when it is stored, and refused if its class builds another one from what it saved.
    """

    name = "module"

    def handles(self, value: Any) -> bool:
        return callable(getattr(value, "save_pretrained", None)) and callable(
            getattr(type(value), "from_pretrained", None)
        )

    def save(self, value: Any, folder: Path) -> None:
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        with _refused(f"the model (a {kind}) cannot be saved"):
            value.save_pretrained(folder / "model")
        _take_along(value, folder / "model")
        facts: dict[str, Any] = {
            "class": kind,
            "file": getattr(sys.modules[type(value).__module__], FILE_ATTRIBUTE, None),
        }
        is_module = hasattr(value, "state_dict") and hasattr(value, "named_modules")
        if is_module:
            facts |= _state(value)
        (folder / "module.json").write_text(json.dumps(facts))
        with _refused(f"the model (a {kind}) cannot be built again from what it saved"):
            again = self.load(folder)
        if is_module:
            _compare(
                value, again, f"{kind}.from_pretrained",
                "let the configuration say it, merge adapters and remove parametrisations before returning it, or return a"
                " class of its own with save_pretrained and from_pretrained",
            )  # fmt: skip

    def load(self, folder: Path) -> Any:
        facts = json.loads((folder / "module.json").read_text())
        with reading_own_results(), contextlib.redirect_stdout(io.StringIO()):  # PyTorchModelHubMixin prints
            model = _class(facts).from_pretrained(folder / "model")
        if "training" in facts:
            _restore_state(model, facts)
        return model


class BuiltModuleCodec:
    """Any other ``torch.nn.Module``: how it is built (:mod:`plait.building`), and its weights in safetensors.

    Restores and compares as :class:`ModuleCodec`. Loads into memory at once.
    """

    name = "built-module"

    def handles(self, value: Any) -> bool:
        torch = sys.modules.get("torch")
        return torch is not None and isinstance(value, torch.nn.Module)

    def save(self, value: Any, folder: Path) -> None:
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        recipe = recipe_of(value)
        if recipe is None:
            raise StoreError(
                f"the model (a {kind}) cannot be stored: it is not known how it is built; build it with"
                " plait.build_module(builder, argument=value), or give it save_pretrained and from_pretrained"
                " (huggingface_hub.PyTorchModelHubMixin gives both)"
            )
        (folder / "module.json").write_text(json.dumps({"recipe": attrs.asdict(recipe), **_state(value)}))
        with _refused(f"the model (a {kind}) cannot be saved"):
            require("safetensors.torch").save_model(value, str(folder / "model.safetensors"))
        with _refused(f"the model (a {kind}) cannot be built again by {recipe.builder}"):
            again = self.load(folder)
        _compare(
            value, again, recipe.builder,
            "build it with plait.build_module(builder, argument=value), where the builder does all that is done to it",
        )  # fmt: skip

    def load(self, folder: Path) -> Any:
        facts = json.loads((folder / "module.json").read_text())
        recipe = Recipe(**facts["recipe"])
        with reading_own_results():
            try:
                model = recipe.build()
            except ValueError as error:
                raise StoreError(f"the model cannot be built again by {recipe.builder}: {error}") from error
        _restore_dtypes(model, facts["dtypes"])
        require("safetensors.torch").load_model(model, str(folder / "model.safetensors"))
        _restore_state(model, facts)
        setattr(model, NOTE, facts["recipe"])
        return model


def _take_along(model: Any, folder: Path) -> None:
    """The image processor of a model of transformers lies beside it, and its ``save_pretrained`` leaves it behind."""
    source = getattr(getattr(model, "config", None), "name_or_path", None)
    for name in PROCESSORS:
        if isinstance(source, str) and source and (Path(source) / name).is_file() and not (folder / name).exists():
            shutil.copyfile(Path(source) / name, folder / name)


def _state(model: Any) -> dict[str, Any]:
    """What a module's weights do not say: train/eval modes, frozen parameters, dtypes."""
    return {
        "training": [name for name, part in model.named_modules() if part.training],
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "dtypes": {name: _dtype(tensor) for name, tensor in _tensors(model).items()},
    }


def _restore_state(model: Any, facts: dict[str, Any]) -> None:
    training, frozen = set(facts["training"]), set(facts["frozen"])
    for name, part in model.named_modules():
        part.training = name in training
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    _restore_dtypes(model, facts["dtypes"])


def _compare(model: Any, again: Any, builder: str, remedy: str) -> None:
    if difference := next(_differences(model, again), None):
        raise StoreError(
            f"the model cannot be stored: built again by {builder}, {difference}. What its configuration does not say is"
            f" lost: {remedy}"
        )


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Whatever a model's own saving or loading raises, as one sentence."""
    try:
        yield
    except PlaitError:
        raise
    except Exception as error:
        sentence = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(f"{what}: {shortened(sentence)}") from error


def _class(facts: dict[str, Any]) -> Any:
    try:
        return stored_object(facts["class"], facts["file"], _loads_itself, "a class with from_pretrained")
    except ValueError as error:
        raise StoreError(
            f"the model's class {facts['class']} cannot be found again ({error}); define it at the top of an importable module"
        ) from error


def _loads_itself(found: Any) -> bool:
    return isinstance(found, type) and callable(getattr(found, "from_pretrained", None))


def _tensors(model: Any) -> dict[str, Any]:
    """Parameters and buffers by name, also buffers that are not saved."""
    return {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}


def _dtype(tensor: Any) -> str:
    return str(getattr(tensor, "dtype", "")).removeprefix("torch.")


def _restore_dtypes(model: Any, dtypes: dict[str, str]) -> None:
    torch = require("torch")
    for name, tensor in _tensors(model).items():
        wanted = dtypes.get(name)
        if wanted and _dtype(tensor) != wanted:
            tensor.data = tensor.data.to(getattr(torch, wanted))


def _differences(model: Any, again: Any) -> Iterator[str]:
    """How a model that was read back differs from what was saved, each in a few words."""
    here, there = _tensors(model), _tensors(again)
    missing, extra = [n for n in here if n not in there], [n for n in there if n not in here]
    if missing:
        yield f"it lacks {_some(missing)}"
    if extra:
        yield f"it has {_some(extra)} besides"
    for name in here:
        if name in there and hasattr(here[name], "shape"):
            one, other = here[name].detach().cpu(), there[name].detach().cpu()
            if one.shape != other.shape:
                yield f"{name} has shape {tuple(other.shape)}, and {tuple(one.shape)} was saved"
            elif one.dtype != other.dtype:
                yield f"{name} is {_dtype(other)}, and {_dtype(one)} was saved"
            elif not _equal(one, other):
                yield f"{name} has other values"
    parts, parts_again = dict(model.named_modules()), dict(again.named_modules())
    for name, part in parts.items():
        other = parts_again.get(name)
        if other is None:
            yield f"it lacks the module {name}"
        elif type(other).__qualname__ != type(part).__qualname__:
            yield f"{name or 'it'} is a {type(other).__name__}, and a {type(part).__name__} was saved"
        else:
            yield from _different_attributes(name, part, other)


def _different_attributes(name: str, part: Any, other: Any) -> Iterator[str]:
    for attribute, value in vars(part).items():
        if attribute.startswith("_") or attribute in INCIDENTAL or not _is_simple(value):
            continue
        again = getattr(other, attribute, "nothing")
        if again != value and not (value != value and again != again):  # NaN
            yield f"attribute {'.'.join(filter(None, (name, attribute)))} is {again!r}, and {value!r} was saved"
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        if len(getattr(part, hooks, ())) > len(getattr(other, hooks, ())):
            yield f"{name or 'it'} has lost a hook that changes what it computes"


def _is_simple(value: Any) -> bool:
    return type(value) in SIMPLE or (type(value) in (tuple, list) and all(type(item) in SIMPLE for item in value))


def _equal(one: Any, other: Any) -> bool:
    if "sparse" in str(one.layout):
        one, other = one.to_dense(), other.to_dense()
    torch = require("torch")
    return bool(torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
