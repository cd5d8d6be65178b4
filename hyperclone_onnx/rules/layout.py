"""Operators that move elements without changing them: they reshape, cut, join and repeat axes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from hyperclone_onnx.algebra.dims import ONE, Concat, Product, Term
from hyperclone_onnx.algebra.shape_values import BINARY, LIMIT, Known, known
from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.rules.dimensions import Axes, Fact
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates

END = 2**31 - 1
"""The bound that we write for "to the end of the axis"."""

FAR = 10**9
"""Bounds from here on mean "to the end". Exporters write 10^9, 2^31 - 1 or 2^63 - 1; no axis is that long."""


@relates("Transpose")
def transpose(op: Op) -> None:
    """out[j_p0, j_p1, ...] = x[j_0, j_1, ...]"""
    axes, elements = op.axes(0), op.known(0)
    perm = op.int_list("perm", None) or list(reversed(range(len(axes))))
    if sorted(perm) != list(range(len(axes))):
        raise op.malformed(f"perm is not an order of {len(axes)} axes")
    op.out([axes[p] for p in perm], None if elements is None else elements.transpose(perm))
    rows = op.dimensions.row_tuples.get(op.value(0))
    if rows is not None and perm == [1, 0]:
        op.dimensions.row_tuples[op.node.outputs[0]] = rows


def _reshaped(op: Op, axes: Sequence[Term]) -> None:
    """Set the output's axes, and carry over what is known of the elements."""
    sizes = [size for term in axes if (size := op.static(term)) is not None]
    elements = op.known(0)
    fits = elements is not None and len(sizes) == len(axes)
    op.out(axes, elements.reshape(sizes) if elements is not None and fits else None)


@relates("Reshape")
def reshape(op: Op) -> None:
    """out[flat index] = x[flat index]: the axes of out are matched with those of x"""
    axes, target = op.axes(0), _shape_elements(op, 1)
    declared = op.declared(op.node.outputs[0])
    if declared is None or len(declared) != len(target):
        declared = [None] * len(target)
    copies = {i for i, e in enumerate(target) if e is not None and e.static == 0 and not op.integer("allowzero", 0)}
    sizes: list[Size | None] = []
    for i, element in enumerate(target):
        if i in copies:
            if i >= len(axes):
                raise op.malformed(f"it copies axis {i} of a value of rank {len(axes)}")
            sizes.append(op.size(axes[i]))
        elif element is None or element.static == -1:
            sizes.append(None)
        else:
            sizes.append(element)
    if sizes.count(None) == 1:
        rest = Size.of(1)
        for size in sizes:
            rest = rest if size is None else rest * size
        total = op.size(Product(tuple(axes)))
        sizes = [total.divided_by(rest) if size is None else size for size in sizes]
    sizes = _with_declared(op, axes, sizes, declared)
    out = [axes[i] if i in copies else op.dim(size) for i, size in enumerate(sizes)]
    op.space.match(axes, out)
    _reshaped(op, out)


def _with_declared(
    op: Op, axes: Axes, sizes: Sequence[Size | None], declared: Sequence[Size | None]
) -> list[Size | None]:
    """Fill in unknown sizes from the file, unless the number of elements then is a multiple or a fraction of x's."""
    filled = [guess if size is None else size for size, guess in zip(sizes, declared, strict=True)]
    total, made = op.size(Product(tuple(axes))), Size.of(1)
    for size in filled:
        if size is None:
            return filled
        made = made * size
    times = (made.divided_by(total), total.divided_by(made))
    return list(sizes) if made != total and any(ratio is not None for ratio in times) else filled


def _shape_elements(op: Op, index: int) -> list[Size | None]:
    """The elements of a shape-like input. If only its length is known, all elements are unknown."""
    op.parameter(index)
    elements = op.known(index)
    if elements is not None:
        return list(elements.ravel())
    length = op.static(op.axis_of(index, 0))
    if length is None:
        raise CannotTell("a shape of unknown length")
    if length > LIMIT:
        raise op.malformed(f"a shape of {length} axes")
    return [None] * length


@edits("Reshape")
def edit_reshape(op: GrownOp) -> None:
    """Sets each static element of the shape to the size of the grown axis."""
    op.resize_input(1, op.out_axes(0), keep=(0, -1))


