"""Finds the feed-forward blocks of a graph, by what happens to their hidden units.

The hidden units of a block are a dimension of the role `ffn`: products with weights make it, and another product sums
over it. A block ends at such a sum. We go back from there: functions of single units, and parts of a joined axis, until
the products that make the units. Such a block is one of the stream if it gives the features that it reads, and if it
computes something that is not linear (two weights alone are a weight of low rank).

Nothing here depends on names, nor on the way in which an exporter writes a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from hyperclone_onnx.algebra import shape_values
from hyperclone_onnx.algebra.dims import Concat, Dim
from hyperclone_onnx.analysis.analysing import Analysis
from hyperclone_onnx.graphs import MICROSOFT, MOVES_OR_CASTS, bodies_of, describe, is_initializer
from hyperclone_onnx.rules.dimensions import Axes, Dimensions
from hyperclone_onnx.rules.elementwise import BROADCASTING, FIRST_OPERAND_SHAPES, UNARY
from hyperclone_onnx.transforms.feed_forward import FeedForward, Projection

KEEPS_ORDER = frozenset(["Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"])
"""Operators that keep the order of all elements."""

LINEAR = frozenset("Add Cast CastLike Identity Mul Div Sub Neg Dropout Sum".split())
"""Elementwise operators that are linear in one operand, where the others are stored."""

LONGEST_WAY = 64
"""The number of values behind a block among which the sum with the stream is looked for."""

ELEMENTWISE = frozenset([*UNARY, *BROADCASTING, *FIRST_OPERAND_SHAPES]) - {"BitCast"}

ELEMENTWISE_OF_RUNTIME = frozenset("BiasGelu FastGelu Gelu QuickGelu".split())
"""ONNX Runtime's elementwise operators. The second input of some is a bias."""


class _Not(Exception):
    """A part of the graph is no feed-forward block that we can describe; the text says why."""


@dataclass(frozen=True)
class Blocks:
    """The feed-forward blocks of a graph.

    Args:
        blocks: the blocks, in the order of the graph.
        refused: why other sums over hidden units are no blocks that can be taken apart, by the sum's node.
    """

    blocks: tuple[FeedForward, ...]
    refused: dict[str, str] = field(default_factory=dict)


def find_feed_forward(analysis: Analysis) -> Blocks:
    """The feed-forward blocks of an analysed graph."""
    search = _Search(analysis)
    blocks: list[FeedForward] = []
    refused: dict[str, str] = {}
    for node in search.exits():
        try:
            blocks.append(search.block(node, len(blocks)))
        except _Not as problem:
            refused[describe(node)] = str(problem)
    return Blocks(tuple(blocks), refused)


@dataclass(frozen=True)
class _Stored:
    """A stored tensor that a node reads, perhaps laid out in another way.

    Args:
        value: the tensor.
        axes: its axes.
    """

    value: ir.Value
    axes: Axes


@dataclass
class _Region:
    """What belongs to a block, as far as it was followed back from its end."""

    unit: Dim
    nodes: set[ir.Node] = field(default_factory=set)
    products: list[ir.Node] = field(default_factory=list)
    """The nodes that make the hidden units."""
    ups: list[Projection] = field(default_factory=list)
    vectors: dict[str, int] = field(default_factory=dict)
    split: dict[str, tuple[int, int]] = field(default_factory=dict)
    is_linear: bool = True


