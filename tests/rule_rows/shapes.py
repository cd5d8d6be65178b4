"""Rows for the rules of `hyperclone_onnx.rules.shapes`."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import numpy_helper

from rule_rows.harness import Model, indices, letters, row


@row("Shape", seeds=8)
def shape(m: Model) -> None:
    dims = m.shape(1, 4)
    attributes: dict[str, Any] = {}
    if m.opset >= 15 and m.coin():
        attributes = {"start": m.size(-len(dims), len(dims))}
        if m.coin():
            attributes["end"] = m.size(-len(dims), len(dims) + 1)
    m.node("Shape", m.operand(dims, "g" * len(dims), stored=False), **attributes)


@row("Shape", "Size", seeds=6)
def shape_of_a_symbolic_value(m: Model, op: str) -> None:
    length, n, d = m.size(), m.size(), m.size()
    x = m.operand((length, n * d), "pg", stored=False)
    m.symbols[x] = ("length", n * d)
    folded = m.node("Reshape", x, m.ints([-1, d]), inner=True)
    m.node(op, folded if m.coin() else x)


@row("Size", seeds=4)
def size_(m: Model) -> None:
    dims = m.shape(1, 3)
    m.node("Size", m.operand(dims, "g" * len(dims), stored=False))


@row("Range", seeds=6)
def range_(m: Model) -> None:
    n = m.size()
    bounds = m.pick((0, n, 1), (1, n + 1, 1), (0, 2 * n, 2), (n, 0, -1))
    x = m.node("Range", *(m.ints(b) for b in bounds), inner=m.coin(), want="g")
    m.node("Mul", x, indices(m, (m.size(), n), 9, "gg", stored=False), want="gg")


@row("ConstantOfShape", seeds=6)
def constant_of_shape(m: Model) -> None:
    dims = m.shape(1, 3)
    attributes: dict[str, Any] = {"value": numpy_helper.from_array(np.array([2.5]))} if m.coin(0.7) else {}
    m.declared["constantofshape0_0"] = dims
    m.node("ConstantOfShape", m.ints(dims), want=letters(dims), **attributes)
    if attributes:
        m.node("Add", "constantofshape0_0", m.operand(dims, stored=False))
