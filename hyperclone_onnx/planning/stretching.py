"""Decides which values are stretched, where the indices of a normalised axis are repeated unequally.

A norm averages squares over an axis. The average over the grown axis is the source's if channel j of the grown stream
is c(j) times the source's channel, with c = `SourceMap.stretch`. So every axis of every value gets a power of c: 1 on
the residual stream, 2 in its squares, 0 in what a norm's gain makes of it. Most operators relate the powers of what
they read to the power of what they make; stored tensors take any power. What no stored tensor can take is multiplied
in the graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Dim
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import MICROSOFT, describe, is_initializer
from hyperclone_onnx.plan.edits import Edit, ScaleInput, ScaleOutput
from hyperclone_onnx.planning.equations import Equation, Powers
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.rules.dimensions import Axes, Dimensions, Sum, Use
from hyperclone_onnx.rules.grown_terms import Power

AxisPowers = Mapping[int, Sequence[Power]]
"""By the number of an axis: the power of each of its growing dimensions, in order. Other axes have the power 0."""

NORM, OPAQUE, MEAN = range(3)
"""The priorities of wishes. What a norm needs is most urgent: nothing can take its place."""


@dataclass(frozen=True)
class Stretches:
    """The powers of the stretch of all values, and the multiplications that the graph needs for them."""

    values: Mapping[ir.Value, AxisPowers] = field(default_factory=dict)
    """The values that the graph computes or reads as inputs. Values without any power are left out."""
    uses: Mapping[Use, AxisPowers] = field(default_factory=dict)
    """The inputs of nodes as the nodes read them, stored tensors included. Inputs without any power are left out."""
    edits: tuple[Edit, ...] = ()

    def joined(self, other: Stretches) -> Stretches:
        """Both, where no dimension is stretched by both."""
        return Stretches(
            {value: _merged(self.values, other.values, value) for value in {**self.values, **other.values}},
            {use: _merged(self.uses, other.uses, use) for use in {**self.uses, **other.uses}},
            (*self.edits, *other.edits),
        )


def _merged(one: Mapping[Any, AxisPowers], other: Mapping[Any, AxisPowers], key: Any) -> AxisPowers:
    """The powers of one value from two tables, in each of which the other's parts have the power 0."""
    first, second = one.get(key, {}), other.get(key, {})
    return {
        axis: [a or b for a, b in zip(first[axis], second[axis], strict=True)]
        if axis in first and axis in second
        else first.get(axis, second.get(axis, ()))
        for axis in {**first, **second}
    }


Holder = ir.Value | Use
"""What has powers: a value, or one use of a stored tensor."""
Leaves = dict[int, list[int]]
"""The variables of the uneven dimensions in each axis of a value, in order."""
Site = tuple[ir.Node, int, bool, int, int]
"""(node, slot, whether the slot is an output, axis, position among the growing dimensions of the axis)"""


