"""Measures how far the clones in a stored tensor differ.

A grown weight W'[j, o] is read as a table. The index j numbers the axes that a contraction sums over (the plan marks
them *shared*), and o numbers the other axes. The clones of an input unit i and those of an output unit u meet in a
small block of the table. Four distances are measured (`distance.py` defines a distance of vectors):

* *forward*, of the clones o. The vector of o has one number for each input unit i: the sum over j in m^-1(i) of
  W'[j, o]. It says what o computes while the clones of its inputs are equal. Growth by any strategy begins with the
  distance 0, because the sum is the source's weight.
* *backward*, of the clones j. The vector of j has one number for each output unit u: the sum over o in m^-1(u) of
  W'[j, o]. It says which gradient j gets while the clones of its readers are equal. Growth without noise begins with
  the distance 0; for a diagonal strategy this needs readers that have clones too.
* *plain*, of either side. The vectors are the weights themselves. They say what a clone computes, or which gradient it
  gets, if the clones of the other side differ.
* *matched*, of both sides together. The vectors are the weights under the best matching of the other side's clones. The
  best matching of numbers is by their order, so the numbers of each block are sorted before they are compared.

Forward, backward and matched do not depend on the order of the clones of a unit. If forward and backward are 0 in every
tensor, the clones of each unit compute the same and get the same gradients: the units are the cells of an equitable
partition. They may be 0 although the weights differ, for example after growth by a diagonal strategy.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.diagnosis.distance import Array, Spread, groups_of, spread, squared
from hyperclone_onnx.plan.maps import Axis, Indices, Kept, Maps, Named, SourceMap, grown_size, index_axis, names_in
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.tensors.packing import unpack

BLOCK = 1 << 17
"""The number of elements in a block. A megabyte of float64 stays in the cache of a processor core."""

WORKERS = min(4, os.cpu_count() or 1)
"""The number of threads."""


@dataclass(frozen=True)
class WeightSpread:
    """The spreads of one tensor's clones. They are 0 for a side that has no clones."""

    forward: Spread = field(default_factory=Spread)
    backward: Spread = field(default_factory=Spread)
    plain_forward: Spread = field(default_factory=Spread)
    plain_backward: Spread = field(default_factory=Spread)
    matched: Spread = field(default_factory=Spread)

    def __add__(self, other: WeightSpread) -> WeightSpread:
        return WeightSpread(
            self.forward + other.forward,
            self.backward + other.backward,
            self.plain_forward + other.plain_forward,
            self.plain_backward + other.plain_backward,
            self.matched + other.matched,
        )


@dataclass(frozen=True)
class Piece:
    """One factor of a tensor's axes, and the places of the clones in it.

    A factor with the map tile or repeat is reshaped to two axes, one of which numbers the clones. The clones of a
    factor with another map are given by `groups`.
    """

    length: int
    """The grown size of the factor."""
    shared: bool
    """Whether a contraction sums over it."""
    dims: tuple[str, ...]
    """Its growing dimensions."""
    cut: tuple[int, ...]
    """The shape to which the factor is reshaped."""
    clones: int | None = None
    """The axis of `cut` that numbers the clones."""
    groups: tuple[Indices, ...] = ()
    """The places of the clones, arrays of shape (units, clones)."""

    @property
    def most(self) -> int:
        """The largest number of clones of a unit."""
        if self.groups:
            return max(int(group.shape[1]) for group in self.groups)
        return 1 if self.clones is None else self.cut[self.clones]


@dataclass(frozen=True)
class Layout:
    """A grown tensor as a table. Its two sides are the axes that a contraction sums over, and the other axes."""

    axes: tuple[int, ...]
    """The shape of the tensor."""
    pieces: tuple[Piece, ...]
    """The factors of its axes, in order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor with each axis divided into its factors."""
        return tuple(piece.length for piece in self.pieces)

    def places(self, shared: bool) -> tuple[int, ...]:
        """The positions in `shape` of the factors that a contraction sums over (`shared`), or of the others."""
        return tuple(place for place, piece in enumerate(self.pieces) if piece.shared == shared)

    def dims(self, shared: bool) -> tuple[str, ...]:
        """The growing dimensions of one side."""
        names = (name for piece in self.pieces if piece.shared == shared for name in piece.dims)
        return tuple(dict.fromkeys(names))

    def clones(self, shared: bool) -> int:
        """The largest number of clones of a unit on one side."""
        return math.prod(piece.most for piece in self.pieces if piece.shared == shared)


def layout(recipe: Recipe, maps: Maps) -> Layout:
    """The layout of the tensor that a recipe grows."""
    shared = set(recipe.shared)
    axes = tuple(math.prod(grown_size(factor, maps) for factor in axis) for axis in recipe.axes)
    pieces = (
        _piece(factor, (number, place) in shared, maps)
        for number, axis in enumerate(recipe.axes)
        for place, factor in enumerate(axis)
    )
    return Layout(axes, tuple(pieces))


def _piece(factor: Axis, shared: bool, maps: Maps) -> Piece:
    length, dims = grown_size(factor, maps), tuple(names_in(factor))
    if isinstance(factor, Kept):
        return Piece(length, shared, dims, (length,))
    if isinstance(factor, Named):
        source = maps[factor.name]
        if source.tile is not None:
            return Piece(length, shared, dims, (source.tile, source.size), 0)
        if source.repeat is not None:
            return Piece(length, shared, dims, (source.size, source.repeat), 1)
    return Piece(length, shared, dims, (length,), groups=tuple(groups_of(index_axis([(factor, False)], maps).source)))


