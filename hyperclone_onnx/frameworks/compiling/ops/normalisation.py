"""Softmax and norms."""

from __future__ import annotations

import math
from typing import Any

from hyperclone_onnx.frameworks.compiling.registry import INTERNAL, Array, implements


def _coerced(xp: Any, function: Any, x: Array, axis: int | None, opset: int) -> Array:
    """Apply a softmax along an axis. Before opset 13 it runs over all axes from `axis` on, as one axis."""
    if opset >= 13:
        return function(x, axis=-1 if axis is None else axis)
    axis = (1 if axis is None else axis) % x.ndim
    flat = xp.reshape(x, (math.prod(x.shape[:axis]), -1))
    return xp.reshape(function(flat, axis=-1), x.shape)


@implements("Softmax")
def softmax(xp: Any, x: Array, *, axis: int | None = None, opset: int) -> Array:
    """e^x / sum e^x along an axis"""
    return _coerced(xp, xp.softmax, x, axis, opset)


@implements("LogSoftmax")
def log_softmax(xp: Any, x: Array, *, axis: int | None = None, opset: int) -> Array:
    """x - log sum e^x along an axis"""
    return _coerced(xp, xp.log_softmax, x, axis, opset)


def wide(xp: Any, x: Array) -> Array:
    """x in float32 or wider, because norms compute their means in at least float32."""
    return xp.astype(x, xp.float32) if x.dtype in (xp.dtype_of(10), xp.dtype_of(16)) else x


def _standardised(xp: Any, x: Array, axes: tuple[int, ...], epsilon: float) -> tuple[Array, Array, Array]:
    mean = xp.mean(x, axis=axes, keepdims=True)
    centred = x - mean
    inverse = 1 / xp.sqrt(xp.mean(centred * centred, axis=axes, keepdims=True) + epsilon)
    return centred * inverse, mean, inverse


@implements("LayerNormalization")
def layer_norm(
    xp: Any,
    x: Array,
    scale: Array,
    bias: Array | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Any:
    """(x - mean) / sqrt(variance + epsilon) scale + bias, over the axes from `axis` on"""
    axes = tuple(range(axis % x.ndim, x.ndim))
    normal, mean, inverse = _standardised(xp, wide(xp, x), axes, epsilon)
    out = xp.astype(normal, x.dtype) * scale
    out = out if bias is None else out + bias
    return out if outputs == 1 else (out, mean, inverse)[:outputs]


@implements("RMSNormalization", "SimplifiedLayerNormalization")
def rms_norm(
    xp: Any,
    x: Array,
    scale: Array,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Any:
    """x / sqrt(mean x^2 + epsilon) scale, over the axes from `axis` on"""
    axes = tuple(range(axis % x.ndim, x.ndim))
    broad = wide(xp, x)
    inverse = 1 / xp.sqrt(xp.mean(broad * broad, axis=axes, keepdims=True) + epsilon)
    out = xp.astype(broad * inverse, x.dtype) * scale
    return out if outputs == 1 else (out, inverse)


@implements("RootMeanSquare", domain=INTERNAL)
def root_mean_square(xp: Any, x: Array, *, epsilon: float) -> Array:
    """x / sqrt(mean x^2 + epsilon), over the last axis"""
    return x * (1 / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + epsilon))


def _per_channel(xp: Any, values: Array, rank: int) -> Array:
    return xp.reshape(values, (-1, *[1] * (rank - 2)))


@implements("BatchNormalization")
def batch_norm(
    xp: Any,
    x: Array,
    scale: Array,
    bias: Array,
    mean: Array,
    variance: Array,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
) -> Array:
    """(x - mean) / sqrt(variance + epsilon) scale + bias, with stored statistics"""
    factor = scale / xp.sqrt(variance + epsilon)
    return x * _per_channel(xp, factor, x.ndim) + _per_channel(xp, bias - mean * factor, x.ndim)


@implements("InstanceNormalization")
def instance_norm(xp: Any, x: Array, scale: Array, bias: Array, *, epsilon: float = 1e-5) -> Array:
    """each channel of each sample standardised, then times scale, plus bias"""
    normal, _, _ = _standardised(xp, wide(xp, x), tuple(range(2, x.ndim)), epsilon)
    return xp.astype(normal, x.dtype) * _per_channel(xp, scale, x.ndim) + _per_channel(xp, bias, x.ndim)


@implements("GroupNormalization")
def group_norm(
    xp: Any,
    x: Array,
    scale: Array,
    bias: Array,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    opset: int,
) -> Array:
    """each group of channels of each sample standardised, then times scale, plus bias (of groups before opset 21)"""
    grouped = xp.reshape(wide(xp, x), (x.shape[0], num_groups, -1))
    normal, _, _ = _standardised(xp, grouped, (2,), epsilon)
    normal = xp.astype(normal, x.dtype)
    if opset < 21:
        return xp.reshape(normal * xp.reshape(scale, (-1, 1)) + xp.reshape(bias, (-1, 1)), x.shape)
    return xp.reshape(normal, x.shape) * _per_channel(xp, scale, x.ndim) + _per_channel(xp, bias, x.ndim)


@implements("LpNormalization")
def lp_norm(xp: Any, x: Array, *, axis: int = -1, p: int = 2) -> Array:
    """x / p-norm(x) along an axis; 0 where the norm is 0"""
    norm = xp.sum(xp.abs(x), axis=axis, keepdims=True) if p == 1 else xp.sqrt(xp.sum(x * x, axis=axis, keepdims=True))
    return xp.where(norm == 0, xp.zeros_like(x), x / xp.where(norm == 0, xp.ones_like(norm), norm))
