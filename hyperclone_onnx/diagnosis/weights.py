"""How far the clones in a stored tensor are apart.

A grown weight W'[j, o] is read as a table: j numbers the axes that a contraction sums over (the plan marks them
*shared*), o all the others. The clones of unit i and those of unit u meet in a small block of it. What is told of the
clones of each side, as `distance.py` defines a distance:

* *forward*, of the clones o: the vectors are what an o computes as long as its inputs' clones are alike,
  sum over j in m^-1(i) of W'[j, o], one number for each i. All strategies start with 0, for that sum is the weight.
* *backward*, of the clones j: the vectors are what a j gets back as long as its readers' clones are alike,
  sum over o in m^-1(u) of W'[j, o], one number for each u. Without noise it starts with 0, diagonal clones included
  where their readers have clones too.
* *plain*, of either side: the vectors are the weights as they stand. This is what a clone computes, or gets back, where
  the clones of the other side are not alike.
* *matched*, of both sides together: the vectors are the weights under the best matching of the other side's clones. Of
  numbers the best matching is by order, so each block's numbers are sorted before they are compared.

Forward, backward and matched do not depend on the order of the clones of any unit. Where forward and backward are 0 in
every tensor, the clones of each unit compute the same and get the same gradients: the units are the cells of an
equitable partition. They may be 0 where the weights themselves differ, as those of diagonal clones do.
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
from hyperclone_onnx.diagnosis.value_axes import names_in
from hyperclone_onnx.plan.maps import Axis, Indices, Kept, Maps, Named, SourceMap, grown_size, index_axis
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.tensors.packing import unpack

BLOCK = 1 << 17
"""A tensor is compared in blocks of about this many numbers: a megabyte of float64 stays in a core's cache."""

WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class WeightSpread:
    """The spreads of one tensor's clones; nothing on a side that has no clones."""

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
    """One factor of a tensor's axes, and where in it the clones of a unit lie.

    Clones that are tiled, or repeated one by one, are an axis of their own when the factor is cut in two. Those of any
    other factor are given by `groups`: arrays of places, shape (units, clones).
    """

    length: int
    shared: bool
    dims: tuple[str, ...]
    cut: tuple[int, ...]
    """The shape that the factor is seen in."""
    clones: int | None = None
    """Which axis of `cut` numbers clones."""
    groups: tuple[Indices, ...] = ()

    @property
    def most(self) -> int:
        """The most clones that a unit has."""
        if self.groups:
            return max(int(group.shape[1]) for group in self.groups)
        return 1 if self.clones is None else self.cut[self.clones]


@dataclass(frozen=True)
class Layout:
    """A grown tensor as a table of the inputs that a contraction sums over by everything else."""

    axes: tuple[int, ...]
    """The shape of the tensor."""
    pieces: tuple[Piece, ...]
    """Its axes' factors, in order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor with each axis cut into its factors."""
        return tuple(piece.length for piece in self.pieces)

    def places(self, shared: bool) -> tuple[int, ...]:
        """The factors that a contraction sums over, or the others."""
        return tuple(i for i, piece in enumerate(self.pieces) if piece.shared == shared)

    def dims(self, shared: bool) -> tuple[str, ...]:
        """The dimensions that grow on one side."""
        names = (name for piece in self.pieces if piece.shared == shared for name in piece.dims)
        return tuple(dict.fromkeys(names))

    def clones(self, shared: bool) -> int:
        """The most clones that a unit of one side has."""
        return math.prod(piece.most for piece in self.pieces if piece.shared == shared)


