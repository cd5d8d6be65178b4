"""Finds out how a graph uses the elements of each input, to choose values that make sense.

We follow the elements through operators that move or convert them, or that add or multiply constants. This ends where
an operator uses them: it indexes a table, applies a mask, compares a number, multiplies it with weights, or takes it as
a size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Term
from hyperclone_onnx.algebra.shape_values import static_values
from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.graphs import MICROSOFT, MOVES_OR_CASTS
from hyperclone_onnx.rules.dimensions import Dimensions

_PASSES_ON = MOVES_OR_CASTS | {"Expand", "Gather", "GatherElements", "Pad", "Slice", "Split", "Tile"}
"""Operators whose outputs contain elements of their first input."""

_JOINS = frozenset(["Concat", "Max", "Min", "Clip", "Mod"])
"""Operators whose output contains elements of any input, or smaller numbers."""

_DECIDES = frozenset(["And", "If", "Not", "Or", "Xor", "NonZero", "Compress"])
"""Operators that take an element as true or false."""

_COMPARES = frozenset(["Greater", "GreaterOrEqual", "Less", "LessOrEqual"])

_COUNTS = frozenset(["CumSum", "ReduceSum", "ReduceMax", "ReduceMin", "ArgMax", "ArgMin"])
"""Operators that combine elements, for example to count the ones of a mask."""

_MEASURES = frozenset(["Conv", "Cos", "Einsum", "Gemm", "LayerNormalization", "MatMul", "Sin", "RMSNormalization"])
"""Operators that take an integer as a quantity: a count, a time."""

_SHAPES = {"Reshape": 1, "Expand": 1, "Tile": 1, "ConstantOfShape": 0, "Range": -1, "Slice": -1, "Pad": 1, "TopK": 1}
"""Operators that take elements as sizes, and the number of this input. -1 means any input except the first."""

_NEEDS_POSITIVE = frozenset(["Log", "Pow", "Reciprocal", "Sqrt", "Acosh"])

_UNITARY = frozenset(["Acos", "Asin", "Atanh"])

HIDING = 1e3
"""The smallest factor of a mask that is added to scores."""


@dataclass(frozen=True)
class Table:
    """An axis of this size is indexed by the elements times `scale`, plus `offset` to `offset + spread`."""

    size: Size
    scale: float
    offset: float
    spread: float = 0.0
    exact: bool = True
    """Whether nothing else changes the elements on the way."""


@dataclass
class Uses:
    """How a graph uses the elements of one input."""

    tables: list[Table] = field(default_factory=list)
    equals: list[float] = field(default_factory=list)
    """Constants in comparisons for equality."""
    limits: list[float] = field(default_factory=list)
    """Constants in other comparisons."""
    decides: bool = False
    """Whether an element is taken as true or false."""
    counted: bool = False
    """Whether elements are added up, or their largest or smallest is taken."""
    measured: bool = False
    """Whether an element is a quantity: multiplied with weights, or an angle."""
    sizes: bool = False
    """Whether an element is taken as a size."""
    positive: bool = False
    """Whether an element must be positive: it is in a logarithm, a root or a divisor."""
    unitary: bool = False
    """Whether an element must lie between -1 and 1."""
    hides: bool = False
    """Whether an element, multiplied by a large number, is added to scores."""
    scored: bool = False
    """Whether an element is added to the input of a Softmax."""
    convolved: bool = False
    """Whether a convolution reads the input: an image, or sound."""
    ranges: list[Term] = field(default_factory=list)
    """Axes whose positions are compared with elements. So the elements are lengths or positions."""
    lengths: list[tuple[ir.Value, int, int]] = field(default_factory=list)
    """The axes that elements are lengths of: a value, its axis, and by how much the lengths are smaller."""
    searched: list[tuple[float, ir.Value, Term]] = field(default_factory=list)
    """Constants that NonZero searches for: the constant, the input of NonZero, and the axis of its results."""

    @property
    def indexes(self) -> bool:
        """Whether the elements index a table."""
        return any(table.exact for table in self.tables) or (bool(self.tables) and not self._masks)

    @property
    def masks(self) -> bool:
        """Whether the elements look like a mask or a flag. Positions computed from a mask may also be indices."""
        return self._masks and not self.indexes

    @property
    def _masks(self) -> bool:
        return self.decides or self.counted or self.hides


@dataclass(frozen=True)
class _Step:
    """A value that contains elements of an input, times `scale`, plus numbers from `offset` to `offset + spread`.

    The numbers differ where fields share one table, and each has an offset of its own.
    """

    value: ir.Value
    scale: float = 1.0
    offset: float = 0.0
    spread: float = 0.0
    exact: bool = True
    """Whether `scale` and `offset` describe all changes of the elements."""
    tested: float | None = None
    """The constant, if the value is the result of a comparison for equality."""
    depth: int = 0


FURTHEST = 40
"""The largest number of operators through which we follow an element."""

MOST = 4000
"""The largest number of values that we look at for one input."""


def uses_of(dimensions: Dimensions) -> dict[str, Uses]:
    """How a graph uses the elements of each input, by name."""
    tables: dict[ir.Value, list[Term]] = defaultdict(list)
    for indices, term in dimensions.index_tables:
        tables[indices].append(term)
    tracer = _Tracer(dimensions, tables)
    return {value.name or "": tracer.trace(value) for value in dimensions.model.graph.inputs}


class _Tracer:
    def __init__(self, dimensions: Dimensions, tables: dict[ir.Value, list[Term]]) -> None:
        self.dimensions = dimensions
        self.tables = tables

    def trace(self, value: ir.Value) -> Uses:
        uses = Uses()
        open_steps = [_Step(value)]
        seen: set[tuple[ir.Value, float | None]] = {(value, None)}
        while open_steps and len(seen) < MOST:
            step = open_steps.pop(0)
            for term in self.tables.get(step.value, ()) if step.tested is None else ():
                size = self.dimensions.space.size(term)
                uses.tables.append(Table(size, step.scale, step.offset, step.spread, step.exact))
            for use in step.value.uses():
                for following in self._through(step, use.node, use.idx, uses):
                    key = (following.value, following.tested)
                    if key not in seen and following.depth < FURTHEST:
                        seen.add(key)
                        open_steps.append(following)
        return uses

    def _through(self, step: _Step, node: ir.Node, index: int, uses: Uses) -> Iterator[_Step]:
        """The outputs of a node that still contain the elements. Notes in `uses` how the node uses them."""
        following = replace(step, depth=step.depth + 1)
        kind = node.op_type
        self._note_lengths(node, index, uses)
        if node.domain:
            return
        if kind == "Cast" and node.attributes["to"].as_int() == int(ir.DataType.BOOL) and step.tested is None:
            uses.decides = True
        if kind in _SHAPES and (index == _SHAPES[kind] or (_SHAPES[kind] < 0 and index > 0)):
            uses.sizes = True
        elif kind in _PASSES_ON and index == 0:
            for output in node.outputs:
                yield replace(following, value=output)
        elif kind in _JOINS:
            yield replace(following, value=node.outputs[0], exact=step.exact and kind == "Concat")
        elif kind in ("Add", "Sub", "Mul", "Div", "Neg"):
            yield from self._arithmetic(following, node, index, uses)
        elif kind == "Equal":
            constant = self._constant(node.inputs[1 - index])
            if constant is not None and step.exact and step.scale and not step.spread:
                number = (constant - step.offset) / step.scale
                uses.equals.append(number)
                yield replace(following, value=node.outputs[0], tested=number)
            elif constant is not None:
                uses.decides = True
        elif kind in _COMPARES:
            self._compared(step, node, index, uses)
        elif kind == "Where":
            if index == 0:
                uses.decides = uses.decides or step.tested is None
                if step.tested is not None:
                    yield replace(following, value=node.outputs[0])
            else:
                yield replace(following, value=node.outputs[0])
        elif kind == "NonZero" and step.tested is not None:
            axes = self.dimensions.axes.get(node.outputs[0])
            if axes and len(axes) == 2:
                uses.searched.append((step.tested, step.value, axes[1]))
        elif kind in _DECIDES:
            uses.decides = uses.decides or step.tested is None
            if step.tested is not None and node.outputs:
                yield replace(following, value=node.outputs[0])
        elif kind in _COUNTS:
            uses.counted = uses.counted or step.tested is None
        elif kind in _NEEDS_POSITIVE:
            uses.positive = uses.positive or kind != "Pow" or (index == 0 and not self._is_integer(node.inputs[1]))
        elif kind in _UNITARY:
            uses.unitary = True
        elif kind in _MEASURES:
            uses.measured = True
            uses.convolved = uses.convolved or (kind == "Conv" and index == 0)

    def _arithmetic(self, step: _Step, node: ir.Node, index: int, uses: Uses) -> Iterator[_Step]:
        output = node.outputs[0]
        if node.op_type == "Neg":
            yield replace(step, value=output, scale=-step.scale, offset=-step.offset - step.spread)
            return
        other = node.inputs[1 - index]
        constant = self._constant(other)
        bounds = self._bounds(other) if node.op_type == "Add" and constant is None else None
        if bounds is not None:
            more = bounds[1] - bounds[0]
            yield replace(step, value=output, offset=step.offset + bounds[0], spread=step.spread + more)
            return
        if node.op_type == "Div" and index == 1:
            uses.positive = True
            yield replace(step, value=output, exact=False)
            return
        if constant is None:
            if other is not None and self.dimensions.is_weight(other) and node.op_type == "Mul":
                uses.measured = True
            if node.op_type in ("Add", "Sub") and self._scores(output):
                uses.scored = True
            yield replace(step, value=output, exact=False)
            return
        scale, offset, spread = step.scale, step.offset, step.spread
        match node.op_type, index:
            case "Add", _:
                offset += constant
            case "Sub", 0:
                offset -= constant
            case "Sub", _:
                scale, offset = -scale, constant - offset - spread
            case "Mul", _:
                scale, offset, spread = _scaled(step, constant)
            case "Div", _ if constant:
                scale, offset, spread = _scaled(step, 1.0 / constant)
        if abs(scale) >= HIDING:
            uses.hides = True
        yield replace(step, value=output, scale=scale, offset=offset, spread=spread)

    def _compared(self, step: _Step, node: ir.Node, index: int, uses: Uses) -> None:
        """Note a comparison with a constant or with positions."""
        other = node.inputs[1 - index]
        constant = self._constant(other)
        if constant is not None:
            if step.exact and step.scale and not step.spread:
                uses.limits.append((constant - step.offset) / step.scale)
            return
        axes = self.dimensions.axes.get(other) if other is not None else None
        wide = [term for term in axes or () if self.dimensions.space.static(term) != 1]
        if wide:
            uses.ranges.append(wide[-1])

    def _scores(self, value: ir.Value) -> bool:
        """Whether a value goes into a Softmax."""
        for _ in range(3):
            users = [use.node for use in value.uses()]
            if any(node.op_type in ("Softmax", "LogSoftmax") for node in users):
                return True
            if len(users) != 1 or users[0].op_type not in (*MOVES_OR_CASTS, "Add", "Max", "Div", "Mul"):
                return False
            value = users[0].outputs[0]
        return False

    def _note_lengths(self, node: ir.Node, index: int, uses: Uses) -> None:
        place = _LENGTHS.get((node.domain, node.op_type), {}).get(index)
        if place is None:
            return
        side, position, axis, less = place
        values = node.inputs if side == "input" else node.outputs
        value = values[position] if position < len(values) else None
        if value is not None:
            uses.lengths.append((value, axis, less))

    def _constant(self, value: ir.Value | None) -> float | None:
        """The number that all elements of a value are. None if it is not known."""
        if value is None:
            return None
        tensor = value.const_value
        if tensor is not None and tensor.size == 1 and tensor.dtype != ir.DataType.STRING:
            number = float(np.asarray(tensor.numpy()).astype(np.float64).ravel()[0])
            return number if math.isfinite(number) else None
        elements = static_values(self.dimensions.known.get(value))
        return float(elements[0]) if elements is not None and len(set(elements)) == 1 else None

    def _bounds(self, value: ir.Value | None) -> tuple[float, float] | None:
        """The smallest and the largest element of a stored tensor of integers. None if it is no such tensor."""
        tensor = value.const_value if value is not None else None
        if tensor is None or not tensor.size or tensor.dtype not in (ir.DataType.INT32, ir.DataType.INT64):
            return None
        elements = np.asarray(tensor.numpy())
        return float(elements.min()), float(elements.max())

    def _is_integer(self, value: ir.Value | None) -> bool:
        constant = self._constant(value)
        return constant is not None and constant.is_integer() and constant >= 0


def _scaled(step: _Step, factor: float) -> tuple[float, float, float]:
    """Scale, offset and spread of a step whose elements are multiplied by a number."""
    ends = sorted((step.offset * factor, (step.offset + step.spread) * factor))
    return step.scale * factor, ends[0], ends[1] - ends[0]


_OF_STEPS = {4: ("input", 0, 0, 0)}

_LENGTHS: dict[tuple[str, str], dict[int, tuple[str, int, int, int]]] = {
    (MICROSOFT, "GroupQueryAttention"): {5: ("output", 1, 2, 1), 6: ("output", 1, 2, 0)},
    (MICROSOFT, "SparseAttention"): {4: ("output", 1, 2, 0), 5: ("output", 1, 2, 0)},
    ("", "ReverseSequence"): {1: ("input", 0, 0, 0)},
    ("", "RNN"): _OF_STEPS,
    ("", "GRU"): _OF_STEPS,
    ("", "LSTM"): _OF_STEPS,
    ("", "Attention"): {6: ("input", 1, -2, 0)},
}
"""Operators with inputs that are lengths. For each such input: the input or output, its number and its axis of which
they are the lengths, and by how much they are smaller (one operator of ONNX Runtime takes the last index)."""
