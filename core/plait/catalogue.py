"""What there is: methods that installed packages offer, and the catalogue of known packages. Nothing is imported."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from plait.errors import PlaitError


@attrs.frozen
class Offer:
    """A method that an installed package offers under a name; nothing is imported yet."""

    hook: str
    name: str
    target: str
    package: str
    version: str


@functools.cache
def _all_entry_points() -> Any:
    return importlib.metadata.entry_points()  # reads a file of every installed distribution


@functools.cache
def entry_points(group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    """The entry points of a group, by name."""
    from stevedore.named import NamedExtensionManager

    # No names: stevedore lists the group from its cache and loads nothing.
    listed = NamedExtensionManager(group, names=[]).list_entry_points()
    if not listed:
        return ()
    # stevedore's cache drops the distribution that an entry point belongs to.
    owned = _all_entry_points().select(group=group)
    return tuple(sorted(set(owned), key=lambda ep: (ep.name, ep.dist.name if ep.dist else "")))


@functools.cache
def offers(hook: str) -> tuple[Offer, ...]:
    """All methods that installed packages offer for a hook, by name; imports none of them."""
    found = {}
    for ep in entry_points(f"plait.{hook}"):
        package, version = (ep.dist.name, ep.dist.version) if ep.dist else ("unknown", "0")
        found[ep.name, package] = Offer(hook, ep.name, ep.value, package, version)
    return tuple(found.values())


@functools.cache
def catalogue() -> Mapping[str, Any]:
    """The registry of known packages: distribution name → hooks, methods, paper, status."""
    import yaml

    shipped = Path(__file__).with_name("registry.yaml")
    path = shipped if shipped.exists() else Path(__file__).parents[2] / "registry.yaml"
    packages: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["packages"]
    return packages


def package_of(hook: str, name: str) -> tuple[str, Mapping[str, Any]] | None:
    """The package in the catalogue that has this method, installed or not."""
    for package, entry in catalogue().items():
        if name in entry.get("methods", {}).get(hook, ()):
            return package, entry
    return None


def load_entry_point(target: str, what: str) -> Any:
    """The object at ``module:attribute``.

    Raises:
        PlaitError: it cannot be imported; the message begins with ``what``.
    """
    module_name, _, attribute = target.partition(":")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module_name))
    except (Exception, SystemExit) as error:
        raise PlaitError(f"{what} cannot be imported: {type(error).__name__}: {error}; see plait doctor") from error
