"""ONNX Runtime's own attention operators that compute their queries, keys and values with weights of their own."""

from __future__ import annotations

import itertools

from hyperclone_onnx.algebra.dims import Concat, Product, Term
from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.attention import (
    cache_lengths,
    edit_heads,
    edit_scale,
    head_terms,
    relate_bias,
    relate_scores,
    split_heads,
)
from hyperclone_onnx.rules.dimensions import Fact
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.onnxruntime.attention import attend_tokens, first_of_three, relate_beams, relate_mask
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates

FIXED_SCALE = "the operator divides scores by the root of its size, and has no attribute for that"
INNER_ANGLES = "the operator makes rotary angles from its size"


def relate_joint_caches(
    op: Op, index: int, batch: Term, heads: Term, new: Term, widths: tuple[Term, Term], shared: bool
) -> Term:
    """Relate the cache of keys and values (2, batch, heads, length, width): input `index` and output 1."""
    past = op.axis_of(index, 3) if op.has(index) else None
    pair = op.pinned_dim(2, "keys and values")
    if past is not None or len(op.node.outputs) > 1:
        op.unify(*widths)
    total, kept = cache_lengths(op, new, past, shared)
    if past is not None:
        op.unify_axes(op.axes(index), (pair, batch, heads, past, widths[0]))
    op.out((pair, batch, heads, kept, widths[0]), index=1)
    return total