def layout(recipe: Recipe, maps: Maps) -> Layout:
    """The table that a recipe's tensor is."""
    shared = set(recipe.shared)
    axes = tuple(math.prod(grown_size(factor, maps) for factor in axis) for axis in recipe.axes)
    pieces = (
        _piece(factor, (a, f) in shared, maps) for a, axis in enumerate(recipe.axes) for f, factor in enumerate(axis)
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
    """The table that the source's tensor is, cut into the same factors."""
    same = {name: SourceMap(each.size, tile=1) for name, each in maps.items()}
    return layout(recipe, same)


def read(tensor: ir.TensorProtocol, recipe: Recipe, table: Layout) -> Array:
    """The tensor's numbers, in the factored shape; mapped from its file, where it is in one."""
    array = tensor.numpy()
    if recipe.bits is not None:
        array = unpack(array, table.axes, recipe.bits)
    return array.reshape(table.shape)


def compare(array: Array, table: Layout) -> WeightSpread:
    """The spreads of a tensor in its factored shape, block by block."""
    seen = array.reshape([size for piece in table.pieces for size in piece.cut])
    with ThreadPoolExecutor(WORKERS) as pool:
        total, blocks = WeightSpread(), _blocks(table)
        while some := list(itertools.islice(blocks, 64 * WORKERS)):
            for made in pool.map(lambda block: _compare_block(_numbers(seen, table, block)), some):
                total += made
        return total


@dataclass(frozen=True)
class _Block:
    """Some units of each factor: a range of them, and of which of the factor's groups."""

    groups: tuple[Indices | None, ...]
    ranges: tuple[tuple[int, int], ...]


def _blocks(table: Layout) -> Iterator[_Block]:
    """All units with all their clones, `BLOCK` numbers at a time."""
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
            at = max(range(len(sizes)), key=sizes.__getitem__)
            start, stop = ranges[at]
            half = (start + stop) // 2
            pending.append((*ranges[:at], (half, stop), *ranges[at + 1 :]))
            pending.append((*ranges[:at], (start, half), *ranges[at + 1 :]))


def _numbers(seen: Array, table: Layout, block: _Block) -> Array:
    """A block as float64, shape (clones of inputs, clones of others, units)."""
    window: list[slice] = []
    for piece, group, (start, stop) in zip(table.pieces, block.groups, block.ranges, strict=True):
        whole = [slice(None)] * len(piece.cut)
        if group is None:
            whole[1 - piece.clones if piece.clones is not None else 0] = slice(start, stop)
        window += whole
    part = seen[tuple(window)]
    order: dict[str, list[int]] = {"inputs": [], "others": [], "units": []}
    at = 0
    for piece, group, (start, stop) in zip(table.pieces, block.groups, block.ranges, strict=True):
        clones = piece.clones
        if group is not None:
            chosen = group[start:stop]
            shape = part.shape
            part = np.take(part, chosen.reshape(-1), axis=at).reshape(*shape[:at], *chosen.shape, *shape[at + 1 :])
            clones = 1
        if clones is None:
            order["units"].append(at)
            at += 1
        else:
            order["inputs" if piece.shared else "others"].append(at + clones)
            order["units"].append(at + 1 - clones)
            at += 2
    sizes = [math.prod(part.shape[i] for i in order[kind]) for kind in ("inputs", "others", "units")]
    turned = part.transpose(*order["inputs"], *order["others"], *order["units"])
    return np.ascontiguousarray(turned, dtype=np.float64).reshape(sizes)


def _compare_block(numbers: Array) -> WeightSpread:
    power = squared(numbers)
    if not math.isfinite(power):
        numbers = np.where(np.isfinite(numbers), numbers, 0.0)
        power = squared(numbers)
    turned = numbers.swapaxes(0, 1)
    inputs, others = numbers.shape[:2]
    forward = plain_forward = backward = plain_backward = matched = Spread()
    if others > 1:
        plain_forward = spread(turned, power)
        forward = plain_forward if inputs == 1 else spread(numbers.sum(axis=0))
        matched += plain_forward if inputs == 1 else spread(_sorted(numbers).swapaxes(0, 1), power)
    if inputs > 1:
        plain_backward = spread(numbers, power)
        backward = plain_backward if others == 1 else spread(turned.sum(axis=0))
        matched += plain_backward if others == 1 else spread(_sorted(turned).swapaxes(0, 1), power)
    return WeightSpread(forward, backward, plain_forward, plain_backward, matched)


def _sorted(numbers: Array) -> Array:
    """The numbers in order along the first, short axis."""
    rows = list(numbers)
    for end in range(len(rows) - 1, 0, -1):
        for i in range(end):
            rows[i], rows[i + 1] = np.minimum(rows[i], rows[i + 1]), np.maximum(rows[i], rows[i + 1])
    return np.stack(rows)
