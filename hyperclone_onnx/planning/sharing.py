"""Who divides a sum: a contraction over a grown axis adds up every repeat.

A weight does it when the summed operand is one, reached through operators that only move its elements; otherwise a
scalar does: a quantisation scale, an existing factor, a norm's gain, Gemm's alpha, or one inserted multiplication.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import describe, is_initializer
from hyperclone_onnx.plan.edits import DivideOutput, Edit, ScaleInput, SetAttribute
from hyperclone_onnx.planning.carriers import LAYOUT, Carriers, Marks, Tracer
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.rules.dimensions import Axes, Sum, Use

Group = tuple[Sum, ...]
"""Sums of one node that one operand must carry together: those that share operands."""

LARGEST_SUM, LARGEST_PRODUCT = 2**31 - 1, 255 * 255
"""Products of bytes are added up in 32 bits."""


@dataclass(frozen=True)
class Division:
    """Where every sum over a grown axis is divided.

    `marks` has the growing axes along which a use of a stored tensor shares it among the repeats, `scales` a number
    that multiplies the tensor for a use, and `edits` the divisions in the graph.
    """

    marks: Mapping[Use, Marks]
    scales: Mapping[Use, float]
    edits: tuple[Edit, ...]


def divide_sums(growth: Growth, untie: bool) -> Division:
    """Decide, for each node that sums over a grown axis, what divides the sum.

    Args:
        growth: the source map of each dimension.
        untie: let two uses of one tensor share it along different axes, so that it is split.

    Raises:
        Refused: a sum cannot be divided.
    """
    divider = _Divider(growth, untie)
    divider.divide()
    uses = growth.dimensions.use_axes
    marks = {use: marks for use in uses if (marks := divider.marks_of(use))}
    return Division(marks, dict(divider.scales), tuple(divider.edits))


class _Divider:
    """The state of `divide_sums`: which groups of sums weights carry so far, and which scalars divide the others."""

    def __init__(self, growth: Growth, untie: bool) -> None:
        self.untie = untie
        self.edits: list[Edit] = []
        self.carried: dict[Group, Carriers] = {}
        self.scales: dict[Use, float] = {}
        self.dimensions = growth.dimensions
        self.space = self.dimensions.space
        self.terms = growth.terms
        self.tracer = Tracer(self.dimensions, self.terms)
        self._by_use: dict[Use, list[Group]] = defaultdict(list)
        self._carried_nodes: set[ir.Node] = set()

    def divide(self) -> None:
        """Divide every sum, by weights where they can and by scalars elsewhere."""
        groups = _independent([each for each in self.dimensions.sums if self.terms.grows(each.term)])
        for group in groups:
            carriers = self._weights_that_carry(group)
            if carriers is not None:
                self.carried[group] = carriers
                for use in carriers.marks:
                    self._by_use[use].append(group)
        self._keep_ties()
        self._carried_nodes = {group[0].node for group in self.carried}
        for carriers in self.carried.values():
            for use, scale in carriers.scales.items():
                self._rescale(use, scale)
        for group in groups:
            if group not in self.carried:
                quantised = [each for each in group if each.integers or each.scales]
                # One operand in several products (an input of two weights) is divided once.
                plain = {self._site(each): each for each in group if each not in quantised}
                for each in (*plain.values(), *quantised):
                    self._scale(each)

    def _rescale(self, use: Use, scale: float) -> None:
        self.scales[use] = self.scales.get(use, 1.0) * scale

    def _weights_that_carry(self, sums: Group) -> Carriers | None:
        """The stored tensors behind one operand that has all the summed axes, or None."""
        node = sums[0].node
        if any(each.power != 1.0 or each.integers or each.scales for each in sums):
            return None
        for index in range(len(node.inputs)):
            value = node.inputs[index]
            if not self.dimensions.is_weight(value):
                continue
            marks = {axis for each in sums for slot, axis in each.sites if slot == index}
            if len(marks) == len(sums):
                found = self.tracer.trace(node, index, frozenset(marks))
                if found is not None:
                    return found
        return self._weights_of_products(node, sums)

    def _weights_of_products(self, node: ir.Node, sums: Group) -> Carriers | None:
        """The stored tensors behind several operands, where each of a node's sums has a weight of its own."""
        marks: dict[int, set[int]] = defaultdict(set)
        for each in sums:
            sites = [(slot, axis) for slot, axis in each.sites if self._constant(node, slot)]
            site = next((s for s in sites if self.tracer.trace(node, s[0], frozenset({s[1]})) is not None), None)
            if site is None:
                return None
            marks[site[0]].add(site[1])
        carriers = Carriers()
        for index, axes in marks.items():
            found = self.tracer.trace(node, index, frozenset(axes))
            if found is None:
                return None
            carriers.add(found)
        return carriers

    def _keep_ties(self) -> None:
        """Where uses of one tensor would come out unlike only in what they divide, let scalars divide."""
        if self.untie:
            return
        uses: dict[ir.Value, list[tuple[Use, Axes]]] = defaultdict(list)
        for value, use, axes in self.dimensions.initializer_uses():
            uses[value].append((use, axes))
        tied = [each for value, each in uses.items() if len(each) > 1 and _size(value) > 1]
        changed = True
        while changed:
            changed = False
            for group in tied:
                if len({self.terms.canonical(self.terms.recipe_axes(axes)) for _, axes in group}) > 1:
                    continue
                if len({self.marks_of(use) for use, _ in group}) > 1:
                    members = {use for use, _ in group}
                    for each in {each for use in members for each in self._by_use[use] if each in self.carried}:
                        del self.carried[each]
                        changed = True

    def marks_of(self, use: Use) -> Marks:
        """The growing axes along which one use of a stored tensor shares it among the repeats."""
        for group in self._by_use.get(use, ()):
            if group in self.carried:
                marks = self.carried[group].marks[use]
                return frozenset(a for a in marks if self.terms.grows(self.dimensions.use_axes[use][a]))
        return frozenset()

    def _scale(self, each: Sum) -> None:
        """Divide by a scalar, or by a vector where the repeats are unequal."""
        if each.integers or each.scales:
            self._scale_quantised(each)
            return
        node = each.node
        slot, axis = self._site(each)
        operand = self.dimensions.axes_of(node, slot)
        factors = self.terms.factors(each.term)
        if operand is None or factors is None:
            raise Refused(f"{describe(node)} sums over an axis that is not known before running")
        repeats = self.tracer.repeats(each.term)
        if repeats is not None and self._fold(node, slot, float(repeats) ** -each.power):
            return
        self.edits.append(ScaleInput(node.name or "", slot, ((axis - len(operand), factors),), each.power))

    def _scale_quantised(self, each: Sum) -> None:
        """Divide by a quantisation scale; a sum that has none is divided itself, or by a factor further on.

        Raises:
            Refused: no one number divides the sum, or it would no longer fit its integers.
        """
        node, repeats = each.node, self.tracer.repeats(each.term)
        if repeats is None:
            raise Refused(
                f"{describe(node)} sums quantised values over an axis whose parts would not grow equally "
                f"({self.terms.written(each.term)}): give its parts one factor with --set"
            )
        if each.integers:
            self._check_range(each)
        if not each.scales:
            # A factor of floats takes only what it can hold exactly: what is rounded to integers again must not move.
            exact = repeats & (repeats - 1) == 0
            if not (exact and self._fold_behind(node.outputs[0], 1.0 / repeats)):
                self.edits.append(DivideOutput(node.name or "", 0, repeats))
            return
        stored = [slot for slot in each.scales if is_initializer(node.inputs[slot])]  # type: ignore[arg-type]
        self._rescale_input(each, stored[0] if stored else each.scales[0], 1.0 / repeats)
        for slot in each.biases:
            self._rescale_input(each, slot, float(repeats))

    def _rescale_input(self, each: Sum, slot: int, scale: float) -> None:
        value = each.node.inputs[slot]
        assert value is not None
        if is_initializer(value):
            self._rescale((each.node, slot), scale)
            return
        factors = self.terms.factors(each.term)
        assert factors is not None
        self.edits.append(ScaleInput(each.node.name or "", slot, ((-1, factors),), 1.0 if scale < 1.0 else -1.0))

    def _check_range(self, each: Sum) -> None:
        """Sums of products of bytes must fit 32 bits, as they did before."""
        slot, _ = each.sites[-1]
        kernel = (self.dimensions.axes_of(each.node, slot) or ())[2:] if "Conv" in each.node.op_type else ()
        products = math.prod(self.space.static(term) or 1 for term in kernel) * LARGEST_PRODUCT
        before, after = self.space.static(each.term) or 0, self.terms.grown(each.term)
        if before * products <= LARGEST_SUM < after * products:
            raise Refused(
                f"{describe(each.node)} would add up {after} products of bytes, too many for 32 bits: "
                "grow the model before it is quantised"
            )

    def _fold_behind(self, value: ir.Value, scale: float) -> bool:
        """Fold a scalar into a stored factor of the only product that reads a value; False when there is none."""
        while len(value.uses()) == 1 and not value.is_graph_output():
            use = next(iter(value.uses()))
            node = use.node
            if node.op_type == "Mul" and not node.domain:
                return self._fold_into_factor(node, 1 - use.idx, scale)
            if node.domain or use.idx or node.op_type not in (LAYOUT | {"Cast"}):
                return False
            value = node.outputs[0]
        return False

    def _fold_into_factor(self, node: ir.Node, slot: int, scale: float) -> bool:
        """Scale a factor of a product: a stored one, or a stored factor of a product that only this one reads."""
        if self._may_scale(node, slot, scale):
            self._rescale((node, slot), scale)
            return True
        value = node.inputs[slot]
        producer = None if value is None else value.producer()
        if value is None or producer is None or len(value.uses()) > 1 or value.is_graph_output():
            return False
        if producer.domain or producer.op_type != "Mul":
            return False
        return any(self._fold_into_factor(producer, inner, scale) for inner in (0, 1))

    def _site(self, each: Sum) -> tuple[int, int]:
        """The operand and the axis that a scalar divides: an activation where there is one."""
        return next((site for site in each.sites if not self._constant(each.node, site[0])), each.sites[0])

    def _constant(self, node: ir.Node, slot: int) -> bool:
        return node.inputs[slot] in self.dimensions.constants

    def _fold(self, node: ir.Node, slot: int, scale: float) -> bool:
        """Fold a scalar into something that scales already; False when nothing does."""
        if node.op_type == "Gemm" and not node.domain:
            alpha = node.attributes.get("alpha")
            scaled = scale * (alpha.as_float() if alpha else 1.0)
            if float(np.float32(scaled)) != scaled:  # an attribute is a float32: 1/3 would not be exact in a double
                return False
            self.edits.append(SetAttribute(node.name or "", "alpha", scaled))
            return True
        value = node.inputs[slot]
        producer = None if value is None else value.producer()
        while producer is not None and value is not None and len(value.uses()) == 1 and not value.is_graph_output():
            if producer.domain or producer in self._carried_nodes:
                return False
            if producer.op_type in LAYOUT:
                value = producer.inputs[0]
                producer = None if value is None else value.producer()
                continue
            slots = {"Mul": (0, 1), "Div": (0, 1), "LayerNormalization": (1, 2), "RMSNormalization": (1,)}
            given = [i for i in slots.get(producer.op_type, ()) if i < len(producer.inputs) and producer.inputs[i]]
            stored = [i for i in given if self._may_scale(producer, i, scale)]
            if producer.op_type in ("Mul", "Div"):
                stored = stored[:1]
            elif stored != given:
                return False
            for index in stored:
                inverse = producer.op_type == "Div" and index == 1
                self._rescale((producer, index), 1.0 / scale if inverse else scale)
            return bool(stored)
        return False

    def _may_scale(self, node: ir.Node, index: int, scale: float) -> bool:
        """Whether a stored factor serves this node alone, and takes a scale without showing that it is rounded."""
        value = node.inputs[index]
        if value is None or not is_initializer(value) or value.const_value is None or value.is_graph_output():
            return False
        alone = len(value.uses()) == 1 or _size(value) == 1
        exact = math.frexp(scale)[0] == 0.5
        wide = value.const_value.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
        return alone and (wide or (exact and value.const_value.dtype.is_floating_point()))


def _independent(sums: Iterable[Sum]) -> list[Group]:
    """Sums by node, those apart that share no operand (a recurrent layer sums its inputs and its state).

    What carries one of two sums over a common operand may vary along the other; sums over operands of their own
    are each right by themselves.
    """
    by_node: dict[ir.Node, list[Group]] = defaultdict(list)
    for each in sums:
        groups = by_node[each.node]
        slots = {slot for slot, _ in each.sites}
        met = [group for group in groups if any(slot in slots for other in group for slot, _ in other.sites)]
        groups[:] = [group for group in groups if group not in met]
        groups.append((*(other for group in met for other in group), each))
    return [group for groups in by_node.values() for group in groups]


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.size
