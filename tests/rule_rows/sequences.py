"""Rows for the rules of `hyperclone_onnx.rules.sequences`: each model ends with a join or an element."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from rule_rows.harness import Model, row


def finish(m: Model, sequence: str, want: str = "") -> None:
    """Join the elements of a sequence along their last axis."""
    m.runtime = True
    m.node("ConcatFromSequence", sequence, axis=-1, want=want, kind=np.float64)


@row("SequenceConstruct", "ConcatFromSequence", "SequenceInsert", "SequenceErase", "SequenceEmpty", seeds=4)
def built(m: Model, op: str) -> None:
    n = m.size()
    parts = [m.operand((n, m.size()), "gg", stored=m.coin(0.3)) for _ in range(3)]
    if op == "SequenceEmpty":
        sequence = m.node(op, inner=True, dtype=TensorProto.DOUBLE)
        sequence = m.node("SequenceInsert", sequence, parts[0], inner=True)
    else:
        sequence = m.node("SequenceConstruct", *parts, inner=True)
    if op == "SequenceInsert":
        sequence = m.node(
            op, sequence, parts[0], *([m.ints(np.asarray(m.pick(0, 1, -1)))] if m.coin() else []), inner=True
        )
    if op == "SequenceErase":
        sequence = m.node(op, sequence, *([m.ints(np.asarray(m.pick(0, 1, -1)))] if m.coin() else []), inner=True)
    finish(m, sequence, "gg")


@row("ConcatFromSequence", seeds=4)
def stacked(m: Model) -> None:
    m.runtime = True
    n, k = m.size(), m.size()
    sequence = m.node("SequenceConstruct", *(m.operand((n, k), "gg") for _ in range(3)), inner=True)
    at = m.size(0, 2)
    letters = ["g", "g"]
    letters.insert(at, "p")
    m.node("ConcatFromSequence", sequence, axis=at, new_axis=1, want="".join(letters), kind=np.float64)


@row("SplitToSequence", "SequenceAt", "SequenceLength", seeds=8)
def split(m: Model, op: str) -> None:
    m.runtime = True
    n, a, b = m.size(), m.size(), m.size()
    kind = m.pick("pieces", "chunks", "single")
    total = 2 * a if kind == "chunks" else a + b
    x = m.operand((n, total), stored=False)
    if kind == "single":
        sequence = m.node("SplitToSequence", x, axis=1, keepdims=m.coin(), inner=True)
    else:
        sizes = m.ints([a, b]) if kind == "pieces" else m.ints(np.asarray(a))
        sequence = m.node("SplitToSequence", x, sizes, axis=m.pick(1, -1), inner=True)
    if op == "SequenceLength":
        m.node(op, sequence, kind=np.int64)
        return
    one = m.node("SequenceAt", sequence, m.ints(np.asarray(m.pick(0, 1, -1))), inner=True)
    m.node("Tanh", one, want="" if kind == "single" else "gg", kind=np.float64)


@row("SequenceAt", seeds=3)
def chosen_while_running(m: Model) -> None:
    m.runtime = True
    n, k = m.size(), m.size()
    sequence = m.node("SequenceConstruct", *(m.operand((n, k), "gg") for _ in range(2)), inner=True)
    m.node("SequenceAt", sequence, m.ints(np.asarray(1), stored=False), want="gg", kind=np.float64)


@row("SequenceMap", seeds=4)
def mapped(m: Model) -> None:
    n, k, p = m.size(), m.size(), m.size()
    sequence = m.node("SequenceConstruct", *(m.operand((n, k), "gg") for _ in range(2)), inner=True)
    weight = m.operand((k, p), "gg", stored=True)
    value = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in ("each", "w", "out")]
    body = helper.make_graph([helper.make_node("MatMul", ["each", "w"], ["out"], name="m")], "b", value[:2], value[2:])
    finish(m, m.node("SequenceMap", sequence, weight, body=body, inner=True), "gg")
