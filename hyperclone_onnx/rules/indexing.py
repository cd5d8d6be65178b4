"""Operators that pick, place, sort or number elements. An axis that is indexed by values keeps its size."""

from __future__ import annotations

from itertools import starmap

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.algebra.dims import ONE, Product, Term
from hyperclone_onnx.algebra.shape_values import LIMIT, Known, accumulated
from hyperclone_onnx.rules.dimensions import Axes, Fact
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates


def index_by(op: Op, term: Term, indices: int) -> None:
    """State that an axis is indexed by the values of input `indices`."""
    op.pin(term, "indexed by values")
    op.fact(Fact.INDEXED, term)
    op.dimensions.index_tables.append((op.value(indices), term))


@relates("Gather")
def gather(op: Op) -> None:
    """out[a, i, b] = x[a, indices[i], b]; known indices in a row cut x into parts"""
    axes, where = op.axes(0), op.axes(1)
    axis = op.axis(op.integer("axis", 0), len(axes))
    if _only_shape_is_read(op) and not where and not op.is_constant(0):
        # No node reads the elements, so the index does not matter.
        op.parameter(1)
        op.out((*axes[:axis], *axes[axis + 1 :]))
        return
    picked = _cut_run(op, axes[axis])
    if picked is not None:
        op.parameter(1)
    else:
        index_by(op, axes[axis], 1)
        if op.is_constant(0) and not op.is_constant(1):
            rest = (*axes[:axis], *axes[axis + 1 :])
            if sum(not op.is_one(term) for term in rest) > 1:
                op.picked()
            else:
                for term in rest:
                    op.fact(Fact.EMBEDDING, term)
    middle = where if picked is None else _spread(op, picked, where)
    op.out((*axes[:axis], *middle, *axes[axis + 1 :]), _gathered(op, axis))


def _only_shape_is_read(op: Op) -> bool:
    """Whether only the size of the output is read."""
    output = op.node.outputs[0]
    readers = output.uses()
    return bool(readers) and not output.is_graph_output() and all(reader.node.op_type == "Shape" for reader in readers)


def _spread(op: Op, picked: Term, where: Axes) -> Axes:
    """The axes of the indices, with the picked segment instead of the one axis whose size is not 1."""
    return tuple(term if op.is_one(term) else picked for term in where)


def _run(op: Op, size: int | None) -> tuple[int, int] | None:
    """(first, length) if the indices are known, follow each other, and have at most one axis. Otherwise None."""
    values = op.ints(1)
    if not values or size is None or sum(not op.is_one(term) for term in op.axes(1)) > 1:
        return None
    values = [value + size if value < 0 else value for value in values]
    first = values[0]
    if not 0 <= first < size or values != list(range(first, first + len(values))):
        return None
    return first, len(values)


def _cut_run(op: Op, term: Term) -> Term | None:
    """The segment of an axis that constant indices in a row pick. None for other indices."""
    run = _run(op, op.static(term))
    if run is None:
        return None
    first, length = run
    if length == 1 and op.is_averaged(term):
        return ONE  # the axis stays whole, and any clone of the index will do
    rest = (op.static(term) or 0) - first - length
    parts = op.space.segments(term, [n for n in (first, length, rest) if n])
    return None if parts is None else parts[1 if first else 0]


def _gathered(op: Op, axis: int) -> Known | None:
    elements, indices = op.known(0), op.ints(1)
    if elements is None or indices is None:
        return None
    where = np.asarray(indices, dtype=np.int64).reshape([op.static(term) or 0 for term in op.axes(1)])
    try:
        return np.asarray(np.take(elements, where, axis=axis), dtype=object)
    except IndexError as problem:
        raise CannotTell("an index outside its table") from problem


@edits("Gather")
def edit_gather(op: GrownOp) -> None:
    """Moves constant indices into a cut axis with the boundaries of its parts."""
    axes = op.axes(0)
    term = axes[op.integer("axis", 0) % len(axes)]
    run = _run(op, op.static(term))
    if run is None or not op.grows(term) or (_only_shape_is_read(op) and not op.axes(1)):
        return
    _move_run(op, term, run, op.axes(1))


def _move_run(op: GrownOp, term: Term, run: tuple[int, int], where: Axes) -> None:
    if run[1] == 1:
        start = op.position(term, run[0])
        end = start + 1
    else:
        start, end = op.offset(term, run[0]), op.offset(term, sum(run))
    op.set_input(1, list(range(start, end)), [1 if op.is_one(axis) else end - start for axis in where])


