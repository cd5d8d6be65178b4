"""Control flow: the walk goes into the bodies.

A body is one graph that is run many times, so what it carries around has the same dimensions before and after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Product, Term
from hyperclone_onnx.algebra.shape_values import static_values
from hyperclone_onnx.plan.edits import TakeBranch
from hyperclone_onnx.rules.dimensions import Axes
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, pinned, relates


@relates("If")
def if_(op: Op) -> None:
    """out = then_branch() or else_branch(): what both make of an axis is the same dimension"""
    names = ("then_branch", "else_branch")
    branches = [op.body(name) for name in names]
    if not len(branches[0].outputs) == len(branches[1].outputs) >= len(op.node.outputs):
        raise op.malformed("its branches make other numbers of values")
    condition = op.element(0)
    if condition is not None and condition.static is not None:  # the other branch never runs
        idle = branches.pop(1 if condition.static else 0)
        op.dimensions.idle.update(idle.all_nodes())
    op.walk(*branches)
    for index, values in enumerate(zip(*(branch.outputs for branch in branches), strict=True)):
        one, other = (op.dimensions.axes.get(value) for value in (values[0], values[-1]))
        if one is None or other is None or len(one) != len(other):
            for term in (*(one or ()), *(other or ())):
                op.pin(term, "made with another rank by the other branch")
            op.out_unknown(index)
            continue
        op.out([_either(op, a, b) for a, b in zip(one, other, strict=True)], index=index)


@edits("If")
def edit_if(op: GrownOp) -> None:
    """A branch that never runs was not walked, and would no longer fit what it reads: the other one takes its place."""
    condition = op.element(0)
    if condition is not None and condition.static is not None:
        op.edits.append(TakeBranch(op.name, "then_branch" if condition.static else "else_branch"))


pinned("a tensor that is sparse or no number; any other is stored before the analysis", "Constant")


def _either(op: Op, one: Term, other: Term) -> Term:
    if op.size(one) == op.size(other):
        op.unify(one, other)
        return one
    for term in (one, other):
        op.pin(term, "made in another size by the other branch")
    return op.pinned_dim(None, "made in two sizes by two branches")


@relates("Loop")
def loop(op: Op) -> None:
    """(carried, stacked) = body(i, condition, carried) for i = 0, 1, ...: what is carried keeps its dimensions"""
    body = op.body("body")
    carried_values = len(body.inputs) - 2
    if len(body.inputs) != max(op.count, 2) or len(body.outputs) < 1 + max(carried_values, len(op.node.outputs)):
        raise op.malformed("its body has other inputs or outputs than itself")
    for index in (0, 1):
        op.parameter(index)
    carried = _enter(op, body.inputs[2:], range(2, op.count))
    for value in body.inputs[:2]:
        op.dimensions.axes[value] = ()
    op.walk(body)
    trips = op.element(0)
    endless = not op.has(1) or op.ints(1) == [1]
    stays = op.dimensions.known.get(body.outputs[0])
    stays_true = body.outputs[0] is body.inputs[1] or static_values(stays) == [1]
    count = trips if endless and stays_true else None
    _leave(
        op, body.outputs[1:], carried, [(0, op.pinned_dim(count, "numbers the turns of a loop"))] * len(body.outputs)
    )


@relates("Scan")
def scan(op: Op) -> None:
    """(carried, stacked) = body(carried, x[.., t, ..]) for t = 0, 1, ... along an axis of each scanned operand"""
    if op.opset < 9:
        raise CannotTell("Scan over a batch (opset 8)")
    body = op.body("body")
    scanned = op.positive("num_scan_inputs")
    states = op.count - scanned
    if states < 0 or len(body.inputs) != op.count or len(body.outputs) < max(states, len(op.node.outputs)):
        raise op.malformed("its body has other inputs or outputs than itself")
    carried = _enter(op, body.inputs[:states], range(states))
    axes_in = op.int_list("scan_input_axes", None, length=scanned) or [0] * scanned
    steps: list[Term] = []
    for value, index, axis in zip(body.inputs[states:], range(states, op.count), axes_in, strict=True):
        axes = list(op.axes(index))
        steps.append(axes.pop(op.axis(axis, len(axes))))
        op.pin(steps[-1], "numbers the steps of a scan")
        op.dimensions.axes[value] = tuple(axes)
        if op.is_weight(index):  # the weights of all layers, of which each step reads one
            op.dimensions.picked.add(value)
            op.dimensions.scanned[value] = (op.node, index, op.axis(axis, op.rank(index)))
    for step in steps[1:]:
        op.unify(steps[0], step)
    op.walk(body)
    stacked = len(body.outputs) - states
    axes_out = op.int_list("scan_output_axes", None, length=stacked) or [0] * stacked
    _leave(op, body.outputs, carried, [(axis, steps[0]) for axis in axes_out])


def _enter(op: Op, inner: Sequence[ir.Value], indices: Sequence[int]) -> list[Axes]:
    """Give a body's carried inputs the axes of what they begin with; a length that may change is a new one."""
    carried: list[Axes] = []
    for value, index in zip(inner, indices, strict=True):
        axes = tuple(op.dim(None) if op.static(term) in (None, 0) else term for term in op.axes(index))
        for term, begins in zip(axes, op.axes(index), strict=True):
            if term is not begins:
                for each in (term, begins):
                    op.pin(each, "a length that a loop may change")
        carried.append(axes)
        op.dimensions.axes[value] = axes
    return carried


def _leave(op: Op, made: Sequence[ir.Value], carried: list[Axes], stacked: Sequence[tuple[int, Term]]) -> None:
    """Relate what a body carried around with what it began with, and set the node's outputs."""
    for index, value in enumerate(made):
        axes = op.dimensions.axes.get(value)
        if axes is None:
            raise CannotTell(*op.dimensions.lost.get(value, ("a body that makes a value of unknown rank", "")))
        if index >= len(carried):
            axis, turns = stacked[index - len(carried)]
            whole = list(axes)
            whole.insert(op.axis(axis, len(axes) + 1), turns)
            op.out(whole, index=index)
            continue
        before = carried[index]
        if _comes_back(op, before, axes):
            op.out(before, index=index)
        else:
            _distrust(op)
            op.out([op.pinned_dim(None, CHANGED) for _ in axes], index=index)


CHANGED = "a loop that changes the shape of what it carries"


def _comes_back(op: Op, before: Axes, after: Axes) -> bool:
    """Relate a carried value at the end of a turn with the same at its beginning; False when the shape is another."""
    if len(before) != len(after):
        return False
    for one, other in zip(before, after, strict=True):
        if op.static(one) is None:
            op.pin(other, "a length that a loop may change")
        elif op.size(one) != op.size(other):
            return False
        else:
            op.unify(one, other)
    return True


def _distrust(op: Op) -> None:
    """Pin all that a body touches: it was read with shapes that it does not keep."""
    for node in op.body("body").all_nodes():
        given = (op.dimensions.axes_of(node, i) for i, value in enumerate(node.inputs) if value is not None)
        for axes in (*given, *(op.dimensions.axes.get(value) for value in node.outputs)):
            op.space.pin(Product(axes or ()), CHANGED, gap=True)
