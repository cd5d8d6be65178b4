"""From a summed operand back to the stored tensors that make it up, through operators that are linear in them."""

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
"""The axes of a value over which a contraction sums."""

_SHARING = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""The element types that can hold a share of a weight."""


LAYOUT = MOVES_ELEMENTS | {"Neg"}
"""Operators that move the elements of their input, or change their sign."""


@dataclass
class Carriers:
    """The stored tensors that divide a sum: weights that share it along some axes, scales that shrink."""

    marks: dict[Use, Marks] = field(default_factory=dict)
    scales: dict[Use, float] = field(default_factory=dict)

    def add(self, other: Carriers) -> None:
        """Take in what divides another part of the operand."""
        self.marks.update(other.marks)
        self.scales.update(other.scales)


@dataclass(frozen=True)
class Tracer:
    """Follows axes of values under a growth."""

    dimensions: Dimensions
    terms: GrownTerms

    def trace(self, node: ir.Node, index: int, marks: Marks) -> Carriers | None:
        """Follow summed axes of an operand back to the stored tensors, through linear operators."""
        value = node.inputs[index]
        axes = self.dimensions.axes_of(node, index)
        if value is None or axes is None:
            return None
        if is_initializer(value):
            tensor = value.const_value
            return Carriers({(node, index): marks}) if tensor is not None and tensor.dtype in _SHARING else None
        producer = value.producer()
        if producer is None or len(value.uses()) > 1 or value.is_graph_output():
            return None
        if producer.op_type == "DequantizeLinear":
            return self._trace_codes(producer, axes, marks)
        inner = _marks_before(self, producer, marks)
        if inner is None:
            return None
        found = Carriers()
        for slot, before in inner.items():
            part = self.trace(producer, slot, before)
            if part is None:
                return None
            found.add(part)
        return found

    def _trace_codes(self, node: ir.Node, axes: Axes, marks: Marks) -> Carriers | None:
        """A quantised weight repeats its codes; its scale shrinks, where every code is repeated equally often."""
        scale = node.inputs[1]
        if scale is None or not is_initializer(scale):
            return None
        repeats = [self.repeats(axes[axis]) for axis in marks if self.terms.grows(axes[axis])]
        if None in repeats:
            return None
        return Carriers(scales={(node, 1): 1.0 / math.prod(count or 1 for count in repeats)})

    def repeats(self, term: Term) -> int | None:
        """How often every index of an axis is repeated; None where that differs, or is not known."""
        factors = self.terms.factors(term)
        if factors is None:
            return None
        counts = index_axis([(factor, True) for factor in factors], self.terms.maps).count
        return int(counts[0]) if counts.min() == counts.max() else None


def _marks_before(tracer: Tracer, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
    """Carry summed axes of a linear operator's output to its inputs; None where that cannot be done."""
    if node.domain:
        return None
    match node.op_type:
        case "Identity" | "Neg":
            return {0: marks}
        case "Cast":
            types = [value.dtype for value in (node.inputs[0], node.outputs[0]) if value is not None]
            return {0: marks} if all(t is not None and t.is_floating_point() for t in types) else None
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
    found = {axis for (_, axis), (_, seen) in zip(old, new, strict=True) if seen in marks}
    split = {axis for (_, axis), (_, seen) in zip(old, new, strict=True) if seen not in marks}
    return None if found & split else {0: frozenset(found)}


def _marks_before_gather(tracer: Tracer, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
    """Whole slices of the data are picked: every axis but the one that is indexed passes."""
    data, where = tracer.dimensions.axes_of(node, 0), tracer.dimensions.axes_of(node, 1)
    if data is None or where is None:
        return None
    attribute = node.attributes.get("axis")
    axis = (0 if attribute is None else attribute.as_int()) % len(data)
    end = axis + len(where)
    if any(axis <= mark < end for mark in marks):
        return None
    return {0: frozenset(mark if mark < axis else mark - len(where) + 1 for mark in marks)}


def _marks_before_product(tracer: Tracer, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        moved = _aligned(tracer, node, index, marks)
        if moved is not None and tracer.dimensions.is_weight(node.inputs[index]):
            return {index: moved}
    return None


def _marks_before_sum(tracer: Tracer, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
    found: dict[int, Marks] = {}
    for index in range(len(node.inputs)):
        moved = _aligned(tracer, node, index, marks)
        if moved is None:
            return None
        found[index] = moved
    return found


def _aligned(tracer: Tracer, node: ir.Node, index: int, marks: Marks) -> Marks | None:
    """Output axes as axes of an operand aligned at the right; None when the operand is stretched along one."""
    operand, out = tracer.dimensions.axes_of(node, index), tracer.dimensions.axes.get(node.outputs[0])
    if operand is None or out is None:
        return None
    moved = frozenset(axis - (len(out) - len(operand)) for axis in marks)
    stretched = any(axis < 0 or tracer.terms.space.static(operand[axis]) == 1 for axis in moved)
    return None if stretched else moved
