"""Patterns that one operator of a framework computes faster, recognised by structure.

Attention, RMS norm, GELU and SiLU are written out by exporters; each is put back together where nothing else reads
what lies between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.frameworks.host_values import is_constant
from hyperclone_onnx.frameworks.registry import INTERNAL


def fuse(model: ir.Model) -> None:
    """Recognise every pattern, in place."""
    for node in list(model.graph):
        if node.graph is None or node.domain:
            continue
        if node.op_type == "Softmax":
            _fuse_attention(node)
        elif node.op_type in ("Mul", "Div"):
            _fuse_norm(node) or _fuse_gelu(node) or _fuse_silu(node)
    model.graph.opset_imports.setdefault(INTERNAL, 1)


# -- reading a graph ------------------------------------------------------------------------------------------


def number(value: ir.Value | None) -> float | None:
    """The one number that is stored in a value without axes."""
    if value is None or not is_constant(value) or value.const_value is None or len(value.const_value.shape):
        return None
    return float(value.const_value.numpy())


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that made a value, if it is of these operators."""
    node = None if value is None else value.producer()
    return node if node is not None and not node.domain and node.op_type in op_types else None


def only(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The same, if the value is read once and does not leave the graph."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return made_by(value, *op_types)


def _with_number(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, n) of x * n, n * x or x / n (n inverted then)."""
    left, right = node.inputs[:2]
    if node.op_type == "Mul" and right is not None and number(left) is not None:
        return right, number(left) or 0.0
    n = number(right)
    if left is None or n is None or (node.op_type == "Div" and n == 0):
        return None
    return left, 1 / n if node.op_type == "Div" else n


def put_in_place(node: ir.Node, new: ir.Node) -> None:
    """Put a new node in the place of another, under its names."""
    graph = node.graph
    assert graph is not None
    old, result = node.outputs[0], new.outputs[0]
    graph.insert_before(node, new)
    name, result.type, result.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    old.name, result.name, new.name = f"{name}.replaced", name, node.name
    graph.remove(node, safe=True)


# -- attention ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scores:
    """scale * query @ key_transposed + biases"""

    query: ir.Value
    key_transposed: ir.Value
    scale: float
    biases: tuple[ir.Value, ...]


def _fuse_attention(softmax: ir.Node) -> None:
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
        scaled = _with_number(node)
        found = None if scaled is None else _scores(scaled[0])
        if scaled is None or found is None or found.biases:
            return None
        return _Scores(found.query, found.key_transposed, found.scale * scaled[1], ())
    query, scale = _unscaled(left)
    key, key_scale = _unscaled(right)
    return None if query is None or key is None else _Scores(query, key, scale * key_scale, ())


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    node = only(value, "Mul", "Div")
    scaled = None if node is None else _with_number(node)
    return (value, 1.0) if scaled is None else scaled


# -- RMS norm -------------------------------------------------------------------------------------------------


def _fuse_norm(node: ir.Node) -> bool:
    """x / sqrt(mean(x^2) + epsilon), then times a stored gain if that is all that happens to it"""
    found = _root_mean_square(node)
    if found is None:
        return False
    x, epsilon = found
    gain = _gain(node)
    if gain is None:
        put_in_place(node, ir.node("RootMeanSquare", [x], {"epsilon": epsilon}, domain=INTERNAL))
    else:
        product, scale = gain
        put_in_place(product, ir.node("RMSNormalization", [x, scale], {"epsilon": epsilon}))
    return True


def _root_mean_square(node: ir.Node) -> tuple[ir.Value, float] | None:
    for x, other in (node.inputs[:2], node.inputs[1::-1]):
        if node.op_type == "Div":
            x, other = node.inputs[:2]
            root = only(other, "Sqrt")
        else:
            inverse = only(other, "Reciprocal", "Div")
            if inverse is None or (inverse.op_type == "Div" and number(inverse.inputs[0]) != 1):
                continue
            root = only(inverse.inputs[-1], "Sqrt")
        total = None if root is None else only(root.inputs[0], "Add")
        if total is None or x is None:
            continue
        for mean, epsilon in (total.inputs[:2], total.inputs[1::-1]):
            if number(epsilon) is not None and _is_mean_square(only(mean, "ReduceMean"), x):
                return x, number(epsilon) or 0.0
    return None


def _is_mean_square(mean: ir.Node | None, x: ir.Value) -> bool:
    if mean is None or not _over_last_axis(mean):
        return False
    square = only(mean.inputs[0], "Pow", "Mul")
    if square is None or square.inputs[0] is not x:
        return False
    return square.inputs[1] is x if square.op_type == "Mul" else number(square.inputs[1]) == 2


def _over_last_axis(mean: ir.Node) -> bool:
    keep = mean.attributes.get("keepdims")
    if keep is not None and keep.as_int() != 1:
        return False
    if "axes" in mean.attributes:
        return list(mean.attributes["axes"].as_ints()) == [-1]
    axes = mean.inputs[1] if len(mean.inputs) > 1 else None
    return axes is not None and is_constant(axes) and np.asarray(axes.const_value).ravel().tolist() == [-1]


def _gain(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    output = node.outputs[0]
    if len(output.uses()) != 1 or output.is_graph_output():
        return None
    (use,) = output.uses()
    product = use.node
    if product.op_type != "Mul" or product.domain:
        return None
    scale = product.inputs[1] if product.inputs[0] is output else product.inputs[0]
    if scale is None or not is_constant(scale) or scale.const_value is None or len(scale.const_value.shape) != 1:
        return None
    return product, scale


# -- GELU -----------------------------------------------------------------------------------------------------


def _fuse_gelu(node: ir.Node) -> bool:
    """x/2 (1 + erf(x / sqrt 2)), or x/2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in any order of the factors"""
    scale, factors = _factors(node.outputs[0], first=True)
    if len(factors) != 2 or not _near(scale, 0.5):
        return False
    for x, gate in (factors, factors[::-1]):
        inner = _minus_one(gate)
        if inner is None:
            continue
        approximate = "none" if inner.op_type == "Erf" else "tanh"
        matches = _is_erf_of(inner, x) if inner.op_type == "Erf" else _is_tanh_of(inner, x)
        if matches:
            put_in_place(node, ir.node("Gelu", [x], {"approximate": approximate}))
            return True
    return False


def _fuse_silu(node: ir.Node) -> bool:
    """x sigmoid(x)"""
    for x, gate in (node.inputs[:2], node.inputs[1::-1]):
        sigmoid = only(gate, "Sigmoid")
        if node.op_type == "Mul" and sigmoid is not None and x is not None and sigmoid.inputs[0] is x:
            put_in_place(node, ir.node("Swish", [x]))
            return True
    return False


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5)


def _factors(value: ir.Value, first: bool = False) -> tuple[float, Sequence[ir.Value]]:
    """A product as (a number, the other factors)."""
    node = made_by(value, "Mul", "Div") if first else only(value, "Mul", "Div")
    if node is None:
        return 1.0, [value]
    scaled = _with_number(node)
    if scaled is not None:
        scale, factors = _factors(scaled[0])
        return scale * scaled[1], factors
    if node.op_type == "Div" or node.inputs[0] is None or node.inputs[1] is None:
        return 1.0, [value]
    parts = [_factors(each) for each in node.inputs if each is not None]
    return parts[0][0] * parts[1][0], [*parts[0][1], *parts[1][1]]


def _minus_one(gate: ir.Value) -> ir.Node | None:
    node = only(gate, "Add")
    if node is None:
        return None
    for one, other in (node.inputs[:2], node.inputs[1::-1]):
        if number(one) == 1:
            return only(other, "Erf", "Tanh")
    return None


def _is_erf_of(node: ir.Node, x: ir.Value) -> bool:
    value = node.inputs[0]
    assert value is not None
    scale, factors = _factors(value)
    return list(factors) == [x] and _near(scale, math.sqrt(0.5))


def _is_tanh_of(node: ir.Node, x: ir.Value) -> bool:
    value = node.inputs[0]
    assert value is not None
    scale, factors = _factors(value)
    total = only(factors[0], "Add") if len(factors) == 1 else None
    if total is None or not _near(scale, math.sqrt(2 / math.pi)):
        return False
    for one, cube in (total.inputs[:2], total.inputs[1::-1]):
        if one is not x or cube is None:
            continue
        part, powers = _factors(cube)
        if _near(part, 0.044715) and _is_cube(powers, x):
            return True
    return False


def _is_cube(factors: Sequence[ir.Value], x: ir.Value) -> bool:
    if len(factors) == 1:
        power = only(factors[0], "Pow")
        return power is not None and power.inputs[0] is x and number(power.inputs[1]) == 3
    return list(factors) == [x, x, x]