class Stretching:
    """The state of `stretch`: a variable for each uneven dimension in each axis of each value, and their equations."""

    def __init__(self, growth: Growth, uneven: set[Dim], carried: list[Sum], divided: list[Sum]) -> None:
        self.growth, self.uneven, self.terms = growth, uneven, growth.terms
        self.dimensions = growth.dimensions
        self.powers: Powers[Site] = Powers()
        self.variables: dict[tuple[Holder, int, int], int] = {}
        self.stored: list[int] = []
        self.averages = {
            average.node
            for average in self.dimensions.uniform
            if any(atom in uneven for atom in self.terms.leaves(average.term))
        }
        self.sums: dict[ir.Node, list[tuple[Sum, bool]]] = defaultdict(list)
        for sums, is_carried in ((carried, True), (divided, False)):
            for summation in sums:
                self.sums[summation.node].append((summation, is_carried))
        self.node: ir.Node

    # -- variables --------------------------------------------------------------------------------------------

    def of(self, holder: Holder, axes: Axes | None) -> Leaves:
        """The variables of a value, or of a use of a stored tensor."""
        leaves: Leaves = {}
        for axis, term in enumerate(axes or ()):
            atoms = self.terms.leaves(term)
            uneven = [n for n, atom in enumerate(atoms) if atom in self.uneven]
            if uneven:
                leaves[axis] = [self._variable(holder, axis, n) for n in uneven]
        return leaves

    def _variable(self, holder: Holder, axis: int, position: int) -> int:
        key = holder, axis, position
        if key not in self.variables:
            self.variables[key] = self.powers.variable()
            if not isinstance(holder, ir.Value):
                self.stored.append(self.variables[key])
        return self.variables[key]

    def input(self, slot: int) -> Leaves:
        """The variables of an input of the current node."""
        value = self.node.inputs[slot] if slot < len(self.node.inputs) else None
        if value is None:
            return {}
        holder = (self.node, slot) if is_initializer(value) else value
        return self.of(holder, self.dimensions.axes_of(self.node, slot))

    def output(self, index: int = 0) -> Leaves:
        """The variables of an output of the current node."""
        if index >= len(self.node.outputs):
            return {}
        value = self.node.outputs[index]
        return self.of(value, self.dimensions.axes.get(value))

    def rank(self, slot: int) -> int:
        """The number of axes of an input of the current node."""
        return len(self.dimensions.axes_of(self.node, slot) or ())

    def out_rank(self, index: int = 0) -> int:
        """The number of axes of an output of the current node."""
        return len(self.dimensions.axes.get(self.node.outputs[index]) or ())

    def atoms(self, axes: Axes | None) -> list[Dim]:
        """The uneven dimensions of all axes, in order."""
        return [atom for term in axes or () for atom in self.terms.leaves(term) if atom in self.uneven]

    def tie(self, uses: Sequence[Use]) -> None:
        """State that uses of one stored tensor have equal powers."""
        first, *others = (self.of(use, self.dimensions.use_axes[use]) for use in uses)
        for other in others:
            self.join(first, other)

    # -- equations --------------------------------------------------------------------------------------------

    def join(self, one: Leaves, other: Leaves) -> None:
        """State that the powers of two values are equal, axis by axis."""
        for axis in one.keys() & other.keys():
            for a, b in zip(one[axis], other[axis], strict=False):
                self.powers.join(a, b)

    def equation(self, terms: Sequence[tuple[int, int]], total: int, variable: int, slot: int, is_output: bool) -> None:
        """State that a sum of powers is `total`; a correction goes to a slot of the current node."""
        axis, position = self.place(variable, slot, is_output)
        site = self.node, slot, is_output, axis, position
        self.powers.equations.append(Equation(tuple(terms), total, variable, site))

    def set_to_sum(self, terms: Sequence[tuple[int, int]], out: int, total: int = 0) -> None:
        """State that a power of the current node's first output is the sum of (power, factor) terms, and `total`."""
        if total == 0 and len(terms) == 1 and terms[0][1] == 1:
            self.powers.join(terms[0][0], out)
        else:
            self.equation([*terms, (out, -1)], -total, out, 0, True)

    def place(self, variable: int, slot: int, is_output: bool) -> tuple[int, int]:
        """The axis of a slot of the current node, and the position in it, to which a variable belongs."""
        value = (self.node.outputs if is_output else self.node.inputs)[slot]
        assert value is not None
        holder = (self.node, slot) if not is_output and is_initializer(value) else value
        axes = self.dimensions.axes.get(value) if is_output else self.dimensions.axes_of(self.node, slot)
        for axis, term in enumerate(axes or ()):
            for position, _ in enumerate(self.terms.leaves(term)):
                if self.variables.get((holder, axis, position)) == variable:
                    return axis, position
        raise AssertionError(f"no such part of {describe(self.node)}")

    def need(self, slot: int, leaves: Iterable[int], power: int, priority: int) -> None:
        """State that the current node must read parts of an input with a power."""
        for leaf in leaves:
            self.equation([(leaf, 1)], power, leaf, slot, False)
            self.powers.wishes[priority].append((leaf, power))

    def make(self, index: int, leaves: Iterable[int], power: int = 0) -> None:
        """State that the current node makes parts of an output with a power."""
        for leaf in leaves:
            self.equation([(leaf, 1)], power, leaf, index, True)
            self.powers.wishes[OPAQUE].append((leaf, power))

    def laws(self) -> dict[tuple[str, str], Law]:
        """The law of each operator."""
        return LAWS

    # -- the graph --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check what can be checked before the walk. Any map will do."""

    def relate(self) -> None:
        """Write down the equations of all nodes.

        Raises:
            Refused: see `stretch`.
        """
        for node in self.dimensions.walked:
            self.node = node
            values = [self.input(slot) for slot in range(len(node.inputs))]
            values += [self.output(index) for index in range(len(node.outputs))]
            if not any(values) and not _BODIES.get((node.domain, node.op_type)):
                continue
            law = self.laws().get((node.domain, node.op_type))
            if node in self.dimensions.unrelated or law is None or not law(self):
                self.opaque()
            self.sum_up()

    def opaque(self) -> None:
        """A node of which nothing is known reads copies and makes copies.

        Raises:
            Refused: it averages over the axis.
        """
        if self.node in self.averages:
            term = next(average.term for average in self.dimensions.uniform if average.node is self.node)
            raise Refused(
                f"{describe(self.node)} averages over an axis whose indices would be repeated unequally "
                f"({self.terms.written(term)}), and no scale of its channels keeps that average: "
                "give the axis a whole factor with --set"
            )
        for slot in range(len(self.node.inputs)):
            for leaves in self.input(slot).values():
                self.need(slot, leaves, 0, OPAQUE)
        for index in range(len(self.node.outputs)):
            for leaves in self.output(index).values():
                self.make(index, leaves)

    def sum_up(self) -> None:
        """A sum that weights divide needs powers that cancel. Another one may have any: its divisor takes them."""
        for summation, is_carried in self.sums.get(self.node, ()):
            places = [(slot, self.input(slot).get(axis, [])) for slot, axis in summation.sites]
            if len({len(leaves) for _, leaves in places}) != 1:
                continue
            constant = [self.dimensions.is_weight(self.node.inputs[slot]) for slot, _ in places]
            slot, corrected = places[constant.index(False)] if False in constant else places[0]
            for position in range(len(corrected)):
                terms = [(leaves[position], 1) for _, leaves in places]
                if is_carried:
                    self.equation(terms, 0, corrected[position], slot, False)
                elif len(places) == 2 and any(constant):
                    weight, other = (places[n][1][position] for n in (constant.index(True), 1 - constant.index(True)))
                    self.powers.hints.append((weight, other, 2))  # k c ** 2 is one number for all indices

    # -- the result -------------------------------------------------------------------------------------------

    def solved(self) -> Stretches:
        """The powers of all values."""
        chosen = self.powers.solve(self.stored)
        corrections = self.powers.corrections(chosen)
        values: dict[ir.Value | Use, dict[int, list[float]]] = {}
        for (holder, axis, position), variable in self.variables.items():
            self._set(values, holder, axis, position, chosen[self.powers.root(variable)])
        at: dict[tuple[ir.Node, int, bool], dict[int, list[float]]] = {}
        for ((node, slot, is_output, axis, position), _), power in corrections.items():
            place = node, slot, is_output
            self._set(at, place, axis, position, -power if is_output else power)
        uses: dict[Use, AxisPowers] = {}
        for node in self.dimensions.walked:
            for slot, value in enumerate(node.inputs):
                if value is None:
                    continue
                holder = (node, slot) if is_initializer(value) else value
                added = at.get((node, slot, False), {})
                powers = _summed(values.get(holder, {}), added)
                if powers:
                    uses[node, slot] = powers
        edits = tuple(self._edit(place, powers) for place, powers in at.items())
        # A use of a stored tensor is what the tensor stores: a correction in front of the node comes on top.
        stored = {holder: powers for holder, powers in values.items() if not isinstance(holder, ir.Value)}
        computed = {holder: powers for holder, powers in values.items() if isinstance(holder, ir.Value)}
        return Stretches(computed, {**uses, **stored}, edits)

    def _set(self, table: dict[Any, dict[int, list[float]]], holder: Any, axis: int, n: int, power: Fraction) -> None:
        if not power:
            return
        axes = self.axes_of_holder(holder)
        powers = table.setdefault(holder, {}).setdefault(axis, [0] * len(self.terms.leaves(axes[axis])))
        powers[n] += int(power) if power.denominator == 1 else float(power)

    def axes_of_holder(self, holder: ir.Value | Use | tuple[ir.Node, int, bool]) -> Axes:
        """The axes of a value, of a use of a stored tensor, or of a slot of a node."""
        if isinstance(holder, ir.Value):
            return self.dimensions.axes[holder] or ()
        node, slot, is_output = holder if len(holder) == 3 else (*holder, False)
        if is_output:
            return self.dimensions.axes[node.outputs[slot]] or ()
        return self.dimensions.axes_of(node, slot) or ()

    def _edit(self, place: tuple[ir.Node, int, bool], powers: AxisPowers) -> Edit:
        node, slot, is_output = place
        axes = self.axes_of_holder(place)
        scaled = []
        for axis in sorted(powers):
            factors = self.terms.factors(axes[axis], powers[axis])
            if factors is None:
                raise Refused(f"{describe(node)} stretches an axis of which a part is known only when the model runs")
            scaled.append((axis - len(axes), factors))
        kind = ScaleOutput if is_output else ScaleInput
        return kind(node.name or "", slot, tuple(scaled), 0.0)


