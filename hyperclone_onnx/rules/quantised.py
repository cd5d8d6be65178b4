"""Operators on quantised values: codes repeat as they are, and what a sum over repeats grows by goes into the scales.

A quantised weight is (codes - zero point) * scale. Codes cannot share a weight without new rounding; their scale can:
divided by the number of repeats it undoes the sum exactly, since every repeat holds the same code.
"""

from __future__ import annotations

from collections.abc import Sequence

from hyperclone_onnx.algebra.dims import ONE, Term
from hyperclone_onnx.rules.contractions import relate_matmul
from hyperclone_onnx.rules.convolution import edit_groups, pool, relate_conv
from hyperclone_onnx.rules.dimensions import Axes, Fact
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.indexing import index_by
from hyperclone_onnx.rules.layout import side_by_side
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.reductions import out_reduced
from hyperclone_onnx.rules.registry import edits, relates

MICROSOFT = "com.microsoft"
BLOCK = "elements of a block share one scale"


def parameters(op: Op, *indices: int) -> None:
    """Scales and zero points of whole tensors, whose own axes keep their size."""
    for index in indices:
        op.parameter(index)


def per_channel(op: Op, index: int, channels: Term) -> None:
    """A scale or zero point that is one number, or a vector with one for each channel."""
    if op.has(index) and op.rank(index) == 1:
        op.merge([op.axes(index)[0], channels])
    elif op.has(index) and op.rank(index) > 1:
        raise CannotTell("scales of more than one axis")


def blocks_of(op: Op, term: Term, blocks: Term, size: int) -> None:
    """An axis is (blocks, elements of a block): blocks grow, for a block's elements share one scale."""
    count, length = op.static(blocks), op.static(term)
    if count is None or length is None or count * size != length:
        for each in (term, blocks):
            op.pin(each, f"blocks of {size} share a scale, and do not fill it")
        return
    op.space.match([term], [blocks, op.pinned_dim(size, BLOCK)])


# -- conversions ------------------------------------------------------------------------------------------


@relates("DequantizeLinear", "QuantizeLinear")
@relates("DequantizeLinear", "QuantizeLinear", domain=MICROSOFT)
def linear(op: Op) -> None:
    """y[j] = (x[j] - zero_point[j]) scale[j], or its inverse; scales are one number, per channel or per block"""
    x = op.axes(0)
    for index in (1, 2):
        if op.has(index):
            _relate_scale(op, x, op.axes(index))
    op.out(x)


def _relate_scale(op: Op, x: Axes, scale: Axes) -> None:
    if all(op.is_one(term) for term in scale):
        return
    axis = op.axis(op.integer("axis", 1), len(x)) if len(x) > 1 else 0
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
    """y[j] = round(x[j] / scale) + zero_point, both from the least and the largest x: repeats do not move them"""
    op.out(op.axes(0))
    op.out((), index=1)
    op.out((), index=2)


# -- sums of products of integers -------------------------------------------------------------------------


def _rows_and_columns(op: Op, rows: Sequence[int], columns: Sequence[int]) -> None:
    """Scales and zero points of a product's operands: one number, a vector for rows or columns, or of full rank."""
    out = op.dimensions.axes[op.node.outputs[0]] or ()
    for slots, axis in ((rows, -2), (columns, -1)):
        for slot in slots:
            if not op.has(slot) or op.rank(slot) == 0:
                continue
            if op.rank(slot) == 1:
                if not op.is_one(op.axes(slot)[0]):
                    op.unify(op.axes(slot)[0], out[axis])
            else:
                op.broadcast([out, op.axes(slot)])


@relates("MatMulInteger")
@relates("MatMulInteger16", domain=MICROSOFT)
def matmul_integer(op: Op) -> None:
    """C[.., m, n] = sum_k (A[.., m, k] - a_zero[m]) (B[.., k, n] - b_zero[n]), in integers"""
    relate_matmul(op, 0, 1, integers=True)
    _rows_and_columns(op, (2,), (3,))


