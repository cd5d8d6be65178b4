"""Source maps say which source index each grown index repeats. This module computes with them.

An axis is an expression over named dimensions (`Kept`, `Named`, `ProductOf`, `ConcatOf`). `index_axis` turns such an
expression into index vectors. The module uses only numpy and does not know ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.errors import Refused

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SourceMap:
    """A map m from grown indices [0, grown) to source indices [0, size). Every source index is used at least once.

    Exactly one of three is set: `tile` (``[0 1 2 0 1 2]``), `repeat` (``[0 0 1 1 2 2]``) or `index` (any map, as the
    list of its source indices).

    Raises:
        ValueError: not exactly one is set, a source index is not used, or `tile` or `repeat` is below 1.

    >>> SourceMap(3, tile=2).indices.tolist(), SourceMap(3, repeat=2).numbers.tolist()
    ([0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 1])
    """

    size: int
    tile: int | None = None
    repeat: int | None = None
    index: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if sum(kind is not None for kind in (self.tile, self.repeat, self.index)) != 1:
            raise ValueError("a source map is either a tile, a repeat or an index")
        times = self.tile if self.tile is not None else self.repeat
        if times is not None and times < 1:
            raise ValueError(f"a source map repeats each index at least once, not {times} times")
        if self.index is not None and set(self.index) != set(range(self.size)):
            raise ValueError(f"an index map must use every source index in [0, {self.size})")

    @property
    def grown(self) -> int:
        """The length of the grown axis."""
        if self.index is not None:
            return len(self.index)
        return self.size * (self.tile or self.repeat or 1)

    @property
    def indices(self) -> Indices:
        """The source index of each grown index, shape (grown,)."""
        return _vectors(self)[0]

    @property
    def numbers(self) -> Indices:
        """The number of each grown index among the repeats of its source index, from 0, shape (grown,)."""
        return _vectors(self)[1]

    @property
    def counts(self) -> Indices:
        """How often the source index of each grown index is repeated, shape (grown,)."""
        return _vectors(self)[2]

    def to_json(self) -> dict[str, Any]:
        """The map as plain data: ``{"tile": 2}``, ``{"repeat": 2}`` or ``{"index": [...]}``."""
        if self.index is not None:
            return {"index": list(self.index)}
        return {"tile": self.tile} if self.tile is not None else {"repeat": self.repeat}

    @staticmethod
    def from_json(size: int, data: Mapping[str, Any]) -> SourceMap:
        """The inverse of `to_json`.

        Raises:
            ValueError: see `SourceMap`.
        """
        index = data.get("index")
        return SourceMap(size, data.get("tile"), data.get("repeat"), None if index is None else tuple(index))


@lru_cache(maxsize=16)
def _vectors(source_map: SourceMap) -> tuple[Indices, Indices, Indices]:
    """The indices, numbers and counts of a map. They are cached, because all layers of a model have equal maps."""
    size, times = source_map.size, source_map.tile or source_map.repeat
    if times is not None:
        source, repeats = np.arange(size, dtype=np.int64), np.arange(times, dtype=np.int64)
        tiled = source_map.tile is not None
        indices = np.tile(source, times) if tiled else np.repeat(source, times)
        numbers = np.repeat(repeats, size) if tiled else np.tile(repeats, size)
        return indices, numbers, _constant(times, len(indices))
    indices = np.asarray(source_map.index, dtype=np.int64)
    order = np.argsort(indices, kind="stable")
    ordered = indices[order]
    numbers = np.empty(len(indices), dtype=np.int64)
    numbers[order] = np.arange(len(indices), dtype=np.int64) - np.searchsorted(ordered, ordered, side="left")
    return indices, numbers, np.bincount(indices, minlength=size)[indices]


def _constant(number: int, length: int) -> Indices:
    """A vector of equal numbers, stored as one number."""
    return np.broadcast_to(np.int64(number), (length,))


@dataclass(frozen=True)
class Kept:
    """A part of an axis that keeps its size."""

    size: int


@dataclass(frozen=True)
class Named:
    """A part of an axis that is one growing dimension, given by its name."""

    name: str


@dataclass(frozen=True)
class ProductOf:
    """Factors of an axis, outermost first."""

    parts: tuple[Axis, ...]


@dataclass(frozen=True)
class ConcatOf:
    """Segments of an axis, side by side."""

    parts: tuple[Axis, ...]


Axis = Kept | Named | ProductOf | ConcatOf
Maps = Mapping[str, SourceMap]


def axis_to_json(axis: Axis) -> Any:
    """An axis as plain data: a size, a name, or ``{"product": [...]}`` / ``{"concat": [...]}``."""
    match axis:
        case Kept(size):
            return size
        case Named(name):
            return name
        case ProductOf(parts):
            return {"product": [axis_to_json(part) for part in parts]}
        case ConcatOf(parts):
            return {"concat": [axis_to_json(part) for part in parts]}


def axis_from_json(data: Any) -> Axis:
    """The inverse of `axis_to_json`."""
    if isinstance(data, int):
        return Kept(data)
    if isinstance(data, str):
        return Named(data)
    if "product" in data:
        return ProductOf(tuple(axis_from_json(part) for part in data["product"]))
    return ConcatOf(tuple(axis_from_json(part) for part in data["concat"]))


def canonical_axis(axis: Axis, maps: Maps) -> object:
    """A key for an axis. Two axes that repeat their indices in the same way have equal keys, whatever their names."""
    match axis:
        case Kept(size):
            return size
        case Named(name):
            return maps[name]
        case ProductOf(parts) | ConcatOf(parts):
            return type(axis).__name__, tuple(canonical_axis(part, maps) for part in parts)


def grown_size(axis: Axis, maps: Maps) -> int:
    """The length of an axis in the grown model."""
    match axis:
        case Kept(size):
            return size
        case Named(name):
            return maps[name].grown
        case ProductOf(parts):
            return math.prod(grown_size(part, maps) for part in parts)
        case ConcatOf(parts):
            return sum(grown_size(part, maps) for part in parts)


def source_size(axis: Axis, maps: Maps) -> int:
    """The length of an axis in the source model."""
    match axis:
        case Kept(size):
            return size
        case Named(name):
            return maps[name].size
        case ProductOf(parts):
            return math.prod(source_size(part, maps) for part in parts)
        case ConcatOf(parts):
            return sum(source_size(part, maps) for part in parts)


@dataclass(frozen=True)
class AxisIndex:
    """The source index, the collapsed index and the repeat of every grown index of one axis.

    All arrays have shape (grown,). A dimension is *shared* if a contraction sums over it, so that its repeats divide a
    weight among themselves. The *collapsed* axis has the shared dimensions at their source size, and the other
    dimensions at their grown size. The shares of one collapsed index add up to the weight.
    """

    source_size: int
    collapsed_size: int
    source: Indices
    """The source index."""
    collapsed: Indices
    """The collapsed index."""
    number: Indices
    """The number of the repeat in the shared dimensions, from 0."""
    count: Indices
    """The number of repeats in the shared dimensions."""
    other_number: Indices
    """The number of the repeat in the other dimensions, from 0."""
    other_count: Indices
    """The number of repeats in the other dimensions."""

    @property
    def grown(self) -> int:
        """The length of the grown axis."""
        return len(self.source)

    def __getitem__(self, window: slice) -> AxisIndex:
        return AxisIndex(
            self.source_size,
            self.collapsed_size,
            self.source[window],
            self.collapsed[window],
            self.number[window],
            self.count[window],
            self.other_number[window],
            self.other_count[window],
        )


def index_axis(factors: Sequence[tuple[Axis, bool]], maps: Maps) -> AxisIndex:
    """The index vectors of an axis.

    Args:
        factors: (factor of the axis, whether it is shared), outermost first.
        maps: the source map of each named dimension.

    Raises:
        KeyError: a dimension has no map.
        Refused: the axis is longer than `LONGEST`.
    """
    return join_axes([_index(factor, shared, maps) for factor, shared in factors])


def join_axes(axes: Sequence[AxisIndex]) -> AxisIndex:
    """Several axes as one axis, whose factors they are, outermost first. No axes give an axis of size 1."""
    return reduce(_product, axes) if axes else index_kept(1)


def presented(factors: Sequence[Axis], maps: Maps) -> Indices:
    """The source index of each index of an axis of a graph input or output, shape (grown,).

    Where every index is repeated equally often, an input or output is tiled (the order of numpy.tile). The order inside
    the graph may differ: a head, for example, is cut into rotary halves. A user of the model need not know this order.
    Where the indices are repeated unequally, an input or output has the order of the graph.
    """
    index = index_axis([(factor, False) for factor in factors], maps)
    counts = np.bincount(index.source, minlength=index.source_size)
    if index.source_size == 0 or counts.min() != counts.max():
        return index.source
    return np.tile(np.arange(index.source_size, dtype=np.int64), int(counts[0]))


LONGEST = 2**31
"""The longest axis for which index vectors are computed. The axes of tensors that fit a file are far shorter."""


def index_kept(size: int) -> AxisIndex:
    """The index vectors of an axis that keeps its size.

    Raises:
        Refused: the axis is longer than `LONGEST`.
    """
    if size > LONGEST:
        raise Refused(f"an axis of {size} elements is longer than those of any tensor that could be stored")
    source = np.arange(size, dtype=np.int64)
    zero, one = _constant(0, size), _constant(1, size)
    return AxisIndex(size, size, source, source, zero, one, zero, one)


def _index(axis: Axis, shared: bool, maps: Maps) -> AxisIndex:
    match axis:
        case Kept(size):
            return index_kept(size)
        case Named(name):
            m = maps[name]
            zero, one = _constant(0, m.grown), _constant(1, m.grown)
            if shared:
                return AxisIndex(m.size, m.size, m.indices, m.indices, m.numbers, m.counts, zero, one)
            grown = np.arange(m.grown, dtype=np.int64)
            return AxisIndex(m.size, m.grown, m.indices, grown, zero, one, m.numbers, m.counts)
        case ProductOf(parts):
            return index_axis([(part, shared) for part in parts], maps)
        case ConcatOf(parts):
            return _concatenation([_index(part, shared, maps) for part in parts])


def _product(outer: AxisIndex, inner: AxisIndex) -> AxisIndex:
    def mixed(a: Indices, b: Indices, base: Indices | int) -> Indices:
        return (a[:, None] * base + b[None, :]).reshape(-1)

    return AxisIndex(
        outer.source_size * inner.source_size,
        outer.collapsed_size * inner.collapsed_size,
        mixed(outer.source, inner.source, inner.source_size),
        mixed(outer.collapsed, inner.collapsed, inner.collapsed_size),
        mixed(outer.number, inner.number, inner.count[None, :]),
        (outer.count[:, None] * inner.count[None, :]).reshape(-1),
        mixed(outer.other_number, inner.other_number, inner.other_count[None, :]),
        (outer.other_count[:, None] * inner.other_count[None, :]).reshape(-1),
    )


def _concatenation(parts: Sequence[AxisIndex]) -> AxisIndex:
    source_starts = np.cumsum([0] + [part.source_size for part in parts])
    collapsed_starts = np.cumsum([0] + [part.collapsed_size for part in parts])
    return AxisIndex(
        int(source_starts[-1]),
        int(collapsed_starts[-1]),
        np.concatenate([part.source + start for part, start in zip(parts, source_starts, strict=False)]),
        np.concatenate([part.collapsed + start for part, start in zip(parts, collapsed_starts, strict=False)]),
        np.concatenate([part.number for part in parts]),
        np.concatenate([part.count for part in parts]),
        np.concatenate([part.other_number for part in parts]),
        np.concatenate([part.other_count for part in parts]),
    )
