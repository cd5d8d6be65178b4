"""Rows for the rules of `hyperclone_onnx.rules.elementwise`."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from hyperclone_onnx.rules import elementwise
from rule_rows.harness import Model, letters, row

LOGICAL = {"Not": np.bool_, "And": np.bool_, "Or": np.bool_, "Xor": np.bool_}
BITWISE = ("BitwiseNot", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
INTEGER = dict.fromkeys((*BITWISE, "Mod"), np.int64)
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "Cast": {"to": TensorProto.FLOAT},
    "Elu": {"alpha": 0.7},
    "LeakyRelu": {"alpha": 0.2},
    "Shrink": {"lambd": 0.4, "bias": 0.1},
    "ThresholdedRelu": {"alpha": 0.4},
    "BitCast": {"to": TensorProto.INT64},
    "BitShift": {"direction": "LEFT"},
    "SwiGLU": {"alpha": 0.7},
}
NEEDS_OPSET = {"Mish": 18, "Gelu": 20, "Swish": 24, "HardSwish": 14, "CastLike": 15, "BitCast": 26, "SwiGLU": 28}
NEEDS_OPSET |= dict.fromkeys(BITWISE, 18)


@row(*elementwise.UNARY, seeds=3)
def unary(m: Model, op: str) -> None:
    m.opset = max(m.opset, NEEDS_OPSET.get(op, 0))
    kind = LOGICAL.get(op) or INTEGER.get(op) or np.float64
    shape = m.shape(1, 4)
    x = m.values(shape, kind) + (1 if op == "Acosh" else 0)
    m.node(op, m.operand(x, letters(shape), stored=False), want=letters(shape), **ATTRIBUTES.get(op, {}))


@row(*elementwise.BROADCASTING, seeds=6)
def broadcasting(m: Model, op: str) -> None:
    kind = LOGICAL.get(op) or INTEGER.get(op) or (np.uint8 if op == "BitShift" else np.float64)
    m.opset = max(m.opset, NEEDS_OPSET.get(op, 0))
    whole = m.shape()
    count = m.size(1, 4) if op in ("Max", "Mean", "Min", "Sum") else 3 if op == "Where" else 2
    shapes = [whole if op == "SwiGLU" else m.stretched(whole) for _ in range(count)]
    # The reference adds in place, so its first operand has the whole shape.
    shapes[0 if op in ("Mean", "PRelu") else m.size(0, count - 1)] = whole
    if op in LOGICAL and op != "Where":
        kinds: list[Any] = [np.bool_] * count
    else:
        kinds = [np.bool_ if op == "Where" and i == 0 else kind for i in range(count)]
    operands = [m.operand(shape, kind=k) for shape, k in zip(shapes, kinds, strict=True)]
    if all(name in m.stored for name in operands):
        m.inputs[operands[0]] = m.stored.pop(operands[0])
    m.node(op, *operands, want=letters(whole), **ATTRIBUTES.get(op, {}))


@row("Add", "Mul", "Greater")
def one_value_twice(m: Model, op: str) -> None:
    n = m.size()
    x = m.operand((n, n), "gg", stored=False)
    m.node(op, x, x, want="gg")


@row("Add")
def crossed(m: Model) -> None:
    """x + x.T makes both axes one dimension."""
    n = m.size()
    x = m.operand((n, n), "gg", stored=False)
    m.node("Add", x, m.node("Transpose", x, inner=True), want="gg")


@row("Cast", seeds=2)
def cast_to_bool(m: Model) -> None:
    """7 becomes true, and true becomes 1."""
    truth = m.node("Cast", m.ints([7]), to=TensorProto.BOOL, inner=True)
    m.node("Expand", m.operand((3, 1), stored=False), m.node("Cast", truth, to=TensorProto.INT64, inner=True))


@row("Mod", seeds=4)
def fmod(m: Model) -> None:
    """-7 fmod 4 is -3, which its negative turns into a length."""
    rest = m.node("Mod", m.ints([-7]), m.ints([4]), fmod=1, inner=True)
    m.node("Expand", m.operand((2, 1), stored=False), m.node("Neg", rest, inner=True))


@row("CastLike", seeds=3)
def cast_like(m: Model) -> None:
    m.opset = max(m.opset, 15)
    shape = m.shape()
    m.node("CastLike", m.operand(shape), m.operand((3,), kind=np.float32), want=letters(shape))


@row("Clip")
def clip(m: Model) -> None:
    shape = m.shape()
    x = m.operand(shape, stored=False)
    low, high = (m.operand(np.asarray(v)) if m.coin(0.7) else "" for v in (0.3, 0.6))
    m.node("Clip", x, low, high, want=letters(shape))


@row("Dropout")
def dropout(m: Model) -> None:
    shape = m.shape()
    m.node("Dropout", m.operand(shape, stored=False), outputs=m.size(1, 2))
