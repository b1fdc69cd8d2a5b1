"""PyG data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plait.codecs.tensors import is_tensor, load_tensors, save_tensors
from plait.errors import StoreError
from plait.optional import require


class GraphCodec:
    """``torch_geometric.data.Data`` of tensors, sparse ones (``adj_t``) too, and JSON-like values: safetensors + JSON, no pickle."""

    name = "graph"

    def handles(self, value: Any) -> bool:
        return any(
            cls.__module__.startswith("torch_geometric.data") and cls.__name__ == "Data" for cls in type(value).__mro__
        )

    def save(self, value: Any, folder: Path) -> None:
        tensors: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for key, item in value.to_dict().items():
            (tensors if is_tensor(item) else others)[key] = item
        for key, item in others.items():
            _check_plain(key, item)
        (folder / "values.json").write_text(json.dumps(others))
        save_tensors(tensors, folder / "tensors.safetensors")

    def load(self, folder: Path) -> Any:
        values = json.loads((folder / "values.json").read_text())
        tensors, _ = load_tensors(folder / "tensors.safetensors")
        return require("torch_geometric.data").Data.from_dict({**values, **tensors})


def _check_plain(key: str, item: Any) -> None:
    try:
        same = json.loads(json.dumps(item)) == item
    except (TypeError, ValueError):
        same = False
    if not same:
        kind = f"{type(item).__module__}.{type(item).__qualname__}"
        raise StoreError(
            f"graph attribute {key!r} is a {kind}, neither a tensor nor JSON-like; leave it out or make it a tensor"
            " (an adjacency matrix: torch_geometric.utils.to_torch_csr_tensor)"
        )
