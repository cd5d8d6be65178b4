"""Layouts: how a checkpoint tensor is made from initializers.

A tensor may be a transposed initializer, a part of one, several side by side, or one with a scale or an added constant.
A layout is plain data. `laid_out` makes the checkpoint's tensor from initializers of any size, grown or not. `put_back`
is the inverse. Both drop axes of size one, because exporters add and remove such axes freely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray
from hyperclone_onnx.plan.maps import Indices

Array = npt.NDArray[Any]
Sources = Callable[[str, int], Indices]
"""For an initializer and the number of an axis (axes of size one not counted): the source index of each index."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a checkpoint tensor: ``permuted(initializer[window]) * scale + offset``.

    `window` is (axis, start, stop) in the source's indices; None means the whole initializer. `permutation` lists the
    initializer's axes in the order that they have in the checkpoint.
    """

    initializer: str
    permutation: tuple[int, ...]
    window: tuple[int, int, int] | None = None
    scale: float = 1.0
    offset: float = 0.0

    def described(self) -> str:
        """What is done to the initializer, in words."""
        words = []
        if self.window is not None:
            words.append(f"[{self.window[1]}:{self.window[2]}] of axis {self.window[0]}")
        if self.permutation != tuple(sorted(self.permutation)):
            words.append("transposed")
        if self.scale != 1.0:
            words.append(f"times {self.scale:.6g}")
        if self.offset:
            words.append(f"plus {self.offset:.6g}")
        return ", ".join(words) or "as it is"

    def to_json(self) -> dict[str, Any]:
        """The piece as plain data."""
        data: dict[str, Any] = {"initializer": self.initializer, "permutation": list(self.permutation)}
        if self.window is not None:
            data["window"] = list(self.window)
        if self.scale != 1.0:
            data["scale"] = self.scale
        if self.offset:
            data["offset"] = self.offset
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Piece:
        """Read what `to_json` gives.

        Raises:
            KeyError, TypeError, ValueError, IndexError: the data is malformed.
        """
        window = data.get("window")
        return Piece(
            data["initializer"],
            tuple(data["permutation"]),
            None if window is None else (int(window[0]), int(window[1]), int(window[2])),
            float(data.get("scale", 1.0)),
            float(data.get("offset", 0.0)),
        )


@dataclass(frozen=True)
class Layout:
    """A checkpoint tensor as pieces side by side along `axis`.

    `shape` is the tensor's shape in the source's checkpoint, axes of size one included. `merged` is set only for a
    single piece: it says how many axes of the initializer form each axis of the tensor.
    """

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    axis: int = 0
    merged: tuple[int, ...] | None = None

    def scaled(self, factor: float, offset: float = 0.0) -> Layout:
        """The layout of ``(tensor + offset) * factor - offset``."""
        return replace(
            self,
            pieces=tuple(
                replace(piece, scale=piece.scale * factor, offset=(piece.offset + offset) * factor - offset)
                for piece in self.pieces
            ),
        )

    def described(self) -> str:
        """What is done to the initializers, in words."""
        return " beside ".join(f"{piece.initializer} {piece.described()}" for piece in self.pieces)

    def to_json(self) -> dict[str, Any]:
        """The layout as plain data."""
        data: dict[str, Any] = {
            "shape": list(self.shape),
            "axis": self.axis,
            "pieces": [piece.to_json() for piece in self.pieces],
        }
        if self.merged is not None:
            data["merged"] = list(self.merged)
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Layout:
        """Read what `to_json` gives.

        Raises:
            KeyError, TypeError, ValueError, IndexError: the data is malformed.
        """
        pieces = tuple(Piece.from_json(entry) for entry in data["pieces"])
        merged = data.get("merged")
        return Layout(pieces, tuple(data["shape"]), int(data["axis"]), None if merged is None else tuple(merged))


def squeezed(array: Array) -> Array:
    """The array without its axes of size one."""
    return array.reshape(squeezed_shape(array))


def squeezed_shape(array: Array | StoredArray) -> tuple[int, ...]:
    """The shape without axes of size one."""
    return tuple(size for size in array.shape if size != 1)


class LaidOut:
    """A checkpoint tensor of the size that the initializers have, which computes its rows when they are read.

    Args:
        layout: how the tensor is made.
        read: gives the array of an initializer.
        sources: gives the source indices of an initializer's axis.
        dtype: the type to declare. It should be the initializers' type, because nothing is cast.
    """

    def __init__(self, layout: Layout, read: Callable[[str], Array], sources: Sources, dtype: Any) -> None:
        self.layout = layout
        self.read = read
        self.sources = sources
        self.dtype = np.dtype(dtype)
        self.shape = grown_shape(layout, sources)

    def release(self) -> None:
        """Forget the elements. They are read again when they are needed."""
        self.__dict__.pop("_view", None)

    @cached_property
    def _view(self) -> Array:
        """The whole tensor, for a single piece still without scale and offset.

        A single piece is a view of the initializer where NumPy can make one. So a large tensor need not be copied.
        """
        parts = [_part(piece, squeezed(self.read(piece.initializer)), self.sources) for piece in self.layout.pieces]
        whole = (
            parts[0]
            if len(parts) == 1
            else np.concatenate(
                [_affine(piece, part) for piece, part in zip(self.layout.pieces, parts, strict=True)],
                axis=self.layout.axis,
            )
        )
        return whole.reshape(self.shape)

    def __getitem__(self, window: Any) -> Array:
        part = self._view[window]
        return _affine(self.layout.pieces[0], part) if len(self.layout.pieces) == 1 else part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        array = np.asarray(self[...], dtype=dtype)
        return array.copy() if copy else array


def laid_out(layout: Layout, read: Callable[[str], Array], sources: Sources) -> Array:
    """The whole array of a checkpoint tensor."""
    return LaidOut(layout, read, sources, np.float32)[...]


def grown_shape(layout: Layout, sources: Sources) -> tuple[int, ...]:
    """The shape of the array that `laid_out` makes."""
    shapes = [_shape(piece, sources) for piece in layout.pieces]
    total = list(shapes[0])
    for shape in shapes[1:]:
        total[layout.axis] += shape[layout.axis]
    return _with_ones(layout.shape, _merged(layout, total))


def put_back(layout: Layout, array: Array, initializer: str, into: Array, sources: Sources) -> int:
    """Write the stretches of a checkpoint tensor that come from one initializer back into it.

    Args:
        layout: how the tensor is made.
        array: the checkpoint's tensor.
        initializer: the name of the initializer. Stretches of other initializers are ignored.
        into: the initializer's array, which is changed. Axes of size one may be anywhere in both arrays.
        sources: gives the source indices of an initializer's axis.

    Returns:
        The number of elements written.

    Raises:
        ValueError: the tensor does not have the shape that the layout makes.
    """
    flat = squeezed(array)
    target = squeezed(into)
    written, start = 0, 0
    for piece in layout.pieces:
        shape = _shape(piece, sources)
        stop = start + (shape[layout.axis] if shape else 1)
        if piece.initializer == initializer:
            part = flat
            if layout.merged is not None:
                part = flat.reshape(shape)
            elif shape:
                part = flat[(slice(None),) * layout.axis + (slice(start, stop),)]
            if piece.scale != 1.0 or piece.offset:
                part = ((part.astype(np.float64) - piece.offset) / piece.scale).astype(into.dtype)
            values = part.transpose(np.argsort(piece.permutation))
            chosen: tuple[Any, ...] = (...,)
            if piece.window is not None:
                chosen = (*[slice(None)] * piece.window[0], _window(piece, sources))
            target[chosen] = values
            written += values.size
        start = stop
    return written


def _part(piece: Piece, array: Array, sources: Sources) -> Array:
    """A piece of an initializer without its scale and offset."""
    if piece.window is not None:
        array = np.take(array, _window(piece, sources), axis=piece.window[0])
    return array.transpose(piece.permutation)


def _affine(piece: Piece, array: Array) -> Array:
    """The array with the piece's scale and offset, computed in float64 and rounded to the array's type."""
    if piece.scale == 1.0 and not piece.offset:
        return array
    wide = array.astype(np.float64) * piece.scale + piece.offset
    return np.asarray(wide.astype(array.dtype))


def _shape(piece: Piece, sources: Sources) -> list[int]:
    """The shape of the stretch that a piece makes."""
    sizes = {axis: len(sources(piece.initializer, axis)) for axis in piece.permutation}
    if piece.window is not None:
        sizes[piece.window[0]] = len(_window(piece, sources))
    return [sizes[axis] for axis in piece.permutation]


def _window(piece: Piece, sources: Sources) -> Indices:
    """The indices along the window's axis whose source indices lie in the window."""
    assert piece.window is not None
    axis, start, stop = piece.window
    source = sources(piece.initializer, axis)
    return np.flatnonzero((source >= start) & (source < stop))


def _merged(layout: Layout, shape: Sequence[int]) -> list[int]:
    """The shape after the axes are merged as the layout says."""
    if layout.merged is None:
        return list(shape)
    ends = np.cumsum(layout.merged).tolist()
    return [math.prod(shape[end - count : end]) for count, end in zip(layout.merged, ends, strict=True)]


def _with_ones(source: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape with axes of size one inserted where the source's shape has them."""
    rest = iter(shape)
    return tuple(1 if size == 1 else int(next(rest)) for size in source)
