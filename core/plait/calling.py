"""Calling a hook: one method, and every installed wrapper around it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pluggy

from plait.catalogue import entry_points, load_entry_point
from plait.errors import PlaitError
from plait.hookspecs import MethodHooks, implemented_hooks

WRAPPERS_GROUP = "plait.plugins"


def hook_caller(hook: str, instance: Any) -> pluggy.HookCaller:
    """The hook with one method and every installed wrapper around it."""
    manager = pluggy.PluginManager("plait")
    manager.add_hookspecs(MethodHooks)
    for name, _, plugin in wrappers():
        if hook in implemented_hooks(type(plugin)):
            manager.register(plugin, name)
    try:
        manager.register(instance)
    except pluggy.PluginValidationError as error:
        raise PlaitError(str(error).replace("\n", " ")) from error
    return getattr(manager.hook, hook)  # type: ignore[no-any-return]


@functools.cache
def wrappers() -> tuple[tuple[str, str, Any], ...]:
    """Plugins of group ``plait.plugins`` (they wrap hooks or listen to events): name, version, object."""
    found = []
    for ep in entry_points(WRAPPERS_GROUP):
        package, version = (ep.dist.name, ep.dist.version) if ep.dist else ("unknown", "0")
        plugin = load_entry_point(ep.value, f"plugin {ep.name!r} of package {package}")
        found.append((f"{package}/{ep.name}", version, plugin() if inspect.isclass(plugin) else plugin))
    return tuple(found)


def wrappers_of(hook: str) -> list[tuple[str, Any]]:
    """Name and class of each installed plugin that wraps a hook."""
    return [(name, type(plugin)) for name, _, plugin in wrappers() if hook in implemented_hooks(type(plugin))]
