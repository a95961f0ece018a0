"""Reads a pickle of numpy arrays and optax states without trusting it.

The names below are all that such a file may use, and each stands for a function of this module: numpy and
optax themselves are never looked up. `learner/pickle_machine.py` refuses every other name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from learner import pickle_machine
from learner.pickle_machine import Admitted, Buildable, Make, Refused, kind_of

__all__ = ["Record", "Refused", "array_of", "kind_of", "load"]

_MAX_DIMENSIONS = 8
_DTYPES = ("b1", "u1", "i4", "i8", "u4", "u8", "f2", "f4", "f8")


@dataclass(frozen=True)
class Record:
    """An inert stand-in for a named tuple of optax."""

    name: str
    fields: tuple[Any, ...]


class _DType(Buildable):
    """A dtype; a file adds its byte order afterwards."""

    def __init__(self, code: str):
        self.code = code

    def build(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, size, alignment, flags)
        plain = type(state) is tuple and len(state) == 8 and type(state[1]) is str
        if not plain or any(part is not None for part in state[2:5]):
            raise Refused("it holds a structured dtype")
        if state[1] not in ("<", "|", "="):
            raise Refused(f"it holds numbers in byte order {state[1][:8]!r}")


class _Array(Buildable):
    """An array; a file adds its shape and bytes afterwards, and may refer to it before."""

    value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if self.value is not None or type(state) is not tuple or len(state) != 5:
            raise Refused("it describes an array as numpy does not")
        _, shape, dtype, fortran, data = state
        self.value = _view(data, dtype, shape, "F" if fortran is True else "C")


def load(data: bytes) -> Any:
    """The object that a pickle describes: None, numbers, strings, tuples, lists, dicts with string keys,
    read-only arrays that are views of `data` (see `array_of`), and `Record`s.

    Raises Refused for anything else, and for a damaged file.
    """
    return pickle_machine.load(data, _ADMITTED)


def array_of(value: Any) -> np.ndarray | None:
    """The array that a loaded value is, if it is one."""
    return value.value if isinstance(value, _Array) else None


def _dtype(code: Any, _align: Any, _copy: Any) -> _DType:
    if type(code) is not str or code not in _DTYPES:
        shown = code[:20] if type(code) is str else kind_of(code)
        raise Refused(f"it holds an array of dtype {shown!r}, which is no plain number")
    return _DType(code)


def _reconstruct(kind: Any, _shape: Any, _code: Any) -> _Array:
    if kind is not _NDARRAY:
        raise Refused(f"it makes an array of a {kind_of(kind)}")
    return _Array()


def _scalar(dtype: Any, data: Any) -> _Array:
    return _frombuffer(data, dtype, (), "C")


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.value = _view(data, dtype, shape, order)
    return array


def _view(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if type(dtype) is not _DType or type(data) is not memoryview or order not in ("C", "F"):
        raise Refused("it describes an array as numpy does not")
    if type(shape) is not tuple or any(type(size) is not int or size < 1 for size in shape):
        raise Refused("it holds an array without a proper shape")
    if len(shape) > _MAX_DIMENSIONS:
        raise Refused(f"it holds an array of {len(shape)} dimensions")
    kind = np.dtype(f"<{dtype.code}")
    needed = math.prod(shape) * kind.itemsize
    if needed != len(data):
        raise Refused(f"it holds an array that needs {needed:,} bytes and has {len(data):,}")
    return np.frombuffer(data, kind).reshape(shape, order=order)


def _with(count: int, make: Callable[..., Any]) -> Make:
    """`make`, for exactly `count` arguments."""

    def checked(arguments: tuple[Any, ...]) -> Any:
        if len(arguments) != count:
            raise Refused(f"it gives {len(arguments)} arguments where {count} belong")
        return make(*arguments)

    return checked


def _record(name: str, fields: int) -> Admitted:
    return Admitted(name, new=_with(fields, lambda *values: Record(name, values)))


_NDARRAY = Admitted("ndarray")
_RECONSTRUCT = Admitted("_reconstruct", call=_with(3, _reconstruct))
_SCALAR = Admitted("scalar", call=_with(2, _scalar))
_FROMBUFFER = Admitted("_frombuffer", call=_with(4, _frombuffer))
_APPLY_IF_FINITE = _record("ApplyIfFiniteState", 4)

_ADMITTED = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): Admitted("dtype", call=_with(3, _dtype)),
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # since numpy 2
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("numpy.core.numeric", "_frombuffer"): _FROMBUFFER,  # protocol 5
    ("numpy._core.numeric", "_frombuffer"): _FROMBUFFER,
    ("optax._src.base", "EmptyState"): _record("EmptyState", 0),
    ("optax._src.transform", "ScaleByAdamState"): _record("ScaleByAdamState", 3),
    ("optax._src.wrappers", "ApplyIfFiniteState"): _APPLY_IF_FINITE,  # float16
    ("optax.transforms._conditionality", "ApplyIfFiniteState"): _APPLY_IF_FINITE,
}
