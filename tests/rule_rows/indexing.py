"""Rows for the rules of `hyperclone_onnx.rules.indexing`."""

from __future__ import annotations

from typing import Any

import numpy as np

from rule_rows.harness import Model, activation, indices, narrow, row


@row("Gather", seeds=24)
def gather(m: Model) -> None:
    """Indices are values, so the indexed axis keeps its size. The axes of the indices and all other axes may grow."""
    shape = m.shape(1, 3)
    axis = m.size(0, len(shape) - 1)
    attributes: dict[str, Any] = {"axis": axis - m.pick(0, len(shape))} if axis or m.coin() else {}
    where = m.shape(0, 2)
    run = m.coin(0.3)
    if run:
        picked = m.rng.integers(0, shape[axis], ())
        index = m.ints(m.pick(np.reshape(picked, ()), np.reshape(picked, (1,)), np.reshape(picked, (1, 1))))
        where = m.stored[index].shape
    else:
        index = indices(m, where, shape[axis], stored=None if np.prod(where) > 2 else False)
    want = "".join(("." if run else "p") if i == axis else "g" for i in range(len(shape)))
    x = m.operand(shape, want)
    if x in m.stored and index in m.stored:
        m.inputs[x] = m.stored.pop(x)
    m.node("Gather", x, index, **attributes)


@row("Gather", seeds=12)
def gather_a_run(m: Model) -> None:
    """Known indices in a row cut the axis."""
    n = m.size(3, 6)
    first = m.size(0, n - 2)
    last = m.size(first + 2, n)
    run = np.arange(first, last) - m.pick(0, n)
    shape = m.pick((-1,), (1, -1), (-1, 1))
    m.node("Gather", m.operand((m.size(), n), "gg", stored=False), m.ints(run.reshape(shape)), axis=1)


@row("GatherElements", "ScatterElements", "Scatter", seeds=16)
def elements(m: Model, op: str) -> None:
    shape = m.shape(1, 3)
    axis = m.size(0, len(shape) - 1)
    where = [m.size(1, n) if m.coin(0.3) and i != axis else n for i, n in enumerate(shape)]
    where[axis] = m.size(1, shape[axis])
    attributes: dict[str, Any] = {"axis": axis - m.pick(0, len(shape))} if axis or m.coin() else {}
    index = np.broadcast_to(
        m.rng.permutation(shape[axis])[: where[axis]].reshape([-1 if i == axis else 1 for i in range(len(shape))]),
        where,
    ).copy()
    want = "".join("p" if i == axis or n != k else "g" for i, (n, k) in enumerate(zip(shape, where, strict=True)))
    operands = [m.operand(shape, want, stored=False), m.operand(index)]
    if op != "GatherElements":
        operands.append(m.operand(tuple(where)))
        if op == "Scatter":
            m.opset = 10
    if op != "ScatterElements" or tuple(where) != shape:
        narrow(m)
    m.node(op, *operands, **attributes)


@row("ScatterElements", "ScatterND", seeds=10)
def scatter_with_a_reduction(m: Model, op: str) -> None:
    m.opset = m.pick(18, 21)
    n, k, d = m.size(), m.size(), m.size()
    x, updates = m.operand((n, d), "p.", stored=False), m.operand((k, d))
    index = m.rng.integers(0, n, (k, 1))
    if op == "ScatterElements":
        index = np.broadcast_to(index, (k, d)).copy()
    m.node(op, x, m.operand(index, stored=False), updates, reduction=m.pick("add", "mul"))


@row("GatherND", seeds=20)
def gather_nd(m: Model) -> None:
    shape = m.shape(1, 4)
    batch = m.size(0, len(shape) - 1)
    depth = m.size(1, len(shape) - batch)
    where = (*shape[:batch], *m.shape(1 if batch == 0 else 0, 2))
    index = np.stack([m.rng.integers(0, n, where) for n in shape[batch : batch + depth]], axis=-1)
    want = "".join("p" if batch <= i < batch + depth else "g" for i in range(len(shape)))
    attributes = {"batch_dims": batch} if batch or m.coin() else {}
    m.node("GatherND", m.operand(shape, want, stored=False), m.operand(index, stored=False), **attributes)


@row("GatherND", seeds=20)
def gather_nd_run(m: Model) -> None:
    n = m.size(3, 6)
    first = m.size(0, n - 2)
    run = np.arange(first, m.size(first + 2, n))
    m.node("GatherND", m.operand((n, m.size()), "gg", stored=False), m.ints(run.reshape(m.pick((-1, 1), (1, -1, 1)))))


