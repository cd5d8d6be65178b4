"""A product with a stored matrix, and a stored vector added: one kernel, and one place for a weight beside its bias."""

from __future__ import annotations

import onnx_ir as ir

from hyperclone_onnx.frameworks.fusions.graphs import only, put_in_place
from hyperclone_onnx.frameworks.host_values import is_constant
from hyperclone_onnx.frameworks.registry import INTERNAL


def fuse_linear(add: ir.Node) -> bool:
    """x W + b, with W and b stored"""
    for product, bias in (add.inputs[:2], add.inputs[1::-1]):
        node = only(product, "MatMul")
        if node is not None and _is_stored(node.inputs[1], 2) and _is_stored(bias, 1):
            put_in_place(add, ir.node("Linear", [*node.inputs, bias], domain=INTERNAL))
            return True
    return False


def _is_stored(value: ir.Value | None, rank: int) -> bool:
    return (
        value is not None
        and is_constant(value)
        and value.const_value is not None
        and len(value.const_value.shape) == rank
    )