@relates("GatherElements")
def gather_elements(op: Op) -> None:
    """out[.., i, ..] = x[.., indices[.., i, ..], ..] along `axis`"""
    axes, where = op.axes(0), op.axes(1)
    axis = op.axis(op.integer("axis", 0), len(axes))
    index_by(op, axes[axis], 1)
    _same_or_pinned(op, axes, where, skip=axis)
    op.out(where)


def _same_or_pinned(op: Op, whole: Axes, part: Axes, skip: int) -> None:
    """Relate the axes of a tensor and of an index tensor, which may be shorter."""
    if len(whole) != len(part):
        raise CannotTell("indices whose rank differs from that of the data")
    for position, (long, short) in enumerate(zip(whole, part, strict=True)):
        if position == skip:
            continue
        if op.size(long) == op.size(short):
            op.unify(long, short)
        else:
            op.pin(long, "its indices do not cover all of it")
            op.pin(short, "it is shorter than the axis of the data")


@relates("ScatterElements", "Scatter")
def scatter_elements(op: Op) -> None:
    """out = x with out[.., indices[.., i, ..], ..] = updates[.., i, ..] along `axis`"""
    axes, where = op.axes(0), op.axes(1)
    axis = op.axis(op.integer("axis", 0), len(axes))
    index_by(op, axes[axis], 1)
    _same_or_pinned(op, axes, where, skip=axis)
    op.unify_axes(where, op.axes(2))
    _pin_accumulated(op, where[axis : axis + 1])
    op.out(axes, _scattered(op, axis))


def _scattered(op: Op, axis: int) -> Known | None:
    """The known elements of a shape of which some are replaced (exporters of ``index_copy`` compute shapes so)."""
    elements, indices, updates, where = op.known(0), op.known(1), op.known(2), op.ints(1)
    if elements is None or indices is None or updates is None or where is None:
        return None
    length = elements.shape[axis]
    fits = indices.shape == updates.shape and all(-length <= index < length for index in where)
    if elements.ndim != 1 or not fits or op.text("reduction", "none") != "none":
        return None
    result = elements.copy()
    for index, update in zip(where, updates, strict=True):
        result[index] = update
    return result


def _pin_accumulated(op: Op, numbering: Axes) -> None:
    """Pin the axes of updates that are added or multiplied: repeats would apply each update more than once."""
    if op.text("reduction", "none") in ("add", "mul"):
        for term in numbering:
            op.pin(term, "it numbers updates that are added up or multiplied")


def _depth(op: Op) -> int:
    """The length of the index tuples of GatherND and ScatterND."""
    where = op.axes(1)
    depth = op.static(where[-1]) if where else None
    if depth is None:
        raise CannotTell("index tuples of unknown length")
    op.pin(where[-1], "a tuple of indices")
    return depth


@relates("GatherND")
def gather_nd(op: Op) -> None:
    """out[b, i, rest] = x[b, indices[b, i, :], rest]"""
    where, depth, batch = op.axes(1), _depth(op), op.integer("batch_dims", 0)
    if batch < 0:
        raise op.malformed(f"batch_dims is {batch}")
    axes = op.axes(0, least=batch + depth)
    op.unify_axes(axes[:batch], where[:-1][:batch])
    picked = _cut_run(op, axes[0]) if batch == 0 and depth == 1 else None
    if picked is not None:
        op.parameter(1)
        op.out((*_spread(op, picked, where[:-1]), *axes[1:]))
        return
    # These tuples list whole rows in order. So the rows are read as a whole, and may have any length.
    rows = op.dimensions.row_tuples.get(op.value(1), ())
    op.unify_axes(axes[batch + depth - len(rows) : batch + depth], rows)
    for term in axes[batch : batch + depth - len(rows)]:
        index_by(op, term, 1)
    op.out((*where[:-1], *axes[batch + depth :]))


@edits("GatherND")
def edit_gather_nd(op: GrownOp) -> None:
    """Moves constant indices into a cut axis with the boundaries of its parts."""
    term = op.axis_of(0, 0)
    run = _run(op, op.static(term))
    one = op.integer("batch_dims", 0) == 0 and op.static(op.axis_of(1, -1)) == 1
    if run is not None and one and op.grows(term):
        _move_run(op, term, run, op.axes(1))


