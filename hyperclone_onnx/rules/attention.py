"""Attention and rotary embedding as single operators, in ONNX and in ONNX Runtime's own domain."""

from __future__ import annotations

import itertools
import math

import numpy as np

from hyperclone_onnx.dims import Concat, Product, Term
from hyperclone_onnx.growth import GrownOp
from hyperclone_onnx.inference import Axes, CannotTell, Fact, Op, Uniform
from hyperclone_onnx.rules.indexing import index_by
from hyperclone_onnx.rules.registry import edits, relates

MICROSOFT = "com.microsoft"


def split_heads(op: Op, term: Term, heads: int) -> tuple[Term, Term]:
    """A packed axis as (heads, head_dim)."""
    size = op.static(term)
    if size is None or heads < 1 or size % heads:
        raise CannotTell("a width that its heads do not divide")
    parts = op.dim(heads), op.dim(size // heads)
    op.space.match([term], parts)
    return parts


def relate_heads(op: Op, query: Term, key: Term) -> None:
    """Query heads are (key/value heads, group): head h reads key/value head h // group."""
    op.fact(Fact.BATCHED, query)
    many, few = op.static(query), op.static(key)
    if many == few:
        op.unify(query, key)
        return
    if many is None or few is None or few < 1 or many % few:
        raise CannotTell("query heads that the key/value heads do not divide")
    group = op.dim(many // few)
    op.space.match([query], [key, group])
    op.fact(Fact.EXPANDED, group)


def relate_scores(op: Op, depth: Term, value_depth: Term, total: Term) -> None:
    """softmax_t(sum_d q[d] k[t, d]) v[t, e]: what is summed, what is free, what softmax runs over."""
    op.fact(Fact.CONTRACTED_WITH_ACTIVATION, depth)
    op.fact(Fact.VALUE_AXIS, value_depth)
    op.dimensions.uniform.append(Uniform(op.node, depth))
    op.fact(Fact.SOFTMAX, total)
    op.pin(total, "softmax runs over it")


def relate_bias(op: Op, index: int, scores: tuple[Term, Term, Term, Term]) -> None:
    """A mask or bias added to the scores, broadcast to their axes (batch, heads, query length, total length).

    It may end before the keys do: the rest is masked.
    """
    if not op.has(index):
        return
    if op.static(op.axes(index)[-1]) != op.static(scores[3]):
        op.pin(op.axes(index)[-1], "a mask of the first keys")
    op.broadcast([scores, op.axes(index)])


def total_length(op: Op, new: Term, past: Term | None) -> Term:
    """The length of past and new keys together."""
    if past is None:
        return new
    for term in (new, past):
        op.pin(term, "positions of a cache")
    return op.pinned_dim(op.size(new) + op.size(past), "positions of a cache")


def edit_scale(op: GrownOp, depth: Term) -> None:
    """Scores are sums over head_dim: n repeats make them n times too large, and change the default scale."""
    ratio = op.growth(depth)
    if ratio == 1:
        return
    attribute = op.node.attributes.get("scale")
    scale = attribute.as_float() if attribute is not None else 0.0
    size = op.static(depth) or 1
    op.set_attribute("scale", float((scale or 1.0 / math.sqrt(size)) / ratio))


def divide_scores(op: GrownOp, depth: Term, given: float | None) -> None:
    """Divide a sum over head_dim by its repeats, exactly: in `scale`, else in the queries (input 0).

    An attribute is a float32, and so is the square root that kernels take of it: where these are not exact the
    source's scale stays, and the queries are divided. The default, 1 / sqrt(head_dim), has then shrunk by the
    square root of what is asked.
    """
    ratio = op.growth(depth)
    if ratio == 1:
        return
    scale = float((1.0 / math.sqrt(op.static(depth) or 1) if given is None else given) / ratio)
    if _has_exact_root(scale) and (given is None or _has_exact_root(given)):
        op.set_attribute("scale", scale)
    else:
        op.divide_input(0, depth, 0.5 if given is None else 1.0)


def _has_exact_root(scale: float) -> bool:
    return scale >= 0 and float(np.float32(scale)) == scale == float(np.float32(math.sqrt(scale))) ** 2


def edit_heads(op: GrownOp, name: str, heads: Term) -> None:
    """An attribute that counts heads."""
    if name in op.node.attributes and op.integer(name) and op.grows(heads):
        op.set_attribute(name, op.grown(heads))


# -- ONNX -------------------------------------------------------------------------------------------------


@relates("Attention")
def attention(op: Op) -> None:
    """Y[b, h, s, e] = sum_t softmax_t(scale sum_d Q[b, h, s, d] K[b, h', t, d] + mask) V[b, h', t, e]"""
    (batch, heads, length, depth), (kv_heads, new, value_depth) = _operands(op)
    relate_heads(op, heads, kv_heads)
    past = op.axes(4)[2] if op.has(4) else None
    total = total_length(op, new, past)
    for index, width in ((4, depth), (5, value_depth)):
        if op.has(index):
            for one, other in zip(op.axes(index), (batch, kv_heads, past or new, width), strict=True):
                op.unify(one, other)
    relate_scores(op, depth, value_depth, total)
    relate_bias(op, 3, (batch, heads, length, total))
    if op.integer("is_causal", 0) or any(op.integer(f"{side}_window_size", -1) >= 0 for side in ("left", "right")):
        op.pin(length, "a mask counts along it")
    if op.has(6):
        op.unify(op.axes(6)[0], batch)
    packed = op.rank(0) == 3
    op.out((batch, length, Product((heads, value_depth))) if packed else (batch, heads, length, value_depth))
    op.out((batch, kv_heads, total, depth), index=1)
    op.out((batch, kv_heads, total, value_depth), index=2)
    op.out((batch, heads, length, total), index=3)


def _operands(op: Op) -> tuple[tuple[Term, Term, Term, Term], tuple[Term, Term, Term]]:
    """((batch, heads, query length, head_dim), (key/value heads, key length, value head_dim))."""
    query, key, value = op.axes(0), op.axes(1), op.axes(2)
    if not len(query) == len(key) == len(value) in (3, 4):
        raise CannotTell("Attention of operands of different ranks")
    if len(query) == 4:
        batch, heads, length, depth = query
        kv_heads, new, value_depth = key[1], key[2], value[3]
        op.unify(key[3], depth)
        op.unify(value[1], kv_heads)
    else:
        batch, length = query[:2]
        new = key[1]
        heads, depth = split_heads(op, query[2], op.integer("q_num_heads"))
        kv_heads, key_depth = split_heads(op, key[2], op.integer("kv_num_heads"))
        value_heads, value_depth = split_heads(op, value[2], op.integer("kv_num_heads"))
        op.unify(key_depth, depth)
        op.unify(value_heads, kv_heads)
    for axes in (key, value):
        op.unify(axes[0], batch)
    op.unify(value[len(value) - 2 if len(value) == 4 else 1], new)
    return (batch, heads, length, depth), (kv_heads, new, value_depth)


def _heads_of(op: GrownOp, index: int, name: str) -> tuple[Term, Term]:
    axes = op.axes(index)
    return (axes[1], axes[3]) if len(axes) == 4 else head_terms(op, axes[2], op.integer(name))


def head_terms(op: GrownOp, term: Term, heads: int) -> tuple[Term, Term]:
    """A packed axis as (heads, head_dim)."""
    return op.factored(term, (op.static(term) or 0) // heads)


@edits("Attention")
def edit_attention(op: GrownOp) -> None:
    """The counts of heads, and the scale of the scores."""
    heads, depth = _heads_of(op, 0, "q_num_heads")
    kv_heads, _ = _heads_of(op, 1, "kv_num_heads")
    edit_heads(op, "q_num_heads", heads)
    edit_heads(op, "kv_num_heads", kv_heads)
    attribute = op.node.attributes.get("scale")
    divide_scores(op, depth, None if attribute is None else attribute.as_float())


# -- rotary embedding -------------------------------------------------------------------------------------


def _rotary_slots(op: Op) -> tuple[int, int, int]:
    """(cosines, sines, position ids): the two domains order their inputs differently."""
    return (2, 3, 1) if op.node.domain == MICROSOFT else (1, 2, 3)


def _rotary_head(op: Op) -> Term:
    """The head_dim of a rotary embedding's operand."""
    axes = op.axes(0)
    if len(axes) == 4:
        return axes[3]
    heads = op.integer("num_heads", 0)
    size = op.static(axes[2])
    if not heads and size is not None:
        half = op.static(op.axes(_rotary_slots(op)[0])[-1])
        heads = size // (2 * half) if half else 0
    return split_heads(op, axes[2], heads)[1]


def rotate(op: Op, depth: Term, half: Term, rotary: int, interleaved: bool) -> None:
    """The first `rotary` of head_dim are two halves, or pairs, that turn by one angle each; the rest stays."""
    size = op.static(depth)
    if size is None or op.static(half) != rotary // 2:
        raise CannotTell("rotary angles that do not fit the head size")
    pair = op.pinned_dim(2, "a pair that rotates") if interleaved else None
    turned: tuple[Term, ...] = (Product((half, pair)),) if pair is not None else (half, half)
    rest = size - rotary
    op.unify(depth, Concat((*turned, op.dim(rest)) if rest else turned))


def _unify_all(op: Op, axes: Axes, wanted: Axes) -> None:
    """Relate axes pairwise where they are as many; a single offset has none of them."""
    if len(axes) == len(wanted):
        for one, other in zip(axes, wanted, strict=True):
            op.merge([one, other])


@relates("RotaryEmbedding")
@relates("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding(op: Op) -> None:
    """(y1, y2)[i] = (x1 cos - x2 sin, x1 sin + x2 cos)[i] for the pairs i of the rotated part of head_dim"""
    cosines, sines, positions = _rotary_slots(op)
    depth = _rotary_head(op)
    rotary = op.integer("rotary_embedding_dim", 0) or (op.static(depth) or 0)
    half = op.axes(cosines)[-1]
    op.unify(op.axes(sines)[-1], half)
    rotate(op, depth, half, rotary, bool(op.integer("interleaved", 0)))
    axes = op.axes(0)
    places = (axes[0], axes[2 if len(axes) == 4 else 1])
    if op.has(positions):
        for index in (cosines, sines):
            index_by(op, op.axes(index)[0], positions)
        _unify_all(op, op.axes(positions), places)
    else:
        for index in (cosines, sines):
            _unify_all(op, op.axes(index)[:-1], places)
    op.out(op.axes(0))


@edits("RotaryEmbedding")
@edits("RotaryEmbedding", domain=MICROSOFT)
def edit_rotary(op: GrownOp) -> None:
    """The count of heads and the width of the rotated part."""
    axes = op.axes(0)
    count = op.integer("num_heads", 0)
    if len(axes) == 3 and count:
        edit_heads(op, "num_heads", head_terms(op, axes[2], count)[0])
    half = op.axes(_rotary_slots(op)[0])[-1]
    if op.integer("rotary_embedding_dim", 0) and op.grows(half):
        op.set_attribute("rotary_embedding_dim", 2 * op.grown(half))


# -- ONNX Runtime -----------------------------------------------------------------------------------------


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
