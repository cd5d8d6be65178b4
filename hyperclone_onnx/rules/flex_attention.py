"""Attention in which subgraphs may change the scores and the probabilities."""

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
    batch, heads, length, depth = op.axes(0, rank=4)
    _, kv_heads, total, _ = op.axes(1, rank=4)
    value_depth = op.axis_of(2, 3)
    relate_heads(op, heads, kv_heads)
    for index, width in ((1, depth), (2, value_depth)):
        op.unify_axes(op.axes(index), (batch, kv_heads, total, width))
    relate_scores(op, depth, value_depth, total)
    for name in ("score_mod", "prob_mod"):
        if op.has_attribute(name):
            _walk_modifier(op, name, (batch, heads, length, total))
    op.out((batch, heads, length, value_depth))


def _walk_modifier(op: Op, name: str, scores: tuple[Term, ...]) -> None:
    """Relate the nodes of a subgraph that maps scores to scores."""
    body = op.body(name)
    if len(body.inputs) != 1 or len(body.outputs) != 1:
        raise op.malformed(f"{name} must have one input and one output")
    op.dimensions.axes[body.inputs[0]] = scores
    op.walk(body)
    changed = op.dimensions.axes.get(body.outputs[0])
    if changed is None or len(changed) != len(scores):
        raise CannotTell(f"{name} returns scores of unknown rank")
    op.unify_axes(changed, scores)


@edits("FlexAttention", domain=PREVIEW)
def edit_flex_attention(op: GrownOp) -> None:
    """Sets the scale of the scores."""
    divide_scores(op, op.axis_of(0, 3), op.number("scale"))
