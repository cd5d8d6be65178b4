"""ONNX Runtime's own operators over images: fused convolutions, and those whose channels come last."""

from __future__ import annotations

from hyperclone_onnx.algebra.dims import Term
from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.dimensions import Axes, Fact
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates

SPACE = "a spatial axis"


def _space(op: Op, axes: Axes) -> tuple[int, list[Term]]:
    """The position of the channels, and the output's spatial axes as the file declares them. Pins the input's."""
    last = op.node.op_type.startswith("Nhwc")
    spatial = axes[1:-1] if last else axes[2:]
    for term in spatial:
        op.pin(term, SPACE)
    declared = op.declared(op.node.outputs[0])
    fits = declared is not None and len(declared) == len(axes)
    sizes = (declared[1:-1] if last else declared[2:]) if declared is not None and fits else [None] * len(spatial)
    return (len(axes) - 1 if last else 1), [op.pinned_dim(size, SPACE) for size in sizes]


def _arranged(op: Op, batch: Term, channels: Term, space: list[Term]) -> Axes:
    return (batch, *space, channels) if op.node.op_type.startswith("Nhwc") else (batch, channels, *space)


@relates("FusedConv", "NhwcConv", "NhwcFusedConv", domain=MICROSOFT)
def fused_convolution(op: Op) -> None:
    """Y[n, (g m), p] = f(sum_{c, k} X[n, (g c), p + k] W[(g m), c, k] + B[(g m)] + Z[n, (g m), p])"""
    x, w = op.axes(0, least=2), op.axes(1, rank=op.rank(0))
    where, space = _space(op, x)
    for term in w[2:]:
        op.pin(term, "a convolution's kernel")
    group = op.positive("group", 1)
    if group == 1:
        op.unify(x[where], w[1])
    else:
        groups = op.dim(group)
        for term, inner in ((x[where], w[1]), (w[0], op.dim((op.static(w[0]) or 0) // group))):
            if op.static(term) != group * (op.static(inner) or 0):
                raise CannotTell("a number of channels that is not a multiple of the number of groups")
            op.space.match([term], [groups, inner])
    op.sum_over((1, 1))
    op.fact(Fact.CONTRACTED_WITH_WEIGHT, w[1])
    op.fact(Fact.WEIGHT_OUTPUT, w[0])
    if op.value(0).is_graph_input():
        op.pin(x[where], "the channels of an input")
    if op.has(2):
        op.unify(op.axis_of(2, 0), w[0])
    out = _arranged(op, x[0], w[0], space)
    if op.has(3):
        out = op.broadcast([out, op.axes(3)])
    op.out(out)


@edits("FusedConv", "NhwcConv", "NhwcFusedConv", domain=MICROSOFT)
def edit_fused_convolution(op: GrownOp) -> None:
    """Sets the attribute `group`: all channels divided by the channels of one group."""
    if op.integer("group", 1) > 1:
        channels = op.axis_of(0, -1 if op.node.op_type.startswith("Nhwc") else 1)
        op.set_attribute("group", op.grown(channels) // op.grown(op.axis_of(1, 1)))


@relates("ConvTransposeWithDynamicPads", domain=MICROSOFT)
def transposed_convolution(op: Op) -> None:
    """Y[n, m, p] = sum_{c, k} X[n, c, q] W[c, m, k] + B[m], where p = q stride + k - padding"""
    x, w = op.axes(0, least=2), op.axes(1, rank=op.rank(0))
    if op.integer("group", 1) != 1:
        raise CannotTell("a transposed convolution in groups")
    _, space = _space(op, x)
    for term in w[2:]:
        op.pin(term, "a convolution's kernel")
    op.sum_over((0, 1), (1, 0))
    op.fact(Fact.WEIGHT_OUTPUT, w[1])
    op.parameter(2)
    if op.value(0).is_graph_input():
        op.pin(x[1], "the channels of an input")
    if op.has(3):
        op.unify(op.axis_of(3, 0), w[1])
    op.out((x[0], w[1], *space))


@relates("NhwcMaxPool", domain=MICROSOFT)
def max_pool(op: Op) -> None:
    """Y[n, p, c] = maximum of X[n, window of p, c]"""
    x = op.axes(0, least=2)
    _, space = _space(op, x)
    op.out(_arranged(op, x[0], x[-1], space))


@relates("GridSample", domain=MICROSOFT)
def grid_sample(op: Op) -> None:
    """Y[n, c, p] = X[n, c, grid[n, p, :]], interpolated"""
    x, grid = op.axes(0, least=2), op.axes(1, least=2)
    op.unify(x[0], grid[0])
    for term in (*x[2:], *grid[1:]):
        op.pin(term, SPACE)
    op.out((*x[:2], *grid[1:-1]))


@relates("CropAndResize", domain=MICROSOFT)
def crop_and_resize(op: Op) -> None:
    """Y[r, c, p] = X[images[r], c, p in the box r], interpolated"""
    x, boxes = op.axes(0, least=2), op.axes(1, rank=2)
    for term in (x[0], *x[2:], boxes[1]):
        op.pin(term, "it is cropped")
    op.unify(op.axis_of(2, 0), boxes[0])
    op.parameter(3)
    sizes = op.ints(3)
    if sizes is not None and len(sizes) != 2:
        raise op.malformed(f"crop_size has {len(sizes)} elements, and must have 2")
    crop = [op.pinned_dim(None if sizes is None else sizes[i], "it is cropped") for i in (0, 1)]
    op.out((boxes[0], x[1], *crop))
