"""Decides which values hold means, where a LayerNorm averages over an axis whose size becomes no multiple.

A LayerNorm subtracts the mean, which no factor of the channels keeps. So the channels are copied in whole turns only.
The channels that are left over hold the mean of the source's channels (LEMON, arXiv 2310.07999). Then the mean over all
channels stays, and with the factor `SourceMap.shrink` the variance, too. Behind the norm these channels are zero.

So a value is in one of two states along such an axis. On the residual stream it is multiplied by the factor (power 1),
and the channels left over hold the mean. Behind a norm (power 0) they hold zero. An operator keeps these states, or it
can read the second one only. What weights have at the channels left over matters only where they write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Dim
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import MICROSOFT, describe, is_initializer
from hyperclone_onnx.planning import stretching
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.planning.stretching import (
    LAWS,
    NORM,
    OPAQUE,
    Holder,
    Law,
    Stretches,
    Stretching,
    added,
    aligned,
    lacking,
)
from hyperclone_onnx.rules.dimensions import Sum
from hyperclone_onnx.rules.grown_terms import Power

NORMS = {("", "LayerNormalization"), (MICROSOFT, "SkipLayerNormalization")}
"""The operators that subtract the mean over their last axes, in one node."""


def averaged(leaves: Iterable[tuple[ir.Node, Dim]]) -> set[Dim]:
    """The dimensions over which one of `NORMS` averages, of those given with the nodes that average over them."""
    return {atom for node, atom in leaves if (node.domain, node.op_type) in NORMS}


class Averaging(Stretching):
    """The states of all values along the axes over which LayerNorms average.

    The power of a part of an axis is 1 on the stream and 0 behind a norm. Nothing is multiplied in the graph: an
    equation that does not hold is a reason to refuse.
    """

    def __init__(self, growth: Growth, uneven: set[Dim], carried: list[Sum], divided: list[Sum]) -> None:
        super().__init__(growth, uneven, carried, divided)
        self.free: list[int] = []
        """The variables of stored tensors whose channels that are left over may hold anything."""
        self.read: list[tuple[int, int, ir.Node]] = []
        """(a variable of a weight, that of the activation with which it is summed, the node)"""

    def laws(self) -> dict[tuple[str, str], Law]:
        """The law of each operator."""
        return _LAWS_OF_MEANS

    def refuse(self, node: ir.Node) -> Refused:
        """The error for a node that does not keep the states."""
        names = ", ".join(sorted(self.growth.maps[atom][0] for atom in self.uneven))
        return Refused(
            f"{describe(node)} cannot take {names} at a size that is no multiple: a LayerNorm averages over it, so "
            "that the channels which are left over hold a mean. Give it a multiple of its size"
        )

    def check(self) -> None:
        """Check that the maps and the graph's inputs allow it.

        Raises:
            Refused: a map is no cycle, or an input of the graph has the axis.
        """
        for atom in self.uneven:
            name, source_map = self.growth.maps[atom]
            if not source_map.is_cycle:
                raise Refused(
                    f"a LayerNorm averages over {name}, whose map repeats indices unequally and not in turn: "
                    "give it a map such as SourceMap(size, cycle=grown)"
                )
        for value in self.dimensions.model.graph.inputs:
            if self.of(value, self.dimensions.axes.get(value)):
                raise Refused(
                    f"the input {value.name!r} has an axis over which a LayerNorm averages, and which would grow to a "
                    "size that is no multiple: give it a multiple of its size"
                )

    def opaque(self) -> None:
        """A node of which nothing is known may only sum over the axis, together with a weight.

        Raises:
            Refused: it does something else.
        """
        if self.node in self.averages:
            raise self.refuse(self.node)
        summed = {site for summation, _ in self.sums.get(self.node, ()) for site in summation.sites}
        for slot in range(len(self.node.inputs)):
            for axis, leaves in self.input(slot).items():
                if (slot, axis) not in summed:
                    raise self.refuse(self.node)
                self.need(slot, leaves, 0, OPAQUE)
        if any(self.output(index) for index in range(len(self.node.outputs))):
            raise self.refuse(self.node)

    def sum_up(self) -> None:
        """A sum is right where one side is zero at the channels that are left over."""
        for summation, is_carried in self.sums.get(self.node, ()):
            places = [(slot, self.input(slot).get(axis, [])) for slot, axis in summation.sites]
            if not any(leaves for _, leaves in places):
                continue
            if len({len(leaves) for _, leaves in places}) != 1 or summation.power != 1.0 or len(places) > 2:
                raise self.refuse(self.node)
            if len(places) == 1:
                self.need(*places[0], 0, OPAQUE)
                continue
            weighs = [self.dimensions.is_weight(self.node.inputs[slot]) for slot, _ in places]
            weight, other = (places if weighs[0] else places[::-1])[:2]
            for one, two in zip(weight[1], other[1], strict=True):
                if is_carried:
                    self.equation([(one, 1), (two, 1)], 0, two, other[0], False)
                self.read.append((one, two, self.node))

    def equation(self, terms: Sequence[tuple[int, int]], total: int, variable: int, slot: int, is_output: bool) -> None:
        """State an equation. A product of two values that have the axis may hold no means: all are zero there."""
        if len(terms) < 3:
            super().equation(terms, total, variable, slot, is_output)
            return
        for part, _ in terms:
            super().equation([(part, 1)], 0, part, slot, is_output)
            self.powers.wishes[OPAQUE].append((part, 0))

    def place(self, variable: int, slot: int, is_output: bool) -> tuple[int, int]:
        """The place of a correction. None is ever made, so that it says nothing."""
        return 0, 0

    def solved(self) -> Stretches:
        """The states of all values.

        Raises:
            Refused: a node cannot keep the states.
        """
        chosen = self.powers.solve(self.stored)
        for (site, _), _power in self.powers.corrections(chosen).items():
            raise self.refuse(site[0])
        free = {self.powers.root(variable) for variable in self.free}
        for weight, other, node in self.read:
            one, two = (chosen[self.powers.root(variable)] for variable in (weight, other))
            if one == two == 1:
                raise self.refuse(node)
            if two == 0:
                free.add(self.powers.root(weight))
        tables: dict[Holder, dict[int, list[Power]]] = {}
        for (holder, axis, position), variable in self.variables.items():
            root = self.powers.root(variable)
            power, is_stored = chosen[root], not isinstance(holder, ir.Value)
            axes, node = self.axes_of_holder(holder), self.node_of(holder)
            if power not in ((-1, 0, 1) if is_stored else (0, 1)):
                raise self.refuse(node)
            if is_stored and not isinstance(self.terms.space.resolve(axes[axis]), Dim):
                raise self.refuse(node)
            holds_mean = power == 1 or (is_stored and root in free)
            powers = tables.setdefault(holder, {}).setdefault(axis, [0] * len(self.terms.leaves(axes[axis])))
            powers[position] = (int(power), "mean" if holds_mean else "zero")
        values = {holder: powers for holder, powers in tables.items() if isinstance(holder, ir.Value)}
        uses = {holder: powers for holder, powers in tables.items() if not isinstance(holder, ir.Value)}
        for node in self.dimensions.walked:
            for slot, value in enumerate(node.inputs):
                if value is not None and not is_initializer(value) and value in values:
                    uses[node, slot] = values[value]
        return Stretches(values, uses, ())

    def node_of(self, holder: Holder) -> ir.Node:
        """The node that makes a value, or uses a stored tensor."""
        if not isinstance(holder, ir.Value):
            return holder[0]
        producer = holder.producer()
        return self.node if producer is None else producer


# -- the laws of operators --------------------------------------------------------------------------------

_LAWS_OF_MEANS: dict[tuple[str, str], Law] = {
    key: LAWS[key]
    for key in (
        *(
            ("", name)
            for name in "Transpose Reshape Flatten Squeeze Unsqueeze Expand Concat Split Slice Gather".split()
        ),
        *(("", name) for name in "GatherND Pad MatMul Gemm Einsum Conv If Loop Scan".split()),
    )
}


def _law(*op_types: str, domain: str = "") -> Callable[[Law], Law]:
    def register(law: Law) -> Law:
        for op_type in op_types:
            _LAWS_OF_MEANS[domain, op_type] = law
        return law

    return register


def _linear(s: Stretching, slots: Sequence[int]) -> bool:
    """Sums, or converts. What is added to a mean must be a mean, and no number alike for all channels."""
    for axis in s.output():
        given = [slot for slot in slots if s.node.inputs[slot] is not None]
        if any(not stretching.is_zero(s, slot) for slot in lacking(s, given, axis)):
            return False
    return added(s, slots)


@_law("Identity", "Cast", "CastLike", "Neg", "Dropout")
def _unary(s: Stretching) -> bool:
    return _linear(s, [0])


@_law("Add", "Sub", "Sum")
def _sum(s: Stretching) -> bool:
    return _linear(s, range(len(s.node.inputs)))


@_law("Where")
def _where(s: Stretching) -> bool:
    return not s.input(0) and _linear(s, [1, 2])


@_law("Mul", "Div")
def _product(s: Stretching) -> bool:
    if s.node.op_type == "Div" and s.input(1):
        return False
    sides = [slot for slot in (0, 1) if s.input(slot)]
    if len(sides) == 1:
        for axis, made in s.output().items():
            for x, out in zip(aligned(s, sides[0]).get(axis, []), made, strict=True):
                s.powers.join(x, out)
        return True
    return _keeps_zero(s)


@_law(
    *"Abs Asin Asinh Atan Celu Elu Erf Gelu HardSwish LeakyRelu Mish Relu Selu Sign Sin Sinh Softsign Sqrt".split(),
    *"Swish Tan Tanh ThresholdedRelu Max Min".split(),
)
def _keeps_zero(s: Stretching) -> bool:
    """f(0) = 0, and nothing more is known."""
    for slot in range(len(s.node.inputs)):
        for leaves in s.input(slot).values():
            s.need(slot, leaves, 0, OPAQUE)
    for axis, leaves in s.output().items():
        if s.node.op_type in ("Max", "Min") and lacking(s, range(len(s.node.inputs)), axis):
            return False
        s.make(0, leaves)
    return True


for _name in ("Gelu", "QuickGelu", "FastGelu", "BiasGelu"):
    _LAWS_OF_MEANS[MICROSOFT, _name] = _keeps_zero


@_law("Shape", "Size")
def _ignores(s: Stretching) -> bool:
    return True


@_law("ReduceSum", "ReduceMean")
def _reduction(s: Stretching) -> bool:
    return s.node not in s.averages and LAWS["", s.node.op_type](s)


@_law("LayerNormalization")
def _layer_norm(s: Stretching) -> bool:
    return _norm(s, [0], 1, 2)


@_law("SkipLayerNormalization", domain=MICROSOFT)
def _skip_layer_norm(s: Stretching) -> bool:
    return _norm(s, [0, 1, 4], 2, 3)


def _norm(s: Stretching, read: Sequence[int], gain: int, bias: int) -> bool:
    """Reads the stream, and makes a value that is zero in the channels that hold means."""
    assert isinstance(s, Averaging)
    if s.node not in s.averages:
        return len(read) == 1 and not s.input(gain) and not s.input(bias) and added(s, read)
    last = s.out_rank() - 1
    for slot in read:
        for leaves in s.input(slot).values():
            s.need(slot, leaves, 1, NORM)
    for index in (0, 3):
        for place, leaves in s.output(index).items():
            if place != last:
                return False
            for leaf in leaves:
                s.equation([(leaf, 1)], 1 if index else 0, leaf, index, True)
                s.powers.wishes[NORM].append((leaf, 1 if index else 0))
    for slot, power in ((gain, -1), (bias, 0)):
        value = s.node.inputs[slot] if slot < len(s.node.inputs) else None
        if value is None:
            continue
        if not is_initializer(value):
            return False
        for leaves in s.input(slot).values():
            s.need(slot, leaves, power, NORM)
            if slot == gain:
                s.free += leaves
    return True