@relates("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(op: Op) -> None:
    """Y[.., m, n] = a_scale b_scale[n] sum_k (A[.., m, k] - a_zero) (B[.., k, n] - b_zero[n]) + bias[n]"""
    relate_matmul(op, 0, 1, integers=True, scales=(3, 2))
    _rows_and_columns(op, (2, 4), (3, 5, 6))


@relates("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_quantize_matmul(op: Op) -> None:
    """Y[.., m, n] = b_scale[n] sum_k A[.., m, k] (B[.., k, n] - b_zero[n]) + bias[n], A being quantised on the way"""
    relate_matmul(op, 0, 1, scales=(2,))
    _rows_and_columns(op, (), (2, 3, 4))


@relates("QLinearMatMul")
def qlinear_matmul(op: Op) -> None:
    """Y[.., m, n] = quantised a_scale b_scale sum_k (A[.., m, k] - a_zero) (B[.., k, n] - b_zero), over y_scale"""
    relate_matmul(op, 0, 3, integers=True, scales=(4, 1))
    _rows_and_columns(op, (1, 2, 6, 7), (4, 5))


@relates("QGemm", domain=MICROSOFT)
def qgemm(op: Op) -> None:
    """Y[m, n] = alpha a_scale b_scale[n] (sum_k A'[m, k] B'[k, n] + C[m, n]), quantised where y_scale is given"""
    a, b = op.axes(0), op.axes(3)
    trans_a, trans_b = op.integer("transA", 0), op.integer("transB", 0)
    op.sum_over((0, 0 if trans_a else 1), (3, 1 if trans_b else 0), integers=True, scales=(4, 1), biases=(6,))
    m, n = a[1 if trans_a else 0], b[0 if trans_b else 1]
    op.fact(Fact.WEIGHT_OUTPUT, n)
    out: Axes = (m, n)
    if op.has(6):
        out = op.broadcast([out, op.axes(6)])
    op.out(out)
    parameters(op, 1, 2, 7, 8)
    for index in (4, 5):
        per_channel(op, index, n)


@relates("ConvInteger")
def conv_integer(op: Op) -> None:
    """Y[n, (g m), p] = sum_{c, k} (X[n, (g c), p + k] - x_zero) (W[(g m), c, k] - w_zero[(g m)]), in integers"""
    relate_conv(op, 0, 1, 4, integers=True)
    parameters(op, 2)
    per_channel(op, 3, op.axes(1)[0])


@relates("QLinearConv")
def qlinear_conv(op: Op) -> None:
    """Conv of (x - x_zero) and (w - w_zero[m]) plus B[m], times x_scale w_scale[m], quantised by y_scale"""
    relate_conv(op, 0, 3, 8, integers=True, scales=(4, 1), biases=(8,))
    parameters(op, 1, 2, 6, 7)
    for index in (4, 5):
        per_channel(op, index, op.axes(3)[0])


@relates("QLinearConv", domain=MICROSOFT)
def microsoft_qlinear_conv(op: Op) -> None:
    """QLinearConv, whose channels may come last"""
    if op.integer("channels_last", 0):
        raise CannotTell("channels that come last")
    qlinear_conv(op)


@edits("ConvInteger", "QLinearConv")
@edits("QLinearConv", domain=MICROSOFT)
def edit_integer_conv(op: GrownOp) -> None:
    """The group attribute is the channels over the channels of a group."""
    edit_groups(op, 1 if op.node.op_type == "ConvInteger" else 3)


# -- quantised elementwise operators, poolings and joins ---------------------------------------------------


@relates("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def qlinear_binary(op: Op) -> None:
    """C[j] = quantised f(dequantised A[j], dequantised B[j]), axes aligned at the right"""
    parameters(op, 1, 2, 4, 5, 6, 7)
    op.out(op.broadcast([op.axes(0), op.axes(3)]))


@relates("MulInteger", domain=MICROSOFT)
def mul_integer(op: Op) -> None:
    """C[j] = (A[j] - a_zero) (B[j] - b_zero), axes aligned at the right"""
    parameters(op, 1, 3)
    op.out(op.broadcast([op.axes(0), op.axes(2)]))


@relates("QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT)
def qlinear_unary(op: Op) -> None:
    """Y[j] = quantised f(dequantised X[j])"""
    parameters(op, 1, 2, 3, 4)
    op.out(op.axes(0))


@relates("QLinearWhere", domain=MICROSOFT)
def qlinear_where(op: Op) -> None:
    """Z[j] = X[j] where condition[j], else Y[j], each quantised by scales of its own"""
    parameters(op, 2, 3, 5, 6, 7, 8)
    op.out(op.broadcast([op.axes(0), op.axes(1), op.axes(4)]))


@relates("QLinearSoftmax", domain=MICROSOFT)
def qlinear_softmax(op: Op) -> None:
    """Y[j] = quantised exp x[j] / sum_k exp x[k]: repeats would take each other's share"""
    axes = op.axes(0)
    axis = op.axis(op.integer("axis", -1), len(axes))
    parameters(op, 1, 2, 3, 4)
    for term in axes[axis:] if op.integer("opset") < 13 else axes[axis : axis + 1]:
        op.fact(Fact.SOFTMAX, term)
        op.pin(term, "QLinearSoftmax runs over it")
    op.out(axes)


@relates("QLinearReduceMean", domain=MICROSOFT)
def qlinear_reduce_mean(op: Op) -> None:
    """Y[j] = quantised mean_k of dequantised X[j, k]"""
    axes = op.axes(0)
    parameters(op, 1, 2, 3, 4)
    listed = op.int_list("axes", None)
    reduced = {op.axis(a, len(axes)) for a in listed} if listed is not None else set(range(len(axes)))
    for axis in sorted(reduced):
        op.uniform(axes[axis])
    out_reduced(op, reduced)


@relates("QLinearGlobalAveragePool", domain=MICROSOFT)
def qlinear_global_pool(op: Op) -> None:
    """Y[n, c, 1...] pools X[n, c, all]; channels may come last"""
    axes = op.axes(0)
    parameters(op, 1, 2, 3, 4)
    last = op.integer("channels_last", 0)
    for term in axes[1:-1] if last else axes[2:]:
        op.uniform(term)
    ones = [ONE] * (len(axes) - 2)
    op.out((axes[0], *ones, axes[-1]) if last else (*axes[:2], *ones))


@relates("QLinearAveragePool", domain=MICROSOFT)
def qlinear_average_pool(op: Op) -> None:
    """Y[n, c, p] = quantised mean of X[n, c, window of p]"""
    if op.integer("channels_last", 0):
        raise CannotTell("channels that come last")
    parameters(op, 1, 2, 3, 4)
    pool(op)


@relates("ReduceSumInteger", domain=MICROSOFT)
def reduce_sum_integer(op: Op) -> None:
    """Y[j] = sum_k X[j, k], in integers"""
    axes = op.axes(0)
    reduced = {op.axis(a, len(axes)) for a in op.int_list("axes", None) or []}
    for axis in sorted(reduced):
        op.sum_over((0, axis), integers=True)
    out_reduced(op, reduced)


@relates("QEmbedLayerNormalization", domain=MICROSOFT)
def qembed_layer_norm(op: Op) -> None:
    """EmbedLayerNormalization whose tables, gain and bias are codes, each with one scale"""
    ids = op.axes(0)
    parameters(op, *range(8, 18))
    width: list[Term] = []
    for table, indices in ((2, 0), (3, 0), (4, 1)):
        if op.has(table):
            index_by(op, op.axes(table)[0], indices)
            op.fact(Fact.EMBEDDING, op.axes(table)[1])
            width.append(op.axes(table)[1])
    if op.has(1):
        for one, other in zip(op.axes(1), ids, strict=True):
            op.merge([one, other])
    op.pin(ids[1], "its positions index a table")
    hidden = op.merge([*width, op.axes(5)[0], op.axes(6)[0]])
    op.uniform(hidden)
    op.out((*ids, hidden))
    op.out((ids[0],), index=1)


@relates("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(op: Op) -> None:
    """Y = operands side by side along one axis, each requantised to one scale"""
    parameters(op, 0, 1, *(i for start in range(2, op.count, 3) for i in (start + 1, start + 2)))
    operands = [op.axes(start) for start in range(2, op.count, 3)]
    axis = op.axis(op.integer("axis"), len(operands[0]))
    if any(op.static(axes[axis]) is None for axes in operands):
        raise CannotTell("joined parts whose size is not known before running")
    op.out(side_by_side(op, operands, axis))