def _summed(one: Mapping[int, Sequence[float]], other: Mapping[int, Sequence[float]]) -> AxisPowers:
    """Powers, with others added."""
    total = {axis: list(powers) for axis, powers in one.items()}
    for axis, powers in other.items():
        before = total.get(axis, [0] * len(powers))
        total[axis] = [a + b for a, b in zip(before, powers, strict=True)]
    return {axis: powers for axis, powers in total.items() if any(powers)}


# -- the laws of operators --------------------------------------------------------------------------------

Law = Callable[[Stretching], bool]
"""Writes down the equations of the current node. False: the node does not have the form that the law knows."""

LAWS: dict[tuple[str, str], Law] = {}
_BODIES: dict[tuple[str, str], bool] = {("", name): True for name in ("If", "Loop", "Scan")}


def _law(*op_types: str, domain: str = "") -> Callable[[Law], Law]:
    def register(law: Law) -> Law:
        for op_type in op_types:
            LAWS[domain, op_type] = law
        return law

    return register


def aligned(s: Stretching, slot: int) -> dict[int, list[int]]:
    """The variables of an input, by the axis of the output to which the axis is broadcast."""
    return {axis + s.out_rank() - s.rank(slot): leaves for axis, leaves in s.input(slot).items()}


def lacking(s: Stretching, slots: Sequence[int], axis: int) -> list[int]:
    """The inputs that are the same number for all indices of an axis of the output."""
    return [slot for slot in slots if s.node.inputs[slot] is not None and axis not in aligned(s, slot)]


