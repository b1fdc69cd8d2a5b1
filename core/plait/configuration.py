"""From a mapping (YAML or Python) to a method's instance, and back; every problem at once."""

from __future__ import annotations

import functools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import attrs
import cattrs

from plait.errors import ConfigurationError, PlaitError, Problem, nearest
from plait.fields import CODE, DOC, HOOK, MANY, OUTPUT, PATH_OR_NAME, allowed_by
from plait.hookspecs import implemented_hooks
from plait.methods import Method, find

FRACTION = re.compile(r"\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*/\s*([\d.]+(?:[eE][+-]?\d+)?)\s*")


def number(value: Any) -> float:
    """A finite float from a number or a fraction such as ``"8/255"``."""
    if isinstance(value, str) and (match := FRACTION.fullmatch(value)):
        try:
            value = float(match[1]) / float(match[2])
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError("a number") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise ValueError("a finite number")
    return float(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _whole(value: Any, _: Any = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number")
    return value


def _exactly(kind: type, name: str) -> Callable[[Any, Any], Any]:
    def check(value: Any, _: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError(name)
        return value

    return check


def _path(value: Any, folder: Path | None) -> Path:
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise ValueError("a path")
    path = Path(os.path.expanduser(value))
    # Without a folder the path stays as it was written, relative to the current one.
    return path if folder is None else folder / path


def _union(value: Any, kind: Any, strict: cattrs.Converter) -> Any:
    for member in typing.get_args(kind):
        try:
            return strict.structure(value, member)
        except Exception:
            continue
    raise ValueError(type_name(kind))


def _literal(value: Any, kind: Any) -> Any:
    for choice in typing.get_args(kind):
        if value == choice and type(value) is type(choice):
            return value
    raise ValueError(type_name(kind))


def _sequence(value: Any, kind: Any, strict: cattrs.Converter) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError(type_name(kind))
    members = typing.get_args(kind)
    origin = typing.get_origin(kind) or kind
    make = list if origin is list else tuple
    if not members:
        return make(value)
    if origin is tuple and members[-1] is not Ellipsis:
        if len(members) != len(value):
            raise ValueError(type_name(kind))
        return tuple(strict.structure(item, member) for item, member in zip(value, members, strict=True))
    return make(strict.structure(item, members[0]) for item in value)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType)


def _is_literal(kind: Any) -> bool:
    origin: Any = typing.get_origin(kind)
    return bool(origin is Literal)


def _is_sequence(kind: Any) -> bool:
    origin: Any = typing.get_origin(kind) or kind
    return origin in (tuple, list, Sequence)


@functools.cache
def converter(folder: Path | None = None) -> cattrs.Converter:
    """The strict converter: nothing is guessed, a string is never a number; paths are relative to ``folder``."""
    strict = cattrs.Converter(detailed_validation=False)
    strict.register_structure_hook(int, _whole)
    strict.register_structure_hook(float, lambda value, _: number(value))
    strict.register_structure_hook(bool, _exactly(bool, "true or false"))
    strict.register_structure_hook(str, _exactly(str, "a text"))
    strict.register_structure_hook(type(None), _exactly(type(None), "null"))
    strict.register_structure_hook(Path, lambda value, _: _path(value, folder))
    strict.register_structure_hook_func(_is_union, lambda value, kind: _union(value, kind, strict))
    strict.register_structure_hook_func(_is_literal, _literal)
    strict.register_structure_hook_func(_is_sequence, lambda value, kind: _sequence(value, kind, strict))
    return strict


def type_name(kind: Any) -> str:
    """What a user may write for a type: ``a whole number or null``."""
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
        type(None): "null",
        Any: "anything",
    }
    if isinstance(kind, Hashable) and kind in names:
        return names[kind]
    if _is_union(kind):
        return " or ".join(type_name(member) for member in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if _is_sequence(kind):
        members = [m for m in typing.get_args(kind) if m is not Ellipsis]
        return "a list of " + type_name(members[0]).removeprefix("a ") if members else "a list"
    if (typing.get_origin(kind) or kind) in (dict, Mapping) or "Mapping" in str(kind):
        return "a mapping"
    return getattr(kind, "__name__", str(kind))


def fields_of(cls: type[Any]) -> dict[str, attrs.Attribute[Any]]:
    """The hyperparameters of a method's class by name, types resolved."""
    attrs.resolve_types(cls)
    return {field.alias: field for field in attrs.fields(cls) if field.init}


def configure(method: Method, values: Mapping[str, Any], folder: Path | None = None) -> Any:
    """Build the instance of a method.

    Args:
        method: from :func:`plait.methods.find`.
        values: field → value, as read from YAML; an instance is taken for a field that is a method.
        folder: what import paths of nested methods are relative to.

    Raises:
        ConfigurationError: all wrong fields at once, each with field, value and what is allowed.
    """
    fields = fields_of(method.cls)
    problems: list[Problem] = []
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        field = fields.get(name)
        if field is None:
            valid = ", ".join(fields) or "none"
            renamed = getattr(method.cls, "renamed_fields", {}).get(name)
            if renamed in fields:
                problems.append(((name,), f"{method.name} has no field {name!r} any more (did you mean {renamed!r}?)"))
                continue
            problems.append(
                ((name,), f"{method.name} has no field {name!r}{nearest(name, fields) or f'; its fields are {valid}'}")
            )
            continue
        try:
            arguments[name] = _structure_field(field, value, folder)
        except ConfigurationError as error:
            problems += [
                ((name, *path), sentence if sentence.startswith(f"{name} is ") else f"{name}: {sentence}")
                for path, sentence in error.problems
            ]
        except PlaitError as error:
            problems.append(((name,), f"{name}: {error}"))
        except Exception:
            problems.append(((name,), f"{name} is {value!r}; allowed is {type_name(field.type)}{_allowed(field)}"))
    missing = [name for name, field in fields.items() if field.default is attrs.NOTHING and name not in values]
    problems += [((), f"{method.name} needs field {name!r} ({type_name(fields[name].type)})") for name in missing]
    for name in list(arguments):
        if problem := _range_problem(method.cls, fields[name], arguments[name]):
            problems.append(((name,), problem))
    if problems:
        raise ConfigurationError(problems)
    try:
        return method.cls(**arguments)
    except PlaitError as error:
        raise ConfigurationError(str(error)) from error
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{method.name}: {error}") from error


def _range_problem(cls: type[Any], field: attrs.Attribute[Any], value: Any) -> str | None:
    if field.validator is None or field.converter is not None:
        return None
    try:
        field.validator(object.__new__(cls), field, value)
    except (PlaitError, ValueError, TypeError) as error:
        return str(error.args[0] if error.args else error)
    except AttributeError:
        return None  # it compares fields with each other: the constructor tells
    return None


def _allowed(field: attrs.Attribute[Any]) -> str:
    allowed = allowed_by(field.validator)
    listed = "one of " in type_name(field.type)  # the type names the choices already
    return f", {allowed}" if allowed and not listed else ""


def _structure_field(field: attrs.Attribute[Any], value: Any, folder: Path | None) -> Any:
    hook = field.metadata.get(HOOK)
    if hook is None:
        if field.type is None:
            return value
        return _local(field, converter(folder).structure(value, field.type), folder)
    if not field.metadata.get(MANY):
        return _nested(hook, value, folder)
    if not isinstance(value, (list, tuple)):
        raise PlaitError(f"it is {value!r}; allowed is a list of methods of hook {hook}")
    made, problems = [], []
    for index, item in enumerate(value):
        try:
            made.append(_nested(hook, item, folder))
        except ConfigurationError as error:
            problems += [((index, *path), sentence) for path, sentence in error.problems]
        except PlaitError as error:
            problems.append(((index,), str(error)))
    if problems:
        raise ConfigurationError(problems)
    return tuple(made)


def _local(field: attrs.Attribute[Any], value: Any, folder: Path | None) -> Any:
    """What a field names on this machine: inputs are there, and are found wherever the pipeline is run from.

    Raises:
        ConfigurationError: there is no such file or folder.
    """
    if isinstance(value, (tuple, list)):
        return type(value)(_local(field, item, folder) for item in value)
    if isinstance(value, Path) and OUTPUT not in field.metadata and not _exists(value):
        raise ConfigurationError(f"{field.alias} is {str(value)!r}, and there is no such file or folder")
    if isinstance(value, str) and PATH_OR_NAME in field.metadata:
        path = _path(value, folder)
        if _exists(path):
            return str(path)
        if value.startswith(("./", "../", "/", "~")):
            raise ConfigurationError(f"{field.alias} is {value!r}, and there is no file or folder {path}")
    if isinstance(value, str) and CODE in field.metadata:
        module, colon, name = value.rpartition(":")
        if colon and module.endswith(".py"):
            path = _path(module, folder)
            if not _exists(path):
                raise ConfigurationError(f"{field.alias} is {value!r}, and there is no file {path}")
            return f"{path}:{name}"
    return value


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # unlike Path's, it bears names of any length


def _nested(hook: str, value: Any, folder: Path | None) -> Any:
    if value is None or hook in implemented_hooks(type(value)):
        return value
    if isinstance(value, str):
        return configure(find(hook, value, folder), {}, folder)
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, values),) = value.items()
        if isinstance(name, str) and (values is None or isinstance(values, Mapping)):
            try:
                return configure(find(hook, name, folder), values or {}, folder)
            except ConfigurationError as error:
                raise ConfigurationError([((name, *path), sentence) for path, sentence in error.problems]) from error
    raise PlaitError(f"it is {value!r}; allowed is a method of hook {hook}: a name, or {{name: {{field: value}}}}")


