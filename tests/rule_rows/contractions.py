"""Rows for the rules of `hyperclone_onnx.rules.contractions`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from onnx import TensorProto

from rule_rows.harness import Model, row


@row("MatMul", seeds=24)
def matmul(m: Model) -> None:
    batch = tuple(m.size() for _ in range(m.size(0, 2)))
    n, k, p = m.size(), m.size(), m.size()
    if m.coin(0.2):
        a, b, want = (k,), (*batch, k, p), "g" * len(batch) + "g"
    elif m.coin(0.2):
        a, b, want = (*batch, n, k), (k,), "g" * len(batch) + "g"
    else:
        a, b = (*m.stretched(batch), n, k), (*batch, k, p)
        want = "g" * len(batch) + "gg"
    m.node("MatMul", m.operand(a), m.operand(b), want=want)


@row("MatMul", seeds=6)
def matmul_with_itself(m: Model) -> None:
    n = m.size()
    x = m.operand((n, n), stored=False)
    m.node("MatMul", x, x, want="gg")


@row("MatMul", seeds=12)
def matmul_of_moved_weight(m: Model) -> None:
    """Operators that are linear in the weight lie between the weight and the product."""
    k, h, d = m.size(3), m.size(), m.size()
    x = m.operand((m.size(), k), "gg", stored=False)
    match m.size(0, 5):
        case 0:
            w = m.node("Transpose", m.operand((h * d, k), stored=True), inner=True)
        case 1:
            w = m.node("Reshape", m.operand((k, h, d), stored=True), m.ints([k, -1]), inner=True)
        case 2:
            w = m.node("Mul", m.operand((k, h * d), stored=True), m.operand((h * d,), stored=True), inner=True)
        case 3:
            w = m.node("Add", m.operand((k, h * d), stored=True), m.operand((h * d,), stored=True), inner=True)
        case 4:
            parts = [m.operand((k, m.size()), stored=True) for _ in range(2)]
            w = m.node("Concat", *parts, axis=1, inner=True)
        case _:
            parts = [m.operand((i, h), stored=True) for i in (k - 1, 1)]
            w = m.node("Sub", m.node("Concat", *parts, axis=0, inner=True), m.operand((k, h), stored=True), inner=True)
    m.node("MatMul", x, w, want="gg")


@row("MatMul", seeds=6)
def matmul_of_a_rounded_weight(m: Model) -> None:
    w = m.operand(np.arange(1.0, 13).reshape(3, 4), stored=True)
    rounded = m.node("Cast", w, to=TensorProto.INT64, inner=True)
    m.node("MatMul", m.operand((2, 3), stored=False), m.node("Cast", rounded, to=TensorProto.DOUBLE, inner=True))


@row("MatMul", seeds=8)
def matmul_of_shared_weight(m: Model) -> None:
    """One stored tensor that is contracted along either axis, and also indexed."""
    n, k = m.size(), m.size()
    w = m.operand((n, k), stored=True)
    m.node("MatMul", m.operand((m.size(), n), stored=False), w)
    m.node("MatMul", w, m.operand((k, m.size()), stored=False))
    if m.coin():
        m.node("Add", w, m.operand((n, k), stored=False))


@row("MatMul", seeds=8)
def matmul_behind_a_scale(m: Model) -> None:
    """In a product of activations, an earlier stored factor is divided, if nothing else reads it."""
    n, k, p = m.size(), m.size(), m.size()
    x = m.operand((n, k), stored=False)
    c = m.operand(m.pick((), (k,), (n, 1), (1, 1)), stored=True)
    op = m.pick("Mul", "Div")
    left = m.node(op, *((x, c) if m.coin() else (c, x)), inner=m.coin())
    if m.coin(0.3) and m.stored[c].ndim:
        m.node("Add", m.operand((n, k), stored=False), c)
    if m.coin():
        left = m.node("Transpose", m.node("Neg", left, inner=True), inner=True)
        n, k = k, n
    m.node("MatMul", left, m.operand((k, p), stored=False))


@row("Gemm", seeds=24)
def gemm(m: Model) -> None:
    n, k, p = m.size(), m.size(), m.size()
    trans_a, trans_b = m.size(0, 1), m.size(0, 1)
    attributes: dict[str, Any] = {"alpha": 0.5, "beta": 2.0} if m.coin() else {}
    if trans_a or m.coin():
        attributes["transA"] = trans_a
    if trans_b or m.coin():
        attributes["transB"] = trans_b
    operands = [m.operand((k, n) if trans_a else (n, k)), m.operand((p, k) if trans_b else (k, p))]
    if m.coin():
        operands.append(m.operand(m.pick((p,), (n, p), (1, p), (n, 1), ())))
    m.node("Gemm", *operands, want="gg", **attributes)


EQUATIONS = (
    "ij,jk->ik ij,kj bij,bjk->bik ij,jk,kl->il ij-> ij->i i,j->ij i,i-> ij,ij->j ...ij,...jk->...ik ...i,i->... "
    "bhid,bhjd->bhij bhij,bhjd->bihd abc->cab ij,ik->jk iJ,Jk ii->i ii ij,j->ij i->i bi,oi->bo abc,cd->abd ij,kl->"
).split()


@row("Einsum", seeds=60)
def einsum(m: Model) -> None:
    equation = str(m.rng.choice(EQUATIONS))
    sizes = {letter: 1 if m.coin(0.1) else m.size() for letter in sorted(set(equation) - set(".,->"))}
    dots = m.shape(0, 2)
    words = equation.split("->")[0].split(",")
    shapes = [
        tuple(n for part in re.findall(r"\.\.\.|\w", word) for n in (dots if part == "..." else (sizes[part],)))
        for word in words
    ]
    if len(words) > 1 and words[1].startswith("..."):
        shapes[1] = (*m.stretched(dots), *shapes[1][len(dots) :])
    m.node("Einsum", *(m.operand(shape) for shape in shapes), equation=equation.replace("->", " -> "))
