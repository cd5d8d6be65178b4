"""Rows for the rules of `hyperclone_onnx.rules.normalisation`."""

from __future__ import annotations

from typing import Any

import numpy as np

from rule_rows.harness import Model, activation, row


@row("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", seeds=12)
def layer_norm(m: Model, op: str) -> None:
    m.equal = True
    m.opset = 23 if op == "RMSNormalization" else m.pick(17, 21)
    shape = m.shape(1, 4)
    axis = m.size(0, len(shape) - 1)
    attributes: dict[str, Any] = {} if axis == len(shape) - 1 and m.coin() else {"axis": axis - m.pick(0, len(shape))}
    kind: Any = np.float64
    if op == "SimplifiedLayerNormalization":
        m.runtime, m.tolerance, kind = True, 1e-4, np.float32
        attributes["epsilon"] = 1e-5
    operands = [m.operand(shape, "g" * len(shape), stored=False, kind=kind), m.operand(shape[axis:], kind=kind)]
    if op == "LayerNormalization" and m.coin():
        operands.append(m.operand(shape[axis:]))
    outputs = m.size(1, 3) if op == "LayerNormalization" else 1
    m.node(op, *operands, outputs=outputs, **attributes)


@row("GroupNormalization", seeds=16)
def group_norm(m: Model) -> None:
    # The operator averages float64 in float32 (its stash_type), and a norm that is written out in float64.
    m.equal, m.opset, m.tolerance = True, m.pick(18, 21), 1e-3
    groups, c = m.size(1, 3), m.size(1, 3)
    length = groups * c if m.opset >= 21 else groups
    shape = (m.size(), groups * c, *m.shape(1, 2))
    scale, bias = m.operand((length,)), m.operand((length,))
    m.node(
        "GroupNormalization", activation(m, shape), scale, bias, num_groups=groups, want=".." + "." * (len(shape) - 2)
    )


@row("GroupNormalization", seeds=6)
def group_norm_of_joined_channels(m: Model) -> None:
    m.equal, m.opset, m.tolerance = True, 21, 1e-4
    c, groups = m.size(), [m.size(1, 2), m.size(1, 3)]
    x = m.node("Concat", *(activation(m, (2, n * c, 3)) for n in groups), axis=1, inner=True)
    scale, bias = m.operand((sum(groups) * c,), ".", stored=True), m.operand((sum(groups) * c,), ".", stored=True)
    m.node("GroupNormalization", x, scale, bias, num_groups=sum(groups))


@row("MeanVarianceNormalization", seeds=8)
def mean_variance_norm(m: Model) -> None:
    m.equal = True
    attributes: dict[str, Any] = {"axes": m.pick([1], [0, -1], [2, 3])} if m.coin() else {}
    m.tolerance = 5e-3
    x = activation(m, tuple(m.size() for _ in range(4)), kind=np.float32)
    m.node("MeanVarianceNormalization", x, want="gggg", **attributes)


@row("Softmax", "LogSoftmax", "Hardmax", seeds=8)
def softmax(m: Model, op: str) -> None:
    m.opset = m.pick(11, 13, 21)
    shape = m.shape(2, 4)
    axis = m.size(0, len(shape) - 1)
    has_axis = m.coin(0.7)
    if m.opset < 13:
        first = axis if has_axis else 1
        want = "g" * first + "p" * (len(shape) - first)
        m.runtime, m.tolerance = True, 1e-5
    else:
        first = axis if has_axis else len(shape) - 1
        want = "".join("p" if i == first else "g" for i in range(len(shape)))
    x = m.operand(shape, want, stored=False, kind=np.float32 if m.runtime else np.float64)
    m.node(op, x, want=want, **({"axis": axis - m.pick(0, len(shape) if m.opset >= 11 else 0)} if has_axis else {}))


@row("LpNormalization", seeds=8)
def lp_normalisation(m: Model) -> None:
    shape = m.shape(1, 3)
    axis = m.size(0, len(shape) - 1)
    m.equal = True
    want = "g" * len(shape)
    x = activation(m, shape, want)
    y = m.node("LpNormalization", x, want=want, inner=True, axis=axis - m.pick(0, len(shape)), p=m.size(1, 2))
    # A stored factor behind it may take the scale.
    m.node("Mul", y, m.operand(shape)) if m.coin() else m.node("Identity", y)
