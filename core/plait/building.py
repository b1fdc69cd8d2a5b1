"""How a module is built again: by a class or function that can be imported, with plain arguments.

A model that saves itself (``save_pretrained``) needs none of this. Any other ``torch.nn.Module`` can be stored when it is
known what built it: :func:`build_module` notes it, and a class whose arguments are its attributes of the same names
(``self.width = width``) or have defaults says it by itself.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from plait.importing import FILE_ATTRIBUTE, makes, named_object, stored_object
from plait.optional import require

NOTE = "_plait_recipe"
WANTED = "a class of modules, or a function that says it returns one (def build() -> torch.nn.Module)"


@attrs.frozen
class Recipe:
    """A class or function by ``package.module:name``, the user's file it lies in if it does, and its arguments."""

    builder: str
    file: str | None
    arguments: Mapping[str, Any]

    def build(self) -> Any:
        """A module of fresh weights; the global random state stays as it is.

        Raises:
            ValueError: the builder cannot be found again, or is not one.
            Exception: whatever it raises.
        """
        torch = require("torch")
        builder = stored_object(self.builder, self.file, makes(torch.nn.Module), WANTED)
        with torch.random.fork_rng(devices=[]):
            return builder(**self.arguments)


def build_module(builder: Callable[..., Any], **arguments: Any) -> Any:
    """Build a module, and note how, so that it can be stored as the result of a step.

    ::

        net = plait.build_module(torchvision.models.resnet18, num_classes=10)

    The note stays with copies of the module. Weights are stored besides: leave out arguments that load some.

    Args:
        builder: a class of ``torch.nn.Module``, or a function that returns one and says so in its annotation.
        arguments: plain values (numbers, text, lists, mappings).

    Raises:
        ValueError: the builder cannot be imported by its name, or an argument is not plain.
    """
    recipe = _recipe(builder, arguments)
    makes_module = makes(require("torch").nn.Module)
    place = f"{recipe.file or recipe.builder.rpartition(':')[0]}:{recipe.builder.rpartition(':')[2]}"
    if named_object(place, makes_module, WANTED) is not builder:
        raise ValueError(
            f"{place} leads to something else than the builder; give the function itself, not a wrapper of it"
        )
    module = builder(**arguments)
    setattr(module, NOTE, attrs.asdict(recipe))
    return module


def recipe_of(module: Any) -> Recipe | None:
    """How a module is built again: by its note, or by its class where arguments can be seen; ``None``: not known."""
    if (note := vars(module).get(NOTE)) is not None:
        return Recipe(**note)
    found: dict[str, Any] = {}
    for parameter in inspect.signature(type(module)).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            return None
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        value = vars(module).get(parameter.name, inspect.Parameter.empty)
        if value is not inspect.Parameter.empty and _is_plain(value):
            found[parameter.name] = value
        elif parameter.default is parameter.empty:
            return None
    return _recipe(type(module), found)


def _recipe(builder: Callable[..., Any], arguments: Mapping[str, Any]) -> Recipe:
    for name, value in arguments.items():
        if not _is_plain(value):
            raise ValueError(
                f"argument {name!r} is a {type(value).__name__}; only plain values can be stored: write a function that takes"
                " those and builds the module"
            )
    module = builder.__module__
    return Recipe(
        f"{module}:{builder.__qualname__}", getattr(sys.modules.get(module), FILE_ATTRIBUTE, None), dict(arguments)
    )


def _is_plain(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
