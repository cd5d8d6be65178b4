"""Computes the tensor of the source back from a grown one: the inverse of growth.

A grown weight W' has, for the source's element (i, j), all elements (a, b) whose indices are repeats of i and j. Along
an axis that a contraction sums over, the repeats are shares: they are added. Along the other axes they are copies:
their mean is taken. Factors of stretched axes and the recipe's scale are divided out. What stands at indices that are
no copies (means, zeros, drawn numbers) is left out. While all copies are equal, the result is the source's tensor, for
every law whose shares add up. After training it is the mean of what the copies have become.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.plan.maps import (
    Axis,
    AxisIndex,
    ConcatOf,
    FirstAndFurther,
    Indices,
    Kept,
    Maps,
    Named,
    ProductOf,
    source_size,
)
from hyperclone_onnx.plan.origins import Joined
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.tensors.packing import pack, packed_width, unpack
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.stored_rows import StoredRows
from hyperclone_onnx.tensors.table import BLOCK, Piece, leading_axes

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Way:
    """The way of one axis back: the grown indices that count, the source index of each, and its weight."""

    grown: int
    size: int
    """The length of the axis in the source."""
    places: Indices
    source: Indices
    weight: npt.NDArray[np.float64]

    @property
    def is_plain(self) -> bool:
        """Whether the axis does not change."""
        return len(self.places) == self.grown == self.size and bool(
            (self.source == self.places).all() and (self.weight == 1.0).all()
        )

    def times(self, inner: Way) -> Way:
        """This axis and an inner one as one axis."""

        def mixed(a: Indices, b: Indices, base: int) -> Indices:
            return (a[:, None] * base + b[None, :]).reshape(-1)

        return Way(
            self.grown * inner.grown,
            self.size * inner.size,
            mixed(self.places, inner.places, inner.grown),
            mixed(self.source, inner.source, inner.size),
            np.multiply.outer(self.weight, inner.weight).reshape(-1),
        )


_ONE = Way(1, 1, np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1))


def _joined(ways: Sequence[Way]) -> Way:
    result = _ONE
    for way in ways:
        result = result.times(way)
    return result


def _in_source(axis: Axis, maps: Maps) -> Indices:
    """The source's index for each index that `plan.maps.index_axis` calls a source index; -1 for one that is no copy.

    The two differ where an axis has a fill: the index behind the last one then stands for the fill.
    """
    match axis:
        case Named(name, _, fill) if fill is not None:
            return np.append(np.arange(maps[name].size, dtype=np.int64), -1)
        case Kept() | Named() | FirstAndFurther():
            return np.arange(source_size(axis, maps), dtype=np.int64)
        case ProductOf(parts):
            return _in_product(parts, maps)
        case ConcatOf(parts):
            starts = np.cumsum([0, *(source_size(part, maps) for part in parts)])
            shifted = [
                np.where(index < 0, -1, index + start)
                for index, start in zip((_in_source(part, maps) for part in parts), starts, strict=False)
            ]
            return np.concatenate(shifted)


def _in_product(parts: Sequence[Axis], maps: Maps) -> Indices:
    result = np.zeros(1, dtype=np.int64)
    for part in parts:
        index, size = _in_source(part, maps), source_size(part, maps)
        outer, inner = result[:, None], index[None, :]
        result = np.where((outer < 0) | (inner < 0), -1, outer * size + inner).reshape(-1)
    return result


def _way(
    factors: Sequence[Axis], index: AxisIndex, maps: Maps, first_only: bool, part: tuple[int, int] | None = None
) -> Way:
    """The way of one axis back.

    Args:
        factors: the factors of the axis.
        index: its index vectors.
        maps: the source map of each named dimension.
        first_only: whether only first copies count.
        part: (first source index, number of source indices) if only these are wanted.
    """
    source = _in_product(factors, maps)[index.source]
    counts = source >= 0
    size = math.prod(source_size(factor, maps) for factor in factors)
    if part is not None:
        start, size = part
        counts &= (source >= start) & (source < start + size)
        source = source - start
    if first_only:
        counts &= index.other_number == 0
    places = np.flatnonzero(counts)
    source, number = source[places], index.number[places]
    # Copies of one share: equal source index, equal number of the share.
    _, which, copies = np.unique(
        source * (int(number.max(initial=0)) + 1) + number, return_inverse=True, return_counts=True
    )
    weight = 1.0 / copies[which.reshape(-1)]
    if index.stretch is not None:
        weight = weight / index.stretch[places]
    return Way(index.grown, size, places, source, weight)


@dataclass(frozen=True)
class _Columns:
    """Columns of a grown row that go to different columns of the source."""

    taken: slice | Indices
    into: slice | Indices
    weight: Array | None
    """None where it is 1."""


def _column_parts(way: Way) -> list[_Columns]:
    """The columns in groups: no two of a group go to the same column."""
    order = np.argsort(way.source, kind="stable")
    ordered = way.source[order]
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered, side="left")
    parts: list[_Columns] = []
    for number in range(int(rank.max(initial=-1)) + 1):
        chosen = rank == number
        weight = way.weight[chosen]
        parts.append(
            _Columns(
                _as_slice(way.places[chosen]),
                _as_slice(way.source[chosen]),
                None if (weight == 1.0).all() else weight,
            )
        )
    return parts


def _as_slice(index: Indices) -> slice | Indices:
    """Evenly spaced indices as a slice; others as they are."""
    if len(index) == 0:
        return slice(0, 0)
    if len(index) == 1:
        return slice(int(index[0]), int(index[0]) + 1)
    steps = np.diff(index)
    step = int(steps[0])
    if step < 1 or not (steps == step).all():
        return index
    return slice(int(index[0]), int(index[-1]) + 1, step)


class CollapsedTensor:
    """The tensor of the source, computed from a grown one on demand.

    Args:
        stored: the grown tensor.
        recipe: its recipe.
        maps: the source map of each named dimension.
        strategy: its strategy.
        part: the number of the wanted tensor, if the recipe joins several.
    """

    def __init__(
        self,
        stored: ir.TensorProtocol,
        recipe: Recipe,
        maps: Maps,
        strategy: Strategy,
        part: tuple[int, int, int] | None = None,
    ) -> None:
        self.dtype = stored.dtype
        self.recipe = recipe
        self.stored = stored
        self.averages = stored.dtype.is_floating_point() and stored.dtype.bitwidth >= 8 and recipe.bits is None
        """Whether copies are averaged. Of codes and other whole numbers, the first copy is taken."""
        first_only = not self.averages or strategy.law.draws_the_rest
        self.ways = [
            _way(factors, index, maps, first_only, part[1:] if part is not None and part[0] == axis else None)
            for axis, (factors, index) in enumerate(zip(recipe.axes, recipe.index(maps), strict=True))
        ]
        self.numbers_shape = tuple(way.size for way in self.ways)
        """The shape of the numbers; the tensor's own where no byte holds several."""
        self._split = leading_axes([way.grown for way in self.ways])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the source's file."""
        if self.recipe.bits is None:
            return self.numbers_shape
        *rows, width = self.numbers_shape
        packed = (*rows, packed_width(width, self.recipe.bits))
        return packed if len(self.stored.shape) == len(packed) else (math.prod(packed),)

    @property
    def itemsize(self) -> int:
        """The bytes of a number in a file. Numbers of a few bits are not streamed."""
        return int(np.dtype(self.dtype.numpy()).itemsize)

    @cached_property
    def rows(self) -> Way:
        """The leading axes as one."""
        return _joined(self.ways[: self._split])

    @cached_property
    def columns(self) -> Way:
        """The last axes as one."""
        return _joined(self.ways[self._split :])

    @cached_property
    def _parts(self) -> list[_Columns] | None:
        return None if self.columns.is_plain else _column_parts(self.columns)

    @cached_property
    def _file(self) -> StoredRows:
        return StoredRows(self.stored, self.rows.grown, self.columns.grown * self.itemsize)

    @cached_property
    def _order(self) -> tuple[Indices, Indices]:
        """The rows in the order of their source rows, and where each source row begins in that order."""
        order = np.argsort(self.rows.source, kind="stable")
        return order, np.searchsorted(self.rows.source[order], np.arange(self.rows.size + 1))

    def block(self, first: int, count: int, scratch: Scratch) -> Array:
        """Rows [first, first + count) of the source, shape (count, columns), in the tensor's type."""
        order, starts = self._order
        chosen = order[starts[first] : starts[first + count]]
        chosen = chosen[np.argsort(self.rows.places[chosen], kind="stable")]
        places, into = self.rows.places[chosen], self.rows.source[chosen] - first
        weight = self.rows.weight[chosen]
        total = np.zeros((count, self.columns.size))
        bounds = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
        for start, end in itertools.pairwise(bounds):
            if start == end:
                continue
            raw = self._file.read(int(places[start]), end - start, scratch, "collapsed").view(self.dtype.numpy())
            numbers = self._narrowed(raw.reshape(end - start, self.columns.grown))
            if not (weight[start:end] == 1.0).all():
                numbers = numbers * weight[start:end, None]
            target = _as_slice(into[start:end])
            if isinstance(target, slice):
                total[target] += numbers
            else:
                np.add.at(total, target, numbers)
        if self.recipe.scale != 1.0:
            total /= self.recipe.scale
        with np.errstate(over="ignore", invalid="ignore"):
            return total.astype(self.dtype.numpy())

    def _narrowed(self, rows: Array) -> Array:
        """Grown rows with the columns of the source, float64."""
        if self._parts is None:
            return rows.astype(np.float64)
        out = np.zeros((len(rows), self.columns.size))
        for part in self._parts:
            numbers = rows[:, part.taken].astype(np.float64)
            if part.weight is not None:
                numbers *= part.weight
            out[:, part.into] += numbers
        return out

    @property
    def step(self) -> int:
        """The number of source rows that are computed together."""
        return max(1, BLOCK // max(1, self.columns.grown))

    def numpy(self) -> Array:
        """The whole tensor, as a file stores it."""
        if not self.averages:
            return self._picked()
        scratch, height = Scratch(), self.rows.size
        blocks = [self.block(start, min(self.step, height - start), scratch) for start in range(0, height, self.step)]
        empty = np.empty((0, self.columns.size), dtype=self.dtype.numpy())
        return np.concatenate([empty, *blocks]).reshape(self.shape)

    def _picked(self) -> Array:
        """The first copies of codes and other whole numbers."""
        array, grown = self.stored.numpy(), tuple(way.grown for way in self.ways)
        if self.recipe.bits is not None:
            array = unpack(array, grown, self.recipe.bits)
        array = array.reshape(grown)
        for axis, way in enumerate(self.ways):
            first = np.zeros(way.size, dtype=np.int64)
            first[way.source[::-1]] = way.places[::-1]
            array = np.take(array, first, axis=axis)
        if self.recipe.scale != 1.0:
            array = np.rint(array / self.recipe.scale).astype(array.dtype)
        return array if self.recipe.bits is None else pack(array, self.recipe.bits).reshape(self.shape)

    def fill(self, start: int, into: Array) -> None:
        """Fill `into` with the bytes of the tensor from `start` on. Only the rows with these bytes are computed."""
        width = self.columns.size * self.itemsize
        first, last = start // width, -(-(start + into.size) // width)
        scratch, flat = Scratch(), into.reshape(-1)
        for row in range(first, last, self.step):
            count = min(self.step, last - row)
            content = np.ascontiguousarray(self.block(row, count, scratch)).view(np.uint8).reshape(-1)
            begin, end = max(start, row * width), min(start + into.size, (row + count) * width)
            flat[begin - start : end - start] = content[begin - row * width : end - row * width]

    def close(self) -> None:
        """Release the file. The next read opens it again."""
        if self.averages and "_file" in self.__dict__:
            self._file.close()

    def pieces(self) -> Iterator[Piece]:
        """The functions that compute the tensor's bytes for a file."""
        if not self.averages:
            yield self._whole
            return
        for start in range(0, self.rows.size, self.step):
            yield partial(self._piece, start, min(self.step, self.rows.size - start))

    def _piece(self, first: int, count: int, scratch: Scratch) -> Iterator[tuple[Array, Sequence[int]]]:
        yield np.ascontiguousarray(self.block(first, count, scratch)), [first * self.columns.size * self.itemsize]

    def _whole(self, _: Scratch) -> Iterator[tuple[Array, Sequence[int]]]:
        yield np.frombuffer(self.as_lazy("").tobytes(), dtype=np.uint8), [0]

    def as_lazy(self, name: str) -> LazyCollapsed:
        """This tensor as a tensor of an ONNX graph."""
        return LazyCollapsed(self, name)


class LazyCollapsed(ir.LazyTensor):
    """A tensor of the source in a graph. The writers of this package stream `collapsed`."""

    def __init__(self, collapsed: CollapsedTensor, name: str) -> None:
        self.collapsed = collapsed
        super().__init__(
            lambda: ir.Tensor(collapsed.numpy(), dtype=collapsed.dtype, name=name),
            dtype=collapsed.dtype,
            shape=ir.Shape(collapsed.shape),
            name=name,
        )


def part_of(joined: Joined, number: int, sizes: Sequence[int]) -> tuple[int, int, int]:
    """The place of a tensor among those that are joined: (axis, first index, number of indices).

    Args:
        joined: the join.
        number: the number of the tensor.
        sizes: the size of each joined tensor along the axis of the join.
    """
    return joined.axis, sum(sizes[:number]), sizes[number]
