"""Operators that move elements without changing them."""

from __future__ import annotations

import math
from typing import Any

from hyperclone_onnx.frameworks.compiling.registry import Array, Host, implements


@implements("Reshape")
def reshape(xp: Any, x: Array, shape: Host, *, allowzero: int = 0) -> Array:
    """the elements of x in another shape, where 0 keeps a size and -1 follows from the other sizes"""
    if not allowzero:
        shape = tuple(x.shape[i] if size == 0 else size for i, size in enumerate(shape))
    return xp.reshape(x, tuple(shape))


@implements("Flatten")
def flatten(xp: Any, x: Array, *, axis: int = 1) -> Array:
    """x with two axes: the axes before `axis` in one, the others in one"""
    axis = axis if axis >= 0 else x.ndim + axis
    return xp.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


@implements("Transpose")
def transpose(xp: Any, x: Array, *, perm: tuple[int, ...] | None = None) -> Array:
    """x with its axes in another order, reversed by default"""
    return xp.permute_dims(x, tuple(perm) if perm is not None else tuple(range(x.ndim))[::-1])


@implements("Squeeze")
def squeeze(xp: Any, x: Array, axes: Host | None = None) -> Array:
    """x without axes of size 1"""
    if axes is None:
        axes = tuple(i for i, size in enumerate(x.shape) if size == 1)
    return xp.squeeze(x, axis=tuple(axes))


@implements("Unsqueeze")
def unsqueeze(xp: Any, x: Array, axes: Host) -> Array:
    """x with further axes of size 1"""
    axes = axes if isinstance(axes, tuple) else (axes,)
    rank = x.ndim + len(axes)
    places = {axis % rank for axis in axes}
    sizes = iter(x.shape)
    return xp.reshape(x, tuple(1 if i in places else next(sizes) for i in range(rank)))


@implements("Concat")
def concat(xp: Any, *operands: Array, axis: int) -> Array:
    """the operands joined along an axis"""
    return xp.concat(operands, axis=axis)


