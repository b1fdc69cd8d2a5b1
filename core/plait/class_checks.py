"""Whether a class is a method: an attrs class whose hooks have the arguments of their specifications."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import attrs

from plait.errors import PlaitError, nearest
from plait.hookspecs import hook_arguments, implemented_hooks


def check_class(cls: type[Any], hook: str, name: str) -> None:
    """Raise PlaitError unless ``cls`` is a method of ``hook``; ``name`` is what the user calls it."""
    if not attrs.has(cls):
        raise PlaitError(
            f"method {name!r}: {cls.__name__} is not an attrs class; decorate it with @attrs.frozen(kw_only=True)"
        )
    function = getattr(cls, hook, None)
    if not inspect.isfunction(function):
        has = implemented_hooks(cls)
        raise PlaitError(f"method {name!r}: {cls.__name__} has no hook {hook}; it has {', '.join(has) or 'none'}")
    if not hasattr(function, "plait_impl"):
        raise PlaitError(f"method {name!r}: {cls.__name__}.{hook} is not marked; put @plait.hookimpl above it")
    allowed = (*hook_arguments(hook), "run")
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        where = f"method {name!r}: {cls.__name__}.{hook} argument {parameter.name!r}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise PlaitError(f"{where} takes any number of arguments; name those of the hook: {', '.join(allowed)}")
        if parameter.default is not parameter.empty:
            raise PlaitError(
                f"{where} has a default, so pluggy would never pass it; annotate it '| None' without a default"
            )
        if parameter.name not in allowed:
            raise PlaitError(
                f"{where} is none of the hook's{nearest(parameter.name, allowed)}; they are {', '.join(allowed)}"
            )


def check_api(cls: type[Any], package: str, version: str) -> None:
    """Raise PlaitError unless the package of ``cls`` says that it is written for this plait."""
    from plait import API

    names = cls.__module__.split(".")
    modules = [sys.modules[".".join(names[:end])] for end in range(len(names), 0, -1)]
    written_for = next((module.__plait_api__ for module in modules if hasattr(module, "__plait_api__")), None)
    if written_for is None:
        raise PlaitError(
            f"package {package} does not say which plait it is for; set __plait_api__ = {API!r} in {cls.__module__}"
        )
    if written_for != API:
        raise PlaitError(
            f"package {package} {version} is written for plait API {written_for}, and this is plait API {API};"
            f" install a {package} for this plait"
        )