def _project(
    op: Op, weight: int, bias: int, *, integers: bool = False, scales: tuple[int, ...] = ()
) -> tuple[Term, Term, Term]:
    """(heads, head_dim, value head_dim) of X W + B. W's columns are queries, keys and values side by side."""
    w, count = op.axes(weight, rank=2), op.positive("num_heads")
    sizes = op.int_list("qkv_hidden_sizes", None, length=3)
    total = op.static(w[1])
    if sizes is None:
        if total is None or total % 3:
            raise CannotTell("packed queries, keys and values of unknown widths")
        sizes = [total // 3] * 3
    if any(size % count for size in sizes):
        raise CannotTell("a width that is not a multiple of the number of heads")
    op.sum_over((0, -1), (weight, 0), integers=integers, scales=scales)
    op.fact(Fact.WEIGHT_OUTPUT, w[1])
    heads, depth, value_depth = op.dim(count), op.dim(sizes[0] // count), op.dim(sizes[2] // count)
    op.unify(w[1], Concat(tuple(Product((heads, width)) for width in (depth, depth, value_depth))))
    if op.has(bias):
        op.unify(op.axis_of(bias, 0), w[1])
    op.fact(Fact.BATCHED, heads)
    return heads, depth, value_depth


@relates("Attention", domain=MICROSOFT)
def projected_attention(op: Op) -> None:
    """MultiHeadAttention of X W + B, where W's columns are queries, keys and values side by side"""
    batch, length, _ = op.axes(0, rank=3)
    heads, depth, value_depth = _project(op, 1, 2)
    if op.integer("do_rotary", 0):
        op.pin(depth, INNER_ANGLES)
        op.pin(length, "its positions are counted")
    if op.integer("unidirectional", 0):
        op.pin(length, "a causal mask compares positions along it")
    shared = bool(op.integer("past_present_share_buffer", 0))
    relate_mask(op, 3, batch, length)
    total = relate_joint_caches(op, 4, batch, heads, length, (depth, value_depth), shared)
    relate_bias(op, 5, (batch, heads, length, total))
    relate_scores(op, depth, value_depth, total)
    op.out((batch, length, Product((heads, value_depth))))


@relates("QAttention", domain=MICROSOFT)
def quantised_attention(op: Op) -> None:
    """Attention of a_scale w_scale (X - x_zero)(W - w_zero) + B"""
    batch, length, _ = op.axes(0, rank=3)
    heads, depth, value_depth = _project(op, 1, 2, integers=True, scales=(4, 3))
    op.unify(depth, value_depth)  # the operator has no attribute for values of another width
    for index in (3, 6):
        op.parameter(index)
    for index in (4, 7):
        if op.has(index) and op.rank(index) == 1:
            op.merge([op.axis_of(index, 0), op.axis_of(1, 1)])
    if op.integer("do_rotary", 0):
        op.pin(depth, INNER_ANGLES)
        op.pin(length, "its positions are counted")
    if op.integer("unidirectional", 0):
        op.pin(length, "a causal mask compares positions along it")
    relate_mask(op, 5, batch, length)
    shared = bool(op.integer("past_present_share_buffer", 0))
    total = relate_joint_caches(op, 8, batch, heads, length, (depth, value_depth), shared)
    relate_scores(op, depth, value_depth, total)
    op.out((batch, length, Product((heads, value_depth))))


@relates("DecoderMaskedSelfAttention", domain=MICROSOFT)
def decoder_masked_self_attention(op: Op) -> None:
    """Attention of X W + B for one new query, with its cache"""
    batch, length, _ = op.axes(0, rank=3)
    heads, depth, value_depth = _project(op, 1, 2)
    shared = bool(op.integer("past_present_share_buffer", 0))
    if op.integer("do_rotary", 0):
        op.pin(depth, INNER_ANGLES)
    if shared:
        op.pin(depth, "a shared buffer stores its keys in pieces of this axis")
    relate_mask(op, 3, batch, length)
    relate_beams(op, 8, batch)
    total = relate_joint_caches(op, 4, batch, heads, length, (depth, value_depth), shared)
    relate_bias(op, 5, (batch, heads, length, total))
    relate_scores(op, depth, value_depth, total)
    op.out((batch, length, Product((heads, value_depth))))


@relates("PackedAttention", domain=MICROSOFT)
def packed_attention(op: Op) -> None:
    """Attention of X W + B of tokens without padding: Y[n, (h e)] attends to the tokens of its own sequence"""
    heads, depth, value_depth = _project(op, 1, 2)
    attend_tokens(op, 3, op.axis_of(0, 0), heads, depth, value_depth)


@edits("Attention", "DecoderMaskedSelfAttention", "PackedAttention", "QAttention", domain=MICROSOFT)
def edit_projected_attention(op: GrownOp) -> None:
    """Sets the number of heads, the widths and the scale of the scores."""
    count = op.integer("num_heads")
    heads, _ = head_terms(op, op.out_axes(0)[-1], count)
    whole = op.axis_of(1, 1)
    widths = op.int_list("qkv_hidden_sizes", None)
    size = op.static(whole) or 0
    bounds = [0, size // 3, 2 * size // 3, size] if widths is None else [0, widths[0], widths[0] + widths[1], size]
    moved = [op.offset(whole, bound) for bound in bounds]
    grown = [b - a for a, b in itertools.pairwise(moved)]
    if widths is not None or len(set(grown)) > 1:
        op.set_attribute("qkv_hidden_sizes", grown)
    edit_heads(op, "num_heads", heads)
    edit_scale(op, head_terms(op, first_of_three(op, whole), count)[1])


@relates("LongformerAttention", domain=MICROSOFT)
def longformer_attention(op: Op) -> None:
    """Attention of X W + B within a window, and of X W' + B' from and to the tokens that `global` marks"""
    x = op.axes(0, rank=3)
    heads, depth, value_depth = _project(op, 1, 2)
    op.unify(depth, value_depth)
    op.unify(op.axis_of(4, 1), op.axis_of(1, 1))
    op.unify(op.axis_of(5, 0), op.axis_of(2, 0))
    op.sum_over((0, 2), (4, 0))
    op.space.match([x[2]], [heads, depth])
    op.pin(depth, FIXED_SCALE)
    for index in (3, 6):
        op.unify_axes(op.axes(index), x[:2])
    op.pin(x[1], "a window moves along it")
    op.out(x)


@edits("LongformerAttention", "DecoderAttention", domain=MICROSOFT)
def edit_fixed_attention(op: GrownOp) -> None:
    """Sets the number of heads."""
    edit_heads(op, "num_heads", head_terms(op, op.axis_of(0, 2), op.integer("num_heads"))[0])


@relates("DecoderAttention", domain=MICROSOFT)
def decoder_attention(op: Op) -> None:
    """Attention of (X Wq, Z Wkv) + B, length before batch, with caches that flags turn on and off"""
    query, key = op.axes(0, rank=3), op.axes(1, rank=3)
    heads, depth = split_heads(op, query[2], op.integer("num_heads"))
    hidden = Product((heads, depth))
    op.sum_over((0, 2), (2, 0))
    op.sum_over((1, 2), (3, 0))
    for index, axis, term in (
        (1, 2, hidden),
        (2, 1, hidden),
        (3, 1, Concat((hidden, hidden))),
        (4, 0, Concat((hidden, hidden, hidden))),
    ):
        op.unify(op.axis_of(index, axis), term)
    op.unify(key[1], query[1])
    op.pin(depth, FIXED_SCALE)
    for length in (query[0], key[0]):
        op.pin(length, "positions of a cache")
    relate_mask(op, 5, query[1], query[0])
    length = op.pinned_dim(None, "positions of a cache")
    for index in (6, 7):
        if op.has(index):
            past = op.axis_of(index, 2)
            op.unify_axes(op.axes(index), (query[1], heads, past, depth))
            op.pin(past, "positions of a cache")
        op.out((query[1], heads, length, depth), index=index - 5)
    op.fact(Fact.BATCHED, heads)
    op.out(query)
