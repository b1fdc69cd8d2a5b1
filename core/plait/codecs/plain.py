"""JSON-like values, mappings and sequences of artifacts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JSONCodec:
    """Numbers, texts, booleans, null, and lists and dicts of these."""

    name = "json"

    def handles(self, value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and self.handles(item) for key, item in value.items())
        if isinstance(value, list):
            return all(map(self.handles, value))
        return value is None or isinstance(value, (bool, int, float, str))

    def save(self, value: Any, folder: Path) -> None:
        (folder / "value.json").write_text(json.dumps(value))

    def load(self, folder: Path) -> Any:
        return json.loads((folder / "value.json").read_text())


class MappingCodec:
    """A mapping of artifacts, each saved by its own codec, so that one part loads without the rest."""

    name = "mapping"

    def handles(self, value: Any) -> bool:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)

    def save(self, value: Any, folder: Path) -> None:
        from plait.codecs import save

        names = {key: f"{index:04d}" for index, key in enumerate(value)}
        for key, item in value.items():
            save(item, folder / names[key])
        (folder / "index.json").write_text(json.dumps({"parts": names}))

    def load(self, folder: Path) -> Any:
        from plait.codecs import load

        names = json.loads((folder / "index.json").read_text())["parts"]
        return {key: load(folder / name) for key, name in names.items()}


class SequenceCodec:
    """A list or tuple of artifacts."""

    name = "sequence"

    def handles(self, value: Any) -> bool:
        return type(value) in (list, tuple)

    def save(self, value: Any, folder: Path) -> None:
        from plait.codecs import save

        for index, item in enumerate(value):
            save(item, folder / f"{index:06d}")
        (folder / "sequence.json").write_text(json.dumps({"length": len(value), "tuple": isinstance(value, tuple)}))

    def load(self, folder: Path) -> Any:
        from plait.codecs import load

        index = json.loads((folder / "sequence.json").read_text())
        items = [load(folder / f"{i:06d}") for i in range(index["length"])]
        return tuple(items) if index["tuple"] else items
