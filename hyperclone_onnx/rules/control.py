"""Control flow: the walk goes into the bodies.

A loop runs its body many times. So a value that the body passes to its next run has the same dimensions before and
after it.
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
    """out = then_branch() or else_branch(): an axis is the same dimension in both"""
    names = ("then_branch", "else_branch")
    branches = [op.body(name) for name in names]
    if not len(branches[0].outputs) == len(branches[1].outputs) >= len(op.node.outputs):
        raise op.malformed("its branches and the node itself have different numbers of outputs")
    condition = op.element(0)
    if condition is not None and condition.static is not None:  # the other branch never runs
        never_run = branches.pop(1 if condition.static else 0)
        op.dimensions.never_run.update(never_run.all_nodes())
    op.walk(*branches)
    for index, values in enumerate(zip(*(branch.outputs for branch in branches), strict=True)):
        one, other = (op.dimensions.axes.get(value) for value in (values[0], values[-1]))
        if one is None or other is None or len(one) != len(other):
            for term in (*(one or ()), *(other or ())):
                op.pin(term, "the other branch makes this value with another rank")
            op.out_unknown(index)
            continue
        op.out([_axis_of_both(op, a, b) for a, b in zip(one, other, strict=True)], index=index)


@edits("If")
def edit_if(op: GrownOp) -> None:
    """Replaces the node by the branch that always runs, where that is known.

    The rules have not related the other branch. It would no longer fit the grown values that it reads.
    """
    condition = op.element(0)
    if condition is not None and condition.static is not None:
        op.edits.append(TakeBranch(op.name, "then_branch" if condition.static else "else_branch"))


pinned("it is sparse or holds no numbers; any other becomes an initializer before the analysis", "Constant")


def _axis_of_both(op: Op, one: Term, other: Term) -> Term:
    if op.size(one) == op.size(other):
        op.unify(one, other)
        return one
    for term in (one, other):
        op.pin(term, "the other branch makes it in another size")
    return op.pinned_dim(None, "the two branches make it in different sizes")


@relates("Loop")
def loop(op: Op) -> None:
    """(carried, stacked) = body(i, condition, carried) for i = 0, 1, ...: carried values keep their dimensions"""
    body = op.body("body")
    carried_values = len(body.inputs) - 2
    if len(body.inputs) != max(op.count, 2) or len(body.outputs) < 1 + max(carried_values, len(op.node.outputs)):
        raise op.malformed("the inputs or outputs of its body do not fit its own")
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
    iterations = op.pinned_dim(count, "it numbers the iterations of a loop")
    _leave(op, body.outputs[1:], carried, [(0, iterations)] * len(body.outputs))


@relates("Scan")
def scan(op: Op) -> None:
    """(carried, stacked) = body(carried, x[.., t, ..]) for t = 0, 1, ... along an axis of each scanned operand"""
    if op.opset < 9:
        raise CannotTell("Scan of opset 8, which also runs over a batch")
    body = op.body("body")
    scanned = op.positive("num_scan_inputs")
    states = op.count - scanned
    if states < 0 or len(body.inputs) != op.count or len(body.outputs) < max(states, len(op.node.outputs)):
        raise op.malformed("the inputs or outputs of its body do not fit its own")
    carried = _enter(op, body.inputs[:states], range(states))
    axes_in = op.int_list("scan_input_axes", None, length=scanned) or [0] * scanned
    steps: list[Term] = []
    for value, index, axis in zip(body.inputs[states:], range(states, op.count), axes_in, strict=True):
        axes = list(op.axes(index))
        steps.append(axes.pop(op.axis(axis, len(axes))))
        op.pin(steps[-1], "it numbers the steps of a scan")
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
    """Give a body's carried inputs the axes of their first values. A length that may change is a new dimension."""
    carried: list[Axes] = []
    for value, index in zip(inner, indices, strict=True):
        axes = tuple(op.dim(None) if op.static(term) in (None, 0) else term for term in op.axes(index))
        for term, begins in zip(axes, op.axes(index), strict=True):
            if term is not begins:
                for axis in (term, begins):
                    op.pin(axis, "a length that a loop may change")
        carried.append(axes)
        op.dimensions.axes[value] = axes
    return carried


def _leave(op: Op, made: Sequence[ir.Value], carried: list[Axes], stacked: Sequence[tuple[int, Term]]) -> None:
    """Relate the carried values at the end of a body with those at its beginning, and set the node's outputs."""
    for index, value in enumerate(made):
        axes = op.dimensions.axes.get(value)
        if axes is None:
            raise CannotTell(
                *op.dimensions.unknown_ranks.get(value, ("the body of a loop makes a value of unknown rank", ""))
            )
        if index >= len(carried):
            axis, turns = stacked[index - len(carried)]
            whole = list(axes)
            whole.insert(op.axis(axis, len(axes) + 1), turns)
            op.out(whole, index=index)
            continue
        before = carried[index]
        if _keeps_shape(op, before, axes):
            op.out(before, index=index)
        else:
            _pin_body(op)
            op.out([op.pinned_dim(None, CHANGED) for _ in axes], index=index)


CHANGED = "a loop changes the shape of a value that it carries"


def _keeps_shape(op: Op, before: Axes, after: Axes) -> bool:
    """Relate a carried value after an iteration with the same value before it. False if its shape has changed."""
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


def _pin_body(op: Op) -> None:
    """Pin all axes in a body. Its rules have seen shapes that change in the next iteration."""
    for node in op.body("body").all_nodes():
        given = (op.dimensions.axes_of(node, i) for i, value in enumerate(node.inputs) if value is not None)
        for axes in (*given, *(op.dimensions.axes.get(value) for value in node.outputs)):
            op.space.pin(Product(axes or ()), CHANGED, gap=True)