def source_layout(recipe: Recipe, maps: Maps) -> Layout:
    """The layout of the source's tensor, with the same factors in their source sizes."""
    identity = {name: SourceMap(source_map.size, tile=1) for name, source_map in maps.items()}
    return layout(recipe, identity)


def read(tensor: ir.TensorProtocol, recipe: Recipe, table: Layout) -> Array:
    """The numbers of a tensor, in the shape `table.shape`. A tensor in a file is mapped into memory."""
    array = tensor.numpy()
    if recipe.bits is not None:
        array = unpack(array, table.axes, recipe.bits)
    return array.reshape(table.shape)


def compare(array: Array, table: Layout) -> WeightSpread:
    """Compare the clones in a tensor, block by block.

    Args:
        array: the tensor, in the shape `table.shape`.
        table: its layout.
    """
    cut = array.reshape([size for piece in table.pieces for size in piece.cut])
    with ThreadPoolExecutor(WORKERS) as pool:
        total, blocks = WeightSpread(), _blocks(table)
        while batch := list(itertools.islice(blocks, 64 * WORKERS)):
            for block_spread in pool.map(lambda block: _compare_block(_numbers(cut, table, block)), batch):
                total += block_spread
        return total


@dataclass(frozen=True)
class _Block:
    """A range of units of each factor, with all their clones."""

    groups: tuple[Indices | None, ...]
    """For each factor, the group to which the units belong; None for a factor without groups."""
    ranges: tuple[tuple[int, int], ...]
    """For each factor, the first unit, and the unit after the last one."""


def _blocks(table: Layout) -> Iterator[_Block]:
    """Divide all units into blocks of at most `BLOCK` numbers where possible."""
    for groups in itertools.product(*(piece.groups or (None,) for piece in table.pieces)):
        units, clones = [], 1
        for piece, group in zip(table.pieces, groups, strict=True):
            units.append(piece.length // piece.most if group is None else len(group))
            clones *= piece.most if group is None else group.shape[1]
        pending = [tuple((0, count) for count in units)]
        while pending:
            ranges = pending.pop()
            sizes = [stop - start for start, stop in ranges]
            if math.prod(sizes) * clones <= BLOCK or max(sizes) == 1:
                yield _Block(groups, ranges)
                continue
            longest = max(range(len(sizes)), key=sizes.__getitem__)
            start, stop = ranges[longest]
            half = (start + stop) // 2
            pending.append((*ranges[:longest], (half, stop), *ranges[longest + 1 :]))
            pending.append((*ranges[:longest], (start, half), *ranges[longest + 1 :]))


def _numbers(cut: Array, table: Layout, block: _Block) -> Array:
    """A block as float64, shape (clones of inputs, clones of others, units).

    Args:
        cut: the tensor, reshaped to the axes in `Piece.cut` of all factors.
        table: the layout of the tensor.
        block: the units of the block.
    """
    window: list[slice] = []
    for piece, group, (start, stop) in zip(table.pieces, block.groups, block.ranges, strict=True):
        whole = [slice(None)] * len(piece.cut)
        if group is None:
            whole[1 - piece.clones if piece.clones is not None else 0] = slice(start, stop)
        window += whole
    part = cut[tuple(window)]
    order: dict[str, list[int]] = {"inputs": [], "others": [], "units": []}
    axis = 0
    for piece, group, (start, stop) in zip(table.pieces, block.groups, block.ranges, strict=True):
        clones = piece.clones
        if group is not None:
            places = group[start:stop]
            shape = part.shape
            part = np.take(part, places.reshape(-1), axis=axis)
            part = part.reshape(*shape[:axis], *places.shape, *shape[axis + 1 :])
            clones = 1
        if clones is None:
            order["units"].append(axis)
            axis += 1
        else:
            order["inputs" if piece.shared else "others"].append(axis + clones)
            order["units"].append(axis + 1 - clones)
            axis += 2
    sizes = [math.prod(part.shape[axis] for axis in order[side]) for side in ("inputs", "others", "units")]
    transposed = part.transpose(*order["inputs"], *order["others"], *order["units"])
    return np.ascontiguousarray(transposed, dtype=np.float64).reshape(sizes)


def _compare_block(numbers: Array) -> WeightSpread:
    power = squared(numbers)
    if not math.isfinite(power):
        numbers = np.where(np.isfinite(numbers), numbers, 0.0)
        power = squared(numbers)
    others_first = numbers.swapaxes(0, 1)
    inputs, others = numbers.shape[:2]
    forward = plain_forward = backward = plain_backward = matched = Spread()
    if others > 1:
        plain_forward = spread(others_first, power)
        forward = plain_forward if inputs == 1 else spread(numbers.sum(axis=0))
        matched += plain_forward if inputs == 1 else spread(_sorted(numbers).swapaxes(0, 1), power)
    if inputs > 1:
        plain_backward = spread(numbers, power)
        backward = plain_backward if others == 1 else spread(others_first.sum(axis=0))
        matched += plain_backward if others == 1 else spread(_sorted(others_first).swapaxes(0, 1), power)
    return WeightSpread(forward, backward, plain_forward, plain_backward, matched)


def _sorted(numbers: Array) -> Array:
    """The numbers, sorted along the first axis.

    That axis is short, and the others are long. So whole rows are compared at a time, as in a bubble sort.
    """
    rows = list(numbers)
    for end in range(len(rows) - 1, 0, -1):
        for row in range(end):
            rows[row], rows[row + 1] = np.minimum(rows[row], rows[row + 1]), np.maximum(rows[row], rows[row + 1])
    return np.stack(rows)
