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

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.diagnosis.distance import Array, Spread, Units, joint, spread
from hyperclone_onnx.diagnosis.value_axes import names_in
from hyperclone_onnx.maps import Axis, Indices, Maps, SourceMap, grown_size, index_axis
from hyperclone_onnx.packing import unpack
from hyperclone_onnx.plan import Recipe

BLOCK = 1 << 21
"""A tensor is compared in blocks of about this many elements, 16 MB as float64."""


@dataclass(frozen=True)
class WeightSpread:
    """The spreads of one tensor's clones; None where that side has no clones."""

    forward: Spread | None
    backward: Spread | None
    plain_forward: Spread | None
    plain_backward: Spread | None
    matched: Spread


@dataclass(frozen=True)
class Side:
    """Factors of a tensor's axes that are taken together: which places of the factored shape, and whose clones."""

    places: tuple[int, ...]
    sizes: tuple[int, ...]
    units: Units
    dims: tuple[str, ...]
    """The dimensions that grow on this side."""


@dataclass(frozen=True)
class Layout:
    """A grown tensor as a table of the inputs that a contraction sums over by everything else."""

    shape: tuple[int, ...]
    """The tensor's axes, each cut into its factors."""
    axes: tuple[int, ...]
    """The tensor's axes as they are."""
    inputs: Side
    others: Side

    @property
    def grows(self) -> bool:
        """Whether any unit has clones."""
        return self.inputs.units.repeats or self.others.units.repeats


def layout(recipe: Recipe, maps: Maps) -> Layout:
    """The table that a recipe's tensor is."""
    shared = set(recipe.shared)
    indexed: list[tuple[bool, Axis, Indices]] = []
    for a, axis in enumerate(recipe.axes):
        for f, factor in enumerate(axis):
            indexed.append(((a, f) in shared, factor, index_axis([(factor, False)], maps).source))
    shape = tuple(len(source) for _, _, source in indexed)

    def side(wanted: bool) -> Side:
        places = tuple(i for i, (is_shared, _, _) in enumerate(indexed) if is_shared == wanted)
        names = (name for i in places for name in names_in(indexed[i][1]))
        return Side(
            places,
            tuple(shape[i] for i in places),
            Units(joint([indexed[i][2] for i in places])),
            tuple(dict.fromkeys(names)),
        )

    axes = tuple(math.prod(grown_size(factor, maps) for factor in axis) for axis in recipe.axes)
    return Layout(shape, axes, side(True), side(False))


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
    forward = backward = plain_forward = plain_backward = matched = Spread()
    for block, inputs, others in _blocks(array, table):
        for rows in inputs.groups:
            for columns in others.groups:
                # (units i, their clones, units u, their clones)
                cells = block[rows[:, :, None, None], columns[None, None, :, :]]
                if columns.shape[1] > 1:
                    forward += spread(cells.sum(axis=1))
                    plain_forward += spread(cells)
                    matched += spread(np.sort(cells, axis=1))
                if rows.shape[1] > 1:
                    turned = cells.transpose(0, 2, 3, 1)
                    backward += spread(turned.sum(axis=2))
                    plain_backward += spread(turned)
                    matched += spread(np.sort(turned, axis=2))
    has_others, has_inputs = table.others.units.repeats, table.inputs.units.repeats
    return WeightSpread(
        forward if has_others else None,
        backward if has_inputs else None,
        plain_forward if has_others else None,
        plain_backward if has_inputs else None,
        matched,
    )


def _blocks(array: Array, table: Layout) -> Iterator[tuple[Array, Units, Units]]:
    """Blocks of the table, whole units each, as float64 (what is not finite is zero), with the clones within."""
    inputs, others = table.inputs, table.others
    by_inputs = inputs.units.count >= others.units.count
    cut, whole = (inputs, others) if by_inputs else (others, inputs)
    turned = array.transpose(*cut.places, *whole.places)
    width = math.prod(whole.sizes)
    for group in cut.units.groups:
        step = max(1, BLOCK // max(1, group.shape[1] * width))
        for start in range(0, len(group), step):
            part = group[start : start + step]
            rows = turned[np.unravel_index(part.reshape(-1), cut.sizes)] if cut.places else turned[None]
            block = rows.reshape(part.size, width).astype(np.float64)
            if not np.isfinite(block).all():
                block[~np.isfinite(block)] = 0.0
            own = Units(np.repeat(np.arange(len(part)), part.shape[1]))
            yield (block, own, whole.units) if by_inputs else (block.T, whole.units, own)
