"""Operators on quantised values: codes are repeated unchanged, and their scales are divided.

A quantised weight is (codes - zero point) * scale. If codes were divided among repeats, they would be rounded again.
Every repeat holds the same code, so n repeats make a sum n times too large. A scale divided by n undoes that exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

from hyperclone_onnx.algebra.dims import Term
from hyperclone_onnx.rules.contractions import relate_matmul
from hyperclone_onnx.rules.convolution import edit_groups, relate_conv
from hyperclone_onnx.rules.dimensions import Axes
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates

BLOCK = "elements of a block share one scale"


def parameters(op: Op, *indices: int) -> None:
    """State that inputs are scales and zero points of whole tensors. Their axes keep their size."""
    for index in indices:
        op.parameter(index)


def per_channel(op: Op, index: int, channels: Term) -> None:
    """Relate a scale or zero point: it is one number, or a vector with one number for each channel."""
    if op.has(index) and op.rank(index) == 1:
        op.merge([op.axis_of(index, 0), channels])
    elif op.has(index) and op.rank(index) > 1:
        raise CannotTell("scales of more than one axis")


def blocks_of(op: Op, term: Term, blocks: Term, size: int) -> None:
    """Relate an axis as (blocks, elements of a block). Only blocks grow, since a block's elements share one scale."""
    count, length = op.static(blocks), op.static(term)
    if count is None or length is None or count * size != length:
        for axis in (term, blocks):
            op.pin(axis, f"the axis is not a multiple of its blocks of {size} elements that share a scale")
        return
    op.space.match([term], [blocks, op.pinned_dim(size, BLOCK)])


# -- conversions ------------------------------------------------------------------------------------------


@relates("DequantizeLinear", "QuantizeLinear")
def linear(op: Op) -> None:
    """y[j] = (x[j] - zero_point[j]) scale[j], or its inverse; one scale in all, or one for each channel or block"""
    x = op.axes(0)
    _relate_scale(op, x, op.axes(1))
    if op.has(2):
        _relate_scale(op, x, op.axes(2))
    op.out(x)


def _relate_scale(op: Op, x: Axes, scale: Axes) -> None:
    if all(op.is_one(term) for term in scale):
        return
    axis = op.axis(op.integer("axis", 1) if len(x) > 1 else 0, len(x))
    if len(scale) == 1 and not op.integer("block_size", 0):
        op.unify(scale[0], x[axis])
        return
    if len(scale) != len(x):
        raise CannotTell("scales of another rank than their values")
    for position, (one, other) in enumerate(zip(scale, x, strict=True)):
        if position != axis:
            op.unify(one, other)
    blocks_of(op, x[axis], scale[axis], op.integer("block_size"))


@relates("DynamicQuantizeLinear")
def dynamic_linear(op: Op) -> None:
    """y[j] = round(x[j] / scale) + zero_point, both from the minimum and maximum of x: repeats do not change them"""
    op.out(op.axes(0))
    op.out((), index=1)
    op.out((), index=2)


# -- sums of products of integers -------------------------------------------------------------------------


def rows_and_columns(op: Op, rows: Sequence[int], columns: Sequence[int]) -> None:
    """Relate scales and zero points of a product's operands: one number, a vector for rows or columns, or full rank."""
    out = op.dimensions.axes[op.node.outputs[0]] or ()
    for slots, axis in ((rows, -2), (columns, -1)):
        for slot in slots:
            if not op.has(slot) or op.rank(slot) == 0:
                continue
            if op.rank(slot) == 1:
                if not op.is_one(op.axis_of(slot, 0)):
                    op.unify(op.axis_of(slot, 0), out[op.axis(axis, len(out))])
            else:
                op.broadcast([out, op.axes(slot)])


@relates("MatMulInteger")
def matmul_integer(op: Op) -> None:
    """C[.., m, n] = sum_k (A[.., m, k] - a_zero[m]) (B[.., k, n] - b_zero[n]), in integers"""
    relate_matmul(op, 0, 1, integers=True)
    rows_and_columns(op, (2,), (3,))


@relates("QLinearMatMul")
def qlinear_matmul(op: Op) -> None:
    """Y[.., m, n] = quantised a_scale b_scale sum_k (A[.., m, k] - a_zero) (B[.., k, n] - b_zero), over y_scale"""
    relate_matmul(op, 0, 3, integers=True, scales=(4, 1))
    rows_and_columns(op, (1, 2, 6, 7), (4, 5))


@relates("ConvInteger")
def conv_integer(op: Op) -> None:
    """Y[n, (g m), p] = sum_{c, k} (X[n, (g c), p + k] - x_zero) (W[(g m), c, k] - w_zero[(g m)]), in integers"""
    relate_conv(op, 0, 1, 4, integers=True)
    parameters(op, 2)
    per_channel(op, 3, op.axis_of(1, 0))


@relates("QLinearConv")
def qlinear_conv(op: Op) -> None:
    """Conv of (x - x_zero) and (w - w_zero[m]) plus B[m], times x_scale w_scale[m], quantised by y_scale"""
    relate_conv(op, 0, 3, 8, integers=True, scales=(4, 1), biases=(8,))
    parameters(op, 1, 2, 6, 7)
    for index in (4, 5):
        per_channel(op, index, op.axis_of(3, 0))


@edits("ConvInteger", "QLinearConv")
def edit_integer_conv(op: GrownOp) -> None:
    """Sets the attribute `group`: all channels divided by the channels of one group."""
    edit_groups(op, 1 if op.node.op_type == "ConvInteger" else 3)
