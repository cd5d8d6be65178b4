"""Sequences of tensors. Each element has its own axes; an operator that joins elements relates these axes.

We follow a sequence if the number of its elements is known before running. Otherwise all that touches it is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence

from hyperclone_onnx.algebra.shape_values import LIMIT, known
from hyperclone_onnx.rules.dimensions import Axes
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.layout import side_by_side
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, pinned, relates

Elements = list[Axes]

pinned("its value may be absent", "Optional", "OptionalGetElement", "OptionalHasElement")


def _elements(op: Op, index: int) -> Elements:
    """The elements of a sequence of known length."""
    value = op.value(index)
    elements = op.dimensions.sequences.get(value)
    if elements is None:
        raise CannotTell(
            *op.dimensions.unknown_ranks.get(value, ("a sequence whose length is known only when running", ""))
        )
    return list(elements)


def _set(op: Op, elements: Sequence[Axes], index: int = 0) -> None:
    op.dimensions.sequences[op.node.outputs[index]] = tuple(elements)
    op.dimensions.axes[op.node.outputs[index]] = None


def _position(op: Op, index: int, count: int) -> int:
    position = op.element(index)
    op.parameter(index)
    if position is None or position.static is None:
        raise CannotTell("an element whose position is known only when running")
    return op.axis(position.static, count)


@relates("SequenceEmpty")
def empty(op: Op) -> None:
    """out = []"""
    _set(op, [])


@relates("SequenceConstruct")
def construct(op: Op) -> None:
    """out = [a, b, ...]"""
    _set(op, [op.axes(i) for i in range(op.count)])


@relates("SequenceInsert")
def insert(op: Op) -> None:
    """out = the elements with one more, at the end or at a position"""
    elements = _elements(op, 0)
    at = _position(op, 2, len(elements) + 1) if op.has(2) else len(elements)
    elements.insert(at, op.axes(1))
    _set(op, elements)


@relates("SequenceErase")
def erase(op: Op) -> None:
    """out = the elements without the last, or without one at a position"""
    elements = _elements(op, 0)
    if not elements:
        raise op.malformed("it takes an element of an empty sequence")
    del elements[_position(op, 1, len(elements)) if op.has(1) else -1]
    _set(op, elements)


@relates("SequenceAt")
def at(op: Op) -> None:
    """out = the element at a position; if the position is not known, all elements must have the same axes"""
    elements = _elements(op, 0)
    if op.ints(1) is not None:
        op.out(elements[_position(op, 1, len(elements))])
        return
    op.parameter(1)
    op.out(_alike(op, elements))


def _alike(op: Op, elements: Elements) -> Axes:
    """The axes that all elements share.

    Raises:
        CannotTell: their shapes differ, or there are no elements.
    """
    if not elements or any(len(axes) != len(elements[0]) for axes in elements):
        raise CannotTell("sequence elements of different ranks")
    for axes in elements[1:]:
        for one, other in zip(elements[0], axes, strict=True):
            if op.size(one) != op.size(other):
                raise CannotTell("sequence elements of different sizes")
            op.unify(one, other)
    return elements[0]


@relates("SequenceLength")
def length(op: Op) -> None:
    """out = how many elements there are"""
    op.out((), known(len(_elements(op, 0))))


@relates("SplitToSequence")
def split(op: Op) -> None:
    """out = pieces of x side by side along one axis; pieces of one index lose the axis if `keepdims` is 0"""
    axes = list(op.axes(0))
    axis = op.axis(op.integer("axis", 0), len(axes))
    total, sizes = op.static(axes[axis]), op.ints(1) if op.has(1) else [1]
    op.parameter(1)
    if total is None or sizes is None:
        raise CannotTell("pieces whose number is known only when running")
    if not op.has(1) or op.rank(1) == 0:
        if total // max(sizes[0], 1) > LIMIT:
            raise CannotTell(f"a sequence of more than {LIMIT} pieces")
        sizes = [min(sizes[0], total - start) for start in range(0, total, max(sizes[0], 1))]
    parts = op.space.segments(axes[axis], sizes)
    if parts is None:
        op.pin(axes[axis], "it is split at an index that is not between two of its parts")
        parts = [op.pinned_dim(size, "a piece of an axis that keeps its size") for size in sizes]
    if not op.has(1) and not op.integer("keepdims", 1):
        _set(op, [(*axes[:axis], *axes[axis + 1 :]) for _ in parts])
    else:
        _set(op, [(*axes[:axis], part, *axes[axis + 1 :]) for part in parts])


@edits("SplitToSequence")
def edit_split(op: GrownOp) -> None:
    """Writes the size of each piece, since equal pieces may grow unequally."""
    axis = op.integer("axis", 0) % len(op.axes(0))
    if op.grows(op.axes(0)[axis]):
        pieces = [axes[axis] for axes in op.dimensions.sequences[op.node.outputs[0]]]
        op.set_input(1, [op.grown(piece) for piece in pieces])


@relates("ConcatFromSequence")
def join(op: Op) -> None:
    """out = the elements side by side along one axis, or along a new one"""
    elements = _elements(op, 0)
    new = op.integer("new_axis", 0)
    axis = op.axis(op.integer("axis"), len(elements[0]) + new) if elements else 0
    if not elements or any(len(axes) != len(elements[0]) for axes in elements):
        raise CannotTell("sequence elements of different ranks")
    if new:
        whole = list(_alike(op, elements))
        whole.insert(axis, op.pinned_dim(len(elements), "it numbers the elements of a sequence"))
        op.out(whole)
        return
    if any(op.static(axes[axis]) is None for axes in elements):
        raise CannotTell("joined parts whose sizes are not known before running")
    op.out(side_by_side(op, elements, axis))


@relates("SequenceMap")
def sequence_map(op: Op) -> None:
    """out[i] = body(x[i], y[i], shared): the elements of a sequence must have the same axes"""
    body = op.body("body")
    if len(body.inputs) != op.count or len(body.outputs) != len(op.node.outputs):
        raise op.malformed("the inputs or outputs of its body do not fit its own")
    count = len(_elements(op, 0))
    for index, value in enumerate(body.inputs):
        elements = op.dimensions.sequences.get(op.value(index))
        axes = op.axes(index) if elements is None else _alike(op, list(elements))
        op.dimensions.axes[value] = axes
    op.walk(body)
    for index, value in enumerate(body.outputs):
        made = op.dimensions.axes.get(value)
        if made is None:
            raise CannotTell("the body makes a value of unknown rank")
        _set(op, [made] * count, index)
