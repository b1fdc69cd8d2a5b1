"""What differs between two artifacts, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import attrs

from plait.optional import require
from plait.report.model import Report


def differences(one: Any, other: Any, ignore: Collection[str] = (), where: str = "result") -> Iterator[str]:
    """A sentence for every difference; nothing when both are equal. On which device tensors are does not count.

    Args:
        ignore: columns of a report's rows that do not count.
    """
    if type(one) is not type(other) and not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        yield f"{where}: {type(one).__name__} and {type(other).__name__}"
    elif isinstance(one, Report):
        yield from _of_reports(one, other, ignore, where)
    elif hasattr(one, "state_dict"):
        yield from _of_modules(one, other, where)
    elif hasattr(one, "untyped_storage"):
        torch = require("torch")
        equal = (
            one.shape == other.shape
            and one.dtype == other.dtype
            and bool(torch.equal(one.cpu().nan_to_num(), other.cpu().nan_to_num()))
        )
        if not equal:
            yield f"{where}: tensors differ"
    elif hasattr(one, "column_names") and hasattr(one, "features"):
        yield from _of_datasets(one, other, where)
    elif hasattr(one, "edge_index") and hasattr(one, "to_dict"):
        yield from differences(one.to_dict(), other.to_dict(), ignore, where)
    elif isinstance(one, Mapping):
        if list(one) != list(other) and set(one) != set(other):
            yield f"{where}: keys {list(one)} and {list(other)}"
        for key in one:
            if key in other:
                yield from differences(one[key], other[key], ignore, f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            yield f"{where}: {len(one)} and {len(other)} items"
        for index, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from differences(a, b, ignore, f"{where}[{index}]")
    elif not _equal(one, other):
        yield f"{where}: {one!r} and {other!r}"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and math.isnan(one):
        return bool(math.isnan(other))
    same = one == other
    return bool(same.all()) if hasattr(same, "all") else bool(same)


def _of_reports(one: Report, other: Report, ignore: Collection[str], where: str) -> Iterator[str]:
    rows = [
        [{name: value for name, value in row.items() if name not in ignore} for row in report.rows]
        for report in (one, other)
    ]
    yield from differences(rows[0], rows[1], ignore, f"{where}.rows")
    for name in ("title", "notes", "curves"):
        a, b = (attrs.asdict(report)[name] for report in (one, other))
        if not ignore:
            yield from differences(a, b, ignore, f"{where}.{name}")


def _of_modules(one: Any, other: Any, where: str) -> Iterator[str]:
    yield from differences(one.state_dict(), other.state_dict(), (), f"{where}.state_dict")
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=False):
        if a.requires_grad != b.requires_grad:
            yield f"{where}: requires_grad of {name}"
        if (a.grad is None) != (b.grad is None):
            yield f"{where}: gradient of {name}"
    for (name, a), (_, b) in zip(one.named_modules(), other.named_modules(), strict=False):
        if a.training != b.training:
            yield f"{where}: train/eval mode of {name or 'the model'}"


def _of_datasets(one: Any, other: Any, where: str) -> Iterator[str]:
    if one.column_names != other.column_names:
        yield f"{where}: columns {one.column_names} and {other.column_names}"
    elif len(one) != len(other):
        yield f"{where}: {len(one)} and {len(other)} rows"
    elif len(one):
        a, b = (data.with_format("arrow")[:] for data in (one, other))
        for name in one.column_names:
            if not a[name].equals(b[name]) and not _same_pictures(one, other, name):
                yield f"{where}: column {name!r} differs"


def _same_pictures(one: Any, other: Any, name: str) -> bool:
    if type(one.features[name]).__name__ != "Image":
        return False
    return all(a.tobytes() == b.tobytes() and a.size == b.size for a, b in zip(one[name], other[name], strict=True))
