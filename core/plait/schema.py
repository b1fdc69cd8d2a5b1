"""The JSON Schema of pipeline files, for editors: it knows the installed methods and their fields."""

from __future__ import annotations

import types
import typing
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

INTERPOLATION = {"type": "string", "pattern": r"\$\{.*\}"}
RESOURCES = {
    "type": "object",
    "properties": {
        "gpu": {"anyOf": [{"type": "integer", "minimum": 0}, INTERPOLATION]},
        "cpu": {"anyOf": [{"type": "number", "minimum": 0}, INTERPOLATION]},
        "memory": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    },
    "additionalProperties": False,
}
REFERENCE = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"$ref": "#/$defs/reference"}, "minItems": 1},
        {"type": "object", "additionalProperties": {"$ref": "#/$defs/reference"}},
    ]
}


def pipeline_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12). Methods whose package does not load are left open."""
    steps = [_step(hook) for hook in HOOKS]
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
            "seed": {"anyOf": [{"type": "integer", "minimum": 0}, INTERPOLATION]},
            "matrix": {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}},
            "steps": {
                "type": "object",
                "minProperties": 1,
                "patternProperties": {f"^{NAME.pattern}$": {"$ref": "#/$defs/step"}},
                "additionalProperties": False,
            },
        },
        "$defs": {"reference": REFERENCE, "resources": RESOURCES, "step": {"oneOf": steps}},
    }


def _step(hook: str) -> dict[str, Any]:
    key = hook.replace("_", "-")
    arguments = {argument: {"$ref": "#/$defs/reference"} for argument in hook_arguments(hook)}
    names = sorted({offer.name for offer in offers(hook)})
    rules = [rule for name in names if (rule := _fields_rule(hook, key, name)) is not None]
    step: dict[str, Any] = {
        "type": "object",
        "required": [key],
        "additionalProperties": False,
        "properties": {
            key: {"anyOf": [{"enum": names}, {"type": "string", "pattern": "[:/]"}, INTERPOLATION]},
            "each": {"anyOf": [{"type": "object", "minProperties": 1}, INTERPOLATION]},
            "from": {"type": "object", "properties": arguments, "additionalProperties": False},
            "with": {"type": "object"},
            "seed": {"anyOf": [{"type": "integer", "minimum": 0}, INTERPOLATION]},
            "resources": {"$ref": "#/$defs/resources"},
            "keep": {"anyOf": [{"type": "boolean"}, INTERPOLATION]},
        },
    }
    return {**step, "allOf": rules} if rules else step


def _fields_rule(hook: str, key: str, name: str) -> dict[str, Any] | None:
    try:
        fields = fields_of(find(hook, name).cls)
    except PlaitError:
        return None
    described = {field: _field(attribute) for field, attribute in fields.items()}
    required = [field for field, attribute in fields.items() if attribute.default is attrs.NOTHING]
    rule: dict[str, Any] = {
        "properties": {"with": {"properties": described, "additionalProperties": False, "required": required}}
    }
    if required:
        rule["required"] = ["with"]
    return {"if": {"properties": {key: {"const": name}}, "required": [key]}, "then": rule}


def _field(field: attrs.Attribute[Any]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "anyOf": [_method(field.metadata) if HOOK in field.metadata else _type(field.type), INTERPOLATION]
    }
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


def _method(metadata: Any) -> dict[str, Any]:
    one = {"anyOf": [{"type": "string"}, {"type": "object", "minProperties": 1, "maxProperties": 1}, {"type": "null"}]}
    return {"type": "array", "items": one} if metadata.get(MANY) else one


def _type(kind: Any) -> dict[str, Any]:
    simple = {int: "integer", bool: "boolean", str: "string", Path: "string", type(None): "null"}
    if kind in simple:
        return {"type": simple[kind]}
    if kind is float:
        return {"anyOf": [{"type": "number"}, {"type": "string", "pattern": "/"}]}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(member) for member in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (tuple, list):
        members = [member for member in arguments if member is not Ellipsis]
        return (
            {"type": "array", "items": {"anyOf": [_type(member) for member in members]}}
            if members
            else {"type": "array"}
        )
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(arguments[1])}
    return {}
