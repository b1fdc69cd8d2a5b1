"""``each``: one step of a pipeline written once for several values.

::

    expert:
      each: {task: [digits, clutter]}
      optimize: multi-task
      from: {model: pretrained, data: {"${each.task}": "${each.task}.train"}}

becomes the steps ``expert.digits`` and ``expert.clutter``; ``expert`` stands for the mapping of both.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

KEY = "each"
WHOLE = re.compile(r"\$\{each\.([\w-]+)\}")
MAX_LABEL = 60


@attrs.frozen
class Family:
    """A step with ``each``.

    Attributes:
        members: label of a combination of values → the names' labels in it; the step ``NAME.LABEL`` is made for it.
    """

    name: str
    members: Mapping[str, Mapping[str, str]]


class EachError(Exception):
    """``each`` of a step is wrong. ``path`` is below the step."""

    def __init__(self, path: tuple[str, ...], sentence: str) -> None:
        self.path = path
        super().__init__(sentence)


def expanded(name: str, body: Mapping[str, Any], each: Any) -> tuple[Family, dict[str, dict[str, Any]]]:
    """The family of a step, and the text of its members by label.

    Args:
        body: the step as written, its ``each`` not looked at.
        each: name → list of values, or mapping label → value; resolved.

    Raises:
        EachError: it is not of that form, or ``${each.…}`` names nothing.
    """
    if not isinstance(each, dict) or not each:
        raise EachError((KEY,), f"each is {each!r}; it has to be a mapping name → list of values")
    labelled = {item: _labelled(item, values) for item, values in each.items()}
    members, bodies = {}, {}
    rest = {key: value for key, value in body.items() if key != KEY}
    for combination in itertools.product(*(values.items() for values in labelled.values())):
        labels = {item: label for item, (label, _) in zip(labelled, combination, strict=True)}
        values = {item: value for item, (_, value) in zip(labelled, combination, strict=True)}
        label = "-".join(labels.values())
        if label in members:
            raise EachError(
                (KEY,), f"each makes two steps {name}.{label}; give the values labels of their own: {{label: value}}"
            )
        members[label] = labels
        bodies[label] = _filled(rest, values, ())
    return Family(name, members), bodies


def _labelled(item: Any, values: Any) -> dict[str, Any]:
    if isinstance(values, dict) and values:
        found = {str(label): value for label, value in values.items()}
    elif isinstance(values, list) and values:
        found = {}
        for value in values:
            label = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if label in found:
                raise EachError((KEY, str(item)), f"each {item} has the value {value!r} twice; keep one")
            found[label] = value
    else:
        raise EachError(
            (KEY, str(item)), f"each {item} is {values!r}; it has to be a list of values, or a mapping label → value"
        )
    for label in found:
        if not label or len(label) > MAX_LABEL or not all(part.strip() for part in label.split(".")):
            raise EachError(
                (KEY, str(item)),
                f"each {item} has the value {label[:MAX_LABEL]!r}; give it a short label: {{label: value}}",
            )
    return found


def _filled(value: Any, values: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """A copy with the values in place of ``${each.name}``, in keys too."""
    if isinstance(value, dict):
        return {_text(key, values, path): _filled(item, values, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, values, path) for item in value]
    if isinstance(value, str):
        if whole := WHOLE.fullmatch(value):
            return _value(whole[1], values, path)
        return _text(value, values, path)
    return value


def _text(text: Any, values: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    if not isinstance(text, str):
        return text
    return WHOLE.sub(lambda match: str(_value(match[1], values, path)), text)


def _value(name: str, values: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    if name not in values:
        raise EachError(path, f"${{each.{name}}} names nothing; each has {', '.join(map(str, values))}")
    return values[name]


def member_of(family: Family, parts: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
    """The label that the first parts of a reference spell, and what is left; labels may hold dots."""
    for end in range(len(parts), 0, -1):
        if (label := ".".join(parts[:end])) in family.members:
            return label, tuple(parts[end:])
    return None
