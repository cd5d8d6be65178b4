"""Recognise mixtures that compute all experts for all tokens, and compute only the chosen ones.

The pattern is a sum over the experts of gates times results. The gates are zeros in which the shares of the chosen
experts stand (ScatterElements). The results come from the tokens by products with stacked weights, stacked biases, and
functions that act on each token and expert by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from hyperclone_onnx.frameworks.compiling.fusions.graphs import made_by, only, put_in_place
from hyperclone_onnx.frameworks.compiling.registry import INTERNAL
from hyperclone_onnx.graphs import MICROSOFT, MOVES_OR_CASTS, is_initializer
from hyperclone_onnx.rules.elementwise import BROADCASTING, FIRST_OPERAND_SHAPES, UNARY

_ELEMENTWISE = frozenset([*UNARY, *BROADCASTING, *FIRST_OPERAND_SHAPES])

_OF_RUNTIME = frozenset(["FastGelu", "Gelu", "QuickGelu"])

_LAST_AXIS = frozenset(["Split"])
"""Operators that cut the last axis, if their axis says so."""


@dataclass(frozen=True)
class _Gates:
    """The choice of a router: the tokens that it reads, the chosen experts and their shares, (tokens, k)."""

    tokens: ir.Value
    which: ir.Value
    shares: ir.Value


@dataclass
class _Rows:
    """The nodes that compute the rows of the chosen experts."""

    dispatch: ir.Node
    experts: int
    nodes: list[ir.Node] = field(default_factory=list)
    made: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """The rows' value for each value of all experts."""

    @property
    def sizes(self) -> ir.Value:
        """The number of rows of each expert."""
        return self.dispatch.outputs[1]

    @property
    def owner(self) -> ir.Value:
        """The expert of each row."""
        return self.dispatch.outputs[2]


class _NotAMixture(Exception):
    """The nodes compute something else."""


def fuse_experts(total: ir.Node) -> bool:
    """ReduceSum over experts of (results of all experts) * (gates of all experts)"""
    product = only(total.inputs[0], "Mul") if _sums_first_axis(total) else None
    for results, gates in () if product is None else (product.inputs[:2], product.inputs[1::-1]):
        chosen = _gates(gates)
        if chosen is None or results is None:
            continue
        try:
            _put_rows_in_place(total, results, chosen)
        except _NotAMixture:
            continue
        return True
    return False


def _put_rows_in_place(total: ir.Node, results: ir.Value, gates: _Gates) -> None:
    count = _count(results, gates.tokens)
    dispatch = ir.node("Dispatch", [gates.tokens, gates.which], {"experts": count}, domain=INTERNAL, num_outputs=4)
    rows = _Rows(dispatch, count)
    rows.made[gates.tokens] = dispatch.outputs[0]
    _follow(results, rows)
    graph = total.graph
    assert graph is not None
    operands = [rows.made[results], gates.shares, dispatch.outputs[3]]
    graph.insert_before(total, [dispatch, *rows.nodes])
    stem = total.name or "experts"
    for number, node in enumerate([dispatch, *rows.nodes]):
        node.name = f"{stem}.rows{number}"
        for place, value in enumerate(node.outputs):
            value.name = f"{stem}.rows{number}.{place}"
    put_in_place(total, ir.node("Combine", operands, domain=INTERNAL))


def _sums_first_axis(total: ir.Node) -> bool:
    axes = total.inputs[1] if len(total.inputs) > 1 else None
    keep = total.attributes.get("keepdims")
    if axes is None or axes.const_value is None or keep is None or keep.as_int() != 0:
        return False
    return bool(axes.const_value.numpy().tolist() == [0])


def _gates(value: ir.Value | None) -> _Gates | None:
    """Unsqueeze(Transpose(ScatterElements(zeros, chosen, shares))), perhaps converted in between."""
    last = made_by(value, "Unsqueeze")
    turned = None if last is None else made_by(last.inputs[0], "Transpose")
    if last is None or turned is None or not _is_last(last.inputs[1]):
        return None
    perm = turned.attributes.get("perm")
    scatter = made_by(_converted(turned.inputs[0]), "ScatterElements")
    if perm is None or list(perm.as_ints()) != [1, 0] or scatter is None:
        return None
    axis, reduction = scatter.attributes.get("axis"), scatter.attributes.get("reduction")
    zeros, which, shares = scatter.inputs[:3]
    filled = made_by(zeros, "ConstantOfShape")
    best = made_by(which, "TopK")
    if filled is None or best is None or which is not best.outputs[1] or shares is None or reduction is not None:
        return None
    fill = filled.attributes.get("value")
    if axis is None or axis.as_int() not in (-1, 1) or (fill is not None and fill.as_tensor().numpy().any()):
        return None
    scores = made_by(_converted(best.inputs[0]), "MatMul")
    tokens = None if scores is None else scores.inputs[0]
    return None if tokens is None or which is None else _Gates(tokens, which, shares)


