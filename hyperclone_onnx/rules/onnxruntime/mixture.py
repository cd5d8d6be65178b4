"""ONNX Runtime's own mixture of experts."""

from __future__ import annotations

from collections.abc import Iterable

from hyperclone_onnx.algebra.dims import Concat, Product, Term
from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.dimensions import Fact
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import relates


@relates("MoE", domain=MICROSOFT)
def mixture_of_experts(op: Op) -> None:
    """Y[n, h] = sum_e p[n, e] sum_i W2[e, h, i] f(sum_d W1[e, i, d] X[n, d], sum_d W3[e, i, d] X[n, d])"""
    x, first, second = op.axes(0, least=2), op.axes(2, rank=3), op.axes(4, rank=3)
    experts, inter, hidden = second[0], second[2], x[-1]
    op.sum_over((0, -1), (2, 2))
    op.sum_over((4, 2))
    op.fact(Fact.CONTRACTED_WITH_WEIGHT, inter)
    op.unify(first[1], fused_rows(op, first[1], inter))
    op.unify(second[1], hidden)
    for index, term in ((3, first[1]), (5, hidden), (7, inter)):
        if op.has(index):
            op.unify(op.axis_of(index, 1), term)
    if op.has(6):
        op.sum_over((0, -1), (6, 2))
        op.unify(op.axis_of(6, 1), inter)
    op.fact(Fact.WEIGHT_OUTPUT, hidden)
    relate_experts(op, inter, range(2, 8), experts)
    op.out(x)


def relate_experts(op: Op, inter: Term, operands: Iterable[int], experts: Term) -> Term:
    """Relate the tokens with those of the router, and the experts: the first axis of each of `operands`."""
    x, router = op.axes(0, least=2), op.axes(1, rank=2)
    op.space.match([router[0]], x[:-1])
    op.fact(Fact.WEIGHT_OUTPUT, inter)
    for term in (router[1], *(op.axis_of(index, 0) for index in operands if op.has(index))):
        op.unify(term, experts)
    op.pin(experts, "a softmax chooses experts along it")
    return experts


def fused_rows(op: Op, rows: Term, inter: Term) -> Term:
    """The rows of the first projection: its outputs, or outputs and gates, interleaved or one after the other."""
    many, few = op.static(rows), op.static(inter)
    if many == few:
        return inter
    fusion = op.integer("swiglu_fusion", 0)
    if many is None or few is None or many != 2 * few or fusion not in (1, 2):
        raise CannotTell("experts whose projections do not fit each other")
    if fusion == 1:
        return Product((inter, op.pinned_dim(2, "a value and its gate")))
    return Concat((inter, inter))