class _Search:
    def __init__(self, analysis: Analysis) -> None:
        self.dimensions: Dimensions = analysis.dimensions
        self.space = analysis.dimensions.space
        self.named = {named.dim: named for named in analysis.named}
        self.units = {dim for dim, named in self.named.items() if named.role == "ffn"}
        self.of_value: dict[ir.Value, frozenset[Dim]] = {}

    # -- dimensions of values -------------------------------------------------------------------------------

    def units_of(self, value: ir.Value | None) -> frozenset[Dim]:
        """The dimensions of hidden units that a computed value has."""
        if value is None or is_initializer(value) or value in self.dimensions.constants:
            return frozenset()
        if value not in self.of_value:
            axes = self.dimensions.axes.get(value) or ()
            atoms = {atom for axis in axes for atom in self.space.atoms(axis)}
            self.of_value[value] = frozenset(atoms & self.units)
        return self.of_value[value]

    def place_of(self, axes: Axes, unit: Dim) -> tuple[int, int] | None:
        """The axis that consists of hidden units alone, and how many of their widths lie side by side on it."""
        holding = [number for number, axis in enumerate(axes) if unit in set(self.space.atoms(axis))]
        if len(holding) != 1:
            return None
        term = self.space.resolve(axes[holding[0]])
        segments = term.segments if isinstance(term, Concat) else (term,)
        return (holding[0], len(segments)) if all(segment is unit for segment in segments) else None

    def is_single(self, axes: Axes | None) -> bool:
        """Whether a value has one element."""
        return axes is not None and all(self.space.static(axis) == 1 for axis in axes)

    # -- where blocks end -----------------------------------------------------------------------------------

    def exits(self) -> Iterator[ir.Node]:
        """The nodes that sum over hidden units, in the order of the graph."""
        for node in self.dimensions.walked:
            before = frozenset[Dim]().union(*(self.units_of(value) for value in node.inputs))
            after = frozenset[Dim]().union(*(self.units_of(value) for value in node.outputs))
            sums = {atom for item in self._sums.get(node, ()) for atom in item}
            if (before - after) & sums:
                yield node

    @property
    def _sums(self) -> dict[ir.Node, list[list[Dim]]]:
        if not hasattr(self, "_by_node"):
            self._by_node: dict[ir.Node, list[list[Dim]]] = {}
            for item in self.dimensions.sums:
                self._by_node.setdefault(item.node, []).append(list(self.space.atoms(item.term)))
        return self._by_node

    # -- one block ------------------------------------------------------------------------------------------

    def block(self, node: ir.Node, number: int) -> FeedForward:
        """The block that ends at a node."""
        unit = self._unit(node)
        entry, down = self.projection(node, unit, into=False)
        region = _Region(unit, {node})
        self._follow(entry, region)
        if region.is_linear:
            raise _Not("two weights with nothing between them that is not linear: a weight of low rank, and no block")
        reads, gives, down = self._ends(region, node, down)
        axes, results = self._axes(reads), self._axes(gives)
        axis = self._features(reads, region.products, unit)
        hidden, width = self.space.static(axes[axis]), unit.size.static
        if hidden is None or width is None:
            raise _Not("its widths are known only when the model runs")
        if self.space.resolve(axes[axis]) != self.space.resolve(results[axis]):
            raise _Not(
                f"it reads {hidden} features and gives {self.space.static(results[axis])} that are not those of the "
                "stream it reads"
            )
        if not self._is_added(gives, axis):
            raise _Not(f"what it gives, {gives.name!r}, is not added to a stream")
        return FeedForward(
            f"block {number}",
            reads.name or "",
            gives.name or "",
            axis,
            len(axes),
            hidden,
            width,
            tuple(region.ups),
            down,
            region.vectors,
            region.split,
        )

    def _unit(self, node: ir.Node) -> Dim:
        before = frozenset[Dim]().union(*(self.units_of(value) for value in node.inputs))
        after = frozenset[Dim]().union(*(self.units_of(value) for value in node.outputs))
        units = [atom for atom in before - after if any(atom in item for item in self._sums.get(node, ()))]
        if len(units) != 1:
            raise _Not("the hidden units are a product of several dimensions")
        return units[0]

    def _follow(self, entry: ir.Value, region: _Region) -> None:
        """Go back from the end of a block to the products that make its hidden units."""
        waiting, seen = [entry], {entry}

        def push(value: ir.Value | None) -> None:
            if value is not None and value not in seen:
                seen.add(value)
                waiting.append(value)

        while waiting:
            value = waiting.pop()
            node = value.producer()
            if node is None:
                raise _Not(f"the hidden units come from the input {value.name!r}")
            if any(True for _ in bodies_of(node)):
                raise _Not(f"{describe(node)} with a body makes the hidden units")
            if self.place_of(self._axes(value), region.unit) is None:
                raise _Not(f"{describe(node)} puts the hidden units together with another dimension")
            region.nodes.add(node)
            inside = [value for value in node.inputs if region.unit in self.units_of(value)]
            if not inside:
                region.ups.append(self.projection(node, region.unit, into=True)[1])
                region.products.append(node)
            elif not node.domain and node.op_type in ("Split", "Slice"):
                self._part(node, value, region)
                push(node.inputs[0])
            elif not node.domain and node.op_type in KEEPS_ORDER:
                push(node.inputs[0])
            elif self._is_elementwise(node):
                region.is_linear &= node.op_type in LINEAR and len(inside) == 1
                for place, operand in enumerate(node.inputs):
                    if operand in inside:
                        push(operand)
                    elif operand is not None and not self._is_scalar(node, place, region.unit):
                        region.vectors.update(self._vector(node, place, region.unit))
            else:
                raise _Not(f"{describe(node)} stands among the hidden units, and does not act on each by itself")
        region.ups = [self._with_bias(up, region) for up in reversed(region.ups)]

    def _with_bias(self, up: Projection, region: _Region) -> Projection:
        """A product with the bias that an Add behind it has, if nothing else reads the product."""
        node = next(node for node in region.nodes if node.outputs[0].name == up.gives)
        uses = list(node.outputs[0].uses())
        add = uses[0].node if len(uses) == 1 and up.bias is None else None
        if add is None or add not in region.nodes or add.op_type != "Add" or add.domain:
            return up
        stored = self.stored(add, 1 - uses[0].idx)
        if stored is None or len(stored.value.uses()) != 1:
            return up
        name = stored.value.name or ""
        if region.vectors.get(name) != up.parts:
            return up
        del region.vectors[name]
        return replace(up, bias=name, gives=add.outputs[0].name or "")

    def _is_elementwise(self, node: ir.Node) -> bool:
        if node.domain == MICROSOFT:
            return node.op_type in ELEMENTWISE_OF_RUNTIME
        return not node.domain and node.op_type in ELEMENTWISE

    def _is_scalar(self, node: ir.Node, place: int, unit: Dim) -> bool:
        """Whether an operand is one number that is the same for all tokens."""
        value = node.inputs[place]
        assert value is not None
        if not self.is_single(self.dimensions.axes_of(node, place)):
            return False
        if is_initializer(value) or value in self.dimensions.constants:
            return True
        producer = value.producer()
        return producer is not None and producer.op_type == "CastLike" and self._is_scalar(producer, 0, unit)

    def _vector(self, node: ir.Node, place: int, unit: Dim) -> dict[str, int]:
        """The stored tensor that gives an operand, which has a number for each hidden unit."""
        stored = self.stored(node, place)
        if stored is None:
            raise _Not(f"{describe(node)} reads a value that is not stored, beside the hidden units")
        place_of = self.place_of(stored.axes, unit)
        if place_of is None or sum(self.space.static(axis) != 1 for axis in stored.axes) != 1:
            raise _Not(f"{describe(node)} reads {stored.value.name!r}, which is no number for each hidden unit")
        return {stored.value.name or "": place_of[1]}

    def _part(self, node: ir.Node, value: ir.Value, region: _Region) -> None:
        """Note which part of the hidden units a Split or a Slice gives."""
        whole = node.inputs[0]
        assert whole is not None
        before, after = (self.place_of(self._axes(part), region.unit) for part in (whole, value))
        if before is None or after is None or after[1] != 1:
            raise _Not(f"{describe(node)} cuts the hidden units in another way than into equal parts")
        if node.op_type == "Split":
            first = value.index() or 0
            if len(node.outputs) != before[1]:
                raise _Not(f"{describe(node)} cuts the hidden units into parts of several widths")
        else:
            first = self._slice_starts(node, before, region.unit)
        region.split[value.name or ""] = (first, before[1])

    def _slice_starts(self, node: ir.Node, place: tuple[int, int], unit: Dim) -> int:
        """The number of the part that a Slice takes."""
        numbers = [None if value is None else self._integers(value) for value in node.inputs[1:]]
        given = [numbers[i] if i < len(numbers) and node.inputs[i + 1] is not None else [i - 2] for i in range(4)]
        starts, _, axes, steps = ((some or [0]) if some is None or len(some) == 1 else [0] for some in given)
        if any(some is None or len(some) != 1 for some in given):
            raise _Not(f"{describe(node)} takes a part whose place is not known")
        width = unit.size.static or 1
        start = starts[0] + place[1] * width if starts[0] < 0 else starts[0]
        if axes[0] % len(self._axes(node.inputs[0])) != place[0] or steps[0] != 1 or start % width:
            raise _Not(f"{describe(node)} takes a part of the hidden units that is no whole width")
        return start // width

    def _integers(self, value: ir.Value) -> list[int] | None:
        """The elements of a small tensor of integers, stored or known from the sizes of the graph."""
        return shape_values.static_values(self.dimensions.known.get(value))

    # -- products -------------------------------------------------------------------------------------------

    def projection(self, node: ir.Node, unit: Dim, *, into: bool) -> tuple[ir.Value, Projection]:
        """A product into hidden units, or out of them, and the value that it reads.

        Raises:
            _Not: the node is no product with a stored weight, or a form of it that is not known here.
        """
        form = _product(node)
        if form is None:
            raise _Not(f"{describe(node)} {'makes' if into else 'sums over'} the hidden units, and is no plain product")
        stored = [self.stored(node, place) for place in form.operands]
        if (stored[0] is None) == (stored[1] is None):
            raise _Not(f"{describe(node)} does not multiply with a weight that is stored as it is")
        which = 1 if stored[0] is None else 0
        weight, value = stored[which], node.inputs[form.operands[1 - which]]
        if not form.allows(which) or value is None or weight is None:
            raise _Not(f"{describe(node)} multiplies in a form that is not known here")
        wide = [number for number, axis in enumerate(weight.axes) if self.space.static(axis) != 1]
        place = self.place_of(weight.axes, unit)
        if place is None or len(wide) != 2 or place[0] not in wide or weight.value.dtype is None:
            raise _Not(f"{describe(node)} has a weight that joins the hidden units with others")
        if not weight.value.dtype.is_floating_point() or weight.value.dtype.bitwidth < 16:
            raise _Not(f"{describe(node)} has a quantised weight")
        if not into and place[1] != 1:
            raise _Not(f"{describe(node)} sums over several parts at once")
        bias = self._bias(node, form)
        unit_first = place[0] == wide[0]
        projection = Projection(
            value.name or "",
            node.outputs[0].name or "",
            weight.value.name or "",
            unit_first if into else not unit_first,
            bias,
            place[1],
            form.scale,
            form.bias_scale,
        )
        return value, projection

    def _bias(self, node: ir.Node, form: _Product) -> str | None:
        if form.bias is None or form.bias >= len(node.inputs) or node.inputs[form.bias] is None:
            return None
        bias = self.stored(node, form.bias)
        if bias is None or sum(self.space.static(axis) != 1 for axis in bias.axes) != 1:
            raise _Not(f"{describe(node)} has a bias that is no stored vector")
        return bias.value.name

    def stored(self, node: ir.Node, place: int) -> _Stored | None:
        """The stored tensor that an input of a node is, perhaps laid out or converted; None if it is none."""
        value = node.inputs[place] if place < len(node.inputs) else None
        use = (node, place)
        while value is not None and not is_initializer(value):
            producer = value.producer()
            if producer is None or producer.domain or producer.op_type not in MOVES_OR_CASTS:
                return None
            use, value = (producer, 0), producer.inputs[0]
        axes = self.dimensions.use_axes.get(use)
        return None if value is None or axes is None else _Stored(value, axes)

    # -- both ends ------------------------------------------------------------------------------------------

    def _ends(self, region: _Region, exit_node: ir.Node, down: Projection) -> tuple[ir.Value, ir.Value, Projection]:
        """The value that a block reads and the one that it gives: of one layout, and nothing else reads the inside."""
        ways = [list(self._before(node, region.unit)) for node in region.products]
        common = [value for value in ways[0] if all(value in way for way in ways[1:])]
        if not common:
            raise _Not("its products read several values")
        ends = list(self._after(exit_node, down))
        problem = ""
        for pair in sorted(((a, b) for a in range(len(common)) for b in range(len(ends))), key=sum):
            reads, (gives, projection) = common[pair[0]], ends[pair[1]]
            if not self._same_layout(reads, gives):
                problem = problem or f"what it gives, {gives.name!r}, has another layout than {reads.name!r}"
                continue
            outside = self._read_outside(region, gives)
            if outside is None:
                return reads, gives, projection
            problem = f"{outside} reads a value inside it"
        raise _Not(problem)

    def _before(self, node: ir.Node, unit: Dim) -> Iterator[ir.Value]:
        """The value that a product reads, and those that it is only another shape of."""
        value, _ = self.projection(node, unit, into=True)
        yield value
        producer = value.producer()
        while producer is not None and not producer.domain and producer.op_type in KEEPS_ORDER:
            before = producer.inputs[0]
            if before is None or is_initializer(before):
                return
            yield before
            producer = before.producer()

    def _after(self, node: ir.Node, down: Projection) -> Iterator[tuple[ir.Value, Projection]]:
        """What a block may give: its last product, that with its bias, and other shapes of it."""
        value = node.outputs[0]
        yield value, down
        while not value.is_graph_output():
            readers = [use for use in value.uses() if use.node.op_type != "Shape"]
            if len(readers) != 1:
                return
            reader, place = readers[0].node, readers[0].idx
            if reader.domain:
                return
            if reader.op_type == "Add" and down.bias is None and len(reader.inputs) == 2:
                bias = self.stored(reader, 1 - place)
                if bias is None or sum(self.space.static(axis) != 1 for axis in bias.axes) != 1:
                    return
                if not self._adds_features(reader, place):
                    return
                down = Projection(
                    **{**vars(down), "bias": bias.value.name, "gives": reader.outputs[0].name or "", "bias_scale": 1.0}
                )
            elif reader.op_type not in KEEPS_ORDER or place != 0:
                return
            value = reader.outputs[0]
            yield value, down

    def _adds_features(self, add: ir.Node, place: int) -> bool:
        """Whether the other operand of an Add has a number for each feature that a product gives."""
        bias, value = self.dimensions.axes_of(add, 1 - place), self._axes(add.inputs[place])
        if bias is None or len(bias) > len(value):
            return False
        aligned = value[len(value) - len(bias) :]
        return all(
            self.space.static(one) == 1 or self.space.resolve(one) == self.space.resolve(other)
            for one, other in zip(bias, aligned, strict=True)
        )

    def _features(self, reads: ir.Value, ups: list[ir.Node], unit: Dim) -> int:
        """The axis of the features in the value that a block reads: the axis that its products sum over."""
        places: set[int] = set()
        for node in ups:
            value, _ = self.projection(node, unit, into=True)
            axes = self._axes(value)
            summed = 1 if node.op_type == "Conv" else len(axes) - (1 if value is node.inputs[0] else 2)
            term = self.space.resolve(axes[summed])
            same = [number for number, axis in enumerate(self._axes(reads)) if self.space.resolve(axis) == term]
            places.update(same if len(same) == 1 else (-1,))
        if len(places) != 1 or -1 in places:
            raise _Not(f"{reads.name!r}, which it reads, has no axis of its own for the features")
        return places.pop()

    def _is_added(self, gives: ir.Value, axis: int) -> bool:
        """Whether a value is added to the stream, perhaps behind a norm or a factor."""
        features = self.space.resolve(self._axes(gives)[axis])
        reached, waiting = {gives}, [gives]
        while waiting and len(reached) < LONGEST_WAY:
            for use in waiting.pop().uses():
                node = use.node
                others = [
                    value
                    for place, value in enumerate(node.inputs)
                    if value is not None
                    and not (place and node.op_type in KEEPS_ORDER)
                    and value not in reached
                    and not self.dimensions.is_weight(value)
                    and not is_initializer(value)
                ]
                if others and (node.op_type in ("Add", "Sum", "Sub") or node.op_type.startswith("Skip")):
                    kinds = [self.dimensions.axes.get(value) or () for value in others]
                    if any(self.space.resolve(term) == features for axes in kinds for term in axes):
                        return True
                if not others and _product(node) is None:
                    waiting += [value for value in node.outputs if value not in reached]
                    reached.update(node.outputs)
        return False

    def _same_layout(self, one: ir.Value, other: ir.Value) -> bool:
        """Whether two values have the same axes. All axes of tokens are in one order, by the way between them."""
        first, second = self._axes(one), self._axes(other)
        return len(first) == len(second) and all(
            self.space.resolve(a) == self.space.resolve(b) or self.space.size(a) == self.space.size(b)
            for a, b in zip(first, second, strict=True)
        )

    def _read_outside(self, region: _Region, gives: ir.Value) -> str | None:
        """What would still need a value inside a block if the block were replaced; None if nothing would."""
        needless: set[ir.Node] = set()
        changed = True
        nodes = self._nearby(region, gives)
        while changed:
            changed = False
            for node in nodes - needless:
                uses = [use.node for value in node.outputs if value is not gives for use in value.uses()]
                is_output = any(value.is_graph_output() and value is not gives for value in node.outputs)
                if not is_output and all(reader in needless for reader in uses):
                    needless.add(node)
                    changed = True
        kept = [node for node in region.nodes if node not in needless]
        if not kept:
            return None
        for value in (value for node in kept for value in node.outputs):
            if value.is_graph_output():
                return f"an output of the graph, {value.name!r},"
        others = [
            use.node
            for node in kept
            for value in node.outputs
            for use in value.uses()
            if use.node not in region.nodes and use.node not in needless
        ]
        return describe(others[0]) if others else "another node"

    def _nearby(self, region: _Region, gives: ir.Value) -> set[ir.Node]:
        """The nodes of a block, and those that compute shapes from its values."""
        nodes, waiting = set(region.nodes), list(region.nodes)
        producer = gives.producer()
        steps = 0
        while producer is not None and producer not in nodes and steps < 16:
            nodes.add(producer)
            waiting.append(producer)
            before = producer.inputs[0] if producer.op_type != "Add" else None
            producers = [value.producer() for value in producer.inputs if value is not None]
            producer = before.producer() if before is not None else next((p for p in producers if p in nodes), None)
            steps += 1
        while waiting:
            node = waiting.pop()
            for value in node.outputs:
                for use in () if value is gives else value.uses():
                    is_shape = use.node.op_type == "Shape" or (
                        value.dtype in (ir.DataType.INT64, ir.DataType.INT32) and len(nodes) < 10_000
                    )
                    if is_shape and use.node not in nodes:
                        nodes.add(use.node)
                        waiting.append(use.node)
        return nodes

    def _axes(self, value: ir.Value | None) -> Axes:
        axes = None if value is None else self.dimensions.axes.get(value)
        if axes is None:
            raise _Not(f"the shape of {'' if value is None else value.name!r} is not known")
        return axes


