"""Rows for the rules of `hyperclone_onnx.rules.layout`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from rule_rows.harness import Model, activation, letters, narrow, row


@row("Transpose")
def transpose(m: Model) -> None:
    shape = m.shape(0, 4)
    attributes: dict[str, Any] = {"perm": m.rng.permutation(len(shape)).tolist()} if shape and m.coin() else {}
    m.node("Transpose", m.operand(shape, stored=False), want="g" * len(shape), **attributes)


@row("Reshape", seeds=60)
def reshape(m: Model) -> None:
    """A Reshape that splits, joins or regroups axes. Its shape has 0, -1 or all sizes."""
    factors = [m.size(1, 4) for _ in range(m.size(2, 5))]

    def grouped() -> list[int]:
        cuts = sorted({0, len(factors), *m.rng.integers(0, len(factors) + 1, 2).tolist()})
        return [int(np.prod(factors[a:b])) for a, b in itertools.pairwise(cuts)]

    before, after = grouped(), grouped()
    target = list(after)
    if m.coin():
        target[m.size(0, len(target) - 1)] = -1
    for i, n in enumerate(target):
        if n != -1 and i < len(before) and before[i] == n and m.coin():
            target[i] = 0
    attributes = {"allowzero": m.size(0, 1) if 0 not in target else 0} if m.opset >= 14 and m.coin() else {}
    m.node("Reshape", m.operand(tuple(before), stored=False), m.ints(target, stored=True), **attributes)


@row("Reshape", seeds=6)
def reshape_to_heads(m: Model) -> None:
    h, d, n = m.size(), m.size(), m.size()
    x = m.operand((n, h * d), "gg", stored=False)
    y = m.node("Reshape", x, m.ints([n, h, d] if m.coin() else [0, -1, d]), want="ggg")
    m.node("Reshape", m.node("Transpose", y, perm=[1, 0, 2], want="ggg"), m.ints([h, -1]), want="gg")


@row("Reshape", seeds=6)
def reshape_to_a_computed_shape(m: Model) -> None:
    """The shape is computed from the sizes of another value, with a length known only when running."""
    h, d, length = m.size(), m.size(), m.size()
    x = m.operand((length, h * d), stored=False)
    m.symbols[x] = ("length", h * d)
    m.expected[x] = "pg"
    size = m.node("Gather", m.node("Shape", x, inner=True), m.ints(m.pick([0], [-2])), axis=0, inner=True)
    shape = m.node("Concat", size, m.ints([h]), m.ints([m.pick(d, -1)]), axis=0)
    y = m.node("Reshape", x, shape, want="pgg")
    folded = m.node("Mul", size, m.ints([h]), inner=True)
    flat = m.node("Reshape", y, m.node("Concat", folded, m.ints([d]), axis=0, inner=True), inner=True)
    m.node("Reshape", m.node("Tanh", flat, inner=True), m.ints([-1, h, d]), want="pgg")


@row("Flatten", seeds=10)
def flatten(m: Model) -> None:
    shape = m.shape(1, 4)
    attributes: dict[str, Any] = {"axis": m.size(-len(shape), len(shape))} if m.coin() else {}
    m.node("Flatten", m.operand(shape, stored=False), **attributes)


@row("Squeeze", seeds=10)
def squeeze(m: Model) -> None:
    m.opset = m.pick(11, 13, 21)
    shape = list(m.shape(1, 3))
    for _ in range(m.size(1, 2)):
        shape.insert(m.size(0, len(shape)), 1)
    x = m.operand(tuple(shape), stored=False)
    ones = [i for i, n in enumerate(shape) if n == 1]
    if len(ones) == 1:  # the reference drops one axis after the other
        ones[0] -= m.pick(0, len(shape))
    if m.coin(0.4):
        m.node("Squeeze", x, want="g" * (len(shape) - len(ones)))
    elif m.opset < 13:
        m.node("Squeeze", x, axes=ones)
    else:
        m.node("Squeeze", x, m.ints(ones[:1]))


@row("Unsqueeze", seeds=10)
def unsqueeze(m: Model) -> None:
    m.opset = m.pick(11, 13, 21)
    shape = m.shape(0, 3)
    rank = len(shape) + m.size(1, 2)
    axes = sorted(m.rng.permutation(rank)[: rank - len(shape)].tolist())
    if len(axes) == 1:  # the reference inserts one axis after the other
        axes[0] -= m.pick(0, rank)
    x = m.operand(shape, stored=False)
    if m.opset < 13:
        m.node("Unsqueeze", x, axes=axes)
    else:
        m.node("Unsqueeze", x, m.ints(axes))


@row("Expand", seeds=16)
def expand(m: Model) -> None:
    whole = m.shape()
    target = m.stretched(whole)
    x = m.operand(m.stretched(whole), stored=False)
    shape = np.broadcast_shapes(target, m.inputs[x].shape)
    if not target:
        target = (1,)
    m.node("Expand", x, m.ints(target), want=letters(shape) if len(shape) else "p")


@row("Tile", seeds=10)
def tile(m: Model) -> None:
    shape = m.shape(1, 3)
    m.node("Tile", m.operand(shape, stored=False), m.ints([m.size(1, 3) for _ in shape]), want="g" * len(shape))


@row("Concat", seeds=10)
def concat(m: Model) -> None:
    shape = list(m.shape(1, 3))
    axis = m.size(0, len(shape) - 1)
    parts = []
    for i in range(m.size(1, 3)):
        shape[axis] = m.size(1, 4) if i else m.size()
        parts.append(m.operand(tuple(shape), stored=None if i else False))
    m.node("Concat", *parts, axis=axis - m.pick(0, len(shape)), want="g" * len(shape))


@row("Concat")
def concat_of_one_value_with_itself(m: Model) -> None:
    x = m.operand((m.size(), m.size()), "gg", stored=False)
    m.node("Concat", x, x, axis=1, want="gg")


@row("Concat", seeds=6)
def cut_where_joined(m: Model) -> None:
    """Joined parts are split at other boundaries."""
    a, b, c = m.size(), m.size(), m.size()
    joined = m.node("Concat", m.operand((3, a + b)), m.operand((3, c), stored=False), axis=1)
    m.opset = max(m.opset, 13)
    m.node("Split", joined, m.ints([a, b + c]), outputs=2, axis=1)


@row("Split", seeds=24)
def split(m: Model) -> None:
    m.opset = m.pick(11, 13, 18, 21)
    shape = list(m.shape(1, 3))
    axis = m.size(0, len(shape) - 1)
    sizes = [m.size(1, 4) for _ in range(m.size(2, 3))]
    equal = m.coin(0.4)
    if equal:
        sizes = [sizes[0]] * len(sizes)
    attributes: dict[str, Any] = {"axis": axis - m.pick(0, len(shape))} if axis or m.coin() else {}
    shape[axis] = sum(sizes)
    inputs: list[str] = []
    if equal and m.coin(0.7):
        if m.opset >= 18:
            attributes["num_outputs"] = len(sizes)
    elif m.opset < 13:
        attributes["split"] = sizes
    else:
        inputs = [m.ints(sizes)]
    want = "".join("." if i == axis and 1 in sizes else "g" for i in range(len(shape)))
    m.node("Split", m.operand(tuple(shape), want, stored=False), *inputs, outputs=len(sizes), **attributes)


@row("Split", seeds=4)
def split_at_run_time(m: Model) -> None:
    """The number of rows in each piece is computed. Their width grows nevertheless."""
    m.opset = m.pick(13, 18, 21)
    x = m.operand((5, m.size()), "pg", stored=False)
    sizes = m.operand(np.asarray([2, 3], np.int64), stored=False)
    m.node("Split", x, sizes, outputs=2, axis=0)


@row("Split", seeds=6)
def split_with_a_shorter_end(m: Model) -> None:
    m.opset = m.pick(18, 21)
    total, count = m.pick((7, 3), (5, 2), (8, 3), (7, 4))
    m.node("Split", m.operand((2, total), "gg", stored=False), outputs=count, axis=1, num_outputs=count)


@row("Slice", seeds=40)
def slice_(m: Model) -> None:
    m.opset = m.pick(9, 11, 13, 21)
    m.runtime = m.opset == 9
    m.tolerance = 1e-6
    shape = m.shape(1, 3)
    axes = m.rng.permutation(len(shape))[: m.size(1, len(shape))].tolist()
    all_axes = axes == list(range(len(shape))) and m.coin()
    starts, ends, steps = [], [], []
    for axis in axes:
        n = shape[axis]
        step = 1 if m.opset == 9 else m.pick(1, 1, 1, 2, 3, -1, -2)
        start = m.size(0, n - 1)
        end = m.size(start + 1, n)
        if step < 0:
            start, end = end - 1, (start - 1 if start else -n - 1)
        else:
            start -= m.pick(0, n)
            end = m.pick(end, end - n if end < n else 2**31 - 1, 2**63 - 1 if end == n else end)
        starts.append(start)
        ends.append(end)
        steps.append(step)
    x = m.operand(shape, stored=False, kind=np.float32 if m.runtime else np.float64)
    if m.opset < 10:
        m.node("Slice", x, starts=starts, ends=ends, **({} if all_axes else {"axes": axes}))
        return
    inputs = [m.ints(starts), m.ints(ends)]
    stepped = steps != [1] * len(steps)
    if not all_axes or stepped:
        inputs.append("" if all_axes else m.ints([a - m.pick(0, len(shape)) for a in axes]))
    if stepped:
        inputs.append(m.ints(steps))
    m.node("Slice", x, *inputs)


@row("Slice", seeds=4)
def halves(m: Model) -> None:
    """The two halves of a rotary embedding swap."""
    d = m.size()
    x = m.operand((m.size(), 2 * d), "gg", stored=False)
    bounds = [m.ints([n]) for n in (0, d, 2**63 - 1, 1)]
    low = m.node("Slice", x, bounds[0], bounds[1], bounds[3], want="gg")
    high = m.node("Slice", x, bounds[1], bounds[2], bounds[3], want="gg")
    m.node("Concat", m.node("Neg", high, inner=True), low, axis=1, want="gg")


@row("Slice", seeds=4)
def the_last_of_a_length(m: Model) -> None:
    """A slice that begins a length before the end, which here is the whole axis."""
    length, d = m.size(), m.size()
    x = m.operand((length, d), stored=False)
    m.symbols[x] = ("length", d)
    size = m.node("Gather", m.node("Shape", x, inner=True), m.ints([0]), axis=0, inner=True)
    last = m.node("Slice", x, m.node("Neg", size, inner=True), m.ints([2**63 - 1]), m.ints([0]), want="pg")
    measured = m.node("Gather", m.node("Shape", last, inner=True), m.ints([0]), axis=0, inner=True)
    flat = m.node("Reshape", m.node("Tanh", x, inner=True), m.ints([-1]), inner=True)
    shape = m.node("Concat", measured, m.ints([-1]), axis=0, inner=True)
    m.node("Reshape", flat, shape, want="pg")


@row("Slice", seeds=4)
def pairs(m: Model) -> None:
    """Every second index: the pairs of an interleaved rotary embedding."""
    d = m.size()
    x = m.operand((m.size(), 2 * d), "gg", stored=False)
    for first in (0, 1):
        m.node("Slice", x, m.ints([first]), m.ints([2**31 - 1]), m.ints([1]), m.ints([2]), want="gg")


@row("Pad", seeds=24)
def pad(m: Model) -> None:
    m.opset = m.pick(13, 18, 21)
    shape = tuple(m.size(3, 5) for _ in range(m.size(1, 3)))
    axes = list(range(len(shape)))
    mode = m.pick("", "constant", "edge", "reflect")
    chosen = m.opset >= 18 and m.coin()
    if chosen:
        axes = m.rng.permutation(len(shape))[: m.size(1, len(shape))].tolist()
    low = -1 if mode in ("", "constant") and m.coin(0.3) else 0
    inputs = [m.ints([m.size(low, 2) for _ in range(2 * len(axes))])]
    if mode in ("", "constant") and (m.coin() or chosen):
        inputs.append(m.operand(np.asarray(0.25)))
    elif chosen:
        inputs.append("")
    if chosen:
        inputs.append(m.ints([a - m.pick(0, len(shape)) for a in axes]))
    x = m.operand(shape, stored=False)
    if low < 0:
        narrow(m)
    m.node("Pad", x, *inputs, **({"mode": mode} if mode else {}))


@row("Slice", seeds=8)
def slice_of_one_index_of_an_averaged_axis(m: Model) -> None:
    """The axis stays whole, and any clone of the index will do."""
    m.opset, m.equal = 21, True
    n = m.size()
    x = activation(m, (3, n), "gg")
    m.node("ReduceMean", x, m.ints([1]), want="gp")
    at = m.size(0, n - 1)
    m.node("Slice", x, m.ints([at]), m.ints([at + 1]), m.ints([m.pick(1, -1)]), want="gp")


@row("Reshape", "Concat", seeds=8)
def groups_across_joined_parts(m: Model, op: str) -> None:
    """Groups of channels that reach across the boundary of two parts: each channel is repeated in place."""
    groups, channels = m.size(2, 4), m.size(3, 5)
    first = channels + 1
    n = m.size()
    parts = [activation(m, (n, size), "gg") for size in (first, groups * channels - first)]
    joined = m.node("Concat", *parts, axis=1, inner=True)
    m.node("Reshape", joined, m.ints([0, groups, channels]), want="gpg")
