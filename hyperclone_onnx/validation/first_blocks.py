"""Cuts source and grown graph behind the same value, to compare the first layers of a model too large to run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as passes

from hyperclone_onnx.graphs import is_initializer
from hyperclone_onnx.plan.maps import Maps, fills_of, index_axis
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.activations import ValueAxes, activations
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.transforms.interface import name_in_file

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Cut:
    """A value of the source that the grown graph has under the same name, repeated along its axes."""

    name: str
    axes: ValueAxes
    nodes: int
    """How many nodes of the source come before the cut."""
    bytes: int
    """The bytes of the weights before the cut, in both models together."""


def find_cut(
    dimensions: Dimensions, grown: ir.Model, plan: Plan, budget: int, in_file: Collection[str] | None = None
) -> Cut | None:
    """The last value, in graph order, that needs at most `budget` bytes of weights. None if there is none.

    At least two nodes must read the value, as in a residual stream. Growth may have scaled a value that only one node
    reads, to divide a sum in that node.

    Args:
        dimensions: the dimensions of the source.
        grown: the grown model.
        plan: the plan.
        budget: the most bytes of weights before the value, in both models together.
        in_file: the values that the source has in its file. If they are given, the value is one of them.
    """
    graph = dimensions.model.graph
    axes_of = activations(dimensions, plan)
    made = {value.name for node in grown.graph for value in node.outputs}
    weights = dimensions.constants | dimensions.picked
    best: Cut | None = None
    reached: set[ir.Value] = set()
    total = 0
    for number, node in enumerate(graph, 1):
        for value in (read for read in node.inputs if read is not None and is_initializer(read)):
            if value not in reached:
                reached.add(value)
                total += _bytes(value, grown)
        if total > budget:
            break
        for value in node.outputs:
            floating = value.dtype is not None and value.dtype.is_floating_point()
            if len(value.uses()) < 2 or value.name not in made or value in weights or not floating:
                continue
            if in_file is not None and name_in_file(value) not in in_file:
                continue
            if value.name in axes_of:
                best = Cut(value.name, axes_of[value.name], number, total)
    return best


def _bytes(value: ir.Value, grown: ir.Model) -> int:
    """The bytes of a tensor in both models."""
    own = value.const_value.nbytes if value.const_value is not None else 0
    other = grown.graph.initializers.get(value.name or "")
    return own + (own if other is None or other.const_value is None else other.const_value.nbytes)


def cut_off(model: ir.Model, name: str) -> ir.Model:
    """A copy of a model whose only output is the named value."""
    short = model.clone()
    value = next(output for node in short.graph for output in node.outputs if output.name == name)
    short.graph.outputs[:] = [value]
    passes.RemoveUnusedNodesPass()(short)
    short.metadata_props.clear()
    return short


def repeated(array: Array, axes: ValueAxes, maps: Maps) -> Array:
    """A value of the source, repeated as inside the grown graph."""
    for axis, factors in enumerate(axes):
        if factors is not None:
            index = index_axis([(factor, False) for factor in factors], maps)
            for fill in {fill for factor in factors for fill in fills_of(factor)}:
                mean = array.mean(axis=axis, keepdims=True)
                array = np.concatenate([array, mean if fill == "mean" else np.zeros_like(mean)], axis=axis)
            array = np.take(array, index.source, axis=axis)
            if index.stretch is not None:
                shape = [-1 if axis == other else 1 for other in range(array.ndim)]
                array = array * index.stretch.astype(array.dtype).reshape(shape)
    return array
