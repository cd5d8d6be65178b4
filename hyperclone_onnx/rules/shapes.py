"""Operators that compute with sizes. In the grown model too, they compute with the sizes of the source model.

Shape and Size return the source's length of a grown axis. So all that is computed from a length stays the same, such as
an attention scale or the width of a mask. An operator that makes an axis from a length multiplies the length itself.
"""

from __future__ import annotations

from fractions import Fraction

from hyperclone_onnx.algebra.dims import Product, Term
from hyperclone_onnx.algebra.shape_values import Known, known, span
from hyperclone_onnx.rules.dimensions import Axes
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates


def _window(op: Op, rank: int) -> slice:
    start, end = op.integer("start", 0), op.integer("end", rank)
    return slice(*(min(max(bound + rank if bound < 0 else bound, 0), rank) for bound in (start, end)))


@relates("Shape")
def shape(op: Op) -> None:
    """out[i] = size of axis i of x"""
    sizes = [op.size(term) for term in op.axes(0)[_window(op, op.rank(0))]]
    op.out([op.pinned_dim(len(sizes), "a vector of sizes")], known(sizes))


@edits("Shape")
def edit_shape(op: GrownOp) -> None:
    """Returns the source's lengths of grown axes."""
    literals: list[int | None] = []
    factors: list[Fraction] = []
    for term in op.axes(0)[_window(op, op.rank(0))]:
        literals.append(op.static(term) if op.grows(term) else None)
        factors.append(1 / op.growth(term))
    op.resize_output(0, literals, factors)


@relates("Size")
def size(op: Op) -> None:
    """out = product of the sizes of x"""
    op.out((), known(op.size(Product(op.axes(0)))))


@edits("Size")
def edit_size(op: GrownOp) -> None:
    """Returns the source's number of elements."""
    whole = Product(op.axes(0))
    if op.grows(whole):
        op.resize_output(0, [op.static(whole)], [1 / op.growth(whole)])


def counted(op: Op, first: int, last: int, step: int) -> tuple[Axes, Known | None]:
    """The axis of a range, and its elements if they are few.

    Raises:
        Malformed: its step is 0.
    """
    if step == 0:
        raise op.malformed("a step of 0")
    length, elements = span(first, last, step)
    return (op.dim(length),), elements


@relates("Range")
def range_(op: Op) -> None:
    """out[j] = start + j delta; the grown model makes the source's values and repeats them"""
    start, limit, delta = (op.element(i) for i in range(3))
    bounds = [bound.static for bound in (start, limit, delta) if bound is not None and bound.static is not None]
    if len(bounds) == 3:
        op.out(*counted(op, *bounds))
        return
    declared = op.declared(op.node.outputs[0])
    length = declared[0] if declared else None
    if start is not None and limit is not None and delta is not None and delta.static == 1:
        length = limit - start
    op.out([op.dim(length)])


@edits("Range")
def edit_range(op: GrownOp) -> None:
    """Repeats the source's range along the grown axis."""
    if op.grows(op.out_axes(0)[0]):
        op.gather_output(0, 0)


@relates("ConstantOfShape")
def constant_of_shape(op: Op) -> None:
    """out[j] = value"""
    op.parameter(0)
    elements = op.known(0)
    if elements is None:
        raise CannotTell("a shape computed at run time")
    axes: list[Term] = [op.dim(size) for size in elements.ravel()]
    sizes = [op.static(term) for term in axes]
    tensor = op.tensor("value")
    if tensor is not None and tensor.size != 1:
        raise op.malformed(f"value has {tensor.size} elements, and must have one")
    filled = None
    integers = tensor is not None and not tensor.dtype.is_floating_point()
    if tensor is not None and integers and len(axes) == 1 and sizes[0] is not None and sizes[0] <= 64:
        filled = known([int(tensor.numpy().item())] * sizes[0])
    op.out(axes, filled)


@edits("ConstantOfShape")
def edit_constant_of_shape(op: GrownOp) -> None:
    """Sets each static element of the shape to the size of the grown axis."""
    op.resize_input(0, op.out_axes(0), keep=())
