"""Fake quantisation: QuantizeLinear and DequantizeLinear, as models have them that are trained to be quantised.

The gradient goes straight through the rounding, and is 0 where a value lies outside the range of the codes. Integers
have no gradient, so codes on the way from one of the two operators to the other are floating numbers (`Codes`, which
`fusions.quantisation` puts in the place of QuantizeLinear).
"""

from __future__ import annotations

from typing import Any

from hyperclone_onnx.frameworks.compiling.ops.normalisation import wide
from hyperclone_onnx.frameworks.compiling.registry import INTERNAL, Array, implements

BYTE = 2
"""ONNX's number of uint8, the type of codes if nothing says otherwise."""


def _spread(xp: Any, scale: Array, x: Array, axis: int, block: int) -> Array:
    """A scale or zero point for each element: one for all, one for each index of an axis, or one for each block."""
    if scale.ndim == 0 or (scale.ndim == 1 and scale.shape[0] == 1):
        return xp.reshape(scale, ())
    if block:
        repeated = xp.repeat(scale, block, axis=axis)
        return repeated[tuple(slice(0, size) for size in x.shape)]
    return xp.reshape(scale, tuple(-1 if i == axis % x.ndim else 1 for i in range(x.ndim)))


def _codes(
    xp: Any, x: Array, scale: Array, zero: Array | None, axis: int, block: int, output_dtype: int
) -> tuple[Array, Any]:
    """The codes as floating numbers, and their type. The gradient goes through the rounding."""
    kind = zero.dtype if zero is not None else xp.dtype_of(output_dtype or BYTE)
    limits = xp.iinfo(kind)
    values = wide(xp, x) / wide(xp, _spread(xp, scale, x, axis, block))
    shift = xp.zeros_like(values)
    if zero is not None:
        shift = shift + xp.astype(_spread(xp, zero, x, axis, block), values.dtype)
    low, high = float(limits.min), float(limits.max)
    inside = xp.minimum(xp.maximum(values, low - shift), high - shift)
    return xp.fixed(xp.round(inside)) + (inside - xp.fixed(inside)) + shift, kind


@implements("QuantizeLinear")
def quantize(
    xp: Any,
    x: Array,
    y_scale: Array,
    y_zero_point: Array | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Array:
    """round(x / scale) + zero point, within the range of the codes"""
    codes, kind = _codes(xp, x, y_scale, y_zero_point, axis, block_size, output_dtype)
    return xp.astype(codes, kind)


@implements("Codes", domain=INTERNAL)
def floating_codes(
    xp: Any,
    x: Array,
    y_scale: Array,
    y_zero_point: Array | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Array:
    """QuantizeLinear whose codes are floating numbers, so that the gradient goes through"""
    return _codes(xp, x, y_scale, y_zero_point, axis, block_size, output_dtype)[0]


@implements("DequantizeLinear")
def dequantize(
    xp: Any,
    x: Array,
    x_scale: Array,
    x_zero_point: Array | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Array:
    """(x - zero point) scale"""
    kind = xp.dtype_of(output_dtype) if output_dtype else x_scale.dtype
    scale = wide(xp, _spread(xp, x_scale, x, axis, block_size))
    codes = xp.astype(x, scale.dtype)
    if x_zero_point is not None:
        codes = codes - xp.astype(_spread(xp, x_zero_point, x, axis, block_size), scale.dtype)
    return xp.astype(codes * scale, kind)
