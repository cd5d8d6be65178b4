"""Operators that read or write elements at given places."""

from __future__ import annotations

import math
from typing import Any

from hyperclone_onnx.frameworks.compiling.registry import Array, Host, implements


def _places(xp: Any, indices: Array, size: Any) -> Array:
    """Indices counted from the front: in ONNX negative indices count from the end."""
    return xp.where(indices < 0, indices + size, indices)


@implements("Gather")
def gather(xp: Any, data: Array, indices: Array, *, axis: int = 0) -> Array:
    """out[.., i.., ..] = data[.., indices[i..], ..]"""
    axis %= data.ndim
    flat = xp.reshape(_places(xp, indices, data.shape[axis]), (-1,))
    rows = xp.take(data, flat, axis=axis)
    return xp.reshape(rows, (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]))


@implements("GatherElements")
def gather_elements(xp: Any, data: Array, indices: Array, *, axis: int = 0) -> Array:
    """out[.., i, ..] = data[.., indices[.., i, ..], ..]"""
    axis %= data.ndim
    window = tuple(slice(None) if i == axis else slice(0, size) for i, size in enumerate(indices.shape))
    return xp.take_along_axis(data[window], _places(xp, indices, data.shape[axis]), axis=axis)


def _linear(xp: Any, indices: Array, sizes: tuple[Any, ...]) -> Array:
    """The places in the flattened axes of tuples of indices, which lie along the last axis."""
    place = _places(xp, indices[..., 0], sizes[0])
    for i, size in enumerate(sizes[1:], 1):
        place = place * size + _places(xp, indices[..., i], size)
    return place


@implements("GatherND")
def gather_nd(xp: Any, data: Array, indices: Array, *, batch_dims: int = 0) -> Array:
    """out[b.., i..] = data[b.., *indices[b.., i..]]"""
    batch, depth = data.shape[:batch_dims], indices.shape[-1]
    picked, rest = data.shape[batch_dims : batch_dims + depth], data.shape[batch_dims + depth :]
    flat = xp.reshape(_linear(xp, indices, picked), (math.prod(batch), -1))
    offsets = xp.arange(math.prod(batch), dtype=flat.dtype, device=xp.device_of(flat))
    flat = xp.reshape(flat + xp.reshape(offsets, (-1, 1)) * math.prod(picked), (-1,))
    rows = xp.take(xp.reshape(data, (math.prod(batch) * math.prod(picked), *rest)), flat, axis=0)
    return xp.reshape(rows, (*indices.shape[:-1], *rest))


@implements("ScatterND")
def scatter_nd(xp: Any, data: Array, indices: Array, updates: Array, *, reduction: str = "none") -> Array:
    """data with out[*indices[i..]] = updates[i..], or with updates added, multiplied, ..."""
    depth = indices.shape[-1]
    rest = math.prod(data.shape[depth:])
    rows = xp.reshape(_linear(xp, indices, data.shape[:depth]), (-1, 1))
    columns = xp.arange(rest, dtype=rows.dtype, device=xp.device_of(rows))
    flat = xp.scatter(xp.reshape(data, (-1,)), xp.reshape(rows * rest + columns, (-1,)), updates, reduction)
    return xp.reshape(flat, data.shape)


@implements("ScatterElements")
def scatter_elements(
    xp: Any, data: Array, indices: Array, updates: Array, *, axis: int = 0, reduction: str = "none"
) -> Array:
    """data with out[.., indices[.., i, ..], ..] = updates[.., i, ..], or with updates added, multiplied, ..."""
    axis %= data.ndim
    place: Any = 0
    for i, size in enumerate(data.shape):
        if i == axis:
            along = _places(xp, indices, size)
        else:
            numbers = xp.arange(indices.shape[i], dtype=indices.dtype, device=xp.device_of(indices))
            along = xp.reshape(numbers, tuple(-1 if i == j else 1 for j in range(data.ndim)))
        place = place * size + along
    flat = xp.scatter(xp.reshape(data, (-1,)), xp.reshape(place, (-1,)), updates, reduction)
    return xp.reshape(flat, data.shape)


