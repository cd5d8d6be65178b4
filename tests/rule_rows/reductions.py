"""Rows for the rules of `hyperclone_onnx.rules.reductions`."""

from __future__ import annotations

from typing import Any

import numpy as np

from rule_rows.harness import Model, row

SUMS = "ReduceSum ReduceL1 ReduceLogSum ReduceL2 ReduceSumSquare".split()


def reduction(m: Model, op: str, want: str, kind: Any = np.float64) -> None:
    shape = m.shape(1, 4)
    axes = sorted(m.rng.permutation(len(shape))[: m.size(1, len(shape))].tolist())
    has_axes = m.coin(0.8)
    attributes: dict[str, Any] = {"keepdims": m.size(0, 1)} if m.coin() else {}
    if not has_axes:
        axes = list(range(len(shape)))
        if (op == "ReduceSum" or m.opset >= 18) and m.coin(0.3):
            attributes["noop_with_empty_axes"] = 1
            axes = []
    signed = [a - m.pick(0, len(shape)) for a in axes]
    letters_ = "".join(want if i in axes else "g" for i in range(len(shape)))
    operands = [m.operand(shape, letters_, stored=False, kind=kind)]
    if has_axes and (op == "ReduceSum" or m.opset >= 18):
        operands.append(m.ints(signed))
    elif has_axes:
        attributes["axes"] = signed
    m.node(op, *operands, **attributes)


@row(*SUMS, "ReduceMax", "ReduceMin", seeds=10)
def reduced(m: Model, op: str) -> None:
    m.opset = m.pick(13, 18, 21)
    reduction(m, op, "g")


@row("ReduceSum", "ReduceL1", "ReduceL2", seeds=9)
def reduced_weight(m: Model, op: str) -> None:
    """Of a stored weight, only a plain sum can be shared, because noise changes signs."""
    m.opset = 18
    w = m.operand(m.values((m.size(), m.size())) * 1e-3, "g" + ("p" if op == "ReduceL1" else "g"), stored=True)
    x = m.operand((m.size(), 1), stored=False)
    m.node("Add", x, m.node(op, w, m.ints([1]), keepdims=0, inner=True))


@row("ReduceMean", seeds=10)
def averaged(m: Model, op: str) -> None:
    m.equal, m.opset = True, m.pick(13, 18, 21)
    reduction(m, op, "g")


@row("ReduceProd", "ReduceLogSumExp", seeds=8)
def pinned_reduction(m: Model, op: str) -> None:
    m.opset = m.pick(13, 18, 21)
    reduction(m, op, "p")


@row("ReduceSum", "ReduceL1", "ReduceSumSquare", seeds=6)
def reduced_integers(m: Model, op: str) -> None:
    """A part of an integer is no integer, so integers are not shared."""
    m.opset = m.pick(13, 18, 21)
    reduction(m, op, ".", np.int64)


@row("MatMul", seeds=6)
def matmul_of_integers(m: Model) -> None:
    k = m.size()
    a, b = ((m.size(), k), (k, m.size()))
    m.node("MatMul", m.operand(a, kind=np.int64), m.operand(b, kind=np.int64))


@row("ArgMax", "ArgMin", seeds=8)
def arg_extreme(m: Model, op: str) -> None:
    shape = m.shape(1, 4)
    axis = m.size(0, len(shape) - 1)
    attributes: dict[str, Any] = {"axis": axis - m.pick(0, len(shape))} if axis or m.coin() else {}
    attributes |= {"keepdims": m.size(0, 1)} if m.coin() else {}
    attributes |= {"select_last_index": m.size(0, 1)} if m.coin() else {}
    want = "".join("p" if i == axis else "g" for i in range(len(shape)))
    m.node(op, m.operand(shape, want, stored=False), **attributes)


@row("Det", seeds=6)
def det(m: Model) -> None:
    batch, n = m.shape(1, 2), m.size()
    x = m.operand((*batch, n, n), "g" * len(batch) + "pp", stored=False)
    m.node("Det", x, want="g" * len(batch))
