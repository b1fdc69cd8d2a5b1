"""Planetoid's raw files are pickles; here they are read without running anything that a pickle may name.

A pickle names functions, which are called while it is read. The few names that occur in these files stand for the
inert parts below, which only keep numbers; any other name is refused.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse

PICKLED = ("x", "tx", "allx", "y", "ty", "ally", "graph")

Numbers: TypeAlias = "np.ndarray | scipy.sparse.csr_matrix | dict[int, list[int]]"


def read_numbers(path: Path) -> Numbers:
    """An array of numbers, a CSR matrix, or a mapping node → neighbours.

    Raises:
        ValueError: the file is damaged, or it names or holds anything else.
    """
    try:
        with path.open("rb") as file:
            value: Any = _Unpickler(file, encoding="latin1").load()
    except _RefusedError as error:
        raise ValueError(f"{path.name} {error}") from error
    except Exception as error:  # a damaged pickle may end in any
        raise ValueError(f"{path.name} is not a whole pickle of numbers") from error
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, _Csr):
        return value.matrix(path.name)
    if _is_graph(value):
        graph: dict[int, list[int]] = value
        return graph
    raise ValueError(f"{path.name} holds a {type(value).__name__.strip('_')}; expected numbers")


class _RefusedError(Exception):
    """The message completes "<file> ..."."""


class _DType:
    """The type of an array's numbers: its code, such as ``i4``, and its byte order."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype:
        if not (re.fullmatch("[biuf][1248]", str(self.code)) and self.order in ("<", ">", "=", "|")):
            raise _RefusedError(f"holds an array of type {self.code}; expected numbers")
        return np.dtype(f"{self.order}{self.code}")


class _Array:
    """An array that is built from its bytes when they come."""

    values: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, in_columns, content = state
        self.fill(content, dtype, shape, "F" if in_columns else "C")

    def fill(self, content: Any, dtype: _DType, shape: tuple[int, ...], order: Any) -> None:
        numbers = dtype.numpy()
        content = content.encode("latin1") if isinstance(content, str) else bytes(content)  # of Python 2: str
        self.values = np.frombuffer(content, numbers).reshape(shape, order=order).copy(order)


class _Csr:
    """What was an instance of scipy's ``csr_matrix``: its attributes."""

    def matrix(self, name: str) -> scipy.sparse.csr_matrix:
        found = (vars(self).get(part) for part in ("data", "indices", "indptr"))
        parts = [part.values for part in found if isinstance(part, _Array)]
        shape = vars(self).get("_shape")
        if len(parts) < 3 or not isinstance(shape, tuple):
            raise ValueError(f"{name} lacks parts of a CSR matrix")
        matrix = scipy.sparse.csr_matrix(tuple(parts), shape=shape)
        matrix.check_format(full_check=True)
        return matrix


def _new_array(*_: Any) -> _Array:
    return _Array()


def _filled_array(content: Any, dtype: _DType, shape: tuple[int, ...], order: Any, *_: Any) -> _Array:
    array = _Array()
    array.fill(content, dtype, shape, order)
    return array


def _new_matrix(kind: Any, *_: Any) -> _Csr:
    return _Csr()


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _latin1(text: str, *_: Any) -> bytes:
    return text.encode("latin1")


class _Nothing:
    """Stands for types that are only handed to the functions above."""


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Nothing,
    ("numpy", "dtype"): _DType,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _new_array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _filled_array for core in ("core", "_core")},
    **{(f"scipy.sparse.{module}", "csr_matrix"): _Csr for module in ("csr", "_csr")},
    **{(module, "_reconstructor"): _new_matrix for module in ("copy_reg", "copyreg")},
    **{(module, name): _Nothing for module in ("__builtin__", "builtins") for name in ("list", "object")},
    ("collections", "defaultdict"): _empty_dict,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return STAND_INS[module, name]
        except KeyError:
            raise _RefusedError(
                f"names {module}.{name}, which would be run; expected arrays, CSR matrices, dicts, lists and numbers"
            ) from None


def _is_graph(value: Any) -> bool:
    return type(value) is dict and all(
        type(node) is int and type(others) is list and all(type(other) is int for other in others)
        for node, others in value.items()
    )
