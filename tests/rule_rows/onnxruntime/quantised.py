"""Rows for the rules of `hyperclone_onnx.rules.onnxruntime.quantised`."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from rule_rows.harness import MICROSOFT, Model, row
from rule_rows.quantised import codes, scale_for, single, weight_codes, zero


def tensor(m: Model, shape: tuple[int, ...]) -> list[str]:
    """Codes with one scale and one zero point."""
    x = m.node("Identity", m.operand(codes(m, shape, np.uint8), stored=False), inner=True)
    return [x, *parameters(m)]


def parameters(m: Model) -> list[str]:
    return [m.operand(scale_for(m), stored=True), m.operand(codes(m, (), np.uint8), stored=True)]


@row("MatMulInteger16", domain=MICROSOFT, seeds=3)
def matmul_integer16(m: Model) -> None:
    m.runtime, m.equal = True, True
    k, n = m.size(), m.size()
    x, w = (m.operand(codes(m, shape, np.int16, 8), stored=False) for shape in ((2, k), (k, n)))
    m.node("MatMulInteger16", x, w, domain=MICROSOFT, kind=np.int32, want="gg")


@row("MatMulIntegerToFloat", domain=MICROSOFT, seeds=8)
def matmul_integer_to_float(m: Model) -> None:
    m.runtime, m.equal, m.tolerance = True, True, 1e-6
    k, n = m.size(), m.size()
    x = m.node("Identity", m.operand(codes(m, (2, 3, k), np.uint8), stored=False), inner=True)
    w, per = m.operand(weight_codes(m, (k, n), np.int8), stored=True), m.pick((), (n,))
    scales = [m.operand(scale_for(m), stored=False), m.operand(scale_for(m, *per), stored=m.coin(0.7))]
    bias = m.operand(scale_for(m, n)) if m.coin() else ""
    zeros = [zero(m, np.uint8), zero(m, np.int8, *per)]
    m.node("MatMulIntegerToFloat", x, w, *scales, *zeros, bias, domain=MICROSOFT, want="ggg")


@row("DynamicQuantizeMatMul", domain=MICROSOFT, seeds=6)
def dynamic_quantize_matmul(m: Model) -> None:
    m.runtime, m.equal, m.tolerance = True, True, 1e-6
    k, n = m.size(), m.size()
    per = m.pick((1,), (n,))
    operands = [
        single(m, (2, k)),
        m.operand(weight_codes(m, (k, n), np.int8), stored=True),
        m.operand(scale_for(m, *per)),
    ]
    zeros = [zero(m, np.int8, *per), m.operand(scale_for(m, n)) if m.coin() else ""]
    m.node("DynamicQuantizeMatMul", *operands, *zeros, domain=MICROSOFT, want="gg")


@row("DynamicQuantizeLSTM", domain=MICROSOFT, seeds=12)
def dynamic_quantize_lstm(m: Model) -> None:
    """Every input and attribute; scales for a direction, or for each column of its weights. Zero points must be 0.

    The state is quantised at each step: its last bit may move it by a whole step, which the tolerance allows.
    """
    m.runtime, m.equal, m.tolerance = True, True, 2e-3
    length, batch, n, hidden = m.size(), m.size(), m.size(), m.size()
    direction, directions = m.pick(("forward", 1), ("reverse", 1), ("bidirectional", 2))
    columns = 4 * hidden
    state = (directions, batch, hidden)
    kind = m.pick(np.int8, np.uint8)
    per = m.pick((directions,), (directions, columns))
    weights, scales = [], []
    for rows in (n, hidden):
        weights.append(m.operand(weight_codes(m, (directions, rows, columns), kind), "pgg", stored=True))
        scales += [m.operand(scale_for(m, *per), stored=True), m.operand(np.zeros(per, kind), stored=True)]
    inputs = [
        single(m, (length, batch, n)),
        *weights,
        m.operand(scale_for(m, directions, 2 * columns), "pg", stored=True) if m.coin() else "",
        m.operand(m.rng.integers(1, length + 1, (batch,), dtype="int32"), stored=False) if m.coin() else "",
        *(m.operand(scale_for(m, *state), stored=False) if m.coin() else "" for _ in range(2)),
        m.operand(scale_for(m, directions, 3 * hidden), "pg", stored=True) if m.coin() else "",
        *scales,
    ]
    attributes = m.pick({}, {"direction": direction}) if direction == "forward" else {"direction": direction}
    attributes |= m.pick({}, {"clip": 0.4})
    m.node("DynamicQuantizeLSTM", *inputs, outputs=3, domain=MICROSOFT, hidden_size=hidden, want="ppgg", **attributes)


@row("QGemm", domain=MICROSOFT, seeds=10)
def qgemm(m: Model) -> None:
    m.runtime, m.equal, m.tolerance = True, True, 1e-6
    k, n, kind = m.size(), m.size(), np.uint8
    a, b = m.coin(), m.coin()
    x = m.node("Identity", m.operand(codes(m, (k, 3) if a else (3, k), kind), stored=False), inner=True)
    per = m.pick((), (n,))
    operands = [x, m.operand(scale_for(m), stored=True), m.operand(codes(m, (), kind), stored=True)]
    operands += [m.operand(codes(m, (n, k) if b else (k, n), kind), stored=True), m.operand(scale_for(m, *per))]
    operands += [m.operand(codes(m, per, kind), stored=True)]
    operands += [m.operand(codes(m, (n,), np.int32), stored=m.coin(0.7)) if m.coin() else ""]
    if m.coin():
        operands += [m.operand(scale_for(m), stored=True), m.operand(codes(m, (), kind), stored=True)]
    result = kind if len(operands) > 7 else np.float32
    m.node("QGemm", *operands, domain=MICROSOFT, transA=a, transB=b, want="gg", kind=result)


@row("QLinearAdd", "QLinearMul", domain=MICROSOFT, seeds=4)
def qlinear_binary(m: Model, op: str) -> None:
    m.runtime = True
    n = m.size()
    m.node(
        op,
        *tensor(m, (3, n)),
        *tensor(m, m.pick((3, n), (n,))),
        *parameters(m),
        domain=MICROSOFT,
        kind=np.uint8,
        want="gg",
    )


@row("QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT, seeds=3)
def qlinear_unary(m: Model, op: str) -> None:
    m.runtime = True
    m.node(op, *tensor(m, (3, m.size())), *parameters(m), domain=MICROSOFT, kind=np.uint8, want="gg")


@row("QLinearWhere", domain=MICROSOFT, seeds=3)
def qlinear_where(m: Model) -> None:
    m.runtime = True
    test = m.operand(m.values((3, 4), np.bool_), stored=False)
    m.node(
        "QLinearWhere",
        test,
        *tensor(m, (3, 4)),
        *tensor(m, (3, 4)),
        *parameters(m),
        domain=MICROSOFT,
        kind=np.uint8,
        want="gg",
    )


@row("QLinearSoftmax", domain=MICROSOFT, seeds=3)
def qlinear_softmax(m: Model) -> None:
    m.runtime = True
    x = tensor(m, (2, 3, 4))
    m.node("QLinearSoftmax", *x, *parameters(m), domain=MICROSOFT, kind=np.uint8, axis=m.pick(-1, 1), opset=13)


@row("QLinearConcat", domain=MICROSOFT, seeds=4)
def qlinear_concat(m: Model) -> None:
    m.runtime = True
    parts = [name for n in (3, 2) for name in tensor(m, (2, n))]
    m.node("QLinearConcat", *parameters(m), *parts, domain=MICROSOFT, kind=np.uint8, axis=m.pick(1, -1), want="gg")


@row("QLinearGlobalAveragePool", domain=MICROSOFT, seeds=4)
def qlinear_global_pool(m: Model) -> None:
    m.runtime, m.equal = True, True
    last = m.coin()
    shape = (2, 3, 4, 5)
    m.node(
        "QLinearGlobalAveragePool",
        *tensor(m, shape),
        *parameters(m),
        domain=MICROSOFT,
        kind=np.uint8,
        channels_last=last,
    )


@row("QLinearAveragePool", domain=MICROSOFT, seeds=4)
def qlinear_average_pool(m: Model) -> None:
    m.runtime = True
    attributes = {"kernel_shape": [2, 2], "strides": [m.size(1, 2)] * 2, "kind": np.uint8}
    m.node("QLinearAveragePool", *tensor(m, (2, 3, 4, 5)), *parameters(m), domain=MICROSOFT, want="ggpp", **attributes)


@row("QLinearReduceMean", domain=MICROSOFT, seeds=4)
def qlinear_reduce_mean(m: Model) -> None:
    m.equal = True
    axes, keep = m.pick([1], [-1], [0, 2]), m.coin()
    m.node("QLinearReduceMean", *tensor(m, (2, 3, 4)), *parameters(m), domain=MICROSOFT, axes=axes, keepdims=keep)


@row("ReduceSumInteger", domain=MICROSOFT, seeds=6)
def reduce_sum_integer(m: Model) -> None:
    m.equal = True
    x = m.node("Identity", m.operand(codes(m, (2, 3, 4), np.int8), stored=False), inner=True)
    axes, keep = m.pick([1], [-1]), m.coin()
    m.node("ReduceSumInteger", x, domain=MICROSOFT, axes=axes, keepdims=keep, kind=np.int32)


@row("MulInteger", domain=MICROSOFT, seeds=4)
def mul_integer(m: Model) -> None:
    a, b = (m.operand(codes(m, shape, np.uint8), stored=False) for shape in ((3, 4), m.pick((3, 4), (4,))))
    zeros = [m.operand(codes(m, (), np.uint8), stored=True) for _ in "ab"]
    m.node("MulInteger", a, zeros[0], b, zeros[1], domain=MICROSOFT, want="gg", kind=np.int32)


@row("QAttention", domain=MICROSOFT, seeds=12)
def qattention(m: Model) -> None:
    m.runtime, m.equal, m.tolerance = True, True, 3e-5
    heads, depth, k, s = m.size(1, 3), m.size(), m.size(), m.size()
    width = 3 * heads * depth
    x = m.node("Identity", m.operand(codes(m, (2, s, k), np.uint8), stored=False), inner=True)
    w, per = m.operand(weight_codes(m, (k, width), np.int8), stored=True), m.pick((), (width,))
    operands = [x, w, m.operand(scale_for(m, width), stored=True), m.operand(scale_for(m), stored=m.coin())]
    operands += [m.operand(scale_for(m, *per), stored=m.coin(0.7)), "", zero(m, np.uint8), zero(m, np.int8)]
    attributes = {"num_heads": heads} | ({"unidirectional": 1} if m.coin() else {})
    m.node("QAttention", *operands, domain=MICROSOFT, want="..g", **attributes)


@row("QEmbedLayerNormalization", domain=MICROSOFT, seeds=6)
def qembed_layer_norm(m: Model) -> None:
    m.runtime, m.equal, m.tolerance = True, True, 3e-5
    n, s, kind = m.size(), 3, np.uint8
    ids = [m.operand(m.rng.integers(0, 2, (2, s)).astype(np.int32), stored=False) for _ in range(2)]
    tables = [m.operand(codes(m, shape, kind), stored=True) for shape in ((5, n), (4, n), (2, n), (n,), (n,))]
    scales = [m.operand(scale_for(m), stored=True) for _ in tables]
    zeros = [m.operand(codes(m, (), kind), stored=True) for _ in tables]
    m.node("QEmbedLayerNormalization", *ids, *tables, "", *scales, *zeros, outputs=2, domain=MICROSOFT, want="gpg")
    m.kinds[m.outputs[1]] = TensorProto.INT32
