"""How the fields of a method are declared.

::

    bin_width: int = field(32, "width of a bin, in 8-bit levels", in_range(1, 256))
    rounding: Literal["nearest", "none"] = field("nearest", "how pixels become 8-bit levels")
    list_file: Path = field(REQUIRED, "a CSV file with a column image")

The annotation says what a user may write; of a ``Literal`` exactly its choices are allowed, in YAML and in Python.
A field of type ``Path`` names an input: it is relative to the pipeline file, must exist, and what lies there counts
towards the key of the step.
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Callable, Collection, Hashable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import attrs

from plait.errors import ConfigurationError
from plait.importing import is_of_python

DOC = "plait_doc"
HOOK = "plait_hook"
MANY = "plait_many"
OUTPUT = "plait_output"
PATH_OR_NAME = "plait_path_or_name"
CODE = "plait_code"
REQUIRED = attrs.NOTHING

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def field(
    default: Any, text: str, validator: Validator | None = None, *, metadata: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """A hyperparameter.

    Args:
        default: its value where none is given, an ``attrs.Factory``, or ``REQUIRED``.
        text: what it means, with its unit; shown by ``plait show`` and in editors.
        validator: e.g. :func:`in_range`.
        metadata: more of attrs' metadata.
    """
    validators = [_is_a_choice, *([validator] if validator else [])]
    return attrs.field(
        default=default, validator=validators if validator else _is_a_choice, metadata={DOC: text, **metadata}
    )


def path_or_name_field(default: Any, text: str) -> Any:
    """A text that is a local file or folder where one exists (relative to the pipeline file), else a name, as of a hub.

    What lies at a local path counts towards the key of the step.
    """
    return field(default, text, metadata={PATH_OR_NAME: True})


def code_field(default: Any, text: str, *, words: Collection[str] = ()) -> Any:
    """A text that names the user's own code, ``./file.py:name`` (relative to the pipeline file) or ``package.module:name``.

    The file and the local modules that it imports count towards the key of the step. The method gets the object from
    :func:`plait.importing.named_object`, which sees to it that it is of the kind that is wanted.

    Args:
        words: texts that are no import path and that are allowed too.
    """
    return field(default, text, _names_code(tuple(words)), metadata={CODE: True})


def _names_code(words: tuple[str, ...]) -> Validator:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is None or value in words or not isinstance(value, str):
            return
        place, _, name = value.rpartition(":")
        if not place or not name:
            also = f"{', '.join(words)}, or " if words else ""
            raise ConfigurationError(
                f"{attribute.name} is {value!r}; allowed is {also}package.module:name or ./file.py:name"
            )
        if is_of_python(value):
            raise ConfigurationError(
                f"{attribute.name} is {value!r}, which is of Python's own library; name your own code"
            )

    return check


def output_field(default: Any, text: str) -> Any:
    """A file or folder that the method writes beside its result. It is not an input; where it is gone, the step runs again."""
    return field(default, text, metadata={OUTPUT: True})


def doc(text: str) -> dict[str, str]:
    """Metadata with the meaning of a field, for fields that are declared with ``attrs.field``."""
    return {DOC: text}


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
            ok = isinstance(number, (int, float)) and not isinstance(number, bool) and _is_finite(number)
            ok = ok and (low is None or number > low or (number == low and not low_open))
            ok = ok and (high is None or number < high or (number == high and not high_open))
            if not ok:
                raise ConfigurationError(f"{attribute.name} is {value!r}; allowed is {allowed}")

    left = "(" if low_open or low is None else "["
    right = ")" if high_open or high is None else "]"
    allowed = f"{left}{'-inf' if low is None else low}, {'inf' if high is None else high}{right}"
    check.allowed = allowed  # type: ignore[attr-defined]
    check.bounds = (low, high, low_open, high_open)  # type: ignore[attr-defined]
    return check


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond float range
        return False


def one_of(*choices: Any) -> Validator:
    """Allow only the listed values, where the annotation cannot say so: choices that are computed or that are numbers.

    A field of type ``Literal`` needs no validator.
    """

    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value not in choices:
            raise ConfigurationError(f"{attribute.name} is {value!r}; allowed is {allowed}")

    allowed = ", ".join(map(repr, choices))
    check.allowed = f"one of {allowed}"  # type: ignore[attr-defined]
    return check


def allowed_by(validator: Any) -> str:
    """What a field's validator allows, for people; empty where it does not say."""
    for one in getattr(validator, "_validators", (validator,)):
        if text := getattr(one, "allowed", ""):
            return str(text)
    return ""


def bounds_of(validator: Any) -> tuple[float | None, float | None, bool, bool] | None:
    """(low, high, low_open, high_open) of a field with :func:`in_range`."""
    for one in getattr(validator, "_validators", (validator,)):
        if bounds := getattr(one, "bounds", None):
            return bounds  # type: ignore[no-any-return]
    return None


def _is_a_choice(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    choices, is_many = _choices_of_class(typing.cast(Hashable, type(instance))).get(attribute.name, (None, False))
    if choices is None:
        return
    for one in value if is_many and isinstance(value, (list, tuple)) else [value]:
        if not any(one == choice and type(one) is type(choice) for choice in choices):
            raise ConfigurationError(f"{attribute.name} is {one!r}; allowed is one of {', '.join(map(str, choices))}")


@functools.cache
def _choices_of_class(cls: Hashable) -> dict[str, tuple[tuple[Any, ...], bool]]:
    """Field → its choices, and whether it is a list of them; only for fields that are nothing but choices."""
    try:
        attrs.resolve_types(cls)  # type: ignore[type-var]
    except NameError:  # a class inside a function, whose annotations cannot be resolved
        return {}
    found = {}
    for one in attrs.fields(cls):  # type: ignore[arg-type]
        members = typing.get_args(one.type) or ()
        if _is_literal(one.type):
            found[one.name] = (members, False)
        elif members and all(_is_literal(m) or m is type(None) for m in members) and not _is_sequence(one.type):
            choices = tuple(c for m in members for c in (typing.get_args(m) if _is_literal(m) else (None,)))
            found[one.name] = (choices, False)
        elif _is_sequence(one.type) and all(_is_literal(m) for m in members if m is not Ellipsis) and members:
            found[one.name] = (typing.get_args(members[0]), True)
    return found


def _is_literal(kind: Any) -> bool:
    return typing.get_origin(kind) is Literal


def _is_sequence(kind: Any) -> bool:
    return typing.get_origin(kind) in (tuple, list)


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
                raise ConfigurationError(
                    f"{attribute.name} is {method!r}, which has no hook {hook}; name a method of that hook"
                )

    return check
