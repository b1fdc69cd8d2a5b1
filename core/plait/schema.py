"""The JSON Schema of pipeline files, for editors: it knows the installed methods and their fields.

It is flat where it can be, so that an editor's message names the key or field that is wrong, and what several methods
share stands once.
"""

from __future__ import annotations

import json
import types
import typing
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

import attrs

from plait.catalogue import offers
from plait.configuration import fields_of, plain
from plait.errors import PlaitError
from plait.fields import DOC, HOOK, MANY, bounds_of
from plait.hookspecs import HOOKS, hook_arguments
from plait.methods import find
from plait.pipeline import FORMAT, NAME

REFERENCE = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"$ref": "#/$defs/reference"}, "minItems": 1},
        {"type": "object", "additionalProperties": {"$ref": "#/$defs/reference"}},
    ]
}
INTERPOLATED = r"\$\{.*\}"
FRACTION = "/"
SHORT = 60  # characters: what is shorter is repeated rather than shared
SEED = {"type": ["integer", "string"], "minimum": 0, "pattern": INTERPOLATED}
RESOURCES = {
    "type": "object",
    "properties": {
        "gpu": {"type": ["integer", "string"], "minimum": 0, "pattern": INTERPOLATED},
        "cpu": {"type": ["number", "string"], "minimum": 0, "pattern": INTERPOLATED},
        "memory": {"type": ["integer", "string"]},
    },
    "additionalProperties": False,
}


def pipeline_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12). Methods whose package does not load are left open."""
    methods = {hook: _methods(hook) for hook in HOOKS}
    shared = _Shared(
        [field for fields in methods.values() for one in fields.values() for field in one["properties"].values()]
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "plait pipeline",
        "type": "object",
        "required": ["plait", "steps"],
        "additionalProperties": False,
        "properties": {
            "plait": {"const": FORMAT, "description": "format of the file"},
            "name": {"type": "string", "pattern": f"^{NAME.pattern}$"},
            "description": {"type": "string"},
            "seed": SEED,
            "matrix": {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}},
            "steps": {
                "type": "object",
                "minProperties": 1,
                "patternProperties": {f"^{NAME.pattern}$": {"$ref": "#/$defs/step"}},
                "additionalProperties": False,
            },
        },
        "$defs": {
            "reference": REFERENCE,
            "resources": RESOURCES,
            "step": _step(methods, shared),
            **shared.definitions,
        },
    }


def _methods(hook: str) -> dict[str, dict[str, Any]]:
    """Method of a hook → the schema of its fields."""
    found = {}
    for name in sorted({offer.name for offer in offers(hook)}):
        try:
            fields = fields_of(find(hook, name).cls)
        except PlaitError:
            continue
        required = [field for field, attribute in fields.items() if attribute.default is attrs.NOTHING]
        described = {field: _field(attribute) for field, attribute in fields.items()}
        found[name] = {"properties": described, "additionalProperties": False, "required": required}
    return found


class _Shared:
    """Parts that occur several times, as definitions."""

    def __init__(self, parts: list[dict[str, Any]]) -> None:
        counts = Counter(map(_text, parts))
        texts = [text for text, count in counts.items() if count > 1 and len(text) > SHORT]
        self._names = {text: f"field-{number}" for number, text in enumerate(texts)}
        self.definitions: dict[str, Any] = {name: json.loads(text) for text, name in self._names.items()}

    def field(self, part: dict[str, Any]) -> dict[str, Any]:
        """The part, or a reference to it."""
        name = self._names.get(_text(part))
        return {"$ref": f"#/$defs/{name}"} if name else part

    def fields(self, hook: str, method: str, schema: dict[str, Any]) -> dict[str, Any]:
        """A reference to the fields of a method, which it may have under several hooks."""
        whole = {**schema, "properties": {name: self.field(part) for name, part in schema["properties"].items()}}
        name = method if self.definitions.get(method, whole) == whole else f"{hook}.{method}"
        self.definitions[name] = whole
        return {"$ref": f"#/$defs/{name}"}


def _text(part: Any) -> str:
    return json.dumps(part, sort_keys=True)


def _step(methods: Mapping[str, Mapping[str, dict[str, Any]]], shared: _Shared) -> dict[str, Any]:
    keys = {hook: hook.replace("_", "-") for hook in HOOKS}
    properties: dict[str, Any] = {}
    rules = []
    for hook, key in keys.items():
        names = sorted({offer.name for offer in offers(hook)})
        named = {"anyOf": [{"enum": names}, {"type": "string", "pattern": rf"[:/]|{INTERPOLATED}"}]}
        properties[key] = named if names else {"type": "string"}
        arguments = {argument: {"$ref": "#/$defs/reference"} for argument in hook_arguments(hook)}
        taken = {"properties": arguments, "additionalProperties": False}
        rules.append({"if": {"required": [key]}, "then": {"properties": {"from": taken}}})
        for method, schema in methods[hook].items():
            then: dict[str, Any] = {"properties": {"with": shared.fields(hook, method, schema)}}
            if schema["required"]:
                then["required"] = ["with"]
            rules.append({"if": {"properties": {key: {"const": method}}, "required": [key]}, "then": then})
    properties |= {
        "each": {"type": ["object", "string"], "minProperties": 1, "pattern": INTERPOLATED},
        "from": {"type": ["object", "string"], "pattern": INTERPOLATED},
        "with": {"type": ["object", "string"], "pattern": INTERPOLATED},
        "seed": SEED,
        "resources": {"$ref": "#/$defs/resources"},
        "keep": {"type": ["boolean", "string"], "pattern": INTERPOLATED},
    }
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "oneOf": [{"required": [key]} for key in keys.values()],
        "allOf": rules,
    }


def _field(field: attrs.Attribute[Any]) -> dict[str, Any]:
    described = _interpolated(_method(field.metadata) if HOOK in field.metadata else _type(field.type))
    if text := field.metadata.get(DOC):
        described["description"] = text
    if field.default is not attrs.NOTHING and not isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]
        described["default"] = plain(field.default)
    low, high, low_open, high_open = bounds_of(field.validator) or (None, None, False, False)
    for value, is_open, name in ((low, low_open, "inimum"), (high, high_open, "aximum")):
        if value is not None:
            letter = "m" if not is_open else "M"
            described[("exclusive" if is_open else "") + letter + name] = value
    return described


def _interpolated(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, or a text such as ``${matrix.rate}``."""
    if "anyOf" in schema or "enum" in schema:
        return {"anyOf": [*schema.get("anyOf", [schema]), {"type": "string", "pattern": INTERPOLATED}]}
    if "type" not in schema:
        return schema
    kinds = _kinds(schema)
    if "string" in kinds and "pattern" not in schema:
        return schema
    patterns = [*([schema["pattern"]] if "pattern" in schema else []), INTERPOLATED]
    return {**schema, "type": list(dict.fromkeys([*kinds, "string"])), "pattern": "|".join(patterns)}


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    kind = schema["type"]
    return [kind] if isinstance(kind, str) else list(kind)