def is_zero(s: Stretching, slot: int) -> bool:
    """Whether an input is stored, one number, and 0."""
    value = s.node.inputs[slot]
    tensor = None if value is None else value.const_value
    return tensor is not None and tensor.size == 1 and not np.any(tensor.numpy())


def added(s: Stretching, slots: Sequence[int], outputs: Sequence[int] = (0,)) -> bool:
    """out[j] = the sum, or the choice, of the inputs at j: all have one power."""
    for axis, made in s.output().items():
        operands = [(slot, aligned(s, slot).get(axis)) for slot in slots if s.node.inputs[slot] is not None]
        if any(leaves is not None and len(leaves) != len(made) for _, leaves in operands):
            return False
    for index in outputs:
        for axis, made in s.output(index).items():
            constants = [slot for slot in lacking(s, slots, axis) if not is_zero(s, slot)]
            for slot in slots:
                leaves = aligned(s, slot).get(axis, [])
                if constants:
                    s.need(slot, leaves, 0, OPAQUE)
                else:
                    for a, b in zip(leaves, made, strict=bool(leaves)):
                        s.powers.join(a, b)
            if constants:
                s.make(index, made)
    return True


@_law("Identity", "Neg", "Abs", "Relu", "LeakyRelu", "Dropout", "Trilu")
def _homogeneous(s: Stretching) -> bool:
    return added(s, [0])


