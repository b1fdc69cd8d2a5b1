"""Tensors and NumPy arrays, alone (a mapping of them is a mapping of artifacts)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.errors import StoreError
from plait.optional import require

# How the parts of a sparse tensor are asked for, by layout.
SPARSE = {
    "sparse_coo": ("indices", "values"),
    "sparse_csr": ("crow_indices", "col_indices", "values"),
    "sparse_csc": ("ccol_indices", "row_indices", "values"),
    "sparse_bsr": ("crow_indices", "col_indices", "values"),
    "sparse_bsc": ("ccol_indices", "row_indices", "values"),
}


class TensorCodec:
    """A ``torch.Tensor``, or a dict of tensors, as safetensors; values, dtype, shape and layout are kept, loaded on the CPU."""

    name = "tensors"

    def handles(self, value: Any) -> bool:
        if isinstance(value, Mapping):
            return bool(value) and all(isinstance(key, str) and is_tensor(item) for key, item in value.items())
        return is_tensor(value)

    def save(self, value: Any, folder: Path) -> None:
        is_mapping = isinstance(value, Mapping)
        save_tensors(
            value if is_mapping else {"": value}, folder / "tensors.safetensors", "dict" if is_mapping else "tensor"
        )

    def load(self, folder: Path) -> Any:
        tensors, kind = load_tensors(folder / "tensors.safetensors")
        return tensors if kind == "dict" else tensors[""]


def is_tensor(value: Any) -> bool:
    """Whether it is a ``torch.Tensor``; imports nothing."""
    return any(cls.__module__ == "torch" and cls.__name__ == "Tensor" for cls in type(value).__mro__)


def save_tensors(tensors: Mapping[str, Any], file: Path, kind: str = "dict") -> None:
    """Write tensors of any strided or sparse layout.

    Raises:
        StoreError: one is of a layout or type that cannot be stored.
    """
    flat: dict[str, Any] = {}
    sparse: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        layout = str(tensor.layout).removeprefix("torch.")
        if layout in SPARSE:
            tensor = tensor.detach().coalesce() if layout == "sparse_coo" else tensor.detach()
            parts = {part: getattr(tensor, part)() for part in SPARSE[layout]}
            sparse[name] = {"layout": layout, "size": list(tensor.shape)}
            flat |= {f"s{name}/{part}": _plain(item) for part, item in parts.items()}
        elif layout == "strided" and not tensor.is_quantized and not tensor.is_meta:
            flat[f"t{name}"] = _plain(tensor)
        else:
            what = (
                "quantized"
                if tensor.is_quantized
                else "on the meta device"
                if tensor.is_meta
                else f"of layout {layout}"
            )
            raise StoreError(
                f"a tensor {name!r} that is {what} cannot be stored; make it a dense or sparse tensor of numbers"
            )
    # One entry, since safetensors writes several in any order, and equal results are to be equal files.
    facts = json.dumps({"kind": kind, "sparse": sparse})
    require("safetensors.torch").save_file(flat, file, {"plait": facts})


def load_tensors(file: Path) -> tuple[dict[str, Any], str]:
    """Tensors by name, and the kind that was given when they were saved."""
    torch = require("torch")
    with require("safetensors").safe_open(file, "pt") as handle:
        entries = handle.metadata()
        flat = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - no mapping
    tensors = {key[1:]: tensor for key, tensor in flat.items() if key.startswith("t")}
    if "plait" in entries:
        facts = json.loads(entries["plait"])
    else:  # stored by an earlier plait
        facts = {"kind": entries["kind"], "sparse": json.loads(entries.get("sparse", "{}"))}
    for name, fact in facts["sparse"].items():
        parts = [flat[f"s{name}/{part}"] for part in SPARSE[fact["layout"]]]
        if fact["layout"] == "sparse_coo":
            tensors[name] = torch.sparse_coo_tensor(*parts, size=fact["size"], is_coalesced=True)
        else:
            layout = getattr(torch, fact["layout"])
            tensors[name] = torch.sparse_compressed_tensor(*parts, size=fact["size"], layout=layout)
    return tensors, facts["kind"]


def _plain(tensor: Any) -> Any:
    # Views of one storage are saved apart.
    return tensor.detach().cpu().contiguous().clone()


class ArrayCodec:
    """A ``numpy.ndarray`` of numbers, as ``.npy`` without pickle."""

    name = "array"

    def handles(self, value: Any) -> bool:
        return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray" and value.dtype.kind in "biufc"

    def save(self, value: Any, folder: Path) -> None:
        require("numpy").save(folder / "array.npy", value, allow_pickle=False)

    def load(self, folder: Path) -> Any:
        return require("numpy").load(folder / "array.npy", allow_pickle=False)