@row("ScatterND", seeds=12)
def scatter_nd(m: Model) -> None:
    shape = m.shape(1, 3)
    depth = m.size(1, len(shape))
    every = m.rng.permutation(np.array(list(np.ndindex(*shape[:depth]))))
    index = every[: m.size(1, min(3, len(every)))]
    want = "".join("p" if i < depth else "g" for i in range(len(shape)))
    updates = m.operand((len(index), *shape[depth:]))
    m.node("ScatterND", m.operand(shape, want, stored=False), m.operand(index, stored=m.coin()), updates)


@row("OneHot", seeds=8)
def one_hot(m: Model) -> None:
    where = m.shape(1, 2)
    attributes: dict[str, Any] = {"axis": m.size(-len(where) - 1, len(where))} if m.coin() else {}
    inputs = [indices(m, where, 4, "g" * len(where), stored=False), m.ints(m.pick(4, [4])), m.operand((2,))]
    narrow(m)
    m.node("OneHot", *inputs, **attributes)


@row("OneHot", seeds=4)
def one_hot_among_sizes(m: Model) -> None:
    """Repeats that are 1, except along one axis."""
    n, d, times = m.size(), m.size(), m.size()
    x = activation(m, (n, 1, d), "g.g")
    pair = m.node("Concat", m.ints([1]), m.ints([times]), axis=0, inner=True)
    repeats = m.node("OneHot", m.ints([1]), m.ints(3), pair, inner=True)
    tiled = m.node("Tile", x, m.node("Reshape", repeats, m.ints([-1]), inner=True), want="ggg")
    m.node("Add", tiled, m.operand((n, times, d)), want="ggg")


@row("Gather", seeds=4)
def gather_that_is_measured(m: Model) -> None:
    """Only the shape of one picked element is read, so the width is not cut."""
    m.equal, m.opset = True, m.pick(18, 21)
    length, d = m.size(), m.size(3)
    x = activation(m, (length, d), ".g")
    element = m.node("Gather", x, m.ints(m.pick(-1, d - 1)), axis=1, inner=True)
    m.node("Shape", element)
    m.node("ReduceMean", x, m.ints([1]), keepdims=0, want=".")


@row("TopK", seeds=8)
def top_k(m: Model) -> None:
    shape = m.shape(1, 3)
    axis = m.size(0, len(shape) - 1)
    want = "".join("p" if i == axis else "g" for i in range(len(shape)))
    x = m.operand(shape, want, stored=False)
    k = m.ints([m.size(1, 2)])
    m.node("TopK", x, k, outputs=2, want=want, axis=axis - m.pick(0, len(shape)), largest=m.size(0, 1))


@row("CumSum", "CumProd", seeds=8)
def cumulative(m: Model, op: str) -> None:
    m.opset = 26 if op == "CumProd" else m.opset
    shape = m.shape(1, 3)
    axis = m.size(0, len(shape) - 1)
    want = "".join("p" if i == axis else "g" for i in range(len(shape)))
    m.node(op, m.operand(shape, want, stored=False), m.ints(axis - m.pick(0, len(shape))), want=want)


@row("Compress", seeds=8)
def compress(m: Model) -> None:
    shape = m.shape(1, 3)
    axis = m.size(0, len(shape) - 1)
    if m.coin(0.3):
        chosen = m.operand((min(m.size(), int(np.prod(shape))),), "p", kind=np.bool_)
        m.node("Compress", m.operand(shape, "p" * len(shape), stored=False), chosen)
        return
    want = "".join("p" if i == axis else "g" for i in range(len(shape)))
    chosen = m.operand((shape[axis],), "p", kind=np.bool_)
    m.node("Compress", m.operand(shape, want, stored=False), chosen, want=want, axis=axis - m.pick(0, len(shape)))


@row("ReverseSequence", seeds=8)
def reverse_sequence(m: Model) -> None:
    steps, batch = m.size(), m.size()
    first = m.coin()
    shape = ((batch, steps) if first else (steps, batch)) + m.shape(1, 2)
    want = ("gp" if first else "pg") + "g" * (len(shape) - 2)
    lengths = m.operand(m.rng.integers(1, steps + 1, (batch,)), "g")
    attributes = {"time_axis": 1, "batch_axis": 0} if first else {}
    m.node("ReverseSequence", m.operand(shape, want, stored=False), lengths, want=want, **attributes)


@row("TensorScatter", seeds=12)
def tensor_scatter(m: Model) -> None:
    m.opset = 24
    rank = m.size(3, 4)
    axis = m.size(1, rank - 1)
    whole, part = 6, m.size(1, 3)
    sizes = [m.size() for _ in range(rank)]
    cache, update = (tuple(n if i == axis else size for i, size in enumerate(sizes)) for n in (whole, part))
    want = "".join("p" if i == axis else "g" for i in range(rank))
    attributes: dict[str, Any] = {} if axis == rank - 2 and m.coin() else {"axis": axis - m.pick(0, rank)}
    inputs = [m.operand(cache, want, stored=False), m.operand(update, want)]
    if m.coin(0.7):
        circular = m.coin()
        attributes |= {"mode": "circular"} if circular else {}
        inputs.append(m.operand(m.rng.integers(0, whole if circular else whole - part + 1, (sizes[0],)), "g"))
    m.node("TensorScatter", *inputs, want=want, **attributes)


