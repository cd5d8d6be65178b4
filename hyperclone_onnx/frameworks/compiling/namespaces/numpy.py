"""The namespace for NumPy: the reference for tests, and for folding constants. It cannot train."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import array_api_compat.numpy as _standard
import ml_dtypes
import numpy as np
from array_api_compat.numpy import *

from hyperclone_onnx.frameworks.compiling.namespaces import dtype_name
from hyperclone_onnx.frameworks.compiling.ops import control as _control
from hyperclone_onnx.frameworks.compiling.ops.attention import attend as _attend

bool = _standard.bool  # import * leaves out names that hide builtins
abs, all, any, max, min, round, sum, pow = (
    getattr(_standard, name) for name in ("abs", "all", "any", "max", "min", "round", "sum", "pow")
)
NAME = "numpy"


def dtype_named(name: str) -> Any:
    """The type of a name."""
    return np.dtype(getattr(ml_dtypes, name, name))


def dtype_of(number: int) -> Any:
    """The type of an ONNX element type."""
    return dtype_named(dtype_name(number))


def isdtype(dtype: Any, kind: Any) -> Any:
    """The standard's `isdtype`, extended to bfloat16."""
    if dtype == ml_dtypes.bfloat16:
        return kind in ("real floating", "numeric")
    return _standard.isdtype(dtype, kind)


def device_of(_: Any) -> None:
    """None: NumPy has one device."""


def lift(value: Any, number: int, device: Any) -> Any:
    """An array of Python numbers."""
    return np.asarray(value, dtype=dtype_of(number))


def numbers(array: Any) -> Any:
    """The elements of an array as Python numbers."""
    return tuple(array.tolist()) if np.ndim(array) else np.asarray(array).item()


def fixed(x: Any) -> Any:
    """The same numbers, through which no gradient goes."""
    return x


def grouped_matmul(rows: Any, weight: Any, sizes: Any) -> Any:
    """Products of rows, sorted by group, with the matrix of their group."""
    ends = np.cumsum(sizes)
    return np.concatenate([rows[end - size : end] @ w for w, size, end in zip(weight, sizes, ends, strict=True)])


def branch(condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """The results of one of two branches."""
    return yes() if condition else no()


_erf = np.vectorize(math.erf, otypes=[np.float64])


def erf(x: Any) -> Any:
    """The error function."""
    return _erf(x).astype(x.dtype) if x.size else x


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)"""
    return (0.5 * (1 + np.tanh(0.5 * x))).astype(x.dtype)


def softplus(x: Any) -> Any:
    """log(1 + e^x)"""
    return np.logaddexp(x, np.zeros_like(x))


def relu(x: Any) -> Any:
    """max(x, 0)"""
    return np.maximum(x, np.zeros_like(x))


def softmax(x: Any, axis: int) -> Any:
    """e^x / sum e^x"""
    powers = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return powers / np.sum(powers, axis=axis, keepdims=True)


def logsumexp(x: Any, axis: Any, keepdims: Any) -> Any:
    """log sum e^x"""
    peak = np.max(x, axis=axis, keepdims=True) if x.size else np.zeros((1,) * x.ndim, x.dtype)
    peak = np.where(np.isfinite(peak), peak, np.zeros_like(peak))
    out = np.log(np.sum(np.exp(x - peak), axis=axis, keepdims=True)) + peak
    return out if keepdims else np.squeeze(out, axis=axis)


def log_softmax(x: Any, axis: int) -> Any:
    """x - log sum e^x"""
    return x - logsumexp(x, axis, True)


def scan(step: Any, carry: Any, slices: Any, length: Any) -> Any:
    """carry, results = step(carry, slices[i]) for each i"""
    import hyperclone_onnx.frameworks.compiling.namespaces.numpy as xp

    return _control.scan_in_turns(xp, step, carry, slices, length)


def loop(turn: Any, trips: Any, condition: Any, states: Any, *, numbered: Any, device: Any) -> Any:
    """ONNX's Loop"""
    import hyperclone_onnx.frameworks.compiling.namespaces.numpy as xp

    return _control.loop_in_turns(xp, turn, trips, condition, states, numbered=numbered, device=device)


def attend(*operands: Any, **options: Any) -> Any:
    """Attention by the table's equation."""
    import hyperclone_onnx.frameworks.compiling.namespaces.numpy as xp

    return _attend(xp, *operands, **options)


def scatter(flat: Any, places: Any, updates: Any, reduction: str) -> Any:
    """A copy of flat in which flat[places] is set to updates, or updates are added, multiplied, ..."""
    ways = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
    result, values = flat.copy(), np.reshape(updates, (-1,))
    if reduction == "none":
        result[places] = values
    else:
        ways[reduction].at(result, places, values)
    return result


def convolution(x: Any, w: Any, strides: Any, dilations: Any, around: Any, group: int) -> Any:
    """A convolution as a sum over the places of the kernel."""
    x = np.pad(x, [(0, 0), (0, 0), *around])
    kernel = w.shape[2:]
    sizes = [
        (size - (width - 1) * dilation - 1) // stride + 1
        for size, width, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    grouped = np.reshape(w, (group, w.shape[0] // group, *w.shape[1:]))
    kernels: Any = np.moveaxis(grouped, range(3), range(-3, 0))
    out = np.zeros((x.shape[0], group, w.shape[0] // group, *sizes), x.dtype)
    for place in itertools.product(*map(range, kernel)):
        window = tuple(
            slice(i * dilation, i * dilation + (size - 1) * stride + 1, stride)
            for i, size, stride, dilation in zip(place, sizes, strides, dilations, strict=True)
        )
        part = x[(slice(None), slice(None), *window)]
        part = np.reshape(part, (x.shape[0], group, -1, *sizes))
        out += np.einsum("ngc...,goc->ngo...", part, kernels[place])
    return np.reshape(out, (x.shape[0], w.shape[0], *sizes))
