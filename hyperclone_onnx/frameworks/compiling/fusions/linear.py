"""Recognise linear layers: a product with a stored matrix, plus a stored vector.

One kernel then computes the layer, and its weight and bias belong to one operator.
"""

from __future__ import annotations

import onnx_ir as ir

from hyperclone_onnx.frameworks.compiling.fusions.graphs import only, put_in_place
from hyperclone_onnx.frameworks.compiling.registry import INTERNAL
from hyperclone_onnx.graphs import is_initializer


def fuse_linear(add: ir.Node) -> bool:
    """x W + b, with W and b stored"""
    for product, bias in (add.inputs[:2], add.inputs[1::-1]):
        node = only(product, "MatMul")
        shape, length = (None, None) if node is None else (_stored_shape(node.inputs[1]), _stored_shape(bias))
        if node is not None and shape is not None and len(shape) == 2 and length == shape[1:]:
            put_in_place(add, ir.node("Linear", [*node.inputs, bias], domain=INTERNAL))
            return True
    return False


def _stored_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The sizes of a stored floating tensor; None for any other value."""
    if value is None or not is_initializer(value) or value.const_value is None:
        return None
    tensor = value.const_value
    return tuple(int(size) for size in tensor.shape.numpy()) if tensor.dtype.is_floating_point() else None
