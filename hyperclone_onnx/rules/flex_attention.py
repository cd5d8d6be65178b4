"""Attention whose scores and probabilities subgraphs may change."""

from __future__ import annotations

from hyperclone_onnx.algebra.dims import Term
from hyperclone_onnx.rules.attention import divide_scores, relate_heads, relate_scores
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates

PREVIEW = "ai.onnx.preview"


@relates("FlexAttention", domain=PREVIEW)
def flex_attention(op: Op) -> None:
    """Y[b, h, s, e] = sum_t prob_mod(softmax_t(score_mod(scale sum_d Q[b, h, s, d] K[b, h', t, d]))) V[b, h', t, e]"""
    batch, heads, length, depth = op.axes(0)
    kv_heads, total, value_depth = op.axes(1)[1], op.axes(1)[2], op.axes(2)[3]
    relate_heads(op, heads, kv_heads)
    for index, width in ((1, depth), (2, value_depth)):
        for one, other in zip(op.axes(index), (batch, kv_heads, total, width), strict=True):
            op.unify(one, other)
    relate_scores(op, depth, value_depth, total)
    for name in ("score_mod", "prob_mod"):
        if name in op.node.attributes:
            _walk_modifier(op, name, (batch, heads, length, total))
    op.out((batch, heads, length, value_depth))


def _walk_modifier(op: Op, name: str, scores: tuple[Term, ...]) -> None:
    """Relate the nodes of a subgraph that maps scores to scores."""
    body = op.node.attributes[name].as_graph()
    op.dimensions.axes[body.inputs[0]] = scores
    op.walk(body)
    changed = op.dimensions.axes.get(body.outputs[0])
    if changed is None or len(changed) != len(scores):
        raise CannotTell(f"{name} gives scores of unknown axes")
    for one, other in zip(changed, scores, strict=True):
        op.unify(one, other)


@edits("FlexAttention", domain=PREVIEW)
def edit_flex_attention(op: GrownOp) -> None:
    """The scale of the scores."""
    attribute = op.node.attributes.get("scale")
    divide_scores(op, op.axes(0)[3], None if attribute is None else attribute.as_float())
