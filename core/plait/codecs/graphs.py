"""PyG data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plait.codecs.tensors import _is_tensor
from plait.errors import PlaitError
from plait.optional import require


class GraphCodec:
    """``torch_geometric.data.Data`` of tensors and JSON-like values: safetensors + JSON, no pickle."""

    name = "graph"

    def handles(self, value: Any) -> bool:
        return any(
            cls.__module__.startswith("torch_geometric.data") and cls.__name__ == "Data" for cls in type(value).__mro__
        )

    def save(self, value: Any, folder: Path) -> None:
        tensors, others = {}, {}
        for key, item in value.to_dict().items():
            if _is_tensor(item):
                tensors[key] = item.detach().cpu().contiguous().clone()
            else:
                others[key] = item
        try:
            (folder / "values.json").write_text(json.dumps(others))
        except TypeError as error:
            raise PlaitError(
                f"a graph attribute is neither a tensor nor JSON-like ({error}); leave it out or make it a tensor"
            ) from error
        require("safetensors.torch").save_file(tensors, folder / "tensors.safetensors")

    def load(self, folder: Path) -> Any:
        values = json.loads((folder / "values.json").read_text())
        tensors = require("safetensors.torch").load_file(folder / "tensors.safetensors")
        return require("torch_geometric.data").Data.from_dict({**values, **tensors})