@_law("Cast", "CastLike")
def _cast(s: Stretching) -> bool:
    """Integers cannot be scaled by a fraction: the sum of a quantised product is scaled behind its conversion."""
    read = s.node.inputs[0]
    types = [value.dtype for value in (read, s.node.outputs[0]) if value is not None]
    if any(dtype is None or not dtype.is_floating_point() for dtype in types):
        return False
    return added(s, [0])


@_law("Add", "Sub", "Sum", "Max", "Min", "Mean")
def _sum(s: Stretching) -> bool:
    return added(s, range(len(s.node.inputs)))


@_law("BiasAdd", domain=MICROSOFT)
def _bias_add(s: Stretching) -> bool:
    return added(s, range(len(s.node.inputs)))


@_law("Where")
def _where(s: Stretching) -> bool:
    for leaves in s.input(0).values():
        s.need(0, leaves, 0, OPAQUE)
    return added(s, [1, 2])


@_law("Shape", "Size", "IsNaN", "IsInf", "Sign")
def _ignores(s: Stretching) -> bool:
    for leaves in s.output().values():
        s.make(0, leaves)
    return True


def _multiplied(s: Stretching, factors: Mapping[int, int], total: int = 0) -> bool:
    """The power of the output is the sum of the inputs' powers, each times its factor, and `total`."""
    leaves_of = {slot: aligned(s, slot) for slot in factors}
    for axis, made in s.output().items():
        if any(axis in leaves and len(leaves[axis]) != len(made) for leaves in leaves_of.values()):
            return False
    for axis, made in s.output().items():
        operands = [(slot, leaves[axis]) for slot, leaves in leaves_of.items() if axis in leaves]
        for position, out in enumerate(made):
            terms = [(leaves[position], factors[slot]) for slot, leaves in operands]
            s.set_to_sum(terms, out, total)
    return True


@_law("Mul")
def _product(s: Stretching) -> bool:
    return _multiplied(s, {0: 1, 1: 1})


@_law("Div")
def _quotient(s: Stretching) -> bool:
    return _multiplied(s, {0: 1, 1: -1})


@_law("Reciprocal")
def _inverse(s: Stretching) -> bool:
    return _multiplied(s, {0: -1})


@_law("Pow")
def _power(s: Stretching) -> bool:
    exponent = s.node.inputs[1]
    tensor = None if exponent is None else exponent.const_value
    if tensor is None or tensor.size != 1:
        return False
    number = float(tensor.numpy().reshape(-1)[0])
    return number.is_integer() and _multiplied(s, {0: int(number)})


@_law("Sqrt")
def _root(s: Stretching) -> bool:
    for axis, made in s.output().items():
        for x, out in zip(s.input(0)[axis], made, strict=True):
            s.equation([(x, 1), (out, -2)], 0, out, 0, True)
    return True


def _in_order(s: Stretching) -> bool:
    """The output has the input's dimensions in the same order."""
    axes = s.dimensions.axes_of(s.node, 0), s.dimensions.axes.get(s.node.outputs[0])
    if s.atoms(axes[0]) != s.atoms(axes[1]):
        return False
    read, made = ([leaf for axis in sorted(value) for leaf in value[axis]] for value in (s.input(0), s.output()))
    for a, b in zip(read, made, strict=True):
        s.powers.join(a, b)
    return True


