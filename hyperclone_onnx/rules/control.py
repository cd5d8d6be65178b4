"""Control flow: the walk goes into the bodies."""

from __future__ import annotations

from hyperclone_onnx.dims import Term
from hyperclone_onnx.growth import GrownOp
from hyperclone_onnx.inference import CannotTell, Op, walk
from hyperclone_onnx.rules.registry import edits, relates


@relates("If")
def if_(op: Op) -> None:
    """out = then_branch() or else_branch(): what both make of an axis is the same dimension"""
    names = ["then_branch", "else_branch"]
    if any(name not in op.node.attributes for name in names):
        raise CannotTell("If without both branches")
    condition = op.ints(0)
    if condition is not None:  # the other branch never runs
        names = names[:1] if condition[0] else names[1:]
    branches = [op.node.attributes[name].as_graph() for name in names]
    place = op.space.place
    for branch in branches:
        walk(op.dimensions, branch)
    op.space.place = place
    for index, values in enumerate(zip(*(branch.outputs for branch in branches), strict=True)):
        one, other = (op.dimensions.axes.get(value) for value in (values[0], values[-1]))
        if one is None or other is None or len(one) != len(other):
            for term in (*(one or ()), *(other or ())):
                op.pin(term, "made with another rank by the other branch")
            op.dimensions.axes[op.node.outputs[index]] = None
            continue
        op.out([_either(op, a, b) for a, b in zip(one, other, strict=True)], index=index)


@relates("Constant")
def constant(op: Op) -> None:
    """out[j] = value[j]; only one that is itself a branch's result is left after constants were stored"""
    attribute = op.node.attributes.get("value")
    if attribute is None:
        raise CannotTell("a Constant that is no tensor")
    op.out([op.dim(int(size)) for size in attribute.as_tensor().shape.numpy()])


@edits("Constant")
def edit_constant(op: GrownOp) -> None:
    """A grown constant is the source's, repeated."""
    for axis, term in enumerate(op.out_axes(0)):
        if op.grows(term):
            op.gather_output(0, axis)


def _either(op: Op, one: Term, other: Term) -> Term:
    if op.size(one) == op.size(other):
        op.unify(one, other)
        return one
    for term in (one, other):
        op.pin(term, "made in another size by the other branch")
    return op.dim(None)