@relates("ScatterND")
def scatter_nd(op: Op) -> None:
    """out = x with out[indices[i, :], rest] = updates[i, rest]"""
    where, depth = op.axes(1), _depth(op)
    axes = op.axes(0, least=depth)
    row = _known_row(op, axes[:depth])
    if row is not None:
        op.parameter(1)
        for term in axes[: depth - 1]:
            index_by(op, term, 1)
        op.unify_axes(op.axes(2), (*where[:-2], *axes[depth - 1 :]))
        _pin_accumulated(op, axes[depth - 1 : depth])
        op.out(axes)
        return
    # These tuples list whole rows in order. So the rows are set as a whole, and may have any length.
    rows = op.dimensions.row_tuples.get(op.value(1), ())
    op.unify_axes(axes[depth - len(rows) : depth], rows)
    for term in axes[: depth - len(rows)]:
        index_by(op, term, 1)
    op.unify_axes(op.axes(2), (*where[:-1], *axes[depth:]))
    _pin_accumulated(op, where[:-1])
    op.out(axes)


def _known_row(op: Op, axes: Axes) -> list[int] | None:
    """The leading indices of a row, if the known index tuples list exactly this whole row in order. Otherwise None."""
    indices, elements = op.ints(1), op.known(1)
    length = op.static(axes[-1]) if axes else None
    if indices is None or elements is None or length is None or elements.size != length * len(axes) or length < 2:
        return None
    if elements.shape[-2:] != (length, len(axes)):
        return None
    tuples = np.asarray(indices, dtype=np.int64).reshape(length, len(axes))
    whole = np.array_equal(tuples[:, -1], np.arange(length)) and bool((tuples[:, :-1] == tuples[0, :-1]).all())
    return [int(index) for index in tuples[0, :-1]] if whole else None


@edits("ScatterND")
def edit_scatter_nd(op: GrownOp) -> None:
    """Writes the index tuples of a whole grown row."""
    depth = op.static(op.axis_of(1, -1)) or 0
    axes = op.axes(0)[:depth]
    row = _known_row(op, axes)
    if row is not None and op.grows(axes[-1]):
        tuples = [[*row, index] for index in range(op.grown(axes[-1]))]
        outer = [1] * (op.rank(1) - 2)
        op.set_input(1, [index for indices in tuples for index in indices], (*outer, len(tuples), depth))


@relates("OneHot")
def one_hot(op: Op) -> None:
    """out[.., k, ..] = values[indices[..] == k]"""
    axes = list(op.axes(0))
    op.parameter(1)
    op.parameter(2)
    axis = op.axis(op.integer("axis", -1), len(axes) + 1)
    axes.insert(axis, op.pinned_dim(op.element(1), "OneHot numbers it"))
    op.fact(Fact.CHOSEN, axes[axis])
    op.out(axes, _one_hot_known(op, axis))


def _one_hot_known(op: Op, axis: int) -> Known | None:
    elements, indices, length, values = op.known(0), op.ints(0), op.element(1), op.known(2)
    depth = None if length is None else length.static
    if elements is None or indices is None or depth is None or values is None:
        return None
    if elements.size * depth > LIMIT or depth < 0 or any(not -depth <= index < depth for index in indices):
        return None
    if values.shape != (2,):
        raise op.malformed("its values are not two numbers")
    where = np.asarray([i + depth if i < 0 else i for i in indices], dtype=np.int64).reshape(elements.shape)
    hot = np.expand_dims(where, axis) == np.arange(depth).reshape([-1] + [1] * (elements.ndim - axis))
    return np.asarray(values[hot.astype(np.int64)], dtype=object)


@relates("TopK")
def top_k(op: Op) -> None:
    """values, indices of the k largest along `axis`"""
    axes = list(op.axes(0))
    axis = op.axis(op.integer("axis", -1), len(axes))
    op.pin(axes[axis], "it is searched by TopK")
    op.parameter(1)
    op.fact(Fact.CHOSEN, axes[axis])
    axes[axis] = op.pinned_dim(op.element(1), "the k of TopK")
    op.fact(Fact.CHOSEN, axes[axis])
    op.out(axes)
    op.out(axes, index=1)


@relates("CumSum", "CumProd")
def cumulative(op: Op) -> None:
    """out[.., j, ..] = sum_{k <= j} x[.., k, ..], or their product"""
    axes, number = op.axes(0), op.element(1)
    along = None if number is None or number.static is None else op.axis(number.static, len(axes))
    verb = "summed" if op.node.op_type == "CumSum" else "multiplied"
    for term in axes if along is None else [axes[along]]:
        op.pin(term, f"it is {verb} step by step by {op.node.op_type}")
    elements = op.known(0)
    if elements is None or along is None or op.node.op_type != "CumSum":
        op.out(axes)
        return
    op.out(axes, accumulated(elements, along, bool(op.integer("exclusive", 0)), bool(op.integer("reverse", 0))))


