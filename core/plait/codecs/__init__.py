"""Saving and loading what steps return.

A codec writes one type of artifact into a folder of its own and reads it back. Packages add codecs
through the entry-point group ``plait.codecs`` (name → class); the core's own are registered the same way.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from plait.catalogue import entry_points, load_entry_point
from plait.errors import PlaitError, StoreError, nearest

CODEC_FILE = "codec.json"
GROUP = "plait.codecs"


class Codec(Protocol):
    """One type of artifact."""

    name: str

    def handles(self, value: Any) -> bool:
        """Whether this codec saves ``value``; must not import the type's library."""

    def save(self, value: Any, folder: Path) -> None:
        """Write ``value`` into the empty ``folder``."""

    def load(self, folder: Path) -> Any:
        """Read it back; the result equals what was saved."""


@functools.cache
def _built_in() -> dict[str, Codec]:
    from plait.codecs.datasets import DatasetCodec
    from plait.codecs.graphs import GraphCodec
    from plait.codecs.modules import BuiltModuleCodec, ModuleCodec
    from plait.codecs.plain import JSONCodec, MappingCodec, SequenceCodec
    from plait.codecs.reports import ReportCodec
    from plait.codecs.tensors import ArrayCodec, TensorCodec

    codecs: list[Codec] = [
        DatasetCodec(), ModuleCodec(), BuiltModuleCodec(), TensorCodec(), ArrayCodec(), GraphCodec(), ReportCodec(), JSONCodec(),
        MappingCodec(), SequenceCodec(),
    ]  # fmt: skip
    return {codec.name: codec for codec in codecs}


@functools.cache
def _of_plugin(name: str, target: str) -> Codec:
    codec: Codec = load_entry_point(target, f"codec {name!r}")()
    return codec


def save(value: Any, folder: Path) -> None:
    """Save an artifact of any known type into ``folder``.

    Raises:
        StoreError: no codec handles its type, or it cannot be built again from what was saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, codec in _candidates():
        if codec.handles(value):
            content = folder / "content"
            content.mkdir()
            codec.save(value, content)
            (folder / CODEC_FILE).write_text(json.dumps({"codec": name}))
            return
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise StoreError(
        f"a result of type {kind} cannot be saved; return a datasets.Dataset, a torch.nn.Module, tensors, PyG data or JSON-like values, or add a codec (entry point plait.codecs)"
    )


def _candidates() -> Iterator[tuple[str, Codec]]:
    # A plugin's codec knows its own type best, so it is asked before the general ones. A value of that type comes from
    # the plugin itself as a rule: plugins that nothing has imported are asked last, and seldom have to be imported.
    found = [
        (ep.name, ep.value, ep.value.partition(":")[0].partition(".")[0] in sys.modules) for ep in entry_points(GROUP)
    ]
    yield from ((name, _of_plugin(name, target)) for name, target, is_imported in found if is_imported)
    yield from _built_in().items()
    yield from ((name, _of_plugin(name, target)) for name, target, is_imported in found if not is_imported)


def load(folder: Path, part: tuple[str, ...] = ()) -> Any:
    """Load an artifact, or a part of a mapping without reading the rest.

    Raises:
        PlaitError: it has no such part, or its codec is not installed.
    """
    name = json.loads((folder / CODEC_FILE).read_text())["codec"]
    content = folder / "content"
    if part:
        return _load_part(folder, content, part)
    of_plugins = {ep.name: ep.value for ep in entry_points(GROUP)}
    if name in _built_in():
        codec = _built_in()[name]
    elif name in of_plugins:
        codec = _of_plugin(name, of_plugins[name])
    else:
        raise PlaitError(
            f"the result was saved by codec {name!r}, which is not installed; install the package that has it"
        )
    return codec.load(content)


def _load_part(folder: Path, content: Path, part: tuple[str, ...]) -> Any:
    names = parts(folder)
    if part[0] in names:
        return load(content / names[part[0]], part[1:])
    whole = {} if names else load(folder)  # a dict of tensors or of plain values is saved as one
    if isinstance(whole, Mapping) and part[0] in whole and len(part) == 1:
        return whole[part[0]]
    known = list(names) or (list(whole) if isinstance(whole, Mapping) else [])
    has = f"it has {', '.join(known)}" if known else "it is one whole, without parts"
    raise PlaitError(f"there is no split {part[0]!r}{nearest(part[0], known)}; {has}")


def parts(folder: Path) -> Mapping[str, str]:
    """Name → sub-folder of each part of a saved mapping; empty for anything else."""
    index = folder / "content" / "index.json"
    return json.loads(index.read_text())["parts"] if index.exists() else {}
