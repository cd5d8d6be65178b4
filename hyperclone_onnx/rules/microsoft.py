"""ONNX Runtime's own elementwise, normalising and contracting operators."""

from __future__ import annotations

from hyperclone_onnx.dims import ONE, Term
from hyperclone_onnx.inference import CannotTell, Fact, Op
from hyperclone_onnx.rules.contractions import note_roles
from hyperclone_onnx.rules.indexing import index_by
from hyperclone_onnx.rules.registry import relates

MICROSOFT = "com.microsoft"


@relates("Gelu", "QuickGelu", domain=MICROSOFT)
def activation(op: Op) -> None:
    """out[j] = f(x[j])"""
    op.out(op.axes(0))


@relates("BiasGelu", "FastGelu", domain=MICROSOFT)
def biased_activation(op: Op) -> None:
    """out[.., j] = f(x[.., j] + bias[j])"""
    op.out(op.broadcast([op.axes(i) for i in range(op.count) if op.has(i)]))


def _normalised(op: Op, operands: list[int]) -> None:
    axes = op.broadcast([op.axes(i) for i in operands if op.has(i)])
    op.uniform(axes[-1])
    op.out(axes)


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
    _normalised(op, list(range(op.count)))
    axes = op.dimensions.axes[op.node.outputs[0]] or ()
    for index in (1, 2):
        op.out((*axes[:-1], ONE), index=index)
    op.out(axes, index=3)


@relates("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_norm(op: Op) -> None:
    """Y[b, s] = norm(words[ids[b, s]] + positions[s] + segments[kinds[b, s]]) * gamma + beta"""
    ids = op.axes(0)
    width: list[Term] = []
    for table, indices in ((2, 0), (3, 8), (4, 1)):
        if op.has(table):
            index_by(op, op.axes(table)[0], indices if op.has(indices) else 0)
            op.fact(Fact.EMBEDDING, op.axes(table)[1])
            width.append(op.axes(table)[1])
    for index in (1, 7, 8):
        if op.has(index) and op.rank(index) == 2:
            for one, other in zip(op.axes(index), ids, strict=True):
                op.merge([one, other])
    if not op.has(8):
        op.pin(ids[1], "its positions index a table")
    for index in (5, 6):
        width.append(op.axes(index)[0])
    hidden = op.merge(width)
    op.uniform(hidden)
    op.out((*ids, hidden))
    op.out((ids[0],), index=1)
    op.out((*ids, hidden), index=2)


@relates("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(op: Op) -> None:
    """C[.., m, n] = alpha sum_k A'[.., m, k] B'[.., k, n], with A', B' transposed as asked"""
    left, right = op.axes(0), op.axes(1)
    if op.integer("transBatchA", 0) or op.integer("transBatchB", 0) or min(len(left), len(right)) < 2:
        raise CannotTell("FusedMatMul with transposed batches")
    trans_a, trans_b = op.integer("transA", 0), op.integer("transB", 0)
    op.sum_over((0, -2 if trans_a else -1), (1, -1 if trans_b else -2))
    m, n = left[-1 if trans_a else -2], right[-2 if trans_b else -1]
    batch = op.broadcast([left[:-2], right[:-2]])
    note_roles(op, batch, (m,), (n,))
    op.out((*batch, m, n))
