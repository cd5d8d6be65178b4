"""Pooling: for each place of the kernel, a strided view of the padded input.

The view holds the element that each window has at this place. So a sum or a maximum over views pools all windows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from hyperclone_onnx.frameworks.compiling.ops.convolution import spatial_pads
from hyperclone_onnx.frameworks.compiling.registry import Array, implements

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Windows:
    """How windows lie over the spatial axes. `around` is the padding (before, after), with what rounding up adds."""

    kernel: Sizes
    strides: Sizes
    dilations: Sizes
    around: tuple[tuple[Any, Any], ...]
    counts: tuple[Any, ...]
    """The number of windows along each axis."""

    def pieces(self, padded: Array) -> Iterator[tuple[Sizes, Array]]:
        """Each place of the kernel, with the elements that all windows have there."""
        for place in itertools.product(*map(range, self.kernel)):
            cut = tuple(
                slice(i * dilation, i * dilation + (count - 1) * stride + 1, stride)
                for i, dilation, count, stride in zip(place, self.dilations, self.counts, self.strides, strict=True)
            )
            yield place, padded[(slice(None), slice(None), *cut)]


def windows(
    sizes: tuple[Any, ...],
    kernel: Sizes,
    strides: Sizes | None,
    dilations: Sizes | None,
    auto_pad: str,
    pads: Sizes | None,
    ceil_mode: int,
) -> Windows:
    """The windows over axes of these sizes. No window begins in the padding after the end."""
    rank = len(kernel)
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    around, counts = [], []
    padding = spatial_pads(auto_pad, pads, sizes, kernel, strides, dilations)
    for size, width, stride, dilation, (before, after) in zip(sizes, kernel, strides, dilations, padding, strict=True):
        room = size + before + after - (width - 1) * dilation - 1
        count = room // stride + 1
        if ceil_mode and auto_pad == "NOTSET":
            count = -(-room // stride) + 1
            count = count - 1 if (count - 1) * stride >= size + before else count
        counts.append(count)
        missing = (count - 1) * stride + (width - 1) * dilation + 1 - size - before - after
        around.append((before, after + max(missing, 0)))
    return Windows(kernel, strides, dilations, tuple(around), tuple(counts))


def padded(xp: Any, x: Array, around: tuple[tuple[Any, Any], ...], value: float) -> Array:
    """x padded with a value around its spatial axes"""
    for axis, sides in enumerate(around, 2):
        pieces = [
            xp.full((*x.shape[:axis], count, *x.shape[axis + 1 :]), value, dtype=x.dtype, device=xp.device_of(x))
            for count in sides
        ]
        x = xp.concat([pieces[0], x, pieces[1]], axis=axis) if any(sides) else x
    return x


@implements("MaxPool")
def max_pool(
    xp: Any,
    x: Array,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sizes | None = None,
    kernel_shape: Sizes,
    pads: Sizes | None = None,
    storage_order: int = 0,
    strides: Sizes | None = None,
    outputs: int = 1,
) -> Any:
    """the largest element of each window, and its place in the flattened input"""
    form = windows(x.shape[2:], kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    lowest = -math.inf if xp.isdtype(x.dtype, "real floating") else int(xp.iinfo(x.dtype).min)
    pieces = form.pieces(padded(xp, x, form.around, lowest))
    if outputs == 1:
        return reduce(xp.maximum, (piece for _, piece in pieces))
    best, place = None, None
    for at, piece in pieces:
        here = _places(xp, x, form, at, storage_order)
        if best is None:
            best, place = piece, xp.broadcast_to(here, piece.shape)
        else:
            larger = piece > best
            best, place = xp.where(larger, piece, best), xp.where(larger, here, place)
    return best, place


def _places(xp: Any, x: Array, form: Windows, at: Sizes, columns_first: int) -> Array:
    """For one place of the kernel: the places in the flattened input of the elements that the windows have there."""
    along = [
        xp.arange(count, dtype=xp.dtype_of(7), device=xp.device_of(x)) * stride + i * dilation - before
        for count, stride, i, dilation, (before, _) in zip(
            form.counts, form.strides, at, form.dilations, form.around, strict=True
        )
    ]
    rank = len(along)
    places: Any = 0
    for axis in reversed(range(rank)) if columns_first else range(rank):
        places = places * x.shape[2 + axis] + xp.reshape(
            along[axis], tuple(-1 if axis == i else 1 for i in range(rank))
        )
    images = xp.arange(x.shape[0] * x.shape[1], dtype=xp.dtype_of(7), device=xp.device_of(x))
    images = xp.reshape(images, (x.shape[0], x.shape[1], *[1] * rank))
    return places + images * math.prod(x.shape[2:])


@implements("AveragePool")
def average_pool(
    xp: Any,
    x: Array,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sizes | None = None,
    kernel_shape: Sizes,
    pads: Sizes | None = None,
    strides: Sizes | None = None,
) -> Array:
    """the mean of each window; padding counts only if count_include_pad"""
    form = windows(x.shape[2:], kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    total = reduce(lambda a, b: a + b, (piece for _, piece in form.pieces(padded(xp, x, form.around, 0.0))))
    counted = xp.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=xp.device_of(x))
    if count_include_pad:
        padding = spatial_pads(auto_pad, pads, x.shape[2:], form.kernel, form.strides, form.dilations)
        counted = padded(xp, counted, tuple(padding), 1.0)
        rest = tuple((0, more - after) for (_, more), (_, after) in zip(form.around, padding, strict=True))
        counted = padded(xp, counted, rest, 0.0)
    else:
        counted = padded(xp, counted, form.around, 0.0)
    return total / reduce(lambda a, b: a + b, (piece for _, piece in form.pieces(counted)))


@implements("GlobalAveragePool")
def global_average_pool(xp: Any, x: Array) -> Array:
    """the mean over all spatial axes"""
    return xp.mean(x, axis=tuple(range(2, x.ndim)), keepdims=True)


@implements("GlobalMaxPool")
def global_max_pool(xp: Any, x: Array) -> Array:
    """the largest element over all spatial axes"""
    return xp.max(x, axis=tuple(range(2, x.ndim)), keepdims=True)
