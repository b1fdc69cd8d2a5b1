"""Find, load, describe and configure methods.

A method is named in a pipeline by its entry-point name (``ensir``), by package and name where two
packages offer the same one (``plait-ensir/ensir``), or by import path (``./my_attack.py:MyAttack``,
``my_pkg.module:MyAttack``). Only methods that are named are ever imported.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pluggy

from plait.errors import PlaitError
from plait.hookspecs import MethodHooks
from plait.importing import import_code

HOOKS: tuple[str, ...] = tuple(name for name, value in vars(MethodHooks).items() if not name.startswith("_"))
WRAPPERS_GROUP = "plait.plugins"


def hook_arguments(hook: str) -> tuple[str, ...]:
    """The arguments of a hook besides ``run``, in the order of its specification."""
    parameters = inspect.signature(getattr(MethodHooks, hook)).parameters
    return tuple(name for name in parameters if name not in ("self", "run"))


def nearest(name: str, names: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the most similar valid name, or the empty string."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


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


def _entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
    from stevedore.named import NamedExtensionManager

    # No names: stevedore lists the group from its cache and loads nothing.
    listed = NamedExtensionManager(group, names=[]).list_entry_points()
    if not listed:
        return []
    # stevedore's cache drops the distribution that an entry point belongs to.
    owned = _all_entry_points().select(group=group)
    return sorted(set(owned), key=lambda ep: (ep.name, ep.dist.name if ep.dist else ""))


@functools.cache
def offers(hook: str) -> tuple[Offer, ...]:
    """All methods that installed packages offer for a hook, by name; imports none of them."""
    found = {}
    for ep in _entry_points(f"plait.{hook}"):
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


@attrs.frozen
class Method:
    """A method's class, checked against its hook, and where it comes from."""

    hook: str
    name: str
    cls: type[Any]
    package: str | None
    version: str

    @property
    def arguments(self) -> dict[str, bool]:
        """The hook arguments that it takes (without ``run``) → whether they are required."""
        return {name: required for name, required in _arguments(self.cls, self.hook).items() if name != "run"}


def find(hook: str, name: str, folder: Path | None = None) -> Method:
    """Load the class of a method.

    Args:
        hook: name of the hook, e.g. ``"ensemble"``.
        name: see the module's first lines.
        folder: what ``./file.py:Class`` is relative to; default the current one.

    Raises:
        PlaitError: no such method (with the nearest name, or the package to install), it cannot be
            imported, it is not an attrs class, or its hook's signature is wrong.
    """
    method = _by_path(hook, name, folder) if ":" in name else _by_name(hook, name)
    _check_class(method)
    return method


def _by_name(hook: str, name: str) -> Method:
    package, _, short = name.rpartition("/")
    known = [offer for offer in offers(hook) if offer.name == short and package in ("", offer.package)]
    if not known:
        raise PlaitError(_unknown(hook, name))
    if len(known) > 1:
        choices = " or ".join(f"{offer.package}/{short}" for offer in known)
        raise PlaitError(f"method {short!r} of hook {hook} is offered by {len(known)} packages; write {choices}")
    offer = known[0]
    cls = _import(offer.target, f"method {name!r} of package {offer.package}")
    _check_api(cls, offer)
    return Method(hook, offer.name, cls, offer.package, _installed_version(offer, cls))


def _unknown(hook: str, name: str) -> str:
    short = name.rpartition("/")[2]
    other = [h for h in HOOKS if any(offer.name == short for offer in offers(h))]
    if other:
        return f"{name!r} is no method of hook {hook}, but of {other[0]}; write {other[0].replace('_', '-')}: {short}"
    if found := package_of(hook, short):
        package, entry = found
        if entry.get("status") == "planned":
            return f"method {short!r} of hook {hook} belongs to {package}, which is planned and not released yet"
        return f"method {short!r} of hook {hook} is not installed; pip install {package}"
    names = sorted(
        {offer.name for offer in offers(hook)}
        | {n for e in catalogue().values() for n in e.get("methods", {}).get(hook, ())}
    )
    guess = nearest(short, names)
    if (
        guess
        and (hit := package_of(hook, guess.split("'")[1]))
        and not any(o.name == guess.split("'")[1] for o in offers(hook))
    ):
        guess += f" (pip install {hit[0]})"
    return f"hook {hook} has no method {name!r}{guess or '; plait list shows all'}"