@relates("Flatten")
def flatten(op: Op) -> None:
    """out[(j_0 .. j_a-1), (j_a ..)] = x[j]"""
    axes = op.axes(0)
    axis = op.integer("axis", 1)
    axis = len(axes) if axis == len(axes) else op.axis(axis, len(axes))
    op.out((Product(axes[:axis]), Product(axes[axis:])))


@relates("Squeeze")
def squeeze(op: Op) -> None:
    """out drops axes of size 1"""
    axes = op.axes(0)
    dropped = op.int_list("axes", 1)
    if dropped is None:
        gone = {i for i, term in enumerate(axes) if op.is_one(term)}
    else:
        gone = {op.axis(a, len(axes)) for a in dropped}
    _reshaped(op, [term for i, term in enumerate(axes) if i not in gone])


@relates("Unsqueeze")
def unsqueeze(op: Op) -> None:
    """out has new axes of size 1"""
    axes = list(op.axes(0))
    new = op.int_list("axes", 1) or []
    for axis in sorted(op.axis(a, len(axes) + len(new)) for a in new):
        axes.insert(axis, ONE)
    _reshaped(op, axes)


@relates("Expand")
def expand(op: Op) -> None:
    """out[j] = x[j], size-1 axes stretched to the shape, which may also add axes in front"""
    axes, target = op.axes(0), _shape_elements(op, 1)
    declared = op.declared(op.node.outputs[0])
    rank = max(len(axes), len(target))
    if declared is None or len(declared) != rank:
        declared = [None] * rank
    padded = (ONE,) * (rank - len(axes)) + tuple(axes)
    wanted = [Size.of(1)] * (rank - len(target)) + list(target)
    out: list[Term] = []
    for term, element, guess in zip(padded, wanted, declared, strict=True):
        size = guess if element is None else element
        if not op.is_one(term):
            if size is not None:
                op.space.relate(op.size(term), size, stretch=True)
            if op.static(term) is None and size is not None and size.static not in (None, 1):
                op.pin(term, "it is broadcast with an axis whose size is not known before running")
                term = op.pinned_dim(size, "it stretches an axis whose size is not known before running")
            out.append(term)
        else:
            made = op.dim(size)
            op.fact(Fact.EXPANDED, made)
            out.append(made)
    pairs = enumerate(zip(padded, out, strict=True))
    new = frozenset(axis for axis, (before, after) in pairs if op.is_one(before) and not op.is_one(after))
    op.dimensions.expanded_axes[op.node.outputs[0]] = new
    op.out(out, _expanded(op.known(0), [op.static(term) for term in out]))


def _expanded(elements: Known | None, sizes: list[int | None]) -> Known | None:
    shape = [size for size in sizes if size is not None]
    if elements is None or len(shape) < len(sizes) or np.prod(shape, dtype=float) > LIMIT:
        return None
    return np.broadcast_to(elements, shape)


@edits("Expand")
def edit_expand(op: GrownOp) -> None:
    """Sets each static element of the shape to the size of the grown axis. A 1 still means "keep the size"."""
    op.resize_input(1, op.out_axes(0), keep=(1,))


@relates("Tile")
def tile(op: Op) -> None:
    """out[(r, j)] = x[j] for every repeat r"""
    axes, repeats = op.axes(0), _shape_elements(op, 1)
    if len(repeats) != len(axes):
        raise op.malformed(f"{len(repeats)} repeats for {len(axes)} axes")
    made = [op.dim(repeat) for repeat in repeats]
    for term in made:
        op.fact(Fact.EXPANDED, term)
    op.out([Product((repeat, term)) for repeat, term in zip(made, axes, strict=True)])


@edits("Tile")
def edit_tile(op: GrownOp) -> None:
    """Multiplies the repeats by the growth of the output divided by the growth of the input."""
    factors = [op.growth(out) / op.growth(axis) for out, axis in zip(op.out_axes(0), op.axes(0), strict=True)]
    op.scale_input(1, factors)


@relates("Concat")
def concat(op: Op) -> None:
    """out = operands side by side along one axis"""
    operands = [op.axes(i, rank=op.rank(0)) for i in range(op.count)]
    axis = op.axis(op.integer("axis"), op.rank(0))
    op.out(side_by_side(op, operands, axis), _concatenated(op, axis))


