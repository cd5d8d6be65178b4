"""Attention that was written out: products, a scale, masks, a softmax."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from hyperclone_onnx.frameworks.fusions.graphs import number, only, put_in_place, with_number
from hyperclone_onnx.frameworks.registry import INTERNAL


@dataclass(frozen=True)
class _Scores:
    """scale * query @ key_transposed + biases"""

    query: ir.Value
    key_transposed: ir.Value
    scale: float
    biases: tuple[ir.Value, ...]


def fuse_attention(softmax: ir.Node) -> None:
    """MatMul(Softmax(scale * MatMul(Q, K^T) + biases), V)"""
    axis = softmax.attributes.get("axis")
    opset = softmax.graph.opset_imports.get("", 1) if isinstance(softmax.graph, ir.Graph) else 1
    if opset < 13 or (axis is not None and axis.as_int() != -1):
        return
    last = _after(softmax.outputs[0])
    scores = _scores(softmax.inputs[0])
    if last is None or scores is None:
        return
    operands = [scores.query, scores.key_transposed, last.inputs[1], *scores.biases]
    put_in_place(last, ir.node("Attention", operands, {"scale": scores.scale}, domain=INTERNAL))


def _after(weights: ir.Value) -> ir.Node | None:
    """The product with V, behind a guard of rows that nothing is visible to."""
    if weights.is_graph_output():
        return None
    readers = [use.node for use in weights.uses()]
    if len(readers) == 2:
        guard = next((node for node in readers if node.op_type == "IsNaN"), None)
        choice = next((node for node in readers if node.op_type == "Where"), None)
        if guard is None or choice is None or choice.inputs[0] is not guard.outputs[0]:
            return None
        if choice.inputs[2] is not weights or number(choice.inputs[1]) != 0 or len(guard.outputs[0].uses()) != 1:
            return None
        weights = choice.outputs[0]
        if weights.is_graph_output():
            return None
        readers = [use.node for use in weights.uses()]
    if len(readers) != 1 or readers[0].op_type != "MatMul" or readers[0].inputs[0] is not weights:
        return None
    return readers[0]


def _scores(value: ir.Value | None) -> _Scores | None:
    node = only(value, "Add", "Mul", "Div", "MatMul")
    if node is None:
        return None
    left, right = node.inputs[:2]
    if node.op_type == "Add":
        for inner, bias in ((left, right), (right, left)):
            found = _scores(inner)
            if found is not None and bias is not None:
                return _Scores(found.query, found.key_transposed, found.scale, (*found.biases, bias))
        return None
    if node.op_type in ("Mul", "Div"):
        scaled = with_number(node)
        found = None if scaled is None else _scores(scaled[0])
        if scaled is None or found is None or found.biases:
            return None
        return _Scores(found.query, found.key_transposed, found.scale * scaled[1], ())
    query, scale = _unscaled(left)
    key, key_scale = _unscaled(right)
    return None if query is None or key is None else _Scores(query, key, scale * key_scale, ())


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    node = only(value, "Mul", "Div")
    scaled = None if node is None else with_number(node)
    return (value, 1.0) if scaled is None else scaled
