"""ONNX Runtime's own attention operators."""

from __future__ import annotations

import itertools

from hyperclone_onnx.dims import Concat, Product, Term
from hyperclone_onnx.growth import GrownOp
from hyperclone_onnx.inference import CannotTell, Fact, Op
from hyperclone_onnx.rules.attention import (
    MICROSOFT,
    edit_heads,
    edit_scale,
    head_terms,
    relate_bias,
    relate_heads,
    relate_scores,
    rotate,
    split_heads,
    total_length,
)
from hyperclone_onnx.rules.registry import edits, relates


def _past_and_present(op: Op, past_index: int, batch: Term, heads: Term, new: Term, widths: tuple[Term, Term]) -> Term:
    """Relate key and value caches at `past_index` and after, set the present ones (outputs 1, 2)."""
    past = op.axes(past_index)[2] if op.has(past_index) else None
    total = total_length(op, new, past)
    for offset, width in enumerate(widths):
        if op.has(past_index + offset):
            for one, other in zip(op.axes(past_index + offset), (batch, heads, past or new, width), strict=True):
                op.unify(one, other)
        op.out((batch, heads, total, width), index=1 + offset)
    return total


@relates("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(op: Op) -> None:
    """Y[b, s, (h e)] = sum_t softmax_t(scale sum_d Q[b, s, (h d)] K[b, t, (h d)] + bias) V[b, t, (h e)]"""
    query = op.axes(0)
    if len(query) != 3 or not op.has(1) or not op.has(2) or op.has(8) or op.has(9):
        raise CannotTell("MultiHeadAttention with packed operands or beams")
    count = op.integer("num_heads")
    heads, depth = split_heads(op, query[2], count)
    key, value = op.axes(1), op.axes(2)
    if len(key) == 4:  # (batch, heads, length, head_dim): keys and values of a cross attention
        kv_heads, new, key_depth, value_depth = key[1], key[2], key[3], value[3]
        op.unify(value[1], kv_heads)
    else:
        new = key[1]
        kv_heads, key_depth = split_heads(op, key[2], count)
        value_heads, value_depth = split_heads(op, value[2], count)
        op.unify(value_heads, kv_heads)
    op.unify(value[-2], key[-2])
    for axes in (key, value):
        op.unify(axes[0], query[0])
    op.unify(kv_heads, heads)
    op.unify(key_depth, depth)
    if len(key) == 4:
        op.unify(key_depth, value_depth)
    if op.integer("unidirectional", 0):
        op.pin(query[1], "a causal mask counts along it")
    op.fact(Fact.BATCHED, heads)
    if op.has(3):
        packed = (Product((heads, depth)), Product((heads, depth)), Product((heads, value_depth)))
        op.unify(op.axes(3)[0], Concat(packed))
    if op.has(4):
        for term in op.axes(4)[1:]:
            op.pin(term, "positions of a mask")
    total = _past_and_present(op, 6, query[0], heads, new, (depth, value_depth))
    relate_bias(op, 5, (query[0], heads, query[1], total))
    relate_scores(op, depth, value_depth, total)
    op.out((*query[:2], Product((heads, value_depth))))
    op.out((query[0], heads, query[1], total), index=3)


@edits("MultiHeadAttention", domain=MICROSOFT)
def edit_multi_head_attention(op: GrownOp) -> None:
    """The count of heads and the scale of the scores."""
    heads, depth = head_terms(op, op.axes(0)[2], op.integer("num_heads"))
    edit_heads(op, "num_heads", heads)
    edit_scale(op, depth)


@relates("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(op: Op) -> None:
    """MultiHeadAttention whose query heads are (key/value heads, group), causal, with rotary angles inside"""
    query = op.axes(0)
    many, few = op.integer("num_heads"), op.integer("kv_num_heads")
    if len(query) != 3 or any(op.has(index) for index in range(12, op.count)):
        raise CannotTell("GroupQueryAttention with quantised caches")
    packed = not op.has(1)
    width = op.static(query[2])
    if width is None:
        raise CannotTell("a width known only when running")
    depth = op.dim(width // (many + 2 * few if packed else many))
    heads, kv_heads = op.dim(many), op.dim(few)
    relate_heads(op, heads, kv_heads)
    keys = Product((kv_heads, depth))
    if packed:
        op.unify(query[2], Concat((Product((heads, depth)), keys, keys)))
    else:
        op.space.match([query[2]], [heads, depth])
        for index in (1, 2):
            op.space.match([op.axes(index)[2]], [kv_heads, depth])
            for one, other in zip(op.axes(index)[:2], query[:2], strict=True):
                op.unify(one, other)
    if op.integer("do_rotary", 0) and op.has(7) and op.has(8):
        half = op.axes(7)[1]
        op.unify(op.axes(8)[1], half)
        rotate(op, depth, half, 2 * (op.static(half) or 0), bool(op.integer("rotary_interleaved", 0)))
        for index in (7, 8):
            op.pin(op.axes(index)[0], "indexed by positions")
    op.pin(query[1], "a causal mask counts along it")
    if op.has(5) and op.rank(5) == 1:
        op.unify(op.axes(5)[0], query[0])
    if op.has(11):
        op.unify(op.axes(11)[0], heads)
    total = _past_and_present(op, 3, query[0], kv_heads, query[1], (depth, depth))
    relate_bias(op, 10, (query[0], heads, query[1], total))
    relate_scores(op, depth, depth, total)
    op.out((*query[:2], Product((heads, depth))))


@edits("GroupQueryAttention", domain=MICROSOFT)
def edit_group_query_attention(op: GrownOp) -> None:
    """The counts of heads and the scale of the scores."""
    heads, depth = head_terms(op, op.out_axes(0)[2], op.integer("num_heads"))
    count = op.integer("kv_num_heads")
    kv_heads = head_terms(op, op.axes(1)[2] if op.has(1) else heads, count)[0]
    edit_heads(op, "num_heads", heads)
    edit_heads(op, "kv_num_heads", kv_heads)
    edit_scale(op, depth)


@relates("Attention", domain=MICROSOFT)
def packed_attention(op: Op) -> None:
    """MultiHeadAttention of X W + B, where W's columns are queries, keys and values side by side"""
    x, w = op.axes(0), op.axes(1)
    if op.has(4) or op.integer("do_rotary", 0) or op.integer("past_present_share_buffer", 0):
        raise CannotTell("Attention with a packed cache or rotary angles inside")
    count = op.integer("num_heads")
    sizes = op.int_list("qkv_hidden_sizes", None)
    total = op.static(w[1])
    if sizes is None:
        if total is None or total % 3:
            raise CannotTell("packed queries, keys and values of unknown widths")
        sizes = [total // 3] * 3
    op.sum_over((0, 2), (1, 0))
    op.fact(Fact.WEIGHT_OUTPUT, w[1])
    heads = op.dim(count)
    depths = [op.dim(size // count) for size in (sizes[0], sizes[2])]
    op.unify(w[1], Concat(tuple(Product((heads, depths[i])) for i in (0, 0, 1))))
    if op.has(2):
        op.unify(op.axes(2)[0], w[1])
    op.fact(Fact.BATCHED, heads)
    relate_bias(op, 5, (x[0], heads, x[1], x[1]))
    relate_scores(op, depths[0], depths[1], x[1])
    op.out((*x[:2], Product((heads, depths[1]))))


@edits("Attention", domain=MICROSOFT)
def edit_packed_attention(op: GrownOp) -> None:
    """The count of heads, the widths, and the scale of the scores."""
    count = op.integer("num_heads")
    heads, _ = head_terms(op, op.out_axes(0)[2], count)
    whole = op.axes(1)[1]
    widths = op.int_list("qkv_hidden_sizes", None)
    size = op.static(whole) or 0
    bounds = [0, size // 3, 2 * size // 3, size] if widths is None else [0, widths[0], widths[0] + widths[1], size]
    moved = [op.offset(whole, bound) for bound in bounds]
    grown = [b - a for a, b in itertools.pairwise(moved)]
    if widths is not None or len(set(grown)) > 1:
        op.set_attribute("qkv_hidden_sizes", grown)
    edit_heads(op, "num_heads", heads)
    query = op.space.resolve(whole)
    first = query.segments[0] if isinstance(query, Concat) else query
    edit_scale(op, head_terms(op, first, count)[1])