def plain(value: Any) -> Any:
    """A configured value as JSON-like data (for keys, logs and reports); methods become ``{class: {fields}}``."""
    if attrs.has(type(value)):
        fields = {field.alias: plain(getattr(value, field.name)) for field in attrs.fields(type(value)) if field.init}
        return {type(value).__qualname__: fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def plain_fields(instance: Any) -> dict[str, Any]:
    """The fields of a method's instance as JSON-like data."""
    (fields,) = plain(instance).values()
    return dict(fields)


def yaml_text(value: Any) -> str:
    """A plain value as a pipeline file has it, on one line: ``null``, ``true``, ``[1, 2]``."""
    import yaml

    text: str = yaml.safe_dump(
        plain(value), default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def example_step(method: Method) -> str:
    """A step with a method, ready to be pasted into a pipeline: required fields have placeholders in capitals."""
    name = method.name.rpartition("/")[2].rpartition(":")[2]
    parts = [f"{method.hook.replace('_', '-')}: {yaml_text(method.name)}"]
    inputs = [f"{argument}: {argument.upper()}" for argument, required in method.arguments.items() if required]
    parts += [f"from: {{{', '.join(inputs)}}}"] if inputs else []
    required = [name for name, field in fields_of(method.cls).items() if field.default is attrs.NOTHING]
    parts += [f"with: {{{', '.join(f'{name}: {name.upper()}' for name in required)}}}"] if required else []
    return f"{re.sub('[^A-Za-z0-9_-]', '-', name)}: {{{', '.join(parts)}}}"


def describe(field: attrs.Attribute[Any]) -> dict[str, str]:
    """Name, type, default, range and meaning of a field, for people."""
    hook = field.metadata.get(HOOK)
    kind = type_name(field.type)
    if hook:
        kind = f"{'a list of methods' if field.metadata.get(MANY) else 'a method'} of hook {hook}"
    default: Any = field.default
    if default is attrs.NOTHING:
        shown = "required"
    elif isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        shown = "computed" if default.takes_self else yaml_text(default.factory())
    else:
        shown = yaml_text(default)
    return {
        "name": field.alias,
        "type": kind,
        "default": shown,
        "allowed": allowed_by(field.validator),
        "doc": field.metadata.get(DOC, ""),
    }
