"""Is this installation sound? What ``plait doctor`` looks at."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator
from typing import Any

import attrs
from packaging.requirements import Requirement

from plait import API, __version__
from plait.calling import WRAPPERS_GROUP
from plait.catalogue import Offer, catalogue, entry_points, load_entry_point, offers
from plait.errors import PlaitError
from plait.hookspecs import HOOKS, implemented_hooks
from plait.methods import find
from plait.store import Store


@attrs.frozen
class Finding:
    """One line: ``ok`` is ``False`` where something is wrong."""

    ok: bool
    text: str


def examine(store: Store) -> Iterator[Finding]:
    """Look at versions, every entry point, names, torch and the store."""
    yield Finding(True, f"plait {__version__}, API {API}, Python {platform.python_version()} at {sys.prefix}")
    yield from _packages()
    yield from _methods()
    yield from _wrappers()
    yield from _torch()
    yield from _store(store)


def _packages() -> Iterator[Finding]:
    found = {offer.package for hook in HOOKS for offer in offers(hook)}
    for package in sorted(found):
        version = importlib.metadata.version(package)
        known = "" if package in catalogue() else ", not in the catalogue"
        yield Finding(True, f"{package} {version}{known}")
    for package in sorted(found):
        for requirement in importlib.metadata.requires(package) or []:
            problem = _unmet(requirement)
            if problem:
                yield Finding(False, f"{package} requires {requirement}, {problem}")


def _unmet(requirement: str) -> str | None:
    wanted = Requirement(requirement)
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return None
    try:
        installed = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return f"which is not installed; pip install {wanted.name}"
    if not wanted.specifier.contains(installed, prereleases=True):
        return f"but {installed} is installed; pip install '{wanted.name}{wanted.specifier}'"
    return None


def _methods() -> Iterator[Finding]:
    count = 0
    for hook in HOOKS:
        by_name: dict[str, list[Offer]] = {}
        for offer in offers(hook):
            by_name.setdefault(offer.name, []).append(offer)
            try:
                find(hook, f"{offer.package}/{offer.name}")
                count += 1
            except PlaitError as error:
                yield Finding(False, str(error).removesuffix("; see plait doctor"))
        for name, several in by_name.items():
            if len(several) > 1:
                packages = " and ".join(offer.package for offer in several)
                yield Finding(
                    False,
                    f"method {name!r} of hook {hook} is offered by {packages}; in a pipeline write package/{name}, or uninstall one",
                )
    yield Finding(True, f"{count} methods load")


def _wrappers() -> Iterator[Finding]:
    for ep in entry_points(WRAPPERS_GROUP):
        owner = ep.dist.name if ep.dist else "unknown"
        try:
            plugin: Any = load_entry_point(ep.value, f"plugin {ep.name!r} of package {owner}")
        except PlaitError as error:
            yield Finding(False, str(error).removesuffix("; see plait doctor"))
            continue
        wrapped = implemented_hooks(plugin)
        what = f"wraps {', '.join(wrapped)}" if wrapped else "listens to runs"
        yield Finding(True, f"plugin {ep.name} of {owner} {what}")


def _torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        yield Finding(True, "torch is not installed; methods that need it say so")
        return
    torch: Any = importlib.import_module("torch")
    cuda = (
        f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} devices"
        if torch.cuda.is_available()
        else "no CUDA device, the CPU is used"
    )
    yield Finding(True, f"torch {torch.__version__}, {cuda}")


def _store(store: Store) -> Iterator[Finding]:
    entries = list(store.entries())
    size = sum(entry.size for entry in entries) / 2**20
    yield Finding(True, f"store {store.root}: {len(entries)} results, {size:.1f} MiB")
    try:
        with store.lock("doctor"):
            pass
    except PlaitError as error:
        yield Finding(False, str(error))
