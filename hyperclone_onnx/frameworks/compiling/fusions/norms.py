"""Recognise root mean square norms that a model writes as several nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.frameworks.compiling.fusions.graphs import number, only, put_in_place
from hyperclone_onnx.frameworks.compiling.registry import INTERNAL
from hyperclone_onnx.graphs import is_initializer


def fuse_norm(node: ir.Node) -> bool:
    """x / sqrt(mean(x^2) + epsilon), then times a stored gain if no other node reads the quotient"""
    norm = _root_mean_square(node)
    if norm is None:
        return False
    x, epsilon = norm
    gain = _gain(node)
    if gain is None:
        put_in_place(node, ir.node("RootMeanSquare", [x], {"epsilon": epsilon}, domain=INTERNAL))
    else:
        product, scale = gain
        put_in_place(product, ir.node("RMSNormalization", [x, scale], {"epsilon": epsilon}))
    return True


def _root_mean_square(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, epsilon) if a node computes x / sqrt(mean(x^2) + epsilon)"""
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
    return axes is not None and is_initializer(axes) and np.asarray(axes.const_value).ravel().tolist() == [-1]


def _gain(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The product of a node's output with a stored vector, and this vector."""
    output = node.outputs[0]
    if len(output.uses()) != 1 or output.is_graph_output():
        return None
    (use,) = output.uses()
    product = use.node
    if product.op_type != "Mul" or product.domain:
        return None
    scale = product.inputs[1] if product.inputs[0] is output else product.inputs[0]
    if scale is None or not is_initializer(scale) or scale.const_value is None or len(scale.const_value.shape) != 1:
        return None
    return product, scale
