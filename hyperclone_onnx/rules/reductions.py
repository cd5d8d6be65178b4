"""Operators that reduce axes. Repeats change no average, maximum or minimum; the plan divides sums."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from hyperclone_onnx.algebra import shape_values as known
from hyperclone_onnx.algebra.dims import ONE, Term
from hyperclone_onnx.rules.op import Op
from hyperclone_onnx.rules.registry import relates

POWERS = {"ReduceSum": 1.0, "ReduceL1": 1.0, "ReduceLogSum": 1.0, "ReduceL2": 0.5, "ReduceSumSquare": 0.5}
"""A sum over n equal repeats is n times too large. To undo that, divide the input of the operator by n ** power."""


def _reduced_axes(op: Op) -> list[int]:
    rank = op.rank(0)
    axes = op.int_list("axes", 1)
    if not axes:
        return [] if op.integer("noop_with_empty_axes", 0) else list(range(rank))
    return sorted({op.axis(axis, rank) for axis in axes})


def out_reduced(op: Op, reduced: Collection[int]) -> None:
    """Set the output's axes: the reduced ones have size 1, or are removed."""
    keep = op.integer("keepdims", 1)
    out: list[Term] = [ONE if i in reduced else term for i, term in enumerate(op.axes(0)) if keep or i not in reduced]
    elements = op.known(0) if op.node.op_type in known.FOLDS else None
    if elements is not None:
        elements = known.folded(op.node.op_type, elements, reduced)
        if elements is not None and keep:
            elements = np.expand_dims(elements, tuple(sorted(reduced)))
    op.out(out, elements)


@relates(*POWERS)
def summing(op: Op) -> None:
    """out[j] = f(sum_k g(x[j, k])): n repeats are undone if x is divided by a power of n"""
    reduced = _reduced_axes(op)
    if op.node.op_type == "ReduceL1" and op.is_constant(0):
        for axis in reduced:
            op.pin(op.axes(0)[axis], "the absolute values of a weight's shares do not add up to that of the weight")
    for axis in reduced:
        op.sum_over((0, axis), power=POWERS[op.node.op_type])
    out_reduced(op, reduced)


@relates("ReduceMean")
def averaging(op: Op) -> None:
    """out[j] = mean_k x[j, k]"""
    reduced = _reduced_axes(op)
    for axis in reduced:
        op.uniform(op.axes(0)[axis])
    out_reduced(op, reduced)


@relates("ReduceMax", "ReduceMin")
def extreme(op: Op) -> None:
    """out[j] = max_k x[j, k]: a repeated index does not change it"""
    out_reduced(op, _reduced_axes(op))


@relates("ReduceProd", "ReduceLogSumExp")
def pinned_reduction(op: Op) -> None:
    """out[j] = prod_k x[j, k], log sum_k exp x[j, k]: no scale undoes what repeats change"""
    reduced = _reduced_axes(op)
    for axis in reduced:
        op.pin(op.axes(0)[axis], f"reduced by {op.node.op_type}")
    out_reduced(op, reduced)


@relates("ArgMax", "ArgMin")
def arg_extreme(op: Op) -> None:
    """out[j] = the k at which x[j, k] is largest or smallest: k is an index, so the axis keeps its size"""
    axis = op.axis(op.integer("axis", 0), op.rank(0))
    op.pin(op.axes(0)[axis], f"searched by {op.node.op_type}")
    out_reduced(op, [axis])


@relates("Det")
def det(op: Op) -> None:
    """Y[..] = the determinant of X[.., :, :]: equal rows make it 0"""
    axes = op.axes(0, least=2)
    for term in axes[-2:]:
        op.pin(term, "rows or columns of a determinant")
    op.out(axes[:-2])
