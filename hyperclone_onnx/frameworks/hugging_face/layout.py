"""How a checkpoint tensor is laid out from initializers: transposed, a part of one, several side by side, plus one.

A layout is data. `laid_out` makes the checkpoint's tensor from initializers of any size, grown or not; `put_back` is
its inverse. Axes of size one carry nothing and are dropped: an exporter adds and removes them freely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.plan.maps import Indices

Array = npt.NDArray[Any]
Sources = Callable[[str, int], Indices]
"""For an axis of an initializer (size-one axes dropped): the source index of each of its indices."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a checkpoint tensor: ``permuted(initializer[window]) * scale + offset``.

    `window` is (axis, start, stop) in the source's indices, None for the whole tensor; `permutation` orders the
    initializer's axes as the checkpoint has them.
    """

    initializer: str
    permutation: tuple[int, ...]
    window: tuple[int, int, int] | None = None
    scale: float = 1.0
    offset: float = 0.0

    def described(self) -> str:
        """How the initializer became it, in words."""
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
        """The inverse of `to_json`."""
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
    """A checkpoint tensor as pieces side by side along one axis; `shape` is the source's, ones included.

    `merged`, of a single piece, says of how many of the initializer's axes each of the tensor's axes is made.
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
                replace(each, scale=each.scale * factor, offset=(each.offset + offset) * factor - offset)
                for each in self.pieces
            ),
        )

    def described(self) -> str:
        """How the initializers became it, in words."""
        return " beside ".join(f"{each.initializer} {each.described()}" for each in self.pieces)

    def to_json(self) -> dict[str, Any]:
        """The layout as plain data."""
        data: dict[str, Any] = {
            "shape": list(self.shape),
            "axis": self.axis,
            "pieces": [each.to_json() for each in self.pieces],
        }
        if self.merged is not None:
            data["merged"] = list(self.merged)
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Layout:
        """The inverse of `to_json`."""
        pieces = tuple(Piece.from_json(each) for each in data["pieces"])
        merged = data.get("merged")
        return Layout(pieces, tuple(data["shape"]), int(data["axis"]), None if merged is None else tuple(merged))


def squeezed(array: Array) -> Array:
    """Without its axes of size one."""
    return array.reshape([size for size in array.shape if size != 1])


class LaidOut:
    """The checkpoint's tensor, of the size that the initializers have; its rows are made when they are asked for."""

    def __init__(self, layout: Layout, read: Callable[[str], Array], sources: Sources, dtype: Any) -> None:
        self.layout = layout
        self.read = read
        self.sources = sources
        self.dtype = np.dtype(dtype)
        self.shape = grown_shape(layout, sources)

    @cached_property
    def _view(self) -> Array:
        """All of it; where the initializer can be looked at in another order, nothing is copied."""
        parts = [_part(each, squeezed(self.read(each.initializer)), self.sources) for each in self.layout.pieces]
        whole = (
            parts[0]
            if len(parts) == 1
            else np.concatenate(
                [_affine(each, part) for each, part in zip(self.layout.pieces, parts, strict=True)],
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
    """The whole of a checkpoint's tensor."""
    return LaidOut(layout, read, sources, np.float32)[...]


def grown_shape(layout: Layout, sources: Sources) -> tuple[int, ...]:
    """The shape that `laid_out` makes."""
    shapes = [_shape(piece, sources) for piece in layout.pieces]
    total = list(shapes[0])
    for shape in shapes[1:]:
        total[layout.axis] += shape[layout.axis]
    return _with_ones(layout.shape, _merged(layout, total))


def put_back(layout: Layout, array: Array, initializer: str, into: Array, sources: Sources) -> int:
    """Write a checkpoint tensor's stretches back into an initializer; the number of elements written.

    `into` is the initializer's array, which is changed; size-one axes may be anywhere in both.
    """
    flat = squeezed(array)
    target = into.reshape([size for size in into.shape if size != 1])
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
    if piece.window is not None:
        array = np.take(array, _window(piece, sources), axis=piece.window[0])
    return array.transpose(piece.permutation)


def _affine(piece: Piece, array: Array) -> Array:
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
    """The indices of the cut axis whose source indices lie in the window."""
    assert piece.window is not None
    axis, start, stop = piece.window
    source = sources(piece.initializer, axis)
    return np.flatnonzero((source >= start) & (source < stop))


def _merged(layout: Layout, shape: Sequence[int]) -> list[int]:
    if layout.merged is None:
        return list(shape)
    ends = np.cumsum(layout.merged).tolist()
    return [math.prod(shape[end - count : end]) for count, end in zip(layout.merged, ends, strict=True)]


def _with_ones(source: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    rest = iter(shape)
    return tuple(1 if size == 1 else int(next(rest)) for size in source)