def side_by_side(op: Op, operands: Sequence[Axes], axis: int) -> list[Term]:
    """The axes of operands that are joined along `axis`. The other axes are the same in all operands."""
    out: list[Term] = []
    for position in range(len(operands[0])):
        column = [axes[position] for axes in operands]
        if position == axis:
            out.append(_joined(op, column))
        else:
            for term in column[1:]:
                op.unify(column[0], term)
            out.append(column[0])
    return out


def _joined(op: Op, terms: list[Term]) -> Term:
    if all(op.static(term) is not None for term in terms):
        return Concat(tuple(term for term in terms if op.static(term) != 0))
    total = Size.of(0)
    for term in terms:
        total = total + op.size(term)
        op.pin(term, "it is joined to a part whose size is not known before running")
    return op.dim(total)


def _concatenated(op: Op, axis: int) -> Known | None:
    """The known elements of joined vectors. Those of a short unknown vector are None; a long one makes all unknown."""
    parts: list[Known] = []
    for index in range(op.count):
        elements = op.known(index)
        if elements is None:
            length = op.static(op.axes(index)[0]) if op.rank(index) == 1 else None
            if length is None or length > 64:
                return None
            elements = known([None] * length)
        parts.append(elements)
    return np.concatenate(parts, axis=axis) if any(op.known(i) is not None for i in range(op.count)) else None


