"""ONNX Runtime's own operators that move elements, index them, or transform an axis."""

from __future__ import annotations

from hyperclone_onnx.algebra.dims import ONE, Concat, Term
from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.dimensions import Fact
from hyperclone_onnx.rules.indexing import edit_gather_nd, gather_nd, index_by, trilu
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates
from hyperclone_onnx.rules.shapes import counted, edit_range

relates("GatherND", domain=MICROSOFT)(gather_nd)
edits("GatherND", domain=MICROSOFT)(edit_gather_nd)
relates("Trilu", domain=MICROSOFT)(trilu)


@relates("ExpandDims", domain=MICROSOFT)
def expand_dims(op: Op) -> None:
    """out[.., 0, ..] = x[.., ..]"""
    axes, where = list(op.axes(0)), op.element(1)
    if where is None or where.static is None:
        raise CannotTell("an axis whose number is known only when running")
    op.parameter(1)
    axes.insert(op.axis(where.static, len(axes) + 1), ONE)
    op.out(axes)


@relates("Pad", domain=MICROSOFT)
def pad(op: Op) -> None:
    """out = constant beside x beside constant, along each padded axis"""
    axes, pads = op.axes(0), op.ints(1)
    op.parameter(1)
    if pads is None or len(pads) != 2 * len(axes):
        raise CannotTell("paddings known only when running")
    constant = op.text("mode", "constant") == "constant"
    out = [_padded(op, axis, pads[i], pads[i + len(axes)], constant) for i, axis in enumerate(axes)]
    op.out(out)


def _padded(op: Op, term: Term, before: int, after: int, constant: bool) -> Term:
    if before == after == 0:
        return term
    if not constant or min(before, after) < 0 or op.static(term) is None:
        op.pin(term, "it is padded")
        return op.pinned_dim(op.size(term) + before + after, "a padded axis")
    ends = [op.pinned_dim(n, "padding") if n else None for n in (before, after)]
    return Concat(tuple(part for part in (ends[0], term, ends[1]) if part is not None))


@relates("Range", domain=MICROSOFT)
def range_(op: Op) -> None:
    """out[j] = start + j delta; the grown model makes the source's values and repeats them"""
    for index in range(op.count):
        op.parameter(index)
    bounds = [op.element(0), op.element(1), op.element(2) if op.has(2) else Size.of(1)]
    known = [bound.static for bound in bounds if bound is not None and bound.static is not None]
    if len(known) == 3:
        op.out(*counted(op, *known))
        return
    declared = op.declared(op.node.outputs[0])
    op.out([op.dim(declared[0] if declared else None)])


edits("Range", domain=MICROSOFT)(edit_range)


@relates("TorchEmbedding", domain=MICROSOFT)
def embedding(op: Op) -> None:
    """out[i, h] = table[indices[i], h]"""
    rows, width = op.axes(0, rank=2)
    index_by(op, rows, 1)
    op.fact(Fact.EMBEDDING, width)
    op.out((*op.axes(1), width))


@relates("RemovePadding", domain=MICROSOFT)
def remove_padding(op: Op) -> None:
    """out[n, h] = x[b, s, h] for the tokens n that are no padding; the other outputs number them"""
    batch, length, hidden = op.axes(0, rank=3)
    for term in (batch, length):
        op.pin(term, "tokens of several sequences")
    op.parameter(1)
    op.out((op.pinned_dim(None, "tokens of several sequences"), hidden))
    op.out((batch, length), index=1)
    op.out((op.pinned_dim(op.size(batch) + 1, "where sequences begin"),), index=2)
    op.out((ONE,), index=3)


@relates("RestorePadding", domain=MICROSOFT)
def restore_padding(op: Op) -> None:
    """out[b, s, h] = x[n, h] for the tokens n that are no padding, else 0"""
    tokens, hidden = op.axes(0, rank=2)
    op.pin(tokens, "tokens of several sequences")
    op.parameter(1)
    op.out((*op.axes(1), hidden))


@relates("UnfoldTensor", domain=MICROSOFT)
def unfold(op: Op) -> None:
    """out[.., i, .., w] = x[.., i step + w, ..]"""
    axes = list(op.axes(0))
    axis, size, step = op.axis(op.integer("dim", -1), len(axes)), op.positive("size"), op.positive("step", 1)
    op.pin(axes[axis], "windows move along it")
    length = op.static(axes[axis])
    axes[axis] = op.pinned_dim(None if length is None else (length - size) // step + 1, "windows")
    op.out((*axes, op.pinned_dim(size, "a window")))


@relates("ComplexMul", "ComplexMulConj", domain=MICROSOFT)
def complex_product(op: Op) -> None:
    """out[j, :] = a[j, :] b[j, :] as complex numbers"""
    axes = op.broadcast([op.axes(0, least=1), op.axes(1)])
    op.pin(axes[-1], "real and imaginary parts")
    op.out(axes)


@relates("Rfft", "Irfft", domain=MICROSOFT)
def fourier(op: Op) -> None:
    """out[.., k, :] = sum_n x[.., n] exp(-2 pi i k n / N), or back: repeats would change the frequencies"""
    inverse = op.node.op_type == "Irfft"
    dims = op.positive("signal_ndim", 1)
    axes = op.axes(0, least=dims + inverse)
    signal = axes[len(axes) - dims - inverse :]
    for term in signal:
        op.pin(term, "a signal's axis")
    length = op.static(signal[dims - 1])
    other = None if length is None else 2 * (length - 1) if inverse else length // 2 + 1
    pair = [] if inverse else [op.pinned_dim(2, "real and imaginary parts")]
    kept = axes[: len(axes) - 1 - inverse]
    op.out((*kept, op.pinned_dim(other, "a signal's axis"), *pair))


@relates("Inverse", domain=MICROSOFT)
def inverse(op: Op) -> None:
    """out[j] = the inverse of the matrix x[j]"""
    axes = op.axes(0)
    for term in axes[-2:]:
        op.pin(term, "inverted")
    op.out(axes)


@relates("CDist", domain=MICROSOFT)
def distance(op: Op) -> None:
    """out[m, k] = the distance of a[m, :] and b[k, :]"""
    left, right = op.axes(0, rank=2), op.axes(1, rank=2)
    op.unify(left[1], right[1])
    op.pin(left[1], "distances run over it")
    op.out((left[0], right[0]))


@relates("IsAllFinite", domain=MICROSOFT)
def is_all_finite(op: Op) -> None:
    """out = whether each element of each input is finite"""
    op.out(())
