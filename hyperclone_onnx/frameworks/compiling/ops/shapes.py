"""Operators that return the sizes of arrays, or create arrays of given sizes."""

from __future__ import annotations

import math
from typing import Any

from hyperclone_onnx.frameworks.compiling.registry import Array, Host, implements


@implements("Shape")
def shape(xp: Any, x: Array, *, start: int = 0, end: int | None = None) -> tuple[Any, ...]:
    """the sizes of x, as Python numbers"""
    return tuple(x.shape)[slice(start, end)]


@implements("Size")
def size(xp: Any, x: Array) -> Any:
    """the number of elements of x, as a Python number"""
    return math.prod(x.shape)


@implements("Range")
def arange(xp: Any, start: Host, limit: Host, delta: Host, *, device: Any, element_type: int) -> Array:
    """start, start + delta, ... up to before limit"""
    return xp.arange(start, limit, delta, dtype=xp.dtype_of(element_type), device=device)


@implements("ConstantOfShape")
def constant_of_shape(xp: Any, shape: Host, *, value: tuple[int, tuple[Any]] | None = None, device: Any) -> Array:
    """an array that holds one value everywhere"""
    element_type, (number,) = value or (1, (0.0,))
    return xp.full(tuple(shape), number, dtype=xp.dtype_of(element_type), device=device)


@implements("EyeLike")
def eye_like(xp: Any, x: Array, *, dtype: int = 0, k: int = 0) -> Array:
    """ones on the k-th diagonal"""
    kind = xp.dtype_of(dtype) if dtype else x.dtype
    return xp.eye(x.shape[0], x.shape[1], k=k, dtype=kind, device=xp.device_of(x))
