"""Recognise attention that a model writes as several nodes: products, a scale, masks, a softmax."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.frameworks.compiling.fusions.graphs import number, only, put_in_place, with_number
from hyperclone_onnx.frameworks.compiling.registry import INTERNAL
from hyperclone_onnx.graphs import is_initializer, opset_of


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
    opset = opset_of(softmax.graph) if isinstance(softmax.graph, ir.Graph) else 1
    if opset < 13 or (axis is not None and axis.as_int() != -1):
        return
    last = _after(softmax.outputs[0])
    scores = _scores(softmax.inputs[0])
    if last is None or scores is None:
        return
    key, value = _heads(scores.key_transposed, transposed=True), _heads(last.inputs[1])
    if key is None or value is None:
        operands = [scores.query, scores.key_transposed, last.inputs[1], *scores.biases]
        put_in_place(last, ir.node("Attention", operands, {"scale": scores.scale}, domain=INTERNAL))
        return
    operands = [scores.query, key.few, key.spread, key.joined, value.few, value.spread, value.joined, *scores.biases]
    put_in_place(last, ir.node("GroupedAttention", operands, {"scale": scores.scale}, domain=INTERNAL))


@dataclass(frozen=True)
class _Heads:
    """Reshape(Expand(Unsqueeze(few, 2), spread), joined): heads, repeated because groups of queries share them"""

    few: ir.Value
    spread: ir.Value
    joined: ir.Value


def _heads(value: ir.Value | None, transposed: bool = False) -> _Heads | None:
    """The heads that a value may repeat. The operator checks at run time, when it knows the sizes, that it does."""
    if transposed:
        turned = only(value, "Transpose")
        perm = None if turned is None else turned.attributes.get("perm")
        if turned is None or perm is None or list(perm.as_ints()) != [0, 1, 3, 2]:
            return None
        value = turned.inputs[0]
    reshape = only(value, "Reshape")
    expand = None if reshape is None else only(reshape.inputs[0], "Expand")
    unsqueeze = None if expand is None else only(expand.inputs[0], "Unsqueeze")
    if reshape is None or expand is None or unsqueeze is None or not _at_axis_two(unsqueeze):
        return None
    few, spread, joined = unsqueeze.inputs[0], expand.inputs[1], reshape.inputs[1]
    return None if few is None or spread is None or joined is None else _Heads(few, spread, joined)


def _at_axis_two(unsqueeze: ir.Node) -> bool:
    if "axes" in unsqueeze.attributes:
        return list(unsqueeze.attributes["axes"].as_ints()) == [2]
    axes = unsqueeze.inputs[1]
    return axes is not None and is_initializer(axes) and np.asarray(axes.const_value).ravel().tolist() == [2]


def _after(weights: ir.Value) -> ir.Node | None:
    """The product with V. Before it may be a guard that sets rows to 0 in which the softmax is NaN."""
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
            scores = _scores(inner)
            if scores is not None and bias is not None:
                return _Scores(scores.query, scores.key_transposed, scores.scale, (*scores.biases, bias))
        return None
    if node.op_type in ("Mul", "Div"):
        scaled = with_number(node)
        scores = None if scaled is None else _scores(scaled[0])
        if scaled is None or scores is None or scores.biases:
            return None
        return _Scores(scores.query, scores.key_transposed, scores.scale * scaled[1], ())
    query, scale = _unscaled(left)
    key, key_scale = _unscaled(right)
    return None if query is None or key is None else _Scores(query, key, scale * key_scale, ())


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    node = only(value, "Mul", "Div")
    scaled = None if node is None else with_number(node)
    return (value, 1.0) if scaled is None else scaled
