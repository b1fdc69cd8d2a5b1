"""Tensors and NumPy arrays, alone (a mapping of them is a mapping of artifacts)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.optional import require


class TensorCodec:
    """A ``torch.Tensor``, or a dict of tensors, as safetensors; values, dtype and shape are kept, loaded on the CPU."""

    name = "tensors"

    def handles(self, value: Any) -> bool:
        if isinstance(value, Mapping):
            return bool(value) and all(isinstance(key, str) and _is_tensor(item) for key, item in value.items())
        return _is_tensor(value)

    def save(self, value: Any, folder: Path) -> None:
        tensors = value if isinstance(value, Mapping) else {"": value}
        # Views of one storage are saved apart.
        plain = {f"t{key}": tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        kind = "dict" if isinstance(value, Mapping) else "tensor"
        require("safetensors.torch").save_file(plain, folder / "tensors.safetensors", {"kind": kind})

    def load(self, folder: Path) -> Any:
        file = folder / "tensors.safetensors"
        with require("safetensors").safe_open(file, "pt") as handle:
            kind = handle.metadata()["kind"]
            tensors = {key[1:]: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - no mapping
        return tensors if kind == "dict" else tensors[""]


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "untyped_storage")


class ArrayCodec:
    """A ``numpy.ndarray`` of numbers, as ``.npy`` without pickle."""

    name = "array"

    def handles(self, value: Any) -> bool:
        return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray" and value.dtype.kind in "biufc"

    def save(self, value: Any, folder: Path) -> None:
        require("numpy").save(folder / "array.npy", value, allow_pickle=False)

    def load(self, folder: Path) -> Any:
        return require("numpy").load(folder / "array.npy", allow_pickle=False)
