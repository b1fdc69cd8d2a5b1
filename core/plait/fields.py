"""Validators and metadata for the fields of a method.

::

    bin_width: int = attrs.field(default=32, validator=in_range(1, 256), metadata=doc("width of a bin, in levels"))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import attrs

from plait.errors import PlaitError

DOC = "plait_doc"
HOOK = "plait_hook"
MANY = "plait_many"
OUTPUT = "plait_output"

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def doc(text: str) -> dict[str, str]:
    """Metadata with the meaning of a field (with its unit), shown by ``plait show`` and in editors."""
    return {DOC: text}


def output_path(text: str) -> dict[str, Any]:
    """Metadata of a field that names a file or folder which the method writes beside its result.

    What lies there is not an input of the step; where it is gone, the step runs again.
    """
    return {DOC: text, OUTPUT: True}


def in_range(
    low: float | None = None, high: float | None = None, *, low_open: bool = False, high_open: bool = False
) -> Validator:
    """Allow finite numbers from ``low`` to ``high`` (``None``: no bound; ``*_open``: bound excluded).

    ``None`` passes, so that optional fields may use it; numbers inside lists and tuples are each checked.
    """

    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if number is None:
                continue
            ok = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
            ok = ok and (low is None or number > low or (number == low and not low_open))
            ok = ok and (high is None or number < high or (number == high and not high_open))
            if not ok:
                raise PlaitError(f"{attribute.name} is {value!r}; allowed is {allowed}")

    left = "(" if low_open or low is None else "["
    right = ")" if high_open or high is None else "]"
    allowed = f"{left}{'-inf' if low is None else low}, {'inf' if high is None else high}{right}"
    check.allowed = allowed  # type: ignore[attr-defined]
    check.bounds = (low, high, low_open, high_open)  # type: ignore[attr-defined]
    return check


def one_of(*choices: Any) -> Validator:
    """Allow only the listed values (``None`` is allowed where it is listed)."""

    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value not in choices:
            raise PlaitError(f"{attribute.name} is {value!r}; allowed is {allowed}")

    allowed = ", ".join(map(repr, choices))
    check.allowed = f"one of {allowed}"  # type: ignore[attr-defined]
    check.choices = list(choices)  # type: ignore[attr-defined]
    return check


def method_field(hook: str, text: str, default: Any = attrs.NOTHING) -> Any:
    """A field that is itself a method of ``hook``: ``extractor: {gdf: {timestep: 50}}``, ``extractor: gdf``.

    In Python it is given an instance. It is checked, keyed and described like a step's own method.
    """
    return attrs.field(default=default, metadata={DOC: text, HOOK: hook}, validator=_implements(hook))


def method_list_field(hook: str, text: str, default: Any = attrs.NOTHING) -> Any:
    """A field that is a list of methods of ``hook``, each written as in :func:`method_field`."""
    return attrs.field(default=default, metadata={DOC: text, HOOK: hook, MANY: True}, validator=_implements(hook))


def _implements(hook: str) -> Validator:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        methods: Collection[Any] = value if isinstance(value, (list, tuple)) else [value]
        for method in methods:
            if method is not None and not hasattr(getattr(type(method), hook, None), "plait_impl"):
                raise PlaitError(
                    f"{attribute.name} is {method!r}, which has no hook {hook}; name a method of that hook"
                )

    return check
