"""Traces a summed operand back to the stored tensors from which linear operators compute it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Term
from hyperclone_onnx.graphs import MOVES_ELEMENTS, is_initializer
from hyperclone_onnx.plan.maps import index_axis
from hyperclone_onnx.rules.dimensions import Axes, Dimensions, Use
from hyperclone_onnx.rules.grown_terms import GrownTerms

Marks = frozenset[int]
"""The numbers of the axes of a value over which a contraction sums."""

_SHARING = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""The element types that can hold a share of a weight."""

LAYOUT = MOVES_ELEMENTS | {"Neg"}
"""Operators that only move the elements of their input, or change their sign."""


@dataclass
class Carriers:
    """The stored tensors that divide a sum: weights whose repeats share it, or quantisation scales that shrink."""

    marks: dict[Use, Marks] = field(default_factory=dict)
    """For each use of a weight, the axes along which its repeats share it."""
    scales: dict[Use, float] = field(default_factory=dict)
    """For each use of a quantisation scale, the number that multiplies the scale."""

    def add(self, other: Carriers) -> None:
        """Add the stored tensors that divide another part of the operand."""
        self.marks.update(other.marks)
        self.scales.update(other.scales)


@dataclass(frozen=True)
class Tracer:
    """Follows the axes of an operand back through the graph, for one choice of source maps.

    Args:
        dimensions: the axes of every value.
        terms: the axes, read with the source maps.
    """

    dimensions: Dimensions
    terms: GrownTerms

    def trace(self, node: ir.Node, index: int, marks: Marks) -> Carriers | None:
        """Follow the summed axes of an operand back to stored tensors, through linear operators.

        Args:
            node: the node that sums.
            index: the position of the operand among its inputs.
            marks: the summed axes of the operand.

        Returns:
            The stored tensors that can divide the sum; None where no stored tensor can.
        """
        value = node.inputs[index]
        axes = self.dimensions.axes_of(node, index)
        if value is None or axes is None:
            return None
        if is_initializer(value):
            tensor = value.const_value
            return Carriers({(node, index): marks}) if tensor is not None and tensor.dtype in _SHARING else None
        producer = value.producer()
        if len(value.uses()) > 1 or value.is_graph_output():
            return None
        if value in self.dimensions.scanned:
            scan, slot, axis = self.dimensions.scanned[value]
            return self.trace(scan, slot, frozenset(mark + (mark >= axis) for mark in marks))
        if producer is None:
            return None
        if producer.op_type == "DequantizeLinear":
            return self._trace_codes(producer, axes, marks)
        input_marks = _marks_before(self, producer, marks)
        if input_marks is None:
            return None
        carriers = Carriers()
        for slot, marks_of_input in input_marks.items():
            part = self.trace(producer, slot, marks_of_input)
            if part is None:
                return None
            carriers.add(part)
        return carriers

    def _trace_codes(self, node: ir.Node, axes: Axes, marks: Marks) -> Carriers | None:
        """The scale of a quantised weight, which shrinks; None unless every code is repeated equally often."""
        scale = node.inputs[1]
        if scale is None or not is_initializer(scale):
            return None
        repeats = [self.repeats(axes[axis]) for axis in marks if self.terms.grows(axes[axis])]
        if None in repeats:
            return None
        return Carriers(scales={(node, 1): 1.0 / math.prod(count or 1 for count in repeats)})

    def repeats(self, term: Term) -> int | None:
        """How often each index of an axis is repeated; None where the indices differ in it, or it is not known."""
        factors = self.terms.factors(term)
        if factors is None:
            return None
        counts = index_axis([(factor, True) for factor in factors], self.terms.maps).count
        return int(counts[0]) if counts.min() == counts.max() else None


def _marks_before(tracer: Tracer, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
    """The summed axes of a linear operator's inputs, from those of its output; None where it has no such axes."""
    if node.domain:
        return None
    match node.op_type:
        case "Identity" | "Neg":
            return {0: marks}
        case "Cast":
            types = [value.dtype for value in (node.inputs[0], node.outputs[0]) if value is not None]
            return {0: marks} if all(dtype is not None and dtype.is_floating_point() for dtype in types) else None
        case "Transpose":
            perm = node.attributes.get("perm")
            rank = len(tracer.dimensions.axes_of(node, 0) or ())
            order = list(perm.as_ints()) if perm is not None else list(reversed(range(rank)))
            return {0: frozenset(order[axis] for axis in marks)}
        case "Gather":
            return _marks_before_gather(tracer, node, marks)
        case "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten":
            return _marks_before_reshape(tracer, node, marks)
        case "Mul" | "Div":
            return _marks_before_product(tracer, node, marks)
        case "Add" | "Sub" | "Concat":
            return _marks_before_sum(tracer, node, marks)
    return None


def _marks_before_reshape(tracer: Tracer, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
    """A reshape passes the marks on where the growing factors keep their order and no input axis is marked in part."""
    before, after = tracer.dimensions.axes_of(node, 0), tracer.dimensions.axes.get(node.outputs[0])
    if before is None or after is None:
        return None

    def growing(axes: Axes) -> list[tuple[Term, int]]:
        return [
            (factor, axis)
            for axis, term in enumerate(axes)
            for factor in tracer.terms.space.factors(term)
            if tracer.terms.grows(factor)
        ]

    old, new = growing(before), growing(after)
    if [factor for factor, _ in old] != [factor for factor, _ in new]:
        return None
    marked = {axis for (_, axis), (_, new_axis) in zip(old, new, strict=True) if new_axis in marks}
    unmarked = {axis for (_, axis), (_, new_axis) in zip(old, new, strict=True) if new_axis not in marks}
    return None if marked & unmarked else {0: frozenset(marked)}


def _marks_before_gather(tracer: Tracer, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
    """A Gather picks whole slices of its data: it passes on the marks of every axis but the indexed one."""
    data, indices = tracer.dimensions.axes_of(node, 0), tracer.dimensions.axes_of(node, 1)
    if data is None or indices is None:
        return None
    attribute = node.attributes.get("axis")
    axis = (0 if attribute is None else attribute.as_int()) % len(data)
    end = axis + len(indices)
    if any(axis <= mark < end for mark in marks):
        return None
    return {0: frozenset(mark if mark < axis else mark - len(indices) + 1 for mark in marks)}


def _marks_before_product(tracer: Tracer, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
    """One factor of a product divides the sum: the first that is a weight and has all marked axes."""
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        operand_marks = _aligned(tracer, node, index, marks)
        if operand_marks is not None and tracer.dimensions.is_weight(node.inputs[index]):
            return {index: operand_marks}
    return None


def _marks_before_sum(tracer: Tracer, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
    """Every operand of a sum must be divided, and therefore have all marked axes."""
    marks_of_inputs: dict[int, Marks] = {}
    for index in range(len(node.inputs)):
        operand_marks = _aligned(tracer, node, index, marks)
        if operand_marks is None:
            return None
        marks_of_inputs[index] = operand_marks
    return marks_of_inputs


def _aligned(tracer: Tracer, node: ir.Node, index: int, marks: Marks) -> Marks | None:
    """Axes of the output as axes of an operand that is broadcast to it; None where the operand lacks a marked axis."""
    operand, out = tracer.dimensions.axes_of(node, index), tracer.dimensions.axes.get(node.outputs[0])
    if operand is None or out is None:
        return None
    operand_marks = frozenset(axis - (len(out) - len(operand)) for axis in marks)
    lacks_axis = any(axis < 0 or tracer.terms.space.static(operand[axis]) == 1 for axis in operand_marks)
    return None if lacks_axis else operand_marks
