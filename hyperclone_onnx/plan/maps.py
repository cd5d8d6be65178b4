"""Source maps say which source index each grown index repeats. This module computes with them.

An axis is an expression over named dimensions (`Kept`, `Named`, `ProductOf`, `ConcatOf`). `index_axis` turns such an
expression into index vectors. The module uses only numpy and does not know ONNX.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.errors import Refused

Indices = npt.NDArray[np.int64]
Factors = npt.NDArray[np.float64]
Fill = Literal["mean", "zero"]
"""What stands at the indices that are no copies: the mean over the source's indices, or zero."""


@dataclass(frozen=True)
class SourceMap:
    """A map m from new indices [0, grown) to source indices [0, size).

    Exactly one is set. Of the maps that grow, every source index is used at least once: `tile` (``[0 1 2 0 1 2]``),
    `repeat` (``[0 0 1 1 2 2]``), `cycle` (the grown size, which may be any: ``[0 1 2 0 1]``) or `index` (any map, as
    the list of its source indices). The maps that shrink pick some source indices, each once: `even` (the new size; the
    indices are evenly spaced: ``[0 2 4]``), `first` (the new size: ``[0 1 2]``) or `pick` (the list of indices).

    Raises:
        ValueError: not exactly one is set, a number is not whole, a source index is not used by a map that grows, or is
            used twice by one that shrinks, or `tile` or `repeat` is below 1.

    >>> SourceMap(3, tile=2).indices.tolist(), SourceMap(3, repeat=2).numbers.tolist()
    ([0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 1])
    >>> SourceMap(3, cycle=5).indices.tolist(), SourceMap(3, cycle=5).counts.tolist()
    ([0, 1, 2, 0, 1], [2, 2, 1, 2, 2])
    >>> SourceMap(6, even=3).indices.tolist(), SourceMap(7, even=3).indices.tolist()
    ([0, 2, 4], [0, 3, 6])
    """

    size: int
    tile: int | None = None
    repeat: int | None = None
    index: tuple[int, ...] | None = None
    cycle: int | None = None
    even: int | None = None
    first: int | None = None
    pick: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("size", "tile", "repeat", "cycle", "even", "first"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        for name in ("index", "pick"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(_whole("an index", number) for number in given))
        grows = (self.tile, self.repeat, self.index, self.cycle)
        if sum(kind is not None for kind in (*grows, self.even, self.first, self.pick)) != 1:
            raise ValueError("a source map is either a tile, a repeat, a cycle or an index")
        for picked in (self.even, self.first):
            if picked is not None and not 1 <= picked <= self.size:
                raise ValueError(f"{picked} of {self.size} indices cannot be picked")
        if self.pick is not None and (
            not self.pick or len(set(self.pick)) < len(self.pick) or not set(self.pick) <= set(range(self.size))
        ):
            raise ValueError(f"a map that picks has some indices in [0, {self.size}), each once")
        if self.cycle is not None and self.cycle < self.size:
            raise ValueError(f"a cycle of {self.cycle} does not use every source index in [0, {self.size})")
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
        if self.cycle is not None:
            return self.cycle
        if self.picks:
            return len(self.pick) if self.pick is not None else self.even or self.first or 0
        return self.size * (self.tile or self.repeat or 1)

    @property
    def picks(self) -> bool:
        """Whether the map picks some of the source's indices, each once."""
        return self.even is not None or self.first is not None or self.pick is not None

    @staticmethod
    def to_size(size: int, grown: int) -> SourceMap:
        """The map that repeats all source indices in turn until there are `grown`: 0 1 2 0 1 for 5 out of 3.

        Raises:
            ValueError: `grown` is smaller than `size`.
        """
        return SourceMap(size, tile=grown // size) if grown % size == 0 else SourceMap(size, cycle=grown)

    @property
    def is_even(self) -> bool:
        """Whether every source index is repeated equally often."""
        return self.tile is not None or self.repeat is not None or bool((self.counts == self.counts[:1]).all())

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

    @property
    def stretch(self) -> Factors:
        """The factor c of each grown index on a stretched axis: sqrt(grown / (size * count)), shape (grown,).

        Of n grown channels, k hold the source's channel i. If each of them is c times as large, the mean of the squares
        over all grown channels is that of the source's channels.
        """
        return np.sqrt(self.grown / (self.size * self.counts))

    @property
    def is_cycle(self) -> bool:
        """Whether the source indices follow one another in turn: 0 1 2 0 1 2 0."""
        return self.cycle is not None or np.array_equal(self.indices, np.arange(self.grown) % self.size)

    @property
    def shrink(self) -> float:
        """The factor f of an axis that has the mean of the source's indices after whole turns of copies.

        The copies and the means have the source's mean. With f, their variance is the source's, too.
        """
        return math.sqrt(self.grown / (self.grown // self.size * self.size))

    def to_json(self) -> dict[str, Any]:
        """The map as plain data: ``{"tile": 2}``, ``{"repeat": 2}``, ``{"cycle": 5}`` or ``{"index": [...]}``.

        A map that picks is ``{"even": 3}``, ``{"first": 3}`` or ``{"pick": [...]}``.
        """
        if self.index is not None:
            return {"index": list(self.index)}
        if self.cycle is not None:
            return {"cycle": self.cycle}
        if self.pick is not None:
            return {"pick": list(self.pick)}
        if self.picks:
            return {"even": self.even} if self.even is not None else {"first": self.first}
        return {"tile": self.tile} if self.tile is not None else {"repeat": self.repeat}

    @staticmethod
    def from_json(size: int, data: Mapping[str, Any]) -> SourceMap:
        """The inverse of `to_json`.

        Raises:
            ValueError: see `SourceMap`.
        """
        index, pick = (None if data.get(name) is None else tuple(data[name]) for name in ("index", "pick"))
        numbers = {name: data.get(name) for name in ("tile", "repeat", "cycle", "even", "first")}
        return SourceMap(size, index=index, pick=pick, **numbers)


def _whole(name: str, number: Any) -> int | None:
    """A whole number, also of one of numpy's types, as an int."""
    if number is None or type(number) is int:
        return number
    try:
        return operator.index(number)
    except TypeError as problem:
        raise ValueError(f"{name} of a source map is {number!r}: give a whole number") from problem


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
    if source_map.cycle is not None:
        grown = np.arange(source_map.cycle, dtype=np.int64)
        indices = grown % size
        counts = np.bincount(indices, minlength=size)
        return indices, grown // size, counts[indices]
    if source_map.picks:
        indices = _picked(source_map)
        return indices, _constant(0, len(indices)), _constant(1, len(indices))
    indices = np.asarray(source_map.index, dtype=np.int64)
    order = np.argsort(indices, kind="stable")
    ordered = indices[order]
    numbers = np.empty(len(indices), dtype=np.int64)
    numbers[order] = np.arange(len(indices), dtype=np.int64) - np.searchsorted(ordered, ordered, side="left")
    return indices, numbers, np.bincount(indices, minlength=size)[indices]


def _picked(source_map: SourceMap) -> Indices:
    """The indices that a map picks. Evenly spaced ones have a stride where the size is a multiple of their number."""
    if source_map.pick is not None:
        return np.asarray(source_map.pick, dtype=np.int64)
    size, number = source_map.size, source_map.grown
    picked = np.arange(number, dtype=np.int64)
    if source_map.first is not None or number == 1:
        return picked
    if size % number == 0:
        return picked * (size // number)
    return (2 * picked * (size - 1) + number - 1) // (2 * (number - 1))  # numpy.linspace, rounded, in whole numbers


def _constant(number: int, length: int) -> Indices:
    """A vector of equal numbers, stored as one number."""
    return np.broadcast_to(np.int64(number), (length,))


@dataclass(frozen=True)
class Kept:
    """A part of an axis that keeps its size."""

    size: int


@dataclass(frozen=True)
class Named:
    """A part of an axis that is one growing dimension, given by its name.

    Along it, the numbers are c ** `power` times the source's, where c is the map's `stretch`. Nearly always the power
    is 0, and the numbers are copies of the source's.

    Where `fill` is set, the map is a cycle, and only its whole turns are copies. The indices after them hold the mean
    over the source's indices ("mean"), or zero ("zero"). The factor is then `SourceMap.shrink` for all indices.
    """

    name: str
    power: float = 0
    fill: Fill | None = None


@dataclass(frozen=True)
class FirstAndFurther:
    """A growing dimension of two tensors that are joined along it: first copies are the first's, further the second's.

    The joined axis is twice as long as the dimension. The power is that of `Named`.
    """

    name: str
    power: float = 0


@dataclass(frozen=True)
class ProductOf:
    """Factors of an axis, outermost first."""

    parts: tuple[Axis, ...]


@dataclass(frozen=True)
class ConcatOf:
    """Segments of an axis, side by side."""

    parts: tuple[Axis, ...]


Axis = Kept | Named | FirstAndFurther | ProductOf | ConcatOf
Maps = Mapping[str, SourceMap]


def axis_to_json(axis: Axis) -> Any:
    """An axis as plain data: a size, a name, or ``{"product": [...]}`` / ``{"concat": [...]}``.

    A name whose power is not 0 becomes ``{"stretched": name, "power": power}``; a fill is added as ``"fill": "mean"``.
    A dimension of two joined tensors becomes ``{"further": name}``, with its power if that is not 0.
    """
    match axis:
        case Kept(size):
            return size
        case Named(name, power, fill):
            data = {"stretched": name, "power": power, "fill": fill}
            return name if power == 0 and fill is None else {k: value for k, value in data.items() if value is not None}
        case FirstAndFurther(name, power):
            return {"further": name} if power == 0 else {"further": name, "power": power}
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
    if "stretched" in data:
        return Named(data["stretched"], data["power"], data.get("fill"))
    if "further" in data:
        return FirstAndFurther(data["further"], data.get("power", 0))
    if "product" in data:
        return ProductOf(tuple(axis_from_json(part) for part in data["product"]))
    return ConcatOf(tuple(axis_from_json(part) for part in data["concat"]))


def canonical_axis(axis: Axis, maps: Maps) -> object:
    """A key for an axis. Two axes that repeat their indices in the same way have equal keys, whatever their names."""
    match axis:
        case Kept(size):
            return size
        case Named(name, power, fill):
            return (maps[name], power, fill) if power or fill else maps[name]
        case FirstAndFurther(name, power):
            return "FirstAndFurther", maps[name], power
        case ProductOf(parts) | ConcatOf(parts):
            return type(axis).__name__, tuple(canonical_axis(part, maps) for part in parts)


def has_power(axis: Axis) -> bool:
    """Whether any part of an axis has a power of its map's stretch, or a fill."""
    match axis:
        case Kept():
            return False
        case Named(_, power, fill):
            return power != 0 or fill is not None
        case FirstAndFurther(_, power):
            return power != 0
        case ProductOf(parts) | ConcatOf(parts):
            return any(map(has_power, parts))


def with_powers(axis: Axis, factor: float) -> Axis:
    """An axis with every power of a stretch multiplied by a number."""
    match axis:
        case Kept():
            return axis
        case Named(name, power, fill):
            return Named(name, power * factor, fill)
        case FirstAndFurther(name, power):
            return FirstAndFurther(name, power * factor)
        case ProductOf(parts):
            return ProductOf(tuple(with_powers(part, factor) for part in parts))
        case ConcatOf(parts):
            return ConcatOf(tuple(with_powers(part, factor) for part in parts))


def with_fill(axis: Axis, fill: Fill) -> Axis:
    """An axis with something else at the indices that are no copies, where it has such."""
    match axis:
        case Kept() | FirstAndFurther():
            return axis
        case Named():
            return axis if axis.fill is None else Named(axis.name, axis.power, fill)
        case ProductOf(parts):
            return ProductOf(tuple(with_fill(part, fill) for part in parts))
        case ConcatOf(parts):
            return ConcatOf(tuple(with_fill(part, fill) for part in parts))


def plain(axis: Axis) -> Axis:
    """An axis all of whose indices are copies of the source's, without factors."""
    match axis:
        case Kept():
            return axis
        case Named(name):
            return Named(name)
        case FirstAndFurther(name):
            return FirstAndFurther(name)
        case ProductOf(parts):
            return ProductOf(tuple(map(plain, parts)))
        case ConcatOf(parts):
            return ConcatOf(tuple(map(plain, parts)))


def fills_of(axis: Axis) -> set[Fill]:
    """What stands at indices of an axis that are no copies; empty where all are copies."""
    match axis:
        case Kept() | FirstAndFurther():
            return set()
        case Named(_, _, fill):
            return set() if fill is None else {fill}
        case ProductOf(parts) | ConcatOf(parts):
            return set().union(*map(fills_of, parts))


def names_in(axis: Axis) -> list[str]:
    """The dimensions of which an axis consists, in order."""
    if isinstance(axis, Named | FirstAndFurther):
        return [axis.name]
    return [name for part in axis.parts for name in names_in(part)] if not isinstance(axis, Kept) else []


def grown_size(axis: Axis, maps: Maps) -> int:
    """The length of an axis in the grown model."""
    match axis:
        case Kept(size):
            return size
        case Named(name) | FirstAndFurther(name):
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
        case FirstAndFurther(name):
            return 2 * maps[name].size
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
    stretch: Factors | None = None
    """The factor of each index; None where all are 1. Equal source indices have equal factors."""

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
            None if self.stretch is None else self.stretch[window],
        )

    @property
    def source_stretch(self) -> Factors | None:
        """The factor of each source index, shape (source_size,); None where all are 1."""
        if self.stretch is None:
            return None
        factors = np.ones(self.source_size)
        factors[self.source] = self.stretch
        return factors


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
    Where the indices are repeated unequally, an input or output has the order of the graph, in which the indices that
    hold a mean or zero inside are copies, too.
    """
    index = index_axis([(plain(factor), False) for factor in factors], maps)
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
        case Named(name, power, fill) if fill is not None:
            return _filled(maps[name], power, shared)
        case Named(name, power):
            m = maps[name]
            zero, one = _constant(0, m.grown), _constant(1, m.grown)
            stretch = m.stretch**power if power else None
            if shared:
                return AxisIndex(m.size, m.size, m.indices, m.indices, m.numbers, m.counts, zero, one, stretch)
            grown = np.arange(m.grown, dtype=np.int64)
            return AxisIndex(m.size, m.grown, m.indices, grown, zero, one, m.numbers, m.counts, stretch)
        case FirstAndFurther(name, power):
            m = maps[name]
            zero, one, grown = _constant(0, m.grown), _constant(1, m.grown), np.arange(m.grown, dtype=np.int64)
            source = m.indices + m.size * np.minimum(m.numbers, 1)
            stretch = m.stretch**power if power else None
            return AxisIndex(2 * m.size, m.grown, source, grown, zero, one, m.numbers, m.counts, stretch)
        case ProductOf(parts):
            return index_axis([(part, shared) for part in parts], maps)
        case ConcatOf(parts):
            return _concatenation([_index(part, shared, maps) for part in parts])


def _filled(m: SourceMap, power: float, shared: bool) -> AxisIndex:
    """The index of an axis whose last indices are no copies. Their source index is the size of the source."""
    grown = np.arange(m.grown, dtype=np.int64)
    copied = m.grown // m.size * m.size
    source = np.where(grown < copied, grown % m.size, m.size)
    number = np.where(grown < copied, grown // m.size, grown - copied)
    count = np.where(grown < copied, m.grown // m.size, m.grown - copied)
    zero, one = _constant(0, m.grown), _constant(1, m.grown)
    stretch = np.full(m.grown, m.shrink**power) if power else None
    if shared:
        return AxisIndex(m.size + 1, m.size + 1, source, source, number, count, zero, one, stretch)
    return AxisIndex(m.size + 1, m.grown, source, grown, zero, one, number, count, stretch)


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
        _stretch_of_product(outer, inner),
    )


def _stretch_of_product(outer: AxisIndex, inner: AxisIndex) -> Factors | None:
    if outer.stretch is None and inner.stretch is None:
        return None
    return np.multiply.outer(_factors(outer), _factors(inner)).reshape(-1)


def _factors(axis: AxisIndex) -> Factors:
    return np.ones(axis.grown) if axis.stretch is None else axis.stretch


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
        None if all(part.stretch is None for part in parts) else np.concatenate([_factors(part) for part in parts]),
    )
