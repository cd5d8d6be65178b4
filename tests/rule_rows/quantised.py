"""Rows for the rules of `hyperclone_onnx.rules.quantised`."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from rule_rows.harness import MICROSOFT, Array, Model, activation, row


def codes(m: Model, shape: tuple[int, ...], kind: Any, bits: int = 8) -> Array:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if np.dtype(kind).kind == "i" else (0, 2**bits)
    return m.rng.integers(low, high, shape).astype(kind)


def weight_codes(m: Model, shape: tuple[int, ...], kind: Any) -> Array:
    """Signed codes have 7 bits: without VNNI, ONNX Runtime adds two products with unsigned bytes in 16 bits."""
    return codes(m, shape, kind, 7 if np.dtype(kind).kind == "i" else 8)


def scale_for(m: Model, *shape: int) -> Array:
    """Powers of two, so that products of codes are exact."""
    return np.asarray(2.0 ** m.rng.integers(-8, -4, shape), dtype=np.float32)


def single(m: Model, shape: tuple[int, ...], want: str = "") -> str:
    """A computed float value."""
    return activation(m, shape, want, kind=np.float32)


@row("DequantizeLinear", seeds=24)
@row("DequantizeLinear", domain=MICROSOFT, seeds=6)
def dequantised_weight(m: Model, op: str) -> None:
    """A contracted weight of codes. Growth divides its scale."""
    m.runtime, m.tolerance, m.equal, m.opset = True, 3e-6, True, 21
    contrib = "microsoft" in m.domain
    kind = m.pick(np.int8, np.uint8)
    k, n = m.size() * m.pick(1, 2), m.size()
    layout = "one" if contrib and m.coin() else m.pick("one", "channel", "other", "block")
    layout = "channel" if contrib and layout == "block" else layout
    shape: tuple[int, ...] = {"one": (), "channel": (n,), "other": (k,), "block": (k // 2, n)}[
        layout if layout != "block" or k % 2 == 0 else "one"
    ]
    attributes: dict[str, Any] = {"axis": 0} if layout in ("other", "block") and shape else {"axis": 1}
    if len(shape) == 2:
        attributes["block_size"] = 2
    operands = [m.operand(codes(m, (k, n), kind), stored=True), m.operand(scale_for(m, *shape), stored=True)]
    if m.coin():
        operands.append(m.operand(codes(m, shape, kind), stored=True))
    w = m.node(op, *operands, inner=True, domain=m.domain, want="gg" if len(shape) < 2 else ".g", **attributes)
    m.node("MatMul", single(m, (2, k)), w, want="gg")


@row("DequantizeLinear", seeds=4)
def dequantised_activation(m: Model, op: str) -> None:
    m.runtime, m.opset = True, 21
    x = m.node("QuantizeLinear", single(m, (3, 4), "gg"), m.operand(scale_for(m, 4)), inner=True, axis=1)
    m.node(op, x, m.operand(scale_for(m)), want="gg")


@row("QuantizeLinear", seeds=6)
@row("QuantizeLinear", domain=MICROSOFT, seeds=3)
def quantised(m: Model, op: str) -> None:
    m.runtime, m.opset = True, 21
    operands = [single(m, (3, 4), "gg"), m.operand(scale_for(m, *m.pick((), (4,))))]
    shape = np.shape((m.stored | m.inputs)[operands[1]])
    operands.append(m.operand(codes(m, shape, np.uint8)))
    m.node(op, *operands, axis=1, domain=m.domain, want="gg", kind=np.uint8)


@row("DynamicQuantizeLinear", seeds=3)
def dynamic(m: Model) -> None:
    m.runtime = True
    m.node("DynamicQuantizeLinear", single(m, m.shape(1, 3)), outputs=3)


def zero(m: Model, kind: Any, *shape: int) -> str:
    return m.operand(codes(m, shape, kind), stored=True) if m.coin(0.7) else ""


@row("MatMulInteger", seeds=12)
def matmul_integer(m: Model) -> None:
    m.runtime, m.equal = True, True
    k, n = m.size(), m.size()
    b = m.pick(np.int8, np.uint8)
    x = m.node("Identity", m.operand(codes(m, (2, 3, k), np.uint8), stored=False), inner=True)
    w = m.operand(weight_codes(m, (k, n), b), stored=m.coin(0.7))
    m.node("MatMulInteger", x, w, zero(m, np.uint8), zero(m, b, *m.pick((), (n,))), want="ggg")


@row("MatMulInteger", seeds=8)
def matmul_integer_scaled_behind(m: Model) -> None:
    """Nodes as in ONNX Runtime's dynamic quantisation. Growth divides a scale that is applied later."""
    m.runtime, m.equal, m.tolerance = True, True, 1e-6
    k, n = m.size(), m.size()
    x, scale, zero_point = m.node("DynamicQuantizeLinear", single(m, (2, k)), inner=True, outputs=3)
    product = m.node(
        "MatMulInteger", x, m.operand(weight_codes(m, (k, n), np.int8), stored=True), zero_point, inner=True
    )
    real = m.node("Cast", product, to=TensorProto.FLOAT, inner=True)
    both = m.node("Mul", scale, m.operand(scale_for(m, *m.pick((), (n,))), stored=m.coin(0.8)), inner=True)
    m.node("Mul", *m.pick((real, both), (both, real)), want="gg")