@relates("Split")
def split(op: Op) -> None:
    """x = outputs side by side along one axis"""
    axes = list(op.axes(0))
    axis = op.axis(op.integer("axis", 0), len(axes))
    total = op.static(axes[axis])
    count = len(op.node.outputs)
    if op.integer("num_outputs", count) != count:
        raise op.malformed(f"num_outputs is {op.integer('num_outputs')}, and the node has {count} outputs")
    computed = op.opset >= 13 and op.has(1) and op.ints(1) is None
    op.parameter(1)
    sizes = None if computed else op.int_list("split", 1)
    if sizes is None and total is not None and not computed:
        chunk = -(-total // count)
        sizes = [min(chunk, total - chunk * i) for i in range(count)]
    if sizes is not None and (len(sizes) != count or min(sizes) < 0 or total not in (None, sum(sizes))):
        raise CannotTell("pieces whose sizes do not add up to the size of the axis")
    parts = op.space.segments(axes[axis], sizes) if sizes is not None and total is not None else None
    if parts is None:
        op.pin(axes[axis], "it is split at an index that is not between two of its parts")
        pieces: Sequence[int | None] = sizes if sizes is not None else [None] * count
        parts = [op.pinned_dim(size, "a piece of an axis that keeps its size") for size in pieces]
    elements = op.known(0)
    for index, part in enumerate(parts):
        piece = None
        if elements is not None and sizes is not None:
            piece = np.take(elements, range(sum(sizes[:index]), sum(sizes[: index + 1])), axis=axis)
        op.out((*axes[:axis], part, *axes[axis + 1 :]), piece, index)


@edits("Split")
def edit_split(op: GrownOp) -> None:
    """Writes the size of each piece, since equal pieces may grow unequally."""
    axis = op.integer("axis", 0) % len(op.axes(0))
    pieces = [op.out_axes(i)[axis] for i in range(len(op.node.outputs))]
    if not any(op.grows(piece) for piece in pieces):
        return
    sizes = [op.grown(piece) for piece in pieces]
    if op.opset < 13:
        op.set_attribute("split", sizes)
    else:
        op.remove_attribute("num_outputs")
        op.set_input(1, sizes)


@relates("Slice")
def slice_(op: Op) -> None:
    """out[j] = x[start + step j] along each sliced axis: a cut, or every step-th index"""
    axes = list(op.axes(0))
    bounds = _slice_bounds(op, len(axes))
    for axis, start, end, step in bounds:
        axes[axis] = _sliced(op, axes[axis], start, end, step)
    elements = op.known(0)
    if elements is not None:
        window = [slice(None)] * elements.ndim
        for axis, start, end, step in bounds:
            low, high = (None if bound is None else bound.static for bound in (start, end))
            if low is None or high is None or step is None:
                elements = None
                break
            window[axis] = slice(low, None if step < 0 and high <= -FAR else high, step)
        elements = None if elements is None else elements[tuple(window)]
    op.out(axes, elements)


Bound = tuple[int, Size | None, Size | None, int | None]


def _slice_bounds(op: Op, rank: int) -> list[Bound]:
    """(axis, start, end, step) of each sliced axis. A bound or step that is not known is None.

    Raises:
        CannotTell: the numbers of the sliced axes are not known.
    """
    if op.opset < 10:
        starts: list[Size | None] = [Size.of(i) for i in op.int_list("starts", None) or []]
        ends: list[Size | None] = [Size.of(i) for i in op.int_list("ends", None) or []]
        listed = op.int_list("axes", None)
    else:
        starts, ends = _shape_elements(op, 1), _shape_elements(op, 2)
        listed = op.int_list("axes", 3)
    which = list(range(len(starts))) if listed is None else listed
    steps: list[Size | None] = [Size.of(1)] * len(which)
    if op.opset >= 10 and op.has(4):
        steps = _shape_elements(op, 4)
    if not len(starts) == len(ends) == len(which) == len(steps) or len(which) > rank:
        raise op.malformed(f"{len(starts)} starts, {len(ends)} ends, {len(which)} axes and {len(steps)} steps")
    if any(step is not None and step.static == 0 for step in steps):
        raise op.malformed("a step of 0")
    return [
        (op.axis(axis, rank), start, end, None if step is None else step.static)
        for axis, start, end, step in zip(which, starts, ends, steps, strict=True)
    ]


def _sliced(op: Op, term: Term, start: Size | None, end: Size | None, step: int | None) -> Term:
    size = op.size(term)
    low, high = _from_front(start, size), _no_further(_from_front(end, size), size)
    if step == 1 and low == Size.of(0) and high == size:
        return term
    total = size.static
    if total is not None and step is not None and low is not None and high is not None:
        first, last = low.static, high.static
        if first is not None and last is not None:
            if step < 0 and start is not None and end is not None and start.static is not None:
                op.pin(term, "it is sliced backwards")
                return op.pinned_dim(_backwards(total, start.static, end.static_or(0), step), "a backwards slice")
            return _statically_sliced(op, term, total, first, last, step)
    rows = _leading_rows(op, term, low, high, step)
    if rows is not None:
        return Product((op.dim(rows), *op.space.factors(term)[1:]))
    op.pin(term, "it is sliced at bounds that are not known before running")
    length = None if low is None or high is None or step != 1 else high - low
    if length is not None and low is not None and high == size and dict(low.terms).get((), 0) < 0:
        length = _no_further(length, size)  # the last 512 of an axis that may be shorter
    return op.pinned_dim(length, "a slice of an axis that keeps its size")


def _backwards(total: int, start: int, end: int, step: int) -> int:
    """The length of a slice with a negative step. An end that is far below 0 lies before the first element."""
    return len(range(total)[start : None if end <= -FAR else end : step])


def _no_further(end: Size | None, size: Size) -> Size | None:
    """The end of a slice: the given end, or that of the axis if the axis is shorter."""
    if end is None or end.static is None or end.static <= 1 or size.static is not None:
        return end
    return BINARY["Min"](end, size)


def _leading_rows(op: Op, term: Term, low: Size | None, high: Size | None, step: int | None) -> Size | None:
    """The number of whole rows in a slice from the start of an axis (rows, columns). None for any other slice."""
    factors = op.space.factors(term)
    columns = Product(factors[1:])
    if step != 1 or low != Size.of(0) or high is None or high.static is not None:
        return None
    if len(factors) < 2 or op.static(factors[0]) is not None or op.static(columns) is None:
        return None
    return high.divided_by(op.size(columns))


def _from_front(bound: Size | None, size: Size) -> Size | None:
    """A slice bound, counted from the front. A bound far beyond the axis is the end of the axis."""
    if bound is None:
        return None
    value = bound.static
    if value is None:
        # Symbols stand for lengths. A bound that only subtracts lengths counts from the back. A bound that subtracts
        # lengths from a number mostly counts from the front: `buffer[length - keys :]`.
        counts_back = (-bound).is_length and dict(bound.terms).get((), 0) <= 0
        return size + bound if counts_back else bound
    if value >= FAR or (size.static is not None and value > size.static):
        return size
    if value >= 0:
        return bound
    if value <= -FAR:
        return Size.of(0)
    moved = size + bound
    return Size.of(max(moved.static, 0)) if moved.static is not None else moved


def _statically_sliced(op: Op, term: Term, total: int, first: int, last: int, step: int) -> Term:
    length = max(0, -(-(last - first) // step))
    if length == 0:
        return op.dim(0)
    if step == 1 and length == 1 and op.is_averaged(term):
        return ONE  # the axis stays whole, and any clone of the index will do
    if step == 1:
        sizes = [n for n in (first, length, total - first - length) if n]
        parts = op.space.segments(term, sizes)
        if parts is not None:
            return parts[1 if first else 0]
    elif step > 1 and total % step == 0 and first < step and length == total // step:
        inner = op.dim(step)
        outer = op.dim(length)
        op.pin(inner, "a slice takes one of its indices")
        op.space.match([term], [outer, inner])
        return outer
    op.pin(term, "it is sliced at an index that is not between two of its parts, or backwards")
    return op.pinned_dim(length if step > 0 else None, "a slice of an axis that keeps its size")


@edits("Slice")
def edit_slice(op: GrownOp) -> None:
    """Moves bounds on a grown axis with the boundaries of its parts."""
    axes, out = op.axes(0), op.out_axes(0)
    starts: list[int | None] = []
    ends: list[int | None] = []
    factors: list[Fraction] = []
    for axis, start, end, step in _slice_bounds(op, len(axes)):
        term, low, high = axes[axis], None, None
        high_bound = _from_front(end, op.size(term))
        rows = _leading_rows(op, term, _from_front(start, op.size(term)), high_bound, step)
        cut = rows is not None and high_bound != op.size(term)
        factors.append(op.growth(term) if cut else Fraction(1))
        if cut:
            starts.append(None)
            ends.append(None)
            continue
        if op.grows(term):
            first = _from_front(start, op.size(term))
            assert first is not None and first.static is not None
            if op.static(out[axis]) == 0:
                starts.append(0)
                ends.append(0)
                continue
            if op.static(term) is None:  # the slice is the whole axis
                starts.append(0)
                ends.append(END)
                continue
            if step == 1 and op.is_one(out[axis]):
                starts.append(op.position(term, first.static))
                ends.append(op.position(term, first.static) + 1)
                continue
            low = op.offset(term, first.static) if step == 1 else first.static
            high = low + op.grown(out[axis]) if step == 1 else op.grown(term)
        starts.append(low)
        ends.append(high)
    if any(factor != 1 for factor in factors):
        op.scale_input(2, factors)
    for index, name, moved in ((1, "starts", starts), (2, "ends", ends)):
        if all(value is None for value in moved):
            continue
        if op.opset < 10:
            old = op.int_list(name, None) or []
            op.set_attribute(name, [o if n is None else n for o, n in zip(old, moved, strict=True)])
        else:
            op.replace_elements(index, moved)


@relates("Pad")
def pad(op: Op) -> None:
    """out = constant beside x beside constant, along each padded axis"""
    axes = list(op.axes(0))
    pads: Sequence[Size | None] = [Size.of(n) for n in op.int_list("pads", None) or []]
    if op.opset >= 11:
        pads = _shape_elements(op, 1)
    which = op.int_list("axes", 3) if op.opset >= 18 else None
    where = [op.axis(a, len(axes)) for a in which] if which is not None else list(range(len(axes)))
    if len(pads) != 2 * len(where):
        raise CannotTell("a number of paddings that does not fit the number of axes")
    for position, axis in enumerate(where):
        axes[axis] = _padded(op, axes[axis], pads[position], pads[position + len(where)])
    op.out(axes)


def _padded(op: Op, term: Term, before: Size | None, after: Size | None) -> Term:
    size = op.size(term)
    if before is None or after is None:
        op.pin(term, "it is padded by an amount that is not known before running")
        return op.pinned_dim(None, "a padded axis")
    low, high = before.static, after.static
    if low == 0 and high == 0:
        return term
    constant = op.text("mode", "constant") == "constant" and low is not None and high is not None
    if not constant or low is None or high is None or min(low, high) < 0 or size.static is None:
        op.pin(term, "it is padded")
        return op.pinned_dim(size + before + after, "a padded axis")
    ends = [op.pinned_dim(n, "padding") if n else None for n in (low, high)]
    return Concat(tuple(part for part in (ends[0], term, ends[1]) if part is not None))
