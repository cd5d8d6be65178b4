"""Operators that act on each element by itself: ``out[j] = f(a[m(j)], b[m(j)], ...)``.

Repeated inputs give repeated outputs, so the rules need only the names of the operators.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.algebra import shape_values as known
from hyperclone_onnx.algebra.shape_values import Known
from hyperclone_onnx.rules.op import Op
from hyperclone_onnx.rules.registry import relates

UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitCast BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu "
    "HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink "
    "Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
).split()

BROADCASTING = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean "
    "Min Mod Mul Or Pow PRelu Sub Sum SwiGLU Where Xor"
).split()

FIRST_OPERAND_SHAPES = "CastLike Clip Dropout".split()
"""The output has the shape of their first operand. The others are scalars, or only give a type."""


@relates(*UNARY)
def unary(op: Op) -> None:
    """out[j] = f(x[j])"""
    op.out(op.axes(0), _unary_known(op))
    if op.value(0) in op.dimensions.expanded_axes:
        op.dimensions.expanded_axes[op.node.outputs[0]] = op.dimensions.expanded_axes[op.value(0)]


def _unary_known(op: Op) -> Known | None:
    elements = op.known(0)
    if elements is None and op.node.op_type in _ROUNDING:
        return _rounded_known(op)
    if elements is None or op.node.op_type == "Identity":
        return elements
    if op.node.op_type == "Cast":
        return _cast_known(elements, op.integer("to"))
    return known.unary(op.node.op_type, elements) if op.node.op_type in known.UNARY else None


_ROUNDING = {"Ceil": np.ceil, "Floor": np.floor, "Round": np.rint}


def _rounded_known(op: Op) -> Known | None:
    """The known elements of a stored fraction that is rounded: exporters compute sizes so."""
    tensor = op.value(0).const_value
    if tensor is None or tensor.size != 1 or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return None
    rounded = _ROUNDING[op.node.op_type](np.asarray(tensor.numpy(), dtype=np.float64))
    return known.known(rounded) if np.isfinite(rounded).all() else None


def _cast_known(elements: Known, to: int) -> Known | None:
    """The known elements after a conversion: 0 or 1 for booleans, None for types too narrow for a size."""
    if to == ir.DataType.BOOL:
        return known.known(
            [None if e is None or e.static is None else int(e.static != 0) for e in elements.ravel()]
        ).reshape(elements.shape)
    if to in (ir.DataType.INT64, ir.DataType.INT32):
        return known.truncated(elements)
    return elements if to in (ir.DataType.FLOAT, ir.DataType.DOUBLE) else None


@relates(*BROADCASTING)
def broadcasting(op: Op) -> None:
    """out[j] = f(a[j], b[j], ...), axes aligned at the right, size-1 axes stretched"""
    op.out(op.broadcast([op.axes(i) for i in range(op.count)]), _broadcasting_known(op))


def _broadcasting_known(op: Op) -> Known | None:
    operands = [elements for i in range(op.count) if (elements := op.known(i)) is not None]
    if len(operands) < op.count or not operands:
        return None
    first, *rest = operands
    if op.node.op_type == "Where" and len(rest) == 2:
        return known.where(first, *rest)
    if op.node.op_type not in known.BINARY or len(rest) != 1 or op.integer("fmod", 0):
        return None
    dtype = op.value(0).dtype
    return known.binary(op.node.op_type, first, rest[0], integer=dtype is None or not dtype.is_floating_point())


@relates(*FIRST_OPERAND_SHAPES)
def first_operand(op: Op) -> None:
    """out[j] = f(x[j]); Dropout's mask has the same axes"""
    op.out(op.axes(0), op.known(0) if op.node.op_type == "CastLike" else None)
    op.out(op.axes(0), index=1)