def _is_last(axes: ir.Value | None) -> bool:
    return axes is not None and axes.const_value is not None and axes.const_value.numpy().tolist() in ([-1], [2])


def _converted(value: ir.Value | None) -> ir.Value | None:
    """A value before a conversion to another type."""
    cast = made_by(value, "Cast")
    return value if cast is None else cast.inputs[0]


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The stored tensor of which a value is only another form; None for other values."""
    while value is not None and not is_initializer(value):
        node = value.producer()
        if node is None or node.domain or node.op_type not in MOVES_OR_CASTS:
            return None
        value = node.inputs[0]
    return value


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    tensor = None if value is None else value.const_value
    return () if tensor is None else tuple(int(size) for size in tensor.shape.numpy())


def _count(results: ir.Value, tokens: ir.Value) -> int:
    """The number of experts: the first size of the last product's weight."""
    node = results.producer()
    seen = 0
    while node is not None and seen < 8:
        if node.op_type == "MatMul" and not node.domain:
            shape = _shape(_stored(node.inputs[1]))
            if len(shape) == 3:
                return shape[0]
            break
        computed = [value for value in node.inputs if value is not None and _stored(value) is None]
        if len(computed) != 1 or computed[0] is tokens:
            break
        node, seen = computed[0].producer(), seen + 1
    raise _NotAMixture


def _follow(results: ir.Value, rows: _Rows) -> None:
    """Make the nodes that compute the rows, from the end to the tokens, and put them into the order of the graph."""
    waiting: list[tuple[ir.Value, bool]] = [(results, False)]
    while waiting:
        value, inputs_known = waiting.pop()
        if value in rows.made:
            continue
        node = value.producer()
        if node is None:
            raise _NotAMixture
        inside = _inside(node, rows)
        if not inputs_known:
            waiting.append((value, True))
            waiting += [(operand, False) for operand in inside]
            continue
        _make(node, inside, rows)


def _inside(node: ir.Node, rows: _Rows) -> list[ir.Value]:
    """The operands of a node that have an axis of experts, or are the tokens."""
    if node.op_type == "MatMul" and not node.domain:
        shape = _shape(_stored(node.inputs[1]))
        if len(shape) != 3 or shape[0] != rows.experts or node.inputs[0] is None:
            raise _NotAMixture
        return [node.inputs[0]]
    if node.op_type in _LAST_AXIS and not node.domain:
        axis = node.attributes.get("axis")
        if axis is None or axis.as_int() not in (-1, 2) or node.inputs[0] is None:
            raise _NotAMixture
        return [node.inputs[0]]
    known = node.op_type in (_OF_RUNTIME if node.domain == MICROSOFT else _ELEMENTWISE)
    if node.domain not in ("", MICROSOFT) or not known:
        raise _NotAMixture
    operands = [value for value in node.inputs if value is not None and not _is_number(value)]
    return [value for value in operands if not _is_stack(value, rows)]


def _is_number(value: ir.Value) -> bool:
    """Whether a value is one number."""
    stored = _stored(value)
    return stored is not None and stored.const_value is not None and stored.const_value.size == 1


def _is_stack(value: ir.Value, rows: _Rows) -> bool:
    """Whether a value has a stored vector for each expert."""
    stored = _stored(value)
    if stored is None:
        return False
    shape = _shape(stored)
    if len(shape) != 3 or shape[:2] != (rows.experts, 1):
        raise _NotAMixture
    return True


def _make(node: ir.Node, inside: list[ir.Value], rows: _Rows) -> None:
    """Make the node that computes the rows' value of a node's output."""
    if node.op_type == "MatMul":
        operands: list[ir.Value | None] = [rows.made[inside[0]], node.inputs[1], rows.sizes]
        new = ir.Node(INTERNAL, "GroupedMatMul", operands)
    else:
        cuts = node.op_type in _LAST_AXIS  # the sizes of a Split are no operand with an axis of experts
        operands = [value if cuts and place else _operand(value, rows) for place, value in enumerate(node.inputs)]
        attributes = [
            ir.AttrInt64("axis", -1) if name == "axis" and node.op_type in _LAST_AXIS else attribute
            for name, attribute in node.attributes.items()
        ]
        new = ir.Node(node.domain, node.op_type, operands, attributes, num_outputs=len(node.outputs))
    rows.nodes.append(new)
    for old, result in zip(node.outputs, new.outputs, strict=True):
        result.type = old.type
        rows.made[old] = result


def _operand(value: ir.Value | None, rows: _Rows) -> ir.Value | None:
    if value is None or value in rows.made:
        return None if value is None else rows.made[value]
    if _is_number(value):
        return value
    new = ir.Node(INTERNAL, "OfExperts", [value, rows.owner])
    new.outputs[0].type = value.type
    rows.nodes.append(new)
    return new.outputs[0]