@dataclass(frozen=True)
class _Product:
    """A form of product that we know: the places of both operands and of the bias, and the numbers that multiply."""

    operands: tuple[int, int]
    weight_may_be_left: bool = False
    bias: int | None = None
    scale: float = 1.0
    bias_scale: float = 1.0

    def allows(self, weight: int) -> bool:
        """Whether the weight may be this operand."""
        return weight == 1 or self.weight_may_be_left


def _product(node: ir.Node) -> _Product | None:
    """The form of a product, None for other nodes."""
    kind = (node.domain, node.op_type)
    if kind == ("", "MatMul"):
        return _Product((0, 1), weight_may_be_left=True)
    if kind == ("", "Gemm") and not _integer(node, "transA"):
        return _Product((0, 1), bias=2, scale=_number(node, "alpha"), bias_scale=_number(node, "beta"))
    if kind == (MICROSOFT, "FusedMatMul") and not any(
        _integer(node, name) for name in ("transA", "transBatchA", "transBatchB")
    ):
        return _Product((0, 1), scale=_number(node, "alpha"))
    if kind == ("", "Conv") and _is_pointwise(node):
        return _Product((0, 1), bias=2)
    return None


def _is_pointwise(node: ir.Node) -> bool:
    """Whether a convolution looks at one place at a time."""
    weight = node.inputs[1]
    if weight is None or weight.shape is None or any(size != 1 for size in weight.shape.dims[2:]):
        return False
    if _integer(node, "group", 1) != 1:
        return False
    pads, strides = (node.attributes[name].as_ints() if name in node.attributes else () for name in ("pads", "strides"))
    return not any(pads) and all(stride == 1 for stride in strides)


def _integer(node: ir.Node, name: str, default: int = 0) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def _number(node: ir.Node, name: str) -> float:
    return float(node.attributes[name].as_float()) if name in node.attributes else 1.0