@row("QLinearMatMul", seeds=10)
def qlinear_matmul(m: Model) -> None:
    m.runtime, m.equal = True, True
    k, n = m.size(), m.size()
    kind = np.uint8
    x = m.node("Identity", m.operand(codes(m, (3, k), kind), stored=False), inner=True)
    per = m.pick((), (n,))
    weight = [
        m.operand(codes(m, (k, n), kind), stored=True),
        m.operand(scale_for(m, *per), stored=m.coin(0.7)),
        m.operand(codes(m, per, kind), stored=True),
    ]
    first = [m.operand(scale_for(m)), m.operand(codes(m, (), kind), stored=True)]
    m.node("QLinearMatMul", x, *first, *weight, m.operand(scale_for(m)), m.operand(codes(m, (), kind)), want="gg")


@row("ConvInteger", seeds=6)
def conv_integer(m: Model) -> None:
    m.runtime, m.equal = True, True
    group, c, o = m.pick(1, 2), m.size(1, 3), m.size(1, 3)
    x = m.node("Identity", m.operand(codes(m, (1, group * c, 5, 4), np.uint8), stored=False), inner=True)
    w = m.operand(codes(m, (group * o, c, 2, 2), np.uint8), stored=True)
    m.node("ConvInteger", x, w, zero(m, np.uint8), zero(m, np.uint8), group=group)


@row("QLinearConv", seeds=8)
@row("QLinearConv", domain=MICROSOFT, seeds=3)
def qlinear_conv(m: Model, op: str) -> None:
    m.runtime, m.equal = True, True
    group, c, o, kind = m.pick(1, 2), m.size(1, 3), m.size(1, 3), np.uint8
    x = m.node("Identity", m.operand(codes(m, (1, group * c, 5, 4), kind), stored=False), inner=True)
    w, per = m.operand(codes(m, (group * o, c, 2, 2), kind), stored=True), m.pick((), (group * o,))
    first = [m.operand(scale_for(m)), m.operand(codes(m, (), kind), stored=True)]
    own = [m.operand(scale_for(m, *per), stored=True), m.operand(np.full(per, 7, kind), stored=True)]
    bias = [m.operand(codes(m, (group * o,), np.int32), stored=True)] if m.coin() else []
    result = [m.operand(scale_for(m) * 64), m.operand(codes(m, (), kind), stored=True)]
    m.node(op, x, *first, w, *own, *result, *bias, group=group, domain=m.domain, kind=np.uint8)
