"""From a growth to a plan: who divides each sum, which tensors come out, which nodes are edited.

A contraction over a grown axis sums every repeat, so something must divide. A weight does it when the summed
operand is one, reached through operators that only move its elements; otherwise a scalar does: an existing
scale, a norm's gain, Gemm's alpha, or one inserted multiplication.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.dims import Term
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.growth import GrownOp, GrownTerms
from hyperclone_onnx.inference import Axes, Dimensions, Sum, Use, describe, is_initializer
from hyperclone_onnx.maps import Axis, Kept, canonical_axis, index_axis
from hyperclone_onnx.plan import (
    DivideOutput,
    Edit,
    Feed,
    GrownDim,
    Interface,
    Plan,
    Recipe,
    ScaleInput,
    SetAttribute,
)
from hyperclone_onnx.sizing import Growth
from hyperclone_onnx.strategies import Strategy

Marks = frozenset[int]
"""The axes of a value over which a contraction sums."""
Group = tuple[Sum, ...]
"""Sums of one node that one operand must carry together: those that share operands."""

LARGEST_SUM, LARGEST_PRODUCT = 2**31 - 1, 255 * 255
"""Products of bytes are added up in 32 bits."""


@dataclass
class Carriers:
    """The stored tensors that divide a sum: weights that share it along some axes, scales that shrink."""

    marks: dict[Use, Marks] = field(default_factory=dict)
    scales: dict[Use, float] = field(default_factory=dict)

    def add(self, other: Carriers) -> None:
        """Take in what divides another part of the operand."""
        self.marks.update(other.marks)
        self.scales.update(other.scales)


def make_plan(
    growth: Growth,
    strategy: Strategy | None = None,
    *,
    untie: bool = False,
    keep_interface: bool = False,
) -> Plan:
    """Plan a growth.

    Args:
        growth: the source map of each dimension.
        strategy: how repeats share a weight.
        untie: give each use of a tensor that is stored once a tensor of its own where their recipes differ
            (a tied embedding), instead of moving the division into a scalar.
        keep_interface: leave the graph's inputs and outputs in the source's sizes.

    Raises:
        Refused: a norm would average over unequally repeated parts, or a node cannot be edited.
    """
    planner = _Planner(growth, untie)
    planner.check_uniform()
    planner.share_sums()
    edits = [*planner.edits, *_node_edits(growth, planner.terms)]
    tensors, feeds = planner.tensors()
    roles = {each.name: each.role for each in growth.named}
    return Plan(
        dims={name: GrownDim(roles[name], chosen) for name, chosen in growth.maps.values()},
        tensors=tensors,
        feeds=tuple(feeds),
        edits=tuple(edits),
        inputs=tuple(planner.interface(growth.dimensions.model.graph.inputs)),
        outputs=tuple(planner.interface(growth.dimensions.model.graph.outputs)),
        strategy=strategy or Strategy(),
        keep_interface=keep_interface,
    )


def _node_edits(growth: Growth, terms: GrownTerms) -> Iterable[Edit]:
    from hyperclone_onnx.rules import registry

    dimensions = growth.dimensions
    opsets = dimensions.model.graph.opset_imports
    for node in dimensions.walked:
        edit = registry.edit(node.domain, node.op_type)
        if edit is None or not _touched(dimensions, terms, node):
            continue
        op = GrownOp(growth, terms, node, opsets.get(node.domain, 1))
        edit(op)
        yield from op.edits


def _touched(dimensions: Dimensions, terms: GrownTerms, node: ir.Node) -> bool:
    every: list[Axes | None] = [dimensions.axes_of(node, i) for i in range(len(node.inputs))]
    every += [dimensions.axes.get(output) for output in node.outputs]
    return any(terms.grows(term) for axes in every if axes for term in axes)


@dataclass
class _Planner:
    growth: Growth
    untie: bool
    edits: list[Edit] = field(default_factory=list)
    carried: dict[Group, Carriers] = field(default_factory=dict)
    scales: dict[Use, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dimensions = self.growth.dimensions
        self.space = self.dimensions.space
        self.terms = GrownTerms(self.growth)

    # -- averages -----------------------------------------------------------------------------------------

    def check_uniform(self) -> None:
        """An average over an axis is unchanged only when every index is repeated equally often."""
        for each in self.dimensions.uniform:
            # Where each factor of an axis repeats its indices equally often, so does the axis.
            growing = [factor for factor in self.space.factors(each.term) if self.terms.grows(factor)]
            if any(self._repeats(factor) is None for factor in growing):
                raise Refused(
                    f"{describe(each.node)} averages over an axis whose parts would not grow equally "
                    f"({self._written(each.term)}): give its parts one factor with --set"
                )

    def _written(self, term: Term) -> str:
        return ", ".join(
            f"{self.terms.named[atom][0]} x{self.terms.growth(atom)}" if atom in self.terms.named else str(atom)
            for atom in self.space.atoms(term)
        )

    # -- sums ---------------------------------------------------------------------------------------------

    def share_sums(self) -> None:
        """Decide, for each node that sums over a grown axis, who divides."""
        groups = _independent([each for each in self.dimensions.sums if self.terms.grows(each.term)])
        for group in groups:
            carriers = self._weights_that_carry(group)
            if carriers is not None:
                self.carried[group] = carriers
        self._keep_ties()
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
                found = self._trace(node, index, frozenset(marks))
                if found is not None:
                    return found
        return self._weights_of_products(node, sums)

    def _weights_of_products(self, node: ir.Node, sums: Group) -> Carriers | None:
        """The stored tensors behind several operands, where each of a node's sums has a weight of its own."""
        marks: dict[int, set[int]] = defaultdict(set)
        for each in sums:
            sites = [(slot, axis) for slot, axis in each.sites if self._constant(node, slot)]
            site = next((s for s in sites if self._trace(node, s[0], frozenset({s[1]})) is not None), None)
            if site is None:
                return None
            marks[site[0]].add(site[1])
        carriers = Carriers()
        for index, axes in marks.items():
            found = self._trace(node, index, frozenset(axes))
            if found is None:
                return None
            carriers.add(found)
        return carriers

    def _trace(self, node: ir.Node, index: int, marks: Marks) -> Carriers | None:
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
            part = self._trace(producer, slot, before)
            if part is None:
                return None
            found.add(part)
        return found

    def _trace_codes(self, node: ir.Node, axes: Axes, marks: Marks) -> Carriers | None:
        """A quantised weight repeats its codes; its scale shrinks, where every code is repeated equally often."""
        scale = node.inputs[1]
        if scale is None or not is_initializer(scale):
            return None
        repeats = [self._repeats(axes[axis]) for axis in marks if self.terms.grows(axes[axis])]
        if None in repeats:
            return None
        return Carriers(scales={(node, 1): 1.0 / math.prod(count or 1 for count in repeats)})

    def _repeats(self, term: Term) -> int | None:
        """How often every index of an axis is repeated; None where that differs, or is not known."""
        factors = self.terms.factors(term)
        if factors is None:
            return None
        counts = index_axis([(factor, True) for factor in factors], self.terms.maps).count
        return int(counts[0]) if counts.min() == counts.max() else None

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
                if len({self._canonical(self._recipe_axes(axes)) for _, axes in group}) > 1:
                    continue
                if len({self._marks(use) for use, _ in group}) > 1:
                    members = {use for use, _ in group}
                    for each in [each for each, found in self.carried.items() if members & found.marks.keys()]:
                        del self.carried[each]
                        changed = True

    def _marks(self, use: Use) -> Marks:
        for found in self.carried.values():
            if use in found.marks:
                return frozenset(a for a in found.marks[use] if self.terms.grows(self.dimensions.use_axes[use][a]))
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
        repeats = self._repeats(each.term)
        if repeats is not None and self._fold(node, slot, float(repeats) ** -each.power):
            return
        self.edits.append(ScaleInput(node.name or "", slot, ((axis - len(operand), factors),), each.power))

    def _scale_quantised(self, each: Sum) -> None:
        """Divide by a quantisation scale; a sum that has none is divided itself, or by a factor further on.

        Raises:
            Refused: no one number divides the sum, or it would no longer fit its integers.
        """
        node, repeats = each.node, self._repeats(each.term)
        if repeats is None:
            raise Refused(
                f"{describe(node)} sums quantised values over an axis whose parts would not grow equally "
                f"({self._written(each.term)}): give its parts one factor with --set"
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
            if node.domain or use.idx or node.op_type not in (_LAYOUT | {"Cast"}):
                return False
            value = node.outputs[0]
        return False

    def _fold_into_factor(self, node: ir.Node, slot: int, scale: float) -> bool:
        """Scale a factor of a product: a stored one, or a stored factor of a product that only this one reads."""
        if self._may_scale(node, slot):
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
            if producer.domain or any(producer is sums[0].node for sums in self.carried):
                return False
            if producer.op_type in _LAYOUT:
                value = producer.inputs[0]
                producer = None if value is None else value.producer()
                continue
            slots = {"Mul": (0, 1), "Div": (0, 1), "LayerNormalization": (1, 2), "RMSNormalization": (1,)}
            given = [i for i in slots.get(producer.op_type, ()) if i < len(producer.inputs) and producer.inputs[i]]
            stored = [i for i in given if self._may_scale(producer, i)]
            if producer.op_type in ("Mul", "Div"):
                stored = stored[:1]
            elif stored != given:
                return False
            for index in stored:
                inverse = producer.op_type == "Div" and index == 1
                self._rescale((producer, index), 1.0 / scale if inverse else scale)
            return bool(stored)
        return False

    def _may_scale(self, node: ir.Node, index: int) -> bool:
        """Whether a stored factor serves this node alone, so that scaling it changes nothing else."""
        value = node.inputs[index]
        if value is None or not is_initializer(value) or value.const_value is None:
            return False
        alone = len(value.uses()) == 1 or _size(value) == 1
        return alone and value.const_value.dtype.is_floating_point() and not value.is_graph_output()

    # -- tensors ------------------------------------------------------------------------------------------

    def _recipe_axes(self, axes: Axes) -> tuple[tuple[Axis, ...], ...]:
        made: list[tuple[Axis, ...]] = []
        for term in axes:
            factors = self.terms.factors(term)
            assert factors is not None, "an initializer's axis is static"
            made.append(factors if self.terms.grows(term) else (Kept(self.space.static(term) or 0),))
        return tuple(made)

    def _canonical(self, axes: tuple[tuple[Axis, ...], ...]) -> tuple[object, ...]:
        """Recipe axes with each dimension's name replaced by its map: equal where the tensors come out equal."""
        return tuple(canonical_axis(factor, self.terms.maps) for axis in axes for factor in (*axis, Kept(0)))

    def tensors(self) -> tuple[dict[str, Recipe], list[Feed]]:
        """A recipe for each tensor that changes, and the uses that read another tensor than before."""
        recipes: dict[str, dict[object, tuple[Recipe, list[Use]]]] = defaultdict(dict)
        for value, use, axes in self.dimensions.initializer_uses():
            factors = self._recipe_axes(axes)
            shared = tuple(
                (axis, position)
                for axis in sorted(self._marks(use))
                for position, factor in enumerate(factors[axis])
                if not isinstance(factor, Kept)
            )
            recipe = Recipe(
                value.name or "", factors, shared, self.scales.get(use, 1.0), self.dimensions.packed.get(use)
            )
            key = (self._canonical(factors), shared, recipe.scale, recipe.bits)
            recipes[recipe.source].setdefault(key, (recipe, []))[1].append(use)
        tensors: dict[str, Recipe] = {}
        feeds: list[Feed] = []
        taken = set(self.dimensions.model.graph.initializers)
        for name, variants in recipes.items():
            kept_elsewhere = self._read_elsewhere(name)
            ordered = sorted(variants.values(), key=lambda variant: not _is_trivial(variant[0]))
            for number, (recipe, uses) in enumerate(ordered):
                if number == 0 and not (kept_elsewhere and not _is_trivial(recipe)):
                    if not _is_trivial(recipe):
                        tensors[name] = recipe
                    continue
                own = next(f"{name}.{i}" for i in range(1, len(taken) + 2) if f"{name}.{i}" not in taken)
                taken.add(own)
                tensors[own] = recipe
                feeds.extend(Feed(node.name or "", index, own) for node, index in uses)
        return tensors, feeds

    def _read_elsewhere(self, name: str) -> bool:
        """Whether a tensor is also read where no recipe reaches: a subgraph, the graph's outputs."""
        value = self.dimensions.model.graph.initializers[name]
        return value.is_graph_output() or any(
            (use.node, use.idx) not in self.dimensions.use_axes for use in value.uses()
        )

    # -- interface ----------------------------------------------------------------------------------------

    def interface(self, values: Iterable[ir.Value]) -> Iterable[Interface]:
        """The grown inputs or outputs."""
        for value in values:
            axes = self.dimensions.axes.get(value) or ()
            if any(self.terms.grows(term) for term in axes):
                yield Interface(value.name or "", tuple(self.terms.factors(term) for term in axes))


_SHARING = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""The element types that can hold a share of a weight."""


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


_LAYOUT = frozenset(["Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Neg"])


def _marks_before(planner: _Planner, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
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
            rank = len(planner.dimensions.axes_of(node, 0) or ())
            order = list(perm.as_ints()) if perm is not None else list(reversed(range(rank)))
            return {0: frozenset(order[axis] for axis in marks)}
        case "Gather":
            return _marks_before_gather(planner, node, marks)
        case "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten":
            return _marks_before_reshape(planner, node, marks)
        case "Mul" | "Div":
            return _marks_before_product(planner, node, marks)
        case "Add" | "Sub" | "Concat":
            return _marks_before_sum(planner, node, marks)
    return None


def _marks_before_reshape(planner: _Planner, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
    before, after = planner.dimensions.axes_of(node, 0), planner.dimensions.axes.get(node.outputs[0])
    if before is None or after is None:
        return None

    def growing(axes: Axes) -> list[tuple[Term, int]]:
        return [
            (factor, axis)
            for axis, term in enumerate(axes)
            for factor in planner.space.factors(term)
            if planner.terms.grows(factor)
        ]

    old, new = growing(before), growing(after)
    if [factor for factor, _ in old] != [factor for factor, _ in new]:
        return None
    found = {axis for (_, axis), (_, seen) in zip(old, new, strict=True) if seen in marks}
    split = {axis for (_, axis), (_, seen) in zip(old, new, strict=True) if seen not in marks}
    return None if found & split else {0: frozenset(found)}


def _marks_before_gather(planner: _Planner, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
    """Whole slices of the data are picked: every axis but the one that is indexed passes."""
    data, where = planner.dimensions.axes_of(node, 0), planner.dimensions.axes_of(node, 1)
    if data is None or where is None:
        return None
    attribute = node.attributes.get("axis")
    axis = (0 if attribute is None else attribute.as_int()) % len(data)
    end = axis + len(where)
    if any(axis <= mark < end for mark in marks):
        return None
    return {0: frozenset(mark if mark < axis else mark - len(where) + 1 for mark in marks)}


def _marks_before_product(planner: _Planner, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        moved = _aligned(planner, node, index, marks)
        if moved is not None and planner.dimensions.is_weight(node.inputs[index]):
            return {index: moved}
    return None


def _marks_before_sum(planner: _Planner, node: ir.Node, marks: Marks) -> dict[int, Marks] | None:
    found: dict[int, Marks] = {}
    for index in range(len(node.inputs)):
        moved = _aligned(planner, node, index, marks)
        if moved is None:
            return None
        found[index] = moved
    return found


def _aligned(planner: _Planner, node: ir.Node, index: int, marks: Marks) -> Marks | None:
    """Output axes as axes of an operand aligned at the right; None when the operand is stretched along one."""
    operand, out = planner.dimensions.axes_of(node, index), planner.dimensions.axes.get(node.outputs[0])
    if operand is None or out is None:
        return None
    moved = frozenset(axis - (len(out) - len(operand)) for axis in marks)
    stretched = any(axis < 0 or planner.space.static(operand[axis]) == 1 for axis in moved)
    return None if stretched else moved


def _is_trivial(recipe: Recipe) -> bool:
    kept = all(isinstance(factor, Kept) for axis in recipe.axes for factor in axis)
    return kept and recipe.scale == 1.0


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.size
