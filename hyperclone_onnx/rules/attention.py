"""Attention and rotary embedding as single operators."""

from __future__ import annotations

import math

import numpy as np

from hyperclone_onnx.algebra.dims import Concat, Product, Term
from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.dimensions import Axes, Fact, Uniform
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.indexing import index_by
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates


def split_heads(op: Op, term: Term, heads: int) -> tuple[Term, Term]:
    """Split an axis that holds all heads into (heads, head_dim)."""
    size = op.static(term)
    if size is None or heads < 1 or size % heads:
        raise CannotTell("a width that is not a multiple of the number of heads")
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
        raise CannotTell("a number of query heads that is not a multiple of that of the key/value heads")
    group = op.dim(many // few)
    op.space.match([query], [key, group])
    op.fact(Fact.EXPANDED, group)


def relate_scores(op: Op, depth: Term, value_depth: Term, total: Term) -> None:
    """Record the axes of softmax_t(sum_d q[d] k[t, d]) v[t, e]: d is summed, e is free, softmax runs over t."""
    op.fact(Fact.CONTRACTED_WITH_ACTIVATION, depth)
    op.fact(Fact.VALUE_AXIS, value_depth)
    op.dimensions.uniform.append(Uniform(op.node, depth))
    op.fact(Fact.SOFTMAX, total)
    op.pin(total, "softmax runs over it")


def relate_bias(op: Op, index: int, scores: tuple[Term, Term, Term, Term]) -> None:
    """A mask or bias added to the scores, broadcast to their axes (batch, heads, query length, total length).

    It may cover only the first keys. Then the operator masks the others.
    """
    if not op.has(index):
        return
    if op.static(op.axis_of(index, -1)) != op.static(scores[3]):
        op.pin(op.axis_of(index, -1), "the mask covers only the first keys")
    op.broadcast([scores, op.axes(index)])


def total_length(op: Op, new: Term, past: Term | None) -> Term:
    """The number of past and new keys together."""
    if past is None:
        return new
    for term in (new, past):
        op.pin(term, "positions of a cache")
    return op.pinned_dim(op.size(new) + op.size(past), "positions of a cache")


def cache_lengths(op: Op, new: Term, past: Term | None, shared: bool) -> tuple[Term, Term]:
    """The number of all keys, and the length of the output cache.

    With `shared`, one buffer holds past and new keys. The buffer may be longer than the keys in it. So its length and
    the number of all keys are two dimensions.
    """
    if not shared:
        total = total_length(op, new, past)
        return total, total
    op.pin(new, "positions of a cache")
    total = op.pinned_dim(None, "positions of a cache")
    kept = total if past is None else past
    op.pin(kept, "positions of a cache")
    return total, kept


def edit_scale(op: GrownOp, depth: Term) -> None:
    """Divide the scale of the scores. A score is a sum over head_dim, and n repeats make it n times too large.

    The default scale, 1 / sqrt(head_dim), would change too. So we write the scale of the source, divided by n.
    """
    ratio = op.growth(depth)
    if ratio == 1:
        return
    size = op.static(depth) or 1
    op.set_attribute("scale", float((op.number("scale") or 1.0 / math.sqrt(size)) / ratio))


def divide_scores(op: GrownOp, depth: Term, given: float | None) -> None:
    """Divide a sum over head_dim by the number n of its repeats, without rounding.

    The attribute is a float32, and kernels take its square root in float32. If both are exact, we divide `scale`.
    Otherwise we keep the source's scale and divide the queries (input 0) by n. Without a scale in the source, the
    default 1 / sqrt(head_dim) has already shrunk by sqrt(n), so we divide the queries by sqrt(n) only.
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
    """Set an attribute that holds a number of heads."""
    if op.has_attribute(name) and op.integer(name) and op.grows(heads):
        op.set_attribute(name, op.grown(heads))


# -- ONNX -------------------------------------------------------------------------------------------------


@relates("Attention")
def attention(op: Op) -> None:
    """Y[b, h, s, e] = sum_t softmax_t(scale sum_d Q[b, h, s, d] K[b, h', t, d] + mask) V[b, h', t, e]"""
    (batch, heads, length, depth), (kv_heads, new, value_depth) = _operands(op)
    relate_heads(op, heads, kv_heads)
    past = op.axis_of(4, 2) if op.has(4) else None
    total = total_length(op, new, past)
    for index, width in ((4, depth), (5, value_depth)):
        if op.has(index):
            op.unify_axes(op.axes(index), (batch, kv_heads, past or new, width))
    relate_scores(op, depth, value_depth, total)
    relate_bias(op, 3, (batch, heads, length, total))
    if op.integer("is_causal", 0) or any(op.integer(f"{side}_window_size", -1) >= 0 for side in ("left", "right")):
        op.pin(length, "a mask compares positions along it")
    if op.has(6):
        op.unify(op.axis_of(6, 0), batch)
    packed = op.rank(0) == 3
    op.out((batch, length, Product((heads, value_depth))) if packed else (batch, heads, length, value_depth))
    op.out((batch, kv_heads, total, depth), index=1)
    op.out((batch, kv_heads, total, value_depth), index=2)
    op.out((batch, heads, length, total), index=3)


def _operands(op: Op) -> tuple[tuple[Term, Term, Term, Term], tuple[Term, Term, Term]]:
    """((batch, heads, query length, head_dim), (key/value heads, key length, value head_dim))."""
    query, key, value = op.axes(0), op.axes(1), op.axes(2)
    if not len(query) == len(key) == len(value) in (3, 4):
        raise CannotTell("queries, keys and values of different ranks")
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
    """Split an axis that holds all heads into (heads, head_dim)."""
    return op.factored(term, (op.static(term) or 0) // heads)


@edits("Attention")
def edit_attention(op: GrownOp) -> None:
    """Sets the numbers of heads and the scale of the scores."""
    heads, depth = _heads_of(op, 0, "q_num_heads")
    kv_heads, _ = _heads_of(op, 1, "kv_num_heads")
    edit_heads(op, "q_num_heads", heads)
    edit_heads(op, "kv_num_heads", kv_heads)
    divide_scores(op, depth, op.number("scale"))


# -- rotary embedding -------------------------------------------------------------------------------------


def _rotary_slots(op: Op) -> tuple[int, int, int]:
    """The positions of the inputs (cosines, sines, position ids), which differ between the two domains."""
    return (2, 3, 1) if op.node.domain == MICROSOFT else (1, 2, 3)


def _rotary_head(op: Op) -> Term:
    """The head_dim of the input of a rotary embedding."""
    axes = op.axes(0, least=3)
    if len(axes) == 4:
        return axes[3]
    heads = op.integer("num_heads", 0)
    size = op.static(axes[2])
    if not heads and size is not None:
        half = op.static(op.axis_of(_rotary_slots(op)[0], -1))
        heads = size // (2 * half) if half else 0
    return split_heads(op, axes[2], heads)[1]


def rotate(op: Op, depth: Term, half: Term, rotary: int, interleaved: bool) -> None:
    """Relate head_dim with the angles: its first `rotary` channels are rotated, the others are not.

    The rotated channels are two halves, or pairs of neighbours if `interleaved`. Each pair has one angle.
    """
    size = op.static(depth)
    if size is None or op.static(half) != rotary // 2:
        raise CannotTell("rotary angles that do not fit the head size")
    pair = op.pinned_dim(2, "two numbers that are rotated together") if interleaved else None
    turned: tuple[Term, ...] = (Product((half, pair)),) if pair is not None else (half, half)
    rest = size - rotary
    op.unify(depth, Concat((*turned, op.dim(rest)) if rest else turned))


def _unify_all(op: Op, axes: Axes, wanted: Axes) -> None:
    """Relate axes one by one if there are as many of both. A single offset has none."""
    if len(axes) == len(wanted):
        for one, other in zip(axes, wanted, strict=True):
            op.merge([one, other])


@relates("RotaryEmbedding")
def rotary_embedding(op: Op) -> None:
    """(y1, y2)[i] = (x1 cos - x2 sin, x1 sin + x2 cos)[i] for the pairs i of the rotated part of head_dim"""
    cosines, sines, positions = _rotary_slots(op)
    depth = _rotary_head(op)
    rotary = op.integer("rotary_embedding_dim", 0) or (op.static(depth) or 0)
    half = op.axis_of(cosines, -1)
    op.unify(op.axis_of(sines, -1), half)
    rotate(op, depth, half, rotary, bool(op.integer("interleaved", 0)))
    axes = op.axes(0)
    places = (axes[0], axes[2 if len(axes) == 4 else 1])
    if op.has(positions):
        for index in (cosines, sines):
            index_by(op, op.axis_of(index, 0), positions)
        if op.rank(positions) == 1:
            op.pin(places[1], "its positions are counted from one offset")
        _unify_all(op, op.axes(positions), places)
    else:
        for index in (cosines, sines):
            _unify_all(op, op.axes(index)[:-1], places)
    op.out(op.axes(0))


@edits("RotaryEmbedding")
def edit_rotary(op: GrownOp) -> None:
    """Sets the number of heads and the width of the rotated part."""
    axes = op.axes(0)
    count = op.integer("num_heads", 0)
    if len(axes) == 3 and count:
        edit_heads(op, "num_heads", head_terms(op, axes[2], count)[0])
    half = op.axis_of(_rotary_slots(op)[0], -1)
    if op.integer("rotary_embedding_dim", 0) and op.grows(half):
        op.set_attribute("rotary_embedding_dim", 2 * op.grown(half))