@relates("Compress")
def compress(op: Op) -> None:
    """out = all x[.., k, ..] for which condition[k] is true"""
    axes = list(op.axes(0))
    op.pin(op.axes(1, rank=1)[0], "Compress chooses from it")
    if not op.has_attribute("axis"):
        for term in axes:
            op.pin(term, "Compress chooses from it")
        op.out([op.pinned_dim(None, "Compress chooses from it")])
        return
    axis = op.axis(op.integer("axis"), len(axes))
    op.pin(axes[axis], "Compress chooses from it")
    axes[axis] = op.pinned_dim(None, "Compress chooses from it")
    op.out(axes)


@relates("ReverseSequence")
def reverse_sequence(op: Op) -> None:
    """out[t, b] = x[lengths[b] - 1 - t, b] for t < lengths[b], else x[t, b]"""
    axes = op.axes(0, least=2)
    time, batch = (op.axis(op.integer(name, usual), 2) for name, usual in (("time_axis", 0), ("batch_axis", 1)))
    op.pin(axes[time], "ReverseSequence reverses it")
    op.unify(op.axis_of(1, 0), axes[batch])
    op.out(axes)


@relates("TensorScatter")
def tensor_scatter(op: Op) -> None:
    """out = cache with out[b, .., starts[b] + s, ..] = update[b, .., s, ..] along `axis`"""
    cache, update = op.axes(0), op.axes(1)
    axis = op.axis(op.integer("axis", -2), len(cache))
    if len(update) != len(cache) or axis == 0:
        raise CannotTell("an update that does not fit the cache")
    for position, (one, other) in enumerate(zip(cache, update, strict=True)):
        if position == axis:
            for term in (one, other):
                op.pin(term, "positions of a cache")
        else:
            op.unify(one, other)
    if op.has(2):
        op.unify(op.axis_of(2, 0), cache[0])
    op.out(cache)


@relates("Trilu")
def trilu(op: Op) -> None:
    """out[.., i, j] = x[.., i, j] on one side of a diagonal, 0 on the other"""
    axes = op.axes(0, least=2)
    for term in axes[-2:]:
        op.pin(term, "Trilu cuts it along a diagonal")
    op.out(axes)


@relates("EyeLike")
def eye_like(op: Op) -> None:
    """out[i, j] = 1 on a diagonal"""
    axes = op.axes(0)
    for term in axes:
        op.pin(term, "EyeLike makes a diagonal along it")
    op.out(axes)


def _only_indexes(value: ir.Value) -> bool:
    """Whether indices from NonZero are only used as index tuples, or only their number is read.

    Any other node would read indices of a grown axis, which are those of other elements than in the source.
    """
    if value.is_graph_output():
        return False
    for node, slot in value.uses():
        if node.domain or slot or node.op_type not in ("Transpose", "Shape", "Size"):
            return False
        tuples = node.outputs[0]
        if node.op_type == "Transpose" and (tuples.is_graph_output() or not all(starmap(_indexes, tuples.uses()))):
            return False
    return True


def _indexes(node: ir.Node, slot: int) -> bool:
    """Whether a node reads whole tuples as indices of GatherND or ScatterND, or reads their number."""
    indexing = node.op_type in ("GatherND", "ScatterND") and slot == 1 and "batch_dims" not in node.attributes
    return not node.domain and (indexing or (node.op_type in ("Shape", "Size") and slot == 0))


@relates("NonZero")
def non_zero(op: Op) -> None:
    """out[:, i] = the indices of the i-th element that is not zero; an axis along which x is expanded may grow"""
    axes = op.axes(0)
    repeated = op.dimensions.expanded_axes.get(op.value(0), frozenset())
    if not _only_indexes(op.node.outputs[0]):
        repeated = frozenset()
    start = len(axes)
    while start - 1 in repeated and op.static(axes[start - 1]) is not None:
        start -= 1
    for term in axes[:start]:
        op.pin(term, "NonZero numbers its elements")
    op.out((op.pinned_dim(len(axes), "a tuple of indices"), Product((op.space.unknown(), *axes[start:]))))
    op.dimensions.row_tuples[op.node.outputs[0]] = axes[start:]
