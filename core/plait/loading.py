"""The entrance for plain Python: a configured method by its name."""

from __future__ import annotations

from typing import Any

from plait.catalogue import offers, package_of
from plait.configuration import configure
from plait.errors import PlaitError, nearest
from plait.hookspecs import HOOKS
from plait.methods import find


def load(name: str, *, hook: str | None = None, **fields: Any) -> Any:
    """A configured method for plain Python: ``plait.load("ensir", bin_width=32)``.

    Args:
        name: the method, as in a pipeline.
        hook: needed only where methods of two hooks share the name.
        fields: its hyperparameters.

    Raises:
        PlaitError: unknown method or field, or a value outside what the field allows.
    """
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
