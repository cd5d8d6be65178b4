"""ONNX Runtime's own elementwise, normalising and contracting operators."""

from __future__ import annotations

from hyperclone_onnx.algebra.dims import ONE, Concat, Term
from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.contractions import gemm, note_roles
from hyperclone_onnx.rules.dimensions import Axes, Fact
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.indexing import index_by
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates


@relates("Gelu", "QuickGelu", "ScaledSiLU", "MurmurHash3", "SampleOp", domain=MICROSOFT)
def activation(op: Op) -> None:
    """out[j] = f(x[j])"""
    op.out(op.axes(0))


@relates("BiasGelu", "FastGelu", domain=MICROSOFT)
def biased_activation(op: Op) -> None:
    """out[.., j] = f(x[.., j] + bias[j])"""
    op.out(op.broadcast([op.axes(i) for i in range(op.count) if op.has(i)]))


@relates("BiasAdd", domain=MICROSOFT)
def biased_addition(op: Op) -> None:
    """out[.., j] = x[.., j] + bias[j] + skip[.., j]"""
    op.out(op.broadcast([op.axes(index) for index in range(3)]))


@relates("BiasSplitGelu", domain=MICROSOFT)
def split_activation(op: Op) -> None:
    """out[.., j] = (x + bias)[.., j] gelu((x + bias)[.., J + j])"""
    axes = op.axes(0, least=1)
    size = op.static(axes[-1])
    if size is None or size % 2:
        raise CannotTell("an odd width, which has no halves")
    half = op.dim(size // 2)
    op.unify(axes[-1], Concat((half, half)))
    op.unify(op.axis_of(1, 0), axes[-1])
    op.out((*axes[:-1], half))


@relates("BiasDropout", "BitmaskDropout", "BitmaskBiasDropout", domain=MICROSOFT)
def biased_dropout(op: Op) -> None:
    """out[j] = dropout(x[j] + bias[j]) + residual[j]; a mask of bits has one bit for each element"""
    biased = op.node.op_type != "BitmaskDropout"
    axes = op.broadcast([op.axes(index) for index in ((0, 1, 2) if biased else (0,)) if op.has(index)])
    op.out(axes)
    if op.node.op_type == "BiasDropout":
        op.out(axes, index=1)
    elif len(op.node.outputs) > 1:
        for term in axes:
            op.pin(term, "a mask of bits numbers its elements")
        op.out((op.pinned_dim(None, "a mask of bits"),), index=1)


@relates("BiasSoftmax", domain=MICROSOFT)
def biased_softmax(op: Op) -> None:
    """out[j] = softmax_k(x[j, k] + bias[j, k]) over all axes from `axis` on"""
    axes = op.axes(0)
    for term in axes[op.axis(op.integer("axis", 1), len(axes)) :]:
        op.fact(Fact.SOFTMAX, term)
        op.pin(term, "BiasSoftmax runs over it")
    op.broadcast([axes, op.axes(1)])
    op.out(axes)


def _normalised(op: Op) -> None:
    axes = op.broadcast([op.axes(0, least=1), *(op.axes(i) for i in range(1, op.count) if op.has(i))])
    op.uniform(axes[-1])
    op.out(axes)


def _group_norm(op: Op, axes: Axes) -> None:
    """Relate the channels as (groups, channels of a group). A group is normalised over its channels and the space."""
    last = bool(op.integer("channels_last", 1))
    channels, space = (axes[-1], axes[1:-1]) if last else (axes[1], axes[2:])
    groups, size = op.positive("groups"), op.static(channels)
    if size is None or size % groups:
        raise CannotTell("a number of channels that is not a multiple of the number of groups")
    group, inner = op.dim(groups), op.dim(size // groups)
    op.space.match([channels], [group, inner])
    op.fact(Fact.GROUPED, group)
    for term in (inner, *space):
        op.uniform(term)
    for index in (1, 2, 4):
        if op.has(index):
            op.unify(op.axis_of(index, 0), channels)
    op.out(axes)


@relates("GroupNorm", domain=MICROSOFT)
def group_norm(op: Op) -> None:
    """Y[n, p, (g c)] is X normalised over p and c for each group g, times gamma, plus beta, activated"""
    _group_norm(op, op.axes(0, least=2))


@relates("SkipGroupNorm", domain=MICROSOFT)
def skip_group_norm(op: Op) -> None:
    """Y = GroupNorm(X + skip + bias); the last output is X + skip + bias"""
    axes, skip = op.axes(0, least=2), op.axes(3)
    if len(skip) == 2:
        last = bool(op.integer("channels_last", 1))
        op.unify(skip[0], axes[0])
        op.unify(skip[1], axes[-1 if last else 1])
    else:
        op.broadcast([axes, skip])
    _group_norm(op, axes)
    op.out(axes, index=1)


@edits("GroupNorm", "SkipGroupNorm", domain=MICROSOFT)
def edit_group_norm(op: GrownOp) -> None:
    """Sets the number of groups: it grows by the part of the channels' growth that is outside a group."""
    groups, last = op.integer("groups"), bool(op.integer("channels_last", 1))
    grown, count = 1, 1
    for factor in op.space.factors(op.axes(0)[-1 if last else 1]):
        if count == groups:
            break
        count *= op.static(factor) or 1
        grown *= op.grown(factor)
    if grown != groups:
        op.set_attribute("groups", grown)


@relates("SimplifiedLayerNormalization")
def simplified_layer_norm(op: Op) -> None:
    """Y = X / sqrt(mean X^2 + eps) * scale, over the axes from `axis` on"""
    axes = op.axes(0)
    axis = op.axis(op.integer("axis", -1), len(axes))
    for term in axes[axis:]:
        op.uniform(term)
    op.out(op.broadcast([axes, op.axes(1)]))
    op.out((*axes[:axis], *[ONE] * (len(axes) - axis)), index=1)


@relates("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_layer_norm(op: Op) -> None:
    """Y = norm(X + skip + bias) * gamma (+ beta); the last output is X + skip + bias"""
    _normalised(op)
    axes = op.dimensions.axes[op.node.outputs[0]] or ()
    for index in (1, 2):
        op.out((*axes[:-1], ONE), index=index)
    op.out(axes, index=3)


@relates("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_norm(op: Op) -> None:
    """Y[b, s] = norm(words[ids[b, s]] + positions[s] + segments[kinds[b, s]]) * gamma + beta"""
    ids = op.axes(0, rank=2)
    width: list[Term] = []
    for table, indices in ((2, 0), (3, 8), (4, 1)):
        if op.has(table):
            rows, columns = op.axes(table, rank=2)
            index_by(op, rows, indices if op.has(indices) else 0)
            op.fact(Fact.EMBEDDING, columns)
            width.append(columns)
    for index in (1, 7, 8):
        if op.has(index) and op.rank(index) == 2:
            for one, other in zip(op.axes(index), ids, strict=True):
                op.merge([one, other])
    if not op.has(8):
        op.pin(ids[1], "its positions are indices into a table")
    for index in (5, 6):
        width.append(op.axis_of(index, 0))
    hidden = op.merge(width)
    op.uniform(hidden)
    op.out((*ids, hidden))
    op.out((ids[0],), index=1)
    op.out((*ids, hidden), index=2)


relates("FusedGemm", domain=MICROSOFT)(gemm)


@relates("GemmFastGelu", domain=MICROSOFT)
def gemm_activation(op: Op) -> None:
    """Y[.., m, n] = f(sum_k X[.., m, k] W[k, n] + bias[n])"""
    left, right = op.axes(0, least=1), op.axes(1, least=2)
    op.sum_over((0, -1), (1, -2))
    note_roles(op, (), left[:-1], right[-1:])
    if op.has(2):
        op.unify(op.axis_of(2, 0), right[-1])
    op.out((*left[:-1], *right[-1:]))


@relates("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(op: Op) -> None:
    """C[.., m, n] = f(alpha sum_k A'[.., m, k] B'[.., k, n]), with A', B' = A, B or their transposes"""
    left, right = _matrix(op, 0, "A"), _matrix(op, 1, "B")
    op.sum_over((0, left[-1]), (1, right[-2] if len(right) > 1 else right[0]))
    m, n = ([op.axes(0)[left[-2]]] if len(left) > 1 else []), ([op.axes(1)[right[-1]]] if len(right) > 1 else [])
    batch = op.broadcast([tuple(op.axes(i)[axis] for axis in order[:-2]) for i, order in ((0, left), (1, right))])
    note_roles(op, batch, tuple(m), tuple(n))
    out = (*batch, *m, *n)
    if op.text("activation", "") in ("Softmax", "LogSoftmax", "Hardmax"):
        op.pin(out[op.axis(op.integer("activation_axis", -1), len(out))], "softmax runs over it")
    op.out(out)


def _matrix(op: Op, index: int, letter: str) -> list[int]:
    """The positions of an operand's axes in the order (.., rows, columns), in which the operator multiplies them."""
    order = list(range(len(op.axes(index, least=1))))
    if len(order) > 1 and op.integer(f"transBatch{letter}", 0):  # (rows, .., columns)
        order = [*order[1:-1], order[0], order[-1]]
    if len(order) > 1 and op.integer(f"trans{letter}", 0):
        order[-2:] = reversed(order[-2:])
    return order