def _by_path(hook: str, name: str, folder: Path | None) -> Method:
    module_name, _, class_name = name.rpartition(":")
    file = (folder or Path.cwd()) / os.path.expanduser(module_name)
    if module_name.endswith(".py") and not os.path.isfile(file):  # unlike Path's, it bears names of any length
        raise PlaitError(f"method {name!r}: there is no file {file}")
    try:
        module = import_code(module_name, folder)
    except Exception as error:
        raise PlaitError(f"method {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    source = Path(module.__file__ or "")
    cls = getattr(module, class_name, None)
    if not inspect.isclass(cls):
        classes = [
            n for n, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__
        ]
        raise PlaitError(f"method {name!r}: there is no class {class_name!r} in it{nearest(class_name, classes)}")
    return Method(hook, name, cls, None, _digest([source]) if source.is_file() else "0")


def _import(target: str, what: str) -> type[Any]:
    module_name, _, attribute = target.partition(":")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module_name))  # type: ignore[return-value]
    except Exception as error:
        raise PlaitError(f"{what} cannot be imported: {type(error).__name__}: {error}; see plait doctor") from error


def _check_api(cls: type[Any], offer: Offer) -> None:
    from plait import API

    names = cls.__module__.split(".")
    modules = [sys.modules[".".join(names[:end])] for end in range(len(names), 0, -1)]
    written_for = next((module.__plait_api__ for module in modules if hasattr(module, "__plait_api__")), None)
    if written_for is None:
        raise PlaitError(
            f"package {offer.package} does not say which plait it is for; set __plait_api__ = {API!r} in {cls.__module__}"
        )
    if written_for != API:
        raise PlaitError(
            f"package {offer.package} {offer.version} is written for plait API {written_for}, and this is plait API {API};"
            f" install a {offer.package} for this plait"
        )


def _arguments(cls: type[Any], hook: str) -> dict[str, bool]:
    parameters = list(inspect.signature(getattr(cls, hook)).parameters.values())[1:]
    return {p.name: "None" not in str(p.annotation) for p in parameters}


def implemented_hooks(cls: type[Any]) -> list[str]:
    """The hooks that a class implements; a field may have the name of a hook without being one."""
    return [hook for hook in HOOKS if hasattr(getattr(cls, hook, None), "plait_impl")]


def _check_class(method: Method) -> None:
    cls, hook, name = method.cls, method.hook, method.name
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


def hook_caller(hook: str, instance: Any) -> pluggy.HookCaller:
    """The hook with one method and every installed wrapper around it."""
    manager = pluggy.PluginManager("plait")
    manager.add_hookspecs(MethodHooks)
    for name, _, plugin in wrappers():
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
    for ep in _entry_points(WRAPPERS_GROUP):
        package, version = (ep.dist.name, ep.dist.version) if ep.dist else ("unknown", "0")
        plugin = _import(ep.value, f"plugin {ep.name!r} of package {package}")
        found.append((f"{package}/{ep.name}", version, plugin() if inspect.isclass(plugin) else plugin))
    return tuple(found)


def wrappers_of(hook: str) -> list[str]:
    """Name and version of each installed plugin that wraps a hook: part of a step's key."""
    return [f"{name} {version}" for name, version, plugin in wrappers() if hook in implemented_hooks(type(plugin))]


def _installed_version(offer: Offer, cls: type[Any]) -> str:
    """The distribution's version; for an editable install with a digest of its sources behind it."""
    file = Path(inspect.getfile(cls)).resolve()
    if "site-packages" in file.parts:
        return offer.version
    package = file.parent
    while (package.parent / "__init__.py").exists():
        package = package.parent
    return f"{offer.version}+{_digest(sorted(package.rglob('*.py')))}"


@functools.cache
def _digest_of(path: Path, mtime_ns: int) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(_digest_of(file, file.stat().st_mtime_ns))
    return digest.hexdigest()[:12]


def load(name: str, *, hook: str | None = None, **fields: Any) -> Any:
    """A configured method for plain Python: ``plait.load("ensir", bin_width=32)``.

    Args:
        name: the method, as in a pipeline.
        hook: needed only where methods of two hooks share the name.
        fields: its hyperparameters.

    Raises:
        PlaitError: unknown method or field, or a value outside what the field allows.
    """
    from plait.configuration import configure

    if hook is None:
        if ":" in name:
            hook = _only_hook_of_path(name)
        else:
            hooks = [h for h in HOOKS if any(o.name == name.rpartition("/")[2] for o in offers(h))]
            if len(hooks) > 1 and len({o.target for h in hooks for o in offers(h) if o.name == name}) > 1:
                raise PlaitError(
                    f"method {name!r} exists for hooks {', '.join(hooks)}; say which: load({name!r}, hook={hooks[0]!r})"
                )
            known = [h for h in HOOKS if package_of(h, name)]
            hook = next(iter(hooks or known), None)
            if hook is None:
                every = {o.name for h in HOOKS for o in offers(h)}
                raise PlaitError(f"there is no method {name!r}{nearest(name, every) or '; plait list shows all'}")
    return configure(find(hook, name), fields)


def _only_hook_of_path(name: str) -> str:
    for hook in HOOKS:
        try:
            find(hook, name)
        except PlaitError as error:
            if "has no hook" not in str(error):
                raise
            continue
        return hook
    raise PlaitError(f"method {name!r} implements none of the hooks {', '.join(HOOKS)}")
