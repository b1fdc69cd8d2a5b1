"""Models on disk: by the ``save_pretrained`` of their class where that brings them back, else module by module.

A folder has ``module.json`` (class, types of the tensors, places of heads) beside the class's own files or
``module.pt``. The latter is a whole module as ``torch.save`` writes it. It is read with ``weights_only=True``,
and only classes of modules, enumerations, configurations of transformers and functions of ``torch.nn.functional`` may be
named in it.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import io
import json
import pickle
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from plait_wemoe.heads import Socket, own_heads
from plait_wemoe.states import tied_names

WHOLE = "module.pt"
ABOUT = "module.json"


def save_module(module: nn.Module, folder: str | Path) -> None:
    """Write a module so that :func:`load_module` brings it back, tensor by tensor.

    Raises:
        TypeError: neither its class nor a file of modules can hold it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if getattr(type(module), "stores_parts", False):  # a wrapper of ours knows its parts' sockets
        module.save_pretrained(folder)
        (folder / ABOUT).write_text(json.dumps({"class": class_path(module)}))
        return
    with own_heads(module) as sockets:
        facts: dict[str, Any] = {
            "class": class_path(module),
            "file": getattr(sys.modules.get(type(module).__module__), "__plait_file__", None),
            "sockets": sockets,
            "dtypes": {name: str(value.dtype).removeprefix("torch.") for name, value in _tensors(module).items()},
        }
        if saves_itself(module):
            module.save_pretrained(folder)
            (folder / ABOUT).write_text(json.dumps(facts))
            if _is_back(folder, facts, module):
                return
        facts |= {"class": None}
        _write_whole(module, folder / WHOLE)
        (folder / ABOUT).write_text(json.dumps(facts))


def load_module(folder: str | Path) -> nn.Module:
    """The module that :func:`save_module` wrote. Global random states stay as they are."""
    folder = Path(folder)
    facts = json.loads((folder / ABOUT).read_text())
    module = _loaded(folder, facts)
    for index, place in enumerate(facts.get("sockets", ())):
        module.set_submodule(place, Socket(module.get_submodule(place), index))
    return module


def check_storable(module: nn.Module) -> None:
    """Raise TypeError where :func:`save_module` cannot but fail; no weights are written."""
    if saves_itself(module):
        return
    with own_heads(module):
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
        _write_whole(copy.deepcopy(module, empty), io.BytesIO())


def saves_itself(module: nn.Module) -> bool:
    return hasattr(module, "save_pretrained") and hasattr(type(module), "from_pretrained")


def class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}:{type(module).__qualname__}"


def import_class(path: str, file: str | None = None) -> Any:
    """``package.module:Class``, which must be an ``nn.Module`` that loads itself."""
    from plait.importing import stored_object

    return stored_object(path, file, _loads_itself, "a module class with from_pretrained")


def _loads_itself(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "from_pretrained")


class Portable(nn.Module):
    """A module whose class cannot save itself, with ``save_pretrained`` and ``from_pretrained``; called like it."""

    stores_parts: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def save_pretrained(self, folder: str | Path) -> None:
        save_module(self.model, Path(folder) / "model")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        return cls(load_module(Path(folder) / "model"))


def _loaded(folder: Path, facts: Mapping[str, Any]) -> nn.Module:
    if facts["class"] is None:
        return _read_whole(folder / WHOLE)
    cls = import_class(facts["class"], facts.get("file"))
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        module = cls.from_pretrained(folder)  # draws first weights; PyTorchModelHubMixin prints where it loads from
    for name, value in _tensors(module).items():
        if (dtype := facts.get("dtypes", {}).get(name)) is not None:
            value.data = value.data.to(getattr(torch, dtype))
    return module


def _is_back(folder: Path, facts: Mapping[str, Any], module: nn.Module) -> bool:
    """Whether the class's own files give the same tensors, as many of them tied."""
    try:
        again = _tensors(_loaded(folder, facts))
    except Exception:  # whatever a class raises that cannot build what it has saved
        return False
    here = _tensors(module)
    return (
        again.keys() == here.keys()
        and all(torch.equal(again[name], value.detach().cpu()) for name, value in here.items())
        and tied_names(again) == tied_names(here)
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _write_whole(module: nn.Module, file: Path | io.BytesIO) -> None:
    try:
        torch.save(module, file)
        if isinstance(file, io.BytesIO):
            file.seek(0)
        _allowed(file)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{type(module).__name__} cannot be stored ({error}); define it at the top of an importable module, "
            "or derive it from huggingface_hub.PyTorchModelHubMixin"
        ) from error


def _read_whole(file: Path) -> nn.Module:
    with torch.serialization.safe_globals(_allowed(file)):
        return torch.load(file, map_location="cpu", weights_only=True)


def _allowed(file: Path | io.BytesIO) -> list[Any]:
    """What a file of modules names, all of it harmless to build."""
    found = []
    for path in torch.serialization.get_unsafe_globals_in_checkpoint(file):
        value = _named(path)
        is_class = isinstance(value, type) and (issubclass(value, (nn.Module, enum.Enum)) or _is_configuration(value))
        is_function = path.startswith(("torch.nn.functional.", "torch._C._nn."))
        if not (is_class or is_function or value is functools.partial or value is set):
            raise TypeError(f"it holds {path}, which is neither a module nor an enumeration nor a configuration")
        found.append(value)
    return found


def _is_configuration(cls: type) -> bool:
    """Whether these are the values that a model of transformers was built by; some of their heads hold them."""
    return cls.__module__.startswith("transformers.models.") and any(
        base.__module__ == "transformers.configuration_utils" for base in cls.__mro__
    )


def _named(path: str) -> Any:
    """The object at ``package.module.Outer.Inner``."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            module = sys.modules.get(name) or import_module(name)
            return functools.reduce(getattr, parts[end:], module)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise TypeError(f"{path} cannot be imported")
