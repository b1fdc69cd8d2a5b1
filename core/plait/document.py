"""YAML text → plain data with the line and column of every part.

Safe by construction: only plain scalars, lists and mappings; no tags, no timestamps, YAML 1.2
booleans and floats (``1e-3`` is a number, ``on`` is a text); duplicate keys are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import yaml

from plait.errors import PipelineError

Place = tuple[int, int]
KeyPath = tuple[str | int, ...]
MAX_NODES = 100_000
MAX_DEPTH = 50
MERGE = "<<"
TEXT = "<text>"  # the name of a document that is no file


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


@attrs.frozen
class Document:
    """Plain data, and where in which file each part stands (1-based line and column)."""

    data: Any
    places: dict[KeyPath, Place]
    name: str

    def where(self, path: KeyPath) -> str:
        """``file:line:column`` of a part, or of the nearest part around it."""
        line, column = self.place(path)
        return f"{self.name}:{line}:{column}" if line else self.name

    def place(self, path: KeyPath) -> Place:
        """Line and column of a part, or of the nearest part around it; (0, 0) for data without text."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return (0, 0)


def read(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        PipelineError: it is missing, unreadable, no UTF-8, no YAML, or uses tags or duplicate keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PipelineError([f"there is no file {path}"]) from error
    except IsADirectoryError as error:
        raise PipelineError([f"{path} is a folder; name a pipeline file"]) from error
    except UnicodeDecodeError as error:
        raise PipelineError([f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8"]) from error
    except OSError as error:
        raise PipelineError([f"{path} cannot be read: {error.strerror}"]) from error
    return parse(text, str(path))


def parse(text: str, name: str = TEXT) -> Document:
    """As :func:`read`, for text that is at hand."""
    try:
        # The constructor checks the characters of the text.
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        hint = "; indent with spaces" if "\\t" in str(error.problem) else ""
        raise PipelineError([f"{name}{place}: this is not YAML: {error.problem or error.context}{hint}"]) from error
    except yaml.YAMLError as error:
        raise PipelineError([f"{name}: this is not YAML: {' '.join(str(error).split())}"]) from error
    except RecursionError as error:
        raise PipelineError([f"{name}: it is nested too deeply; {MAX_DEPTH} levels are allowed"]) from error
    places: dict[KeyPath, Place] = {}
    problems: list[str] = []
    data = None if node is None else _build(loader, node, (), places, problems, name)
    if problems:
        raise PipelineError(problems)
    return Document(data, places, name)


def _build(
    loader: _Loader, node: yaml.Node, path: KeyPath, places: dict[KeyPath, Place], problems: list[str], name: str
) -> Any:
    place = (node.start_mark.line + 1, node.start_mark.column + 1)
    at = f"{name}:{place[0]}:{place[1]}"
    places.setdefault(path, place)
    if len(places) > MAX_NODES or len(path) > MAX_DEPTH:
        raise PipelineError(
            [f"{at}: it is too large or nested too deeply; {MAX_NODES} parts and {MAX_DEPTH} levels are allowed"]
        )
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(loader, node, path, places, problems, name)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_build(loader, item, (*path, i), places, problems, name) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.tag.startswith("tag:yaml.org,2002:"):
        try:
            return _scalar(loader, node)
        except UnicodeError:
            problems.append(f"{at}: the text holds half of a character (a lone surrogate); write the character itself")
            return None
        except (ValueError, KeyError, yaml.YAMLError):
            pass
    problems.append(f"{at}: tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not allowed; write plain values")
    return None


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    kind = node.tag.rpartition(":")[2]
    if kind == "int":
        return int(node.value)
    if kind == "float":
        return float(
            node.value.replace(".inf", "inf")
            .replace(".nan", "nan")
            .replace(".Inf", "inf")
            .replace(".NaN", "nan")
            .replace(".INF", "inf")
            .replace(".NAN", "nan")
        )
    if kind == "str":
        return _joined(str(loader.construct_object(node)))
    if kind in ("bool", "null"):
        return loader.construct_object(node)
    raise ValueError(kind)


def _joined(text: str) -> str:
    """A text whose characters beyond the first 65,536 may be written as two escapes, as in JSON.

    Raises:
        UnicodeError: one of the two is missing.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def _build_mapping(
    loader: _Loader, node: yaml.MappingNode, path: KeyPath, places: dict[KeyPath, Place], problems: list[str], name: str
) -> Any:
    result: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
        at = f"{name}:{line}:{column}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{at}: a key has to be a text")
            continue
        try:
            key = _joined(key_node.value)
        except UnicodeError:
            problems.append(f"{at}: the key holds half of a character (a lone surrogate)")
            continue
        if key == MERGE and key_node.style is None and not _are_texts(value_node):
            merged = {**_merged(loader, value_node, path, places, problems, name), **merged}
            continue
        if key in result:
            first = places[(*path, key)]
            problems.append(f"{at}: duplicate key {key!r} (first on line {first[0]}); keep one")
            continue
        places[(*path, key)] = (line, column)
        result[key] = _build(loader, value_node, (*path, key), places, problems, name)
    return {**merged, **result}


def merged_in_place(named: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with ``parts`` where its ``<<`` stands; a name that is given besides replaces its part."""
    result: dict[str, Any] = {}
    for name, item in named.items():
        if name == MERGE:
            result |= {n: part if n == MERGE else named.get(n, part) for n, part in parts.items() if n not in result}
        else:
            result.setdefault(name, item)
    return result


def _are_texts(node: yaml.Node) -> bool:
    """Whether ``<<`` names things to be merged later, by their names."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return bool(nodes) and all(isinstance(n, yaml.ScalarNode) and n.tag == "tag:yaml.org,2002:str" for n in nodes)


def _merged(
    loader: _Loader, node: yaml.Node, path: KeyPath, places: dict[KeyPath, Place], problems: list[str], name: str
) -> dict[str, Any]:
    """The mapping, or the mappings, behind ``<<``; the first one that has a key gives its value."""
    result: dict[str, Any] = {}
    for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if not isinstance(item, yaml.MappingNode):
            line, column = item.start_mark.line + 1, item.start_mark.column + 1
            problems.append(f"{name}:{line}:{column}: << takes a mapping, or a list of mappings")
            continue
        result = {**_build_mapping(loader, item, (*path, "<<"), places, problems, name), **result}
    return result