@_law("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Tile", "Gather", "GatherND", "Expand", "CumSum")
def _layout(s: Stretching) -> bool:
    return _in_order(s)


@_law("Pad")
def _pad(s: Stretching) -> bool:
    filled = len(s.node.inputs) > 2 and s.node.inputs[2] is not None and not is_zero(s, 2)
    return not filled and _in_order(s)


@_law("Transpose")
def _transpose(s: Stretching) -> bool:
    perm = s.node.attributes.get("perm")
    order = list(perm.as_ints()) if perm is not None else list(reversed(range(s.rank(0))))
    read = s.input(0)
    s.join({axis: read[source] for axis, source in enumerate(order) if source in read}, s.output())
    return True


@_law("Concat")
def _concat(s: Stretching) -> bool:
    axis = s.node.attributes["axis"].as_int() % s.out_rank()
    return _side_by_side(s, [s.input(slot) for slot in range(len(s.node.inputs))], s.output(), axis)


@_law("Split")
def _split(s: Stretching) -> bool:
    attribute = s.node.attributes.get("axis")
    axis = (0 if attribute is None else attribute.as_int()) % s.rank(0)
    return _side_by_side(s, [s.output(index) for index in range(len(s.node.outputs))], s.input(0), axis)


def _side_by_side(s: Stretching, parts: Sequence[Leaves], whole: Leaves, axis: int) -> bool:
    along = [leaf for part in parts for leaf in part.get(axis, [])]
    if len(along) != len(whole.get(axis, [])):
        return False
    for part in parts:
        s.join({other: leaves for other, leaves in part.items() if other != axis}, whole)
    s.join({axis: along}, whole)
    return True


# -- sums, averages and norms -----------------------------------------------------------------------------


@_law("ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceMax", "ReduceMin")
def _reduction(s: Stretching) -> bool:
    axes, out = s.dimensions.axes_of(s.node, 0) or (), s.dimensions.axes.get(s.node.outputs[0]) or ()
    reduced = reduced_axes(s.dimensions, s.node, len(axes))
    if reduced is None:
        return False
    kept = [axis for axis in range(len(axes)) if axis not in reduced]
    places = kept if len(out) == len(axes) else range(len(kept))
    read, made = s.input(0), s.output()
    for axis, place in zip(kept, places, strict=True):
        for x, y in zip(read.get(axis, []), made.get(place, []), strict=True):
            if s.node.op_type == "ReduceSumSquare":
                s.equation([(x, 2), (y, -1)], 0, y, 0, True)
            else:
                s.powers.join(x, y)
    for axis in reduced:
        for leaf in read.get(axis, []):
            if s.node.op_type in ("ReduceMax", "ReduceMin"):
                s.need(0, [leaf], 0, OPAQUE)
            elif s.node.op_type == "ReduceMean":
                s.need(0, [leaf], 2, NORM if _is_square(s.node.inputs[0]) else MEAN)
    return True


def _is_square(value: ir.Value | None) -> bool:
    """Whether a value is computed as the square of another one, perhaps converted to another type."""
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in ("Cast", "Identity") and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    if producer is None or producer.domain:
        return False
    return producer.op_type == "Pow" or (producer.op_type == "Mul" and producer.inputs[0] is producer.inputs[1])