def _method(metadata: Any) -> dict[str, Any]:
    one = {"type": ["string", "object", "null"], "minProperties": 1, "maxProperties": 1}
    return {"type": "array", "items": one} if metadata.get(MANY) else one


def _type(kind: Any) -> dict[str, Any]:
    simple = {int: "integer", bool: "boolean", str: "string", Path: "string", type(None): "null"}
    if kind in simple:
        return {"type": simple[kind]}
    if kind is float:
        return {"type": ["number", "string"], "pattern": FRACTION}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _union([_type(member) for member in arguments])
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (tuple, list):
        members = [member for member in arguments if member is not Ellipsis]
        return (
            {"type": "array", "items": _union([_type(member) for member in members])} if members else {"type": "array"}
        )
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(arguments[1])}
    return {}


def _union(members: list[dict[str, Any]]) -> dict[str, Any]:
    """One of several, flat where no two of them say more than their type."""
    if not all("type" in member for member in members):
        return members[0] if len(members) == 1 else {"anyOf": members} if all(members) else {}
    more = [member for member in members if set(member) - {"type", "pattern"}]
    if len({_text(member) for member in more}) > 1:
        return {"anyOf": members}
    merged: dict[str, Any] = dict(more[0]) if more else {}
    merged["type"] = list(dict.fromkeys(kind for member in members for kind in _kinds(member)))
    texts = [member for member in members if "string" in _kinds(member)]
    if texts and all("pattern" in member for member in texts):
        merged["pattern"] = "|".join(dict.fromkeys(member["pattern"] for member in texts))
    if len(merged["type"]) == 1:
        merged["type"] = merged["type"][0]
    return merged
