"""Find the class of a method.

A method is named in a pipeline by its entry-point name (``ensir``), by package and name where two
packages offer the same one (``plait-ensir/ensir``), or by import path (``./my_attack.py:MyAttack``,
``my_pkg.module:MyAttack``). Only methods that are named are ever imported.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import attrs

from plait.catalogue import catalogue, load_entry_point, offers, package_of
from plait.class_checks import check_api, check_class
from plait.errors import PlaitError, nearest
from plait.hookspecs import HOOKS
from plait.importing import import_code, is_of_python
from plait.versions import code_of, version_of


@attrs.frozen
class Method:
    """A method's class, checked against its hook, and where it comes from."""

    hook: str
    name: str
    cls: type[Any]
    package: str | None

    @property
    def full_name(self) -> str:
        """``package/name``, or the path; leads to this method whatever else is installed."""
        return f"{self.package}/{self.name}" if self.package else self.name

    @property
    def arguments(self) -> dict[str, bool]:
        """The hook arguments that it takes (without ``run``) → whether they are required."""
        return arguments_of(self.cls, self.hook)

    @property
    def version(self) -> str:
        """Of its package, with the content of its sources; for a file named by path the content alone."""
        return version_of(self.package) if self.package else ", ".join(code_of(self.cls).values())


def arguments_of(cls: type[Any], hook: str) -> dict[str, bool]:
    """The arguments of a class's hook (without ``run``) → whether they are required."""
    parameters = list(inspect.signature(getattr(cls, hook)).parameters.values())[1:]
    return {p.name: "None" not in str(p.annotation) for p in parameters if p.name != "run"}


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
    return _by_path(hook, name, folder) if ":" in name else _by_name(hook, name)


def _by_name(hook: str, name: str) -> Method:
    package, _, short = name.rpartition("/")
    known = [offer for offer in offers(hook) if offer.name == short and package in ("", offer.package)]
    if not known:
        raise PlaitError(_unknown(hook, name))
    if len(known) > 1:
        choices = " or ".join(f"{offer.package}/{short}" for offer in known)
        raise PlaitError(f"method {short!r} of hook {hook} is offered by {len(known)} packages; write {choices}")
    offer = known[0]
    cls = load_entry_point(offer.target, f"method {name!r} of package {offer.package}")
    check_api(cls, offer.package, offer.version)
    check_class(cls, hook, offer.name)
    return Method(hook, offer.name, cls, offer.package)


def _unknown(hook: str, name: str) -> str:
    short = name.rpartition("/")[2]
    other = [h for h in HOOKS if any(offer.name == short for offer in offers(h))]
    if other:
        return f"{name!r} is not a method of hook {hook} but of {other[0]}; write {other[0].replace('_', '-')}: {short}"
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
    if is_of_python(name):
        raise PlaitError(f"method {name!r} is of Python's own library; name a class of your own")
    file = (folder or Path.cwd()) / os.path.expanduser(module_name)
    if module_name.endswith(".py") and not os.path.isfile(file):  # unlike Path's, it bears names of any length
        raise PlaitError(f"method {name!r}: there is no file {file}")
    try:
        module = import_code(module_name, folder)
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or [""]
        raise PlaitError(f"method {name!r} cannot be imported: {type(error).__name__}: {lines[0]}") from error
    cls = getattr(module, class_name, None)
    if not inspect.isclass(cls):
        classes = [
            n for n, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__
        ]
        raise PlaitError(f"method {name!r}: there is no class {class_name!r} in it{nearest(class_name, classes)}")
    check_class(cls, hook, name)
    return Method(hook, name, cls, None)
