"""Digests of models, data and settings: equal for equal content, whatever object holds it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from plait.optional import require


def fingerprint(*values: Any) -> str:
    """Hexadecimal SHA-256 over the content of all values.

    Takes modules (class, names, dtypes, shapes and values of ``state_dict``), tensors, NumPy arrays, Hugging Face
    datasets (by their own fingerprint), PyG data, attrs instances, mappings, sequences and plain values, and every
    object that has a ``fingerprint`` of its own.

    Raises:
        TypeError: a value of another type.
    """
    digest = hashlib.sha256()
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    kind = type(value).__module__.partition(".")[0]
    own = getattr(value, "fingerprint", None)
    if value is None or isinstance(value, (bool, int, float, str, bytes, Path)):
        _tag(digest, type(value).__name__, repr(value))
    elif own is not None and not isinstance(value, type):
        _tag(digest, "own", str(own() if callable(own) else own))
    elif callable(getattr(value, "state_dict", None)):
        _tag(digest, "module", f"{type(value).__module__}.{type(value).__qualname__}")
        _add(digest, value.state_dict())
    elif hasattr(value, "_fingerprint") and hasattr(value, "column_names"):
        _tag(digest, "dataset", str(value._fingerprint))
    elif kind == "torch" and hasattr(value, "untyped_storage"):
        _add_tensor(digest, value)
    elif kind == "numpy" and hasattr(value, "tobytes"):
        _tag(digest, "array", f"{value.dtype} {getattr(value, 'shape', ())}")
        digest.update(value.tobytes())
    elif attrs.has(type(value)):
        _tag(digest, "attrs", type(value).__qualname__)
        _add(digest, {field.name: getattr(value, field.name) for field in attrs.fields(type(value))})
    elif isinstance(value, Mapping):
        _tag(digest, "mapping", str(len(value)))
        for key, item in value.items():
            _add(digest, key)
            _add(digest, item)
    elif isinstance(value, (list, tuple)):
        _tag(digest, "sequence", str(len(value)))
        for item in value:
            _add(digest, item)
    elif isinstance(value, (set, frozenset)):
        _add(digest, sorted(value, key=repr))
    elif kind == "torch_geometric":
        _add(digest, value.to_dict())
    elif kind == "torch":  # torch.dtype, torch.device, torch.Size
        _tag(digest, "torch", repr(value))
    else:
        raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__} has no fingerprint; give it one")


def _tag(digest: Any, kind: str, text: str) -> None:
    # Lengths keep ("ab", "c") and ("a", "bc") apart.
    digest.update(f"{kind} {len(text)} {text}\n".encode("utf-8", "surrogatepass"))


def _add_tensor(digest: Any, value: Any) -> None:
    _tag(digest, "tensor", f"{value.dtype} {tuple(value.shape)} {value.layout}")
    if "sparse" in str(value.layout):
        for part in _parts_of_sparse(value):
            _add_tensor(digest, part)
        return
    plain = value.detach().cpu().contiguous().reshape(-1)
    digest.update(plain.view(require("torch").uint8).numpy().data if plain.numel() else b"")


def _parts_of_sparse(value: Any) -> list[Any]:
    if str(value.layout) == "torch.sparse_coo":
        value = value.coalesce()
        return [value.indices(), value.values()]
    if str(value.layout) in ("torch.sparse_csr", "torch.sparse_bsr"):
        return [value.crow_indices(), value.col_indices(), value.values()]
    return [value.ccol_indices(), value.row_indices(), value.values()]