def reduced_axes(dimensions: Dimensions, node: ir.Node, rank: int) -> set[int] | None:
    """The axes that a node reduces; None where they are not told before the model runs."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        listed = list(attribute.as_ints())
    elif len(node.inputs) < 2 or node.inputs[1] is None:
        noop = node.attributes.get("noop_with_empty_axes")
        return set() if noop is not None and noop.as_int() else set(range(rank))
    else:
        known = dimensions.known.get(node.inputs[1])
        if known is None or any(element is None or element.static is None for element in known.ravel()):
            return None
        listed = [element.static for element in known.ravel()]
    return {axis % rank for axis in listed}


def _norm(s: Stretching, added: Sequence[int], gain: int, copies: int | None = None) -> bool:
    """The output is x / sqrt(mean x^2 + eps) * gain, where x is the sum of the inputs `added`."""
    last = s.out_rank() - 1
    axis = s.node.attributes.get("axis")
    first = (-1 if axis is None else axis.as_int()) % s.out_rank()
    made, gains = s.output(), aligned(s, gain)
    for place, leaves in made.items():
        averaged = first <= place <= last
        for slot in added:
            read = aligned(s, slot).get(place, [])
            for x, out in zip(read, leaves, strict=bool(read)):
                if averaged:
                    s.need(slot, [x], 1, NORM)
                elif len(added) == 1:
                    s.powers.join(x, out)
                else:
                    s.need(slot, [x], 0, OPAQUE)
        if not averaged:
            if len(added) > 1:
                s.make(0, leaves)
            continue
        for position, out in enumerate(leaves):
            terms = [(gains[place][position], 1)] if place in gains else []
            s.set_to_sum(terms, out, 1)
    if copies is not None and copies < len(s.node.outputs):
        for place, leaves in s.output(copies).items():
            for leaf in leaves:
                s.equation([(leaf, 1)], 1 if first <= place <= last else 0, leaf, copies, True)
    return True


@_law("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(s: Stretching) -> bool:
    return _norm(s, [0], 1)


@_law("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def _skip_rms_norm(s: Stretching) -> bool:
    return _norm(s, [slot for slot in (0, 1, 3) if slot < len(s.node.inputs)], 2, copies=3)


@_law("MatMul")
def _matmul(s: Stretching) -> bool:
    ranks = s.rank(0), s.rank(1)
    if min(ranks) < 2:
        return False
    rank, made = s.out_rank(), s.output()
    free = {0: (ranks[0] - 2, rank - 2), 1: (ranks[1] - 1, rank - 1)}
    for slot, (axis, place) in free.items():
        for a, b in zip(s.input(slot).get(axis, []), made.get(place, []), strict=True):
            s.powers.join(a, b)
    for place, leaves in made.items():
        if place >= rank - 2:
            continue
        for position, out in enumerate(leaves):
            terms = [(aligned(s, slot)[place][position], 1) for slot in (0, 1) if place in aligned(s, slot)]
            s.set_to_sum(terms, out)
    return True


@_law("Gemm")
def _gemm(s: Stretching) -> bool:
    def flag(name: str) -> int:
        attribute = s.node.attributes.get(name)
        return 0 if attribute is None else attribute.as_int()

    free = ((0, 1 if flag("transA") else 0), (1, 0 if flag("transB") else 1))
    made = s.output()
    for place, (slot, axis) in enumerate(free):
        for a, b in zip(s.input(slot).get(axis, []), made.get(place, []), strict=True):
            s.powers.join(a, b)
    if len(s.node.inputs) > 2 and s.node.inputs[2] is not None:
        bias = aligned(s, 2)
        for place, leaves in made.items():
            if place not in bias and not is_zero(s, 2):
                s.make(0, leaves)
        s.join(bias, made)
    return True


@_law("Einsum")
def _einsum(s: Stretching) -> bool:
    left, arrow, right = s.node.attributes["equation"].as_string().replace(" ", "").partition("->")
    words = left.split(",")
    if not arrow or "." in left + right or len(words) != len(s.node.inputs):
        return False
    for place, leaves in s.output().items():
        sites = [(slot, word.index(right[place])) for slot, word in enumerate(words) if right[place] in word]
        operands = [s.input(slot).get(axis, []) for slot, axis in sites]
        operands = [operand for operand in operands if operand]
        for position, out in enumerate(leaves):
            terms = [(operand[position], 1) for operand in operands]
            s.set_to_sum(terms, out)
    return True


@_law("Conv")
def _conv(s: Stretching) -> bool:
    group = s.node.attributes.get("group")
    if group is not None and group.as_int() != 1:
        return False
    s.join({1: s.input(1).get(0, [])}, s.output())
    if len(s.node.inputs) > 2 and s.node.inputs[2] is not None:
        s.join({1: s.input(2).get(0, [])}, s.output())
    return True


@_law("DequantizeLinear")
def _dequantize(s: Stretching) -> bool:
    made, scales = s.output(), s.input(1)
    attribute = s.node.attributes.get("axis")
    axis = (1 if attribute is None else attribute.as_int()) % max(s.rank(0), 1)
    for leaves in s.input(0).values():
        s.need(0, leaves, 0, OPAQUE)
    for leaves in s.input(2).values():
        s.need(2, leaves, 0, OPAQUE)
    for place, leaves in made.items():
        own = scales.get(0, []) if s.rank(1) == 1 and place == axis else []
        if len(own) == len(leaves):
            for a, b in zip(own, leaves, strict=True):
                s.powers.join(a, b)
        else:
            s.make(0, leaves)
    return True


@_law("MatMulNBits", domain=MICROSOFT)
def _matmul_nbits(s: Stretching) -> bool:
    last = s.out_rank() - 1
    for slot in (1, 3):
        for leaves in s.input(slot).values():
            s.need(slot, leaves, 0, OPAQUE)
    made = s.output()
    scales = [leaf for axis in sorted(s.input(2)) for leaf in s.input(2)[axis]]
    count = len(made.get(last, []))
    for place, leaves in made.items():
        if place != last:
            s.join({place: s.input(0).get(place, [])}, made)
            continue
        for a, b in zip(scales, leaves, strict=False):
            s.powers.join(a, b)
    for leaf in scales[count:]:
        s.need(2, [leaf], 0, OPAQUE)
    if len(s.node.inputs) > 5 and s.node.inputs[5] is not None:
        s.join(aligned(s, 5), made)
    return True


# -- bodies -----------------------------------------------------------------------------------------------


@_law("If")
def _if(s: Stretching) -> bool:
    for name in ("then_branch", "else_branch"):
        for index, value in enumerate(s.node.attributes[name].as_graph().outputs):
            if value.producer() is None or value.producer() not in s.dimensions.never_run:
                s.join(s.of(value, s.dimensions.axes.get(value)), s.output(index))
    return True


@_law("Loop")
def _loop(s: Stretching) -> bool:
    body = s.node.attributes["body"].as_graph()
    return _carried(s, body, len(body.inputs) - 2, 2, 1)


@_law("Scan")
def _scan(s: Stretching) -> bool:
    body = s.node.attributes["body"].as_graph()
    states = len(s.node.inputs) - s.node.attributes["num_scan_inputs"].as_int()
    scanned = s.node.attributes.get("scan_input_axes")
    axes = list(scanned.as_ints()) if scanned is not None else [0] * (len(s.node.inputs) - states)
    for slot, axis in zip(range(states, len(s.node.inputs)), axes, strict=True):
        inner = body.inputs[slot]
        own = s.of(inner, s.dimensions.axes.get(inner))
        outer = axis % max(s.rank(slot), 1)
        s.join({place + (place >= outer): leaves for place, leaves in own.items()}, s.input(slot))
    return _carried(s, body, states, 0, 0)


def _carried(s: Stretching, body: ir.Graph, states: int, first_input: int, first_output: int) -> bool:
    """What a loop carries has the same powers before, in and after its turns; what it stacks has a new axis."""
    for number, value in enumerate(body.outputs[first_output:]):
        made = s.of(value, s.dimensions.axes.get(value))
        if number >= states:
            stacked = s.node.attributes.get("scan_output_axes")
            axis = stacked.as_ints()[number - states] if stacked is not None else 0
            axis %= max(s.out_rank(number), 1) if number < len(s.node.outputs) else 1
            s.join({place + (place >= axis): leaves for place, leaves in made.items()}, s.output(number))
            continue
        inner = body.inputs[number + first_input]
        begins = s.of(inner, s.dimensions.axes.get(inner))
        s.join(made, begins)
        s.join(s.input(number + first_input), begins)
        s.join(begins, s.output(number))
    return True