@implements("Split")
def split(
    xp: Any, x: Array, split: Host | None = None, *, axis: int = 0, num_outputs: int = 0, outputs: int
) -> tuple[Array, ...]:
    """x in pieces along an axis"""
    size = x.shape[axis]
    if split is None:
        equal = -(-size // outputs)
        split = (*[equal] * (outputs - 1), size - equal * (outputs - 1))
    axis %= x.ndim
    pieces, start = [], 0
    for length in split:
        pieces.append(x[(*[slice(None)] * axis, slice(start, start + length))])
        start = start + length
    return tuple(pieces)


def _bound(value: Any) -> Any:
    """A bound of a slice, or None for the largest integers: they mean the end of the axis."""
    return None if isinstance(value, int) and abs(value) >= 2**31 - 1 else value


@implements("Slice")
def slice_(
    xp: Any,
    x: Array,
    starts: Host,
    ends: Host,
    axes: Host | None = None,
    steps: Host | None = None,
) -> Array:
    """x[start : end : step] along each of the axes"""
    window: list[slice] = [slice(None)] * x.ndim
    backwards = []
    axes = tuple(range(len(starts))) if axes is None else axes
    steps = (1,) * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step > 0:
            window[axis] = slice(None if start == 0 else _bound(start), _bound(end), None if step == 1 else step)
            continue
        # Some frameworks cannot step backwards, so we take the same elements forwards and then flip them.
        picked = range(*slice(start, _end_backwards(end, x.shape[axis]), step).indices(x.shape[axis]))
        window[axis] = slice(picked[-1], picked[0] + 1, -step) if picked else slice(0, 0)
        backwards.append(axis % x.ndim)
    result = x[tuple(window)]
    return xp.flip(result, axis=tuple(backwards)) if backwards else result


def _end_backwards(end: Any, size: Any) -> Any:
    return None if end < -size else end


@implements("Expand")
def expand(xp: Any, x: Array, shape: Host) -> Array:
    """x repeated along its axes of size 1, to the shape to which its own shape and `shape` broadcast"""
    rank = max(x.ndim, len(shape))
    sizes = (*[1] * (rank - x.ndim), *x.shape)
    targets = (*[1] * (rank - len(shape)), *shape)
    return xp.broadcast_to(x, tuple(a if b == 1 else b for a, b in zip(sizes, targets, strict=True)))


@implements("Tile")
def tile(xp: Any, x: Array, repeats: Host) -> Array:
    """x repeated as a whole, `repeats` times along each axis"""
    return xp.tile(x, tuple(repeats))


@implements("Pad")
def pad(
    xp: Any,
    x: Array,
    pads: Host,
    value: Array | None = None,
    axes: Host | None = None,
    *,
    mode: str = "constant",
) -> Array:
    """x with elements added at both ends of its axes; a negative pad removes elements"""
    axes = range(x.ndim) if axes is None else axes
    value = 0 if value is None else value
    for position, axis in enumerate(axes):
        before, after = pads[position], pads[position + len(axes)]
        x = _pad_axis(xp, x, axis % x.ndim, before, after, mode, value)
    return x


def _pad_axis(xp: Any, x: Array, axis: int, before: Any, after: Any, mode: str, value: Array) -> Array:
    def cut(start: Any, end: Any) -> Array:
        return x[(*[slice(None)] * axis, slice(start, end))]

    size = x.shape[axis]
    if before < 0 or after < 0:
        x = cut(max(-before, 0), size - max(-after, 0))
        before, after, size = max(before, 0), max(after, 0), x.shape[axis]
    if mode == "constant":
        pieces = [_filled(xp, x, axis, before, value), x, _filled(xp, x, axis, after, value)]
    elif mode == "edge":
        first, last = cut(0, 1), cut(size - 1, size)
        pieces = [*[first] * before, x, *[last] * after]
    elif mode == "reflect":
        pieces = [xp.flip(cut(1, before + 1), axis=axis), x, xp.flip(cut(size - 1 - after, size - 1), axis=axis)]
    else:
        pieces = [cut(size - before, size), x, cut(0, after)]
    return xp.concat(pieces, axis=axis)


def _filled(xp: Any, x: Array, axis: int, count: Any, value: Array) -> Array:
    """An array like x with `count` elements along an axis, all equal to `value`."""
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    if hasattr(value, "dtype"):
        return xp.broadcast_to(xp.reshape(xp.astype(value, x.dtype), (1,) * x.ndim), shape)
    return xp.full(shape, value, dtype=x.dtype, device=xp.device_of(x))


@implements("Trilu")
def trilu(xp: Any, x: Array, k: Host | None = None, *, upper: int = 1) -> Array:
    """the part of each matrix on and above (or below) its k-th diagonal"""
    k = 0 if k is None else (k[0] if isinstance(k, tuple) else k)
    return (xp.triu if upper else xp.tril)(x, k=k)


@implements("DepthToSpace")
def depth_to_space(xp: Any, x: Array, *, blocksize: int, mode: str = "DCR") -> Array:
    """the channels moved into blocks of height and width"""
    n, channels, height, width = x.shape
    size, depth = blocksize, channels // blocksize**2
    if mode == "DCR":
        blocks = xp.permute_dims(xp.reshape(x, (n, size, size, depth, height, width)), (0, 3, 4, 1, 5, 2))
    else:
        blocks = xp.permute_dims(xp.reshape(x, (n, depth, size, size, height, width)), (0, 1, 4, 2, 5, 3))
    return xp.reshape(blocks, (n, depth, height * size, width * size))


@implements("SpaceToDepth")
def space_to_depth(xp: Any, x: Array, *, blocksize: int, mode: str = "DCR") -> Array:
    """the blocks of height and width moved into channels"""
    n, channels, height, width = x.shape
    size = blocksize
    blocks = xp.reshape(x, (n, channels, height // size, size, width // size, size))
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return xp.reshape(xp.permute_dims(blocks, order), (n, channels * size**2, height // size, width // size))
