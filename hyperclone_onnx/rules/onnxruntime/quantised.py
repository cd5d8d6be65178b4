"""ONNX Runtime's own operators on quantised values; where repeats make a sum too large, its scales are divided."""

from __future__ import annotations

from hyperclone_onnx.algebra.dims import ONE, Concat, Term
from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.contractions import relate_matmul
from hyperclone_onnx.rules.convolution import pool
from hyperclone_onnx.rules.dimensions import Axes, Fact
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.indexing import index_by
from hyperclone_onnx.rules.layout import side_by_side
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.quantised import (
    edit_integer_conv,
    linear,
    matmul_integer,
    parameters,
    per_channel,
    qlinear_conv,
    rows_and_columns,
)
from hyperclone_onnx.rules.recurrent import GATES, edit_state, relate_states
from hyperclone_onnx.rules.reductions import out_reduced
from hyperclone_onnx.rules.registry import edits, relates

relates("DequantizeLinear", "QuantizeLinear", domain=MICROSOFT)(linear)
relates("MatMulInteger16", domain=MICROSOFT)(matmul_integer)
edits("QLinearConv", domain=MICROSOFT)(edit_integer_conv)


# -- sums of products -------------------------------------------------------------------------------------


@relates("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(op: Op) -> None:
    """Y[.., m, n] = a_scale b_scale[n] sum_k (A[.., m, k] - a_zero) (B[.., k, n] - b_zero[n]) + bias[n]"""
    relate_matmul(op, 0, 1, integers=True, scales=(3, 2))
    rows_and_columns(op, (2, 4), (3, 5, 6))


@relates("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_quantize_matmul(op: Op) -> None:
    """Y[.., m, n] = b_scale[n] sum_k A[.., m, k] (B[.., k, n] - b_zero[n]) + bias[n], where A is quantised first"""
    relate_matmul(op, 0, 1, scales=(2,))
    rows_and_columns(op, (), (2, 3, 4))


@relates("QGemm", domain=MICROSOFT)
def qgemm(op: Op) -> None:
    """Y[m, n] = alpha a_scale b_scale[n] (sum_k A'[m, k] B'[k, n] + C[m, n]), quantised where y_scale is given"""
    a, b = op.axes(0, rank=2), op.axes(3, rank=2)
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


@relates("QLinearConv", domain=MICROSOFT)
def qlinear_conv_last(op: Op) -> None:
    """QLinearConv; if its channels come last, all axes keep their size"""
    if op.integer("channels_last", 0):
        raise CannotTell("channels that come last")
    qlinear_conv(op)


@relates("DynamicQuantizeLSTM", domain=MICROSOFT)
def dynamic_quantize_lstm(op: Op) -> None:
    """LSTM with W[d, i, (gate h)] and R[d, k, (gate h)] as codes with scales; X and H are quantised first

    Repeats of X and H do not change their range, so their codes stay the same. The scales of W and R are divided.
    """
    directions, hidden, _ = op.axes(2, rank=3)
    if op.static(hidden) is None:
        raise CannotTell("a state of unknown width")
    relate_states(op, directions, hidden, GATES["LSTM"], batch_first=False)
    op.sum_over((0, 2), (1, 1), scales=(8,))
    op.sum_over((2, 1), scales=(10,))
    every_gate = Concat((hidden,) * GATES["LSTM"])
    op.unify_axes(op.axes(1, rank=3), (directions, op.axis_of(0, 2), every_gate))
    op.unify_axes(op.axes(2), (directions, hidden, every_gate))
    for index in range(8, 12):
        if op.has(index):
            scale = op.axes(index)
            op.unify_axes(scale, (directions, every_gate)[: max(len(scale), 1)])


@edits("DynamicQuantizeLSTM", domain=MICROSOFT)
def edit_dynamic_quantize_lstm(op: GrownOp) -> None:
    """Sets the width of the state."""
    edit_state(op, op.axis_of(2, 1))


# -- elementwise operators, poolings and joins ---------------------------------------------------------------


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
    """Z[j] = X[j] where condition[j], else Y[j], each with its own scale"""
    parameters(op, 2, 3, 5, 6, 7, 8)
    op.out(op.broadcast([op.axes(0), op.axes(1), op.axes(4)]))


@relates("QLinearSoftmax", domain=MICROSOFT)
def qlinear_softmax(op: Op) -> None:
    """Y[j] = quantised exp x[j] / sum_k exp x[k]: the axis keeps its size, since repeats would change the sum"""
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
    axes = op.axes(0, least=2)
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
    ids = op.axes(0, rank=2)
    parameters(op, *range(8, 18))
    width: list[Term] = []
    for table, indices in ((2, 0), (3, 0), (4, 1)):
        if op.has(table):
            rows, columns = op.axes(table, rank=2)
            index_by(op, rows, indices)
            op.fact(Fact.EMBEDDING, columns)
            width.append(columns)
    if op.has(1):
        for one, other in zip(op.axes(1, rank=2), ids, strict=True):
            op.merge([one, other])
    op.pin(ids[1], "its positions are indices into a table")
    hidden = op.merge([*width, op.axis_of(5, 0), op.axis_of(6, 0)])
    op.uniform(hidden)
    op.out((*ids, hidden))
    op.out((ids[0],), index=1)


@relates("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(op: Op) -> None:
    """Y = operands side by side along one axis, each requantised to one scale"""
    parameters(op, 0, 1, *(i for start in range(2, op.count, 3) for i in (start + 1, start + 2)))
    operands = [op.axes(start, rank=op.rank(2)) for start in range(2, op.count, 3)]
    axis = op.axis(op.integer("axis"), op.rank(2))
    if any(op.static(axes[axis]) is None for axes in operands):
        raise CannotTell("joined parts whose sizes are not known before running")
    op.out(side_by_side(op, operands, axis))