@implements("OneHot")
def one_hot(xp: Any, indices: Array, depth: Host, values: Array, *, axis: int = -1) -> Array:
    """out[.., d, ..] = values[1] where indices is d, else values[0]"""
    depth = depth[0] if isinstance(depth, tuple) else depth
    axis %= indices.ndim + 1
    places = xp.arange(depth, dtype=indices.dtype, device=xp.device_of(indices))
    shape = tuple(-1 if i == axis else 1 for i in range(indices.ndim + 1))
    hot = xp.expand_dims(_places(xp, indices, depth), axis=axis) == xp.reshape(places, shape)
    return xp.where(hot, values[1], values[0])


@implements("CumSum")
def cumulative_sum(xp: Any, x: Array, axis: Host, *, exclusive: int = 0, reverse: int = 0) -> Array:
    """out[i] = sum of x[j] over j <= i; exclusive: j < i; reverse: from the end"""
    axis = (axis[0] if isinstance(axis, tuple) else axis) % x.ndim
    ordered = xp.flip(x, axis=axis) if reverse else x
    sums = xp.cumulative_sum(ordered, axis=axis, dtype=x.dtype)
    sums = sums - ordered if exclusive else sums
    return xp.flip(sums, axis=axis) if reverse else sums


@implements("TopK")
def top_k(xp: Any, x: Array, k: Host, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Array, Array]:
    """the k largest (or smallest) elements along an axis, and their places"""
    k, axis = (k[0] if isinstance(k, tuple) else k), axis % x.ndim
    order = xp.argsort(x, axis=axis, descending=bool(largest), stable=True)
    order = order[(*[slice(None)] * axis, slice(0, k))]
    return xp.take_along_axis(x, order, axis=axis), xp.astype(order, xp.dtype_of(7))


def _extreme_place(xp: Any, find: Any, x: Array, axis: int, keepdims: int, last: int) -> Array:
    axis %= x.ndim
    place = find(xp.flip(x, axis=axis) if last else x, axis=axis, keepdims=bool(keepdims))
    return xp.astype(x.shape[axis] - 1 - place if last else place, xp.dtype_of(7))


@implements("ArgMax")
def arg_max(xp: Any, x: Array, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Array:
    """the place of the largest element along an axis"""
    return _extreme_place(xp, xp.argmax, x, axis, keepdims, select_last_index)


@implements("ArgMin")
def arg_min(xp: Any, x: Array, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Array:
    """the place of the smallest element along an axis"""
    return _extreme_place(xp, xp.argmin, x, axis, keepdims, select_last_index)


@implements("NonZero")
def non_zero(xp: Any, x: Array) -> Array:
    """out[axis, n] = the index along this axis of the n-th element that is not 0"""
    return xp.stack(xp.nonzero(x), axis=0)


@implements("TensorScatter")
def tensor_scatter(
    xp: Any, past: Array, update: Array, starts: Array | None = None, *, axis: int = -2, mode: str = "linear"
) -> Array:
    """past with out[b, .., starts[b] + i, ..] = update[b, .., i, ..]"""
    axis %= past.ndim
    size, length = past.shape[axis], update.shape[axis]
    along = xp.arange(size, dtype=xp.dtype_of(7), device=xp.device_of(past))
    along = xp.reshape(along, tuple(-1 if i == axis else 1 for i in range(past.ndim)))
    if starts is not None:
        along = along - xp.reshape(starts, (-1, *[1] * (past.ndim - 1)))
    along = along % size if mode == "circular" else along
    source = xp.clip(along, 0, length - 1)
    rows = tuple(source.shape[i] if i in (0, axis) else n for i, n in enumerate(past.shape))
    source = xp.broadcast_to(source, (past.shape[0], *rows[1:]))
    values = xp.take_along_axis(update, source, axis=axis)
    return xp.where((along >= 0) & (along < length), values, past)
