"""Decides what divides each sum over a grown axis. Such a sum adds up every repeat, and is too large without division.

A weight divides the sum where the summed operand is a weight, or is computed from weights by linear operators. Its
repeats then share the source's values. Otherwise a scalar divides the sum: a quantisation scale, an existing factor,
the gain of a norm, Gemm's alpha, or a multiplication that is inserted.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Term
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import describe, is_initializer
from hyperclone_onnx.plan.edits import (
    CountFirst,
    DivideOutput,
    Edit,
    ScaleInput,
    ScaleOutput,
    SetAttribute,
    WeighAverage,
    divisors_of,
)
from hyperclone_onnx.plan.maps import Axis, has_power
from hyperclone_onnx.planning.carriers import LAYOUT, Carriers, Marks, Tracer
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.planning.stretching import Stretches
from hyperclone_onnx.planning.widths import stretch
from hyperclone_onnx.rules.dimensions import Axes, Sum, Use
from hyperclone_onnx.rules.grown_terms import Power

Group = tuple[Sum, ...]
"""The sums of one node that have operands in common, so that the same stored tensors must divide them all."""

QUANTISERS = ("QuantizeLinear", "DynamicQuantizeLinear")
"""The operators that make codes of a floating-point value."""

LARGEST_SUM, LARGEST_PRODUCT = 2**31 - 1, 255 * 255
"""The limits of a quantised sum: products of two bytes are added up in a signed integer of 32 bits."""


@dataclass(frozen=True)
class Division:
    """What divides the sums over grown axes."""

    marks: Mapping[Use, Marks] = field(default_factory=dict)
    """For a use of a stored tensor, the growing axes along which the repeats share the tensor."""
    scales: Mapping[Use, float] = field(default_factory=dict)
    """For a use of a stored tensor, the number that multiplies the tensor."""
    edits: tuple[Edit, ...] = ()
    """The divisions that are put into the graph, and the multiplications that stretch values in it."""
    stretches: Stretches = field(default_factory=Stretches)
    """Which values and which uses of stored tensors are stretched."""


def divide_sums(growth: Growth, untie: bool) -> Division:
    """Decide, for each node that sums over a grown axis, what divides the sum.

    Args:
        growth: the source map of each dimension.
        untie: two uses of one tensor may share it along different axes. Planning then gives each use its own tensor.

    Raises:
        Refused: a sum cannot be divided. The text names the node.
    """
    divider = _Divider(growth, untie)
    divider.divide()
    uses = growth.dimensions.use_axes
    marks = {use: marks for use in uses if (marks := divider.marks_of(use))}
    return Division(marks, dict(divider.scales), tuple(divider.edits), divider.stretches)


class _Divider:
    """The state of `divide_sums`.

    `carried` has the groups of sums that weights divide. `scales` and `edits` have the scalars that divide the others.
    """

    def __init__(self, growth: Growth, untie: bool) -> None:
        self.untie = untie
        self.growth = growth
        self.stretches = Stretches()
        self.edits: list[Edit] = []
        self.carried: dict[Group, Carriers] = {}
        self.scales: dict[Use, float] = {}
        self._first: set[tuple[ir.Node, int]] = set()
        """The inputs of which only the first repeats count."""
        self.dimensions = growth.dimensions
        self.space = self.dimensions.space
        self.terms = growth.terms
        self.tracer = Tracer(self.dimensions, self.terms)
        self._by_use: dict[Use, list[Group]] = defaultdict(list)
        self._carried_nodes: set[ir.Node] = set()

    def divide(self) -> None:
        """Divide every sum: by weights where possible, otherwise by scalars.

        Raises:
            Refused: see `divide_sums`.
        """
        groups = _independent([summation for summation in self.dimensions.sums if self.terms.grows(summation.term)])
        for group in groups:
            carriers = self._weights_that_carry(group)
            if carriers is not None:
                self.carried[group] = carriers
                for use in carriers.marks:
                    self._by_use[use].append(group)
        tied = self._keep_ties()
        self.stretches = stretch(
            self.growth,
            [summation for group in self.carried for summation in group],
            [summation for group in groups if group not in self.carried for summation in group],
            tied,
        )
        self.edits += self.stretches.edits
        self._carried_nodes = {group[0].node for group in self.carried}
        for carriers in self.carried.values():
            for use, scale in carriers.scales.items():
                self._rescale(use, scale)
        for group in groups:
            if group not in self.carried:
                quantised = [summation for summation in group if summation.integers or summation.scales]
                # An operand that is summed with several others (an input of two weights) must be divided only once.
                plain = {self._site(summation): summation for summation in group if summation not in quantised}
                for summation in (*plain.values(), *quantised):
                    self._scale(summation)

    def _rescale(self, use: Use, scale: float) -> None:
        self.scales[use] = self.scales.get(use, 1.0) * scale

    def _weights_that_carry(self, sums: Group) -> Carriers | None:
        """The stored tensors that divide all sums of a group; None where no stored tensors can."""
        node = sums[0].node
        if any(summation.power != 1.0 or summation.integers or summation.scales for summation in sums):
            return None
        for index in range(len(node.inputs)):
            value = node.inputs[index]
            if not self.dimensions.is_weight(value):
                continue
            marks = {axis for summation in sums for slot, axis in summation.sites if slot == index}
            if len(marks) == len(sums):
                carriers = self.tracer.trace(node, index, frozenset(marks))
                if carriers is not None:
                    return carriers
        return self._weights_of_products(node, sums)

    def _weights_of_products(self, node: ir.Node, sums: Group) -> Carriers | None:
        """The stored tensors of several operands, where each sum of a node has its own weight; else None."""
        marks: dict[int, set[int]] = defaultdict(set)
        for summation in sums:
            sites = [(slot, axis) for slot, axis in summation.sites if self._constant(node, slot)]
            site = next((s for s in sites if self.tracer.trace(node, s[0], frozenset({s[1]})) is not None), None)
            if site is None:
                return None
            marks[site[0]].add(site[1])
        carriers = Carriers()
        for index, axes in marks.items():
            part = self.tracer.trace(node, index, frozenset(axes))
            if part is None:
                return None
            carriers.add(part)
        return carriers

    def _keep_ties(self) -> list[list[Use]]:
        """Keep a tied tensor one tensor where its uses differ only in what they share: scalars then divide the sums.

        Returns:
            The uses of each matrix that stays one.
        """
        if self.untie:
            return []
        uses: dict[ir.Value, list[tuple[Use, Axes]]] = defaultdict(list)
        for value, use, axes in self.dimensions.initializer_uses():
            uses[value].append((use, axes))
        tied = [tensor_uses for value, tensor_uses in uses.items() if len(tensor_uses) > 1 and _size(value) > 1]
        changed = True
        while changed:
            changed = False
            for tensor_uses in tied:
                if len({self.terms.canonical(self.terms.recipe_axes(axes)) for _, axes in tensor_uses}) > 1:
                    continue
                if len({self.marks_of(use) for use, _ in tensor_uses}) > 1:
                    members = {use for use, _ in tensor_uses}
                    for group in {group for use in members for group in self._by_use[use] if group in self.carried}:
                        del self.carried[group]
                        changed = True
        return [
            [use for use, _ in tensor_uses]
            for tensor_uses in tied
            if len({self.terms.canonical(self.terms.recipe_axes(axes)) for _, axes in tensor_uses}) == 1
            and len(tensor_uses[0][1]) > 1
        ]

    def marks_of(self, use: Use) -> Marks:
        """The growing axes along which the repeats share a stored tensor, for one of its uses."""
        for group in self._by_use.get(use, ()):
            if group in self.carried:
                marks = self.carried[group].marks[use]
                return frozenset(axis for axis in marks if self.terms.grows(self.dimensions.use_axes[use][axis]))
        return frozenset()

    def _scale(self, summation: Sum) -> None:
        """Divide a sum by a scalar, or by a vector where the indices are repeated unequally.

        Raises:
            Refused: the size of the summed axis is not known before the model runs.
        """
        if summation.integers or summation.scales:
            self._scale_quantised(summation)
            return
        if summation.output_only:
            self._scale_output(summation)
            return
        node = summation.node
        slot, axis = self._site(summation)
        operand = self.dimensions.axes_of(node, slot)
        factors = self.terms.factors(summation.term, self._undone(summation))
        if operand is None or factors is None:
            raise Refused(f"{describe(node)} sums over an axis whose size is not known before the model runs")
        divisor = self._divisor(summation, factors)
        if divisor is not None and self._fold(node, slot, divisor):
            return
        self.edits.append(ScaleInput(node.name or "", slot, ((axis - len(operand), factors),), summation.power))

    def _undone(self, summation: Sum) -> list[Power] | None:
        """The powers that undo the stretches of the operands of a sum; None where nothing is stretched."""
        uses = self.stretches.uses
        powers = [uses.get((summation.node, slot), {}).get(axis) for slot, axis in summation.sites]
        given = [site for site in powers if site is not None]
        return [_opposite(leaf) for leaf in zip(*given, strict=True)] if given else None

    def _divisor(self, summation: Sum, factors: tuple[Axis, ...]) -> float | None:
        """The number that multiplies all summands alike, so that their sum is right; None where they need several."""
        repeats = self.tracer.repeats(summation.term)
        if not any(map(has_power, factors)):
            return None if repeats is None else float(repeats) ** -summation.power
        divisors = divisors_of(factors, summation.power, self.terms.maps)
        return 1.0 / float(divisors[0]) if bool((divisors == divisors[:1]).all()) else None

    def _scale_output(self, summation: Sum) -> None:
        """Multiply the output of a node that divides by a sum: in a stored factor behind it, or in the graph.

        Raises:
            Refused: the indices are repeated unequally, so that no one number corrects the output.
        """
        node, repeats = summation.node, self.tracer.repeats(summation.term)
        factors = self.terms.factors(summation.term)
        if any(isinstance(edit, WeighAverage) and edit.node == node.name for edit in self.stretches.edits):
            return  # the sum counts each index once
        if repeats is None or factors is None:
            raise Refused(f"{describe(node)} divides by a norm over an axis that does not grow by one whole factor")
        if self._fold_behind(node.outputs[0], float(repeats) ** -summation.power):
            return
        slot, axis = summation.sites[0]
        rank = len(self.dimensions.axes_of(node, slot) or ())
        self.edits.append(ScaleOutput(node.name or "", 0, ((axis - rank, factors),), summation.power))

    def _scale_quantised(self, summation: Sum) -> None:
        """Divide a quantised sum by its quantisation scale. A sum without a scale is divided itself, or behind it.

        No scale divides unequal repeats. There all but the first repeat of each index count nothing.

        Raises:
            Refused: this is not possible for unequal repeats, or the sum would no longer fit 32 bits.
        """
        node, repeats = summation.node, self.tracer.repeats(summation.term)
        if repeats is None and self._count_first(summation):
            return
        if repeats is None:
            raise Refused(
                f"{describe(node)} sums quantised values over an axis whose parts would not grow equally "
                f"({self.terms.written(summation.term)}): give its parts one factor with --set"
            )
        if summation.integers:
            self._check_range(summation)
        if not summation.scales:
            # A rounded division could move a value across the boundary at which it is quantised again. So a factor of
            # floats takes the division only where it is exact: by a power of two.
            exact = repeats & (repeats - 1) == 0
            if not (exact and self._fold_behind(node.outputs[0], 1.0 / repeats)):
                self.edits.append(DivideOutput(node.name or "", 0, repeats))
            return
        stored = [slot for slot in summation.scales if is_initializer(node.inputs[slot])]  # type: ignore[arg-type]
        self._rescale_input(summation, stored[0] if stored else summation.scales[0], 1.0 / repeats)
        for slot in summation.biases:
            self._rescale_input(summation, slot, float(repeats))

    def _count_first(self, summation: Sum) -> bool:
        """Let a quantised sum count the first repeat of each index alone. False where its operand is not made so.

        The operand is a floating-point activation, or the codes of one that nothing else reads. Zero has a code in
        every quantisation, and does not change the range of the activation.
        """
        if any(average.node is summation.node for average in self.dimensions.uniform):
            return False
        for slot, axis in summation.sites:
            value = summation.node.inputs[slot]
            axes, factors = self.dimensions.axes_of(summation.node, slot), self.terms.factors(summation.term)
            if value is None or self._constant(summation.node, slot) or axes is None or factors is None:
                continue
            place: tuple[ir.Node, int] = summation.node, slot
            if value.dtype is None or not value.dtype.is_floating_point():
                producer = value.producer()
                if producer is None or producer.op_type not in QUANTISERS or value.is_graph_output():
                    continue
                if any((use.node, use.idx, summation.term) not in self._summed for use in value.uses()):
                    continue
                place = producer, 0
            if place not in self._first:
                self._first.add(place)
                edge = axis if axis < 0 else axis - len(axes)
                self.edits.append(CountFirst(place[0].name or "", place[1], ((edge, factors),)))
            return True
        return False

    @cached_property
    def _summed(self) -> set[tuple[ir.Node, int, Term]]:
        """The inputs over whose axis a node sums integers, with the term of that axis."""
        sums = [summation for summation in self.dimensions.sums if summation.integers]
        return {(summation.node, slot, summation.term) for summation in sums for slot, _ in summation.sites}

    def _rescale_input(self, summation: Sum, slot: int, scale: float) -> None:
        """Multiply an input by a number: in its stored tensor, or in the graph where the input is computed."""
        value = summation.node.inputs[slot]
        assert value is not None
        if is_initializer(value):
            self._rescale((summation.node, slot), scale)
            return
        factors = self.terms.factors(summation.term)
        assert factors is not None
        self.edits.append(ScaleInput(summation.node.name or "", slot, ((-1, factors),), 1.0 if scale < 1.0 else -1.0))

    def _check_range(self, summation: Sum) -> None:
        """Check that a sum of products of bytes still fits 32 bits, if it did so in the source.

        Raises:
            Refused: it does not.
        """
        slot, _ = summation.sites[-1]
        kernel = (self.dimensions.axes_of(summation.node, slot) or ())[2:] if "Conv" in summation.node.op_type else ()
        products = math.prod(self.space.static(term) or 1 for term in kernel) * LARGEST_PRODUCT
        before, after = self.space.static(summation.term) or 0, self.terms.grown(summation.term)
        if before * products <= LARGEST_SUM < after * products:
            raise Refused(
                f"{describe(summation.node)} would add up {after} products of bytes, too many for 32 bits: "
                "grow the model before it is quantised"
            )

    def _fold_behind(self, value: ir.Value, scale: float) -> bool:
        """Fold a scalar into a stored factor of the only product that reads a value; False where there is none."""
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
        """Scale an input of a product: a stored tensor, or a product that has a stored factor and no other reader."""
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

    def _site(self, summation: Sum) -> tuple[int, int]:
        """The operand and the axis that a scalar divides: those of an activation, if an activation is summed."""
        sites = summation.sites
        return next((site for site in sites if not self._constant(summation.node, site[0])), sites[0])

    def _constant(self, node: ir.Node, slot: int) -> bool:
        return node.inputs[slot] in self.dimensions.constants

    def _fold(self, node: ir.Node, slot: int, scale: float) -> bool:
        """Fold a scalar into Gemm's alpha, or into a stored factor in front of an operand; False if there is none."""
        if node.op_type == "Gemm" and not node.domain:
            alpha = node.attributes.get("alpha")
            scaled = scale * (alpha.as_float() if alpha else 1.0)
            # Alpha is a float32. In a model of doubles, a rounded alpha (1/3) would be the largest error.
            if float(np.float32(scaled)) != scaled:
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
        """Whether an input is a stored tensor that this node may scale.

        No other node may read it, unless it is a single number, which is copied. And the scale may not lose precision:
        it is a power of two, or the type of the tensor has many bits.
        """
        value = node.inputs[index]
        if value is None or not is_initializer(value) or value.const_value is None or value.is_graph_output():
            return False
        separable = len(value.uses()) == 1 or _size(value) == 1
        is_power_of_two = math.frexp(scale)[0] == 0.5
        has_many_bits = value.const_value.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
        return separable and (has_many_bits or (is_power_of_two and value.const_value.dtype.is_floating_point()))


def _independent(sums: Iterable[Sum]) -> list[Group]:
    """Divide the sums into groups: two sums of one node are in one group if they have an operand in common.

    A weight that divides one of two sums over a common operand also changes the other sum, so that the two are divided
    together. Sums over different operands are independent (a recurrent layer sums its inputs and its state).
    """
    by_node: dict[ir.Node, list[Group]] = defaultdict(list)
    for summation in sums:
        groups = by_node[summation.node]
        slots = {slot for slot, _ in summation.sites}
        joined = [group for group in groups if any(slot in slots for member in group for slot, _ in member.sites)]
        groups[:] = [group for group in groups if group not in joined]
        groups.append((*(member for group in joined for member in group), summation))
    return [group for groups in by_node.values() for group in groups]


def _opposite(powers: Sequence[Power]) -> Power:
    """The power that undoes all of them. Where an operand holds means, another one is zero there."""
    total = -sum(power[0] if isinstance(power, tuple) else power for power in powers)
    return (total, "zero") if any(isinstance(power, tuple) for power in powers) else total


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.size