@row("Trilu", seeds=8)
def trilu(m: Model) -> None:
    m.opset = max(m.opset, 14)
    shape = m.shape(2, 4)
    want = "g" * (len(shape) - 2) + "pp"
    diagonal = [m.ints(m.size(-1, 1))] if m.coin() else []
    attributes = {"upper": m.size(0, 1)} if m.coin() else {}
    m.node("Trilu", m.operand(shape, want, stored=False), *diagonal, want=want, **attributes)


@row("EyeLike", seeds=3)
def eye_like(m: Model) -> None:
    m.node("EyeLike", m.operand((m.size(), m.size()), "pp", stored=False), want="pp", k=1)


@row("NonZero", seeds=3)
def non_zero(m: Model) -> None:
    shape = m.shape(1, 3)
    m.node("NonZero", m.operand(shape, "p" * len(shape), stored=False, kind=np.bool_))


@row("Gather", seeds=8)
def gather_of_one_index_of_an_averaged_axis(m: Model) -> None:
    """The axis stays whole, and any clone of the index will do."""
    m.opset, m.equal = 21, True
    n = m.size()
    x = activation(m, (3, n), "gg")
    m.node("ReduceMean", x, m.ints([1]), want="gp")
    at = m.size(-n, n - 1)
    m.node("Gather", x, m.ints(m.pick(at, [at])), axis=1)


def rows_of_a_mask(m: Model) -> tuple[str, str, tuple[int, int, int]]:
    """A computed value, and the index tuples of the elements under a mask of its rows."""
    m.opset = 21
    b, s, h = m.size(), m.size(), m.size()
    mask = m.operand(m.rng.random((b, s, 1)) < 0.6, stored=False)
    whole = m.node("Expand", mask, m.ints([b, s, h]), inner=True)
    tuples = m.node("Transpose", m.node("NonZero", whole, inner=True), inner=True, perm=[1, 0])
    return activation(m, (b, s, h)), tuples, (b, s, h)


@row("ScatterND", "NonZero", seeds=12)
def masked_scatter(m: Model, op: str) -> None:
    """Rows under a mask are replaced by others, one after the other."""
    x, tuples, (b, s, h) = rows_of_a_mask(m)
    y = m.operand((b * s, h), stored=False)
    m.symbols[y] = ("rows", h)
    count = m.node("Gather", m.node("Shape", tuples, inner=True), m.ints([0]), inner=True)
    flat = m.node("Reshape", m.node("Identity", y, inner=True), m.ints([-1]), inner=True)
    updates = m.node("Slice", flat, m.ints([0]), count, m.ints([0]), inner=True)
    m.node("ScatterND", x, tuples, updates, want="ppg")


@row("GatherND", "NonZero", seeds=12)
def masked_select(m: Model, op: str) -> None:
    """The rows under a mask, flat."""
    x, tuples, (_, _, h) = rows_of_a_mask(m)
    m.expected[x] = "ppg"
    rows = m.node("GatherND", x, tuples, inner=True)
    m.node("Reshape", rows, m.ints([-1, h]), want=".g")


@row("NonZero", seeds=6)
def indices_of_a_mask_that_leave(m: Model) -> None:
    """Any other node that reads the indices gets those of the source."""
    x, tuples, _ = rows_of_a_mask(m)
    m.expected[x] = "ppp"
    m.node("GatherND", x, tuples)
    m.node("Identity", tuples)


@row("ScatterND", seeds=8)
def scatter_of_a_whole_row(m: Model) -> None:
    """One row of a computed table is replaced, as for the position of padding."""
    rows, n = m.size(), m.size()
    at = m.size(0, rows - 1)
    x = activation(m, (rows, n), "pg")
    outer = m.pick((), (1,), (1, 1))
    tuples = m.ints(np.stack([np.full(n, at), np.arange(n)], axis=1).reshape(*outer, n, 2))
    m.node("ScatterND", x, tuples, m.operand((*outer, n), "p" * len(outer) + "g"), want="pg")


@row("ScatterND", seeds=4)
def scatter_of_a_row_in_another_order(m: Model) -> None:
    rows, n = m.size(), m.size()
    tuples = m.ints(np.stack([np.full(n, 0), np.arange(n)[::-1]], axis=1), stored=True)
    m.node("ScatterND", activation(m, (rows, n), "pp"), tuples, m.operand((n,)), want="pp")
