"""ONNX Runtime's own attention operators whose queries, keys and values have the same heads."""

from __future__ import annotations

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
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates


def relate_mask(op: Op, index: int, batch: Term, length: Term) -> None:
    """Relate a padding mask: (batch) lengths, (batch, keys), (batch, queries, keys) or (batch, 1, keys, keys)."""
    if not op.has(index):
        return
    axes = op.axes(index, least=1)
    if len(axes) > 1 or op.size(axes[0]) == op.size(batch):
        op.unify(axes[0], batch)
    else:  # (2 * batch) or (3 * batch + 2): first all ends, then all starts
        for term in (axes[0], batch):
            op.pin(term, "a mask lists the ends and starts of the sequences of a batch")
    for term in (*axes[1:], *([length] if len(axes) > 2 else [])):
        op.pin(term, "positions of a mask")


def relate_beams(op: Op, index: int, batch: Term) -> None:
    """Relate the input that says from which beam a cached token came. The batch then numbers beams."""
    if op.has(index):
        for term in (batch, *op.axes(index)):
            op.pin(term, "it numbers beams")


def relate_caches(
    op: Op, index: int, batch: Term, heads: Term, new: Term, widths: tuple[Term, Term], shared: bool = False
) -> Term:
    """Relate the caches of keys and values (batch, heads, length, width): inputs from `index` on, outputs 1 and 2.

    Returns the number of all keys. A shared buffer may be longer.
    """
    past = op.axis_of(index, 2) if op.has(index) else None
    if past is not None:
        op.unify(*widths)
    total, kept = cache_lengths(op, new, past, shared)
    for offset, width in enumerate(widths):
        if op.has(index + offset):
            op.unify_axes(op.axes(index + offset), (batch, heads, past or new, width))
        op.out((batch, heads, kept, width), index=1 + offset)
    return total


def first_of_three(op: GrownOp, term: Term) -> Term:
    """The queries' part of an axis that holds queries, keys and values side by side."""
    resolved = op.space.resolve(term)
    return resolved.segments[0] if isinstance(resolved, Concat) else resolved


def relate_bias_of_three(op: Op, index: int, heads: Term, depth: Term, value_depth: Term) -> None:
    """Relate a bias that holds queries, keys and values side by side."""
    if op.has(index):
        parts = (Product((heads, depth)), Product((heads, depth)), Product((heads, value_depth)))
        op.unify(op.axis_of(index, 0), Concat(parts))


def _keys_and_values(op: Op, batch: Term, heads: Term, depth: Term) -> tuple[Term, Term]:
    """(number of keys, value head_dim) of inputs 1 and 2, or of input 1 that holds both."""
    key, count = op.axes(1, least=3), op.integer("num_heads")
    op.unify(key[0], batch)
    if len(key) == 5:  # (batch, length, heads, 2, head_dim)
        op.unify(key[2], heads)
        op.pin(key[3], "keys and values side by side")
        op.unify(key[4], depth)
        return key[1], depth
    value = op.axes(2, rank=len(key))
    op.unify(value[0], batch)
    op.unify(value[-2], key[-2])
    if len(key) == 4:  # (batch, heads, length, head_dim): keys and values of a cross attention
        for axes in (key, value):
            op.unify(axes[1], heads)
            op.unify(axes[3], depth)
        return key[2], depth
    kv_heads, key_depth = split_heads(op, key[2], count)
    value_heads, value_depth = split_heads(op, value[2], count)
    for one, other in ((kv_heads, heads), (value_heads, heads), (key_depth, depth)):
        op.unify(one, other)
    return key[1], value_depth


@relates("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(op: Op) -> None:
    """Y[b, s, (h e)] = sum_t softmax_t(scale sum_d Q[b, s, (h d)] K[b, t, (h d)] + bias) V[b, t, (h e)]"""
    query = op.axes(0, least=3)
    batch, length = query[:2]
    if len(query) == 5:  # (batch, length, heads, 3, head_dim)
        heads, depth, new, value_depth = query[2], query[4], length, query[4]
        op.pin(query[3], "queries, keys and values side by side")
    else:
        heads, depth = split_heads(op, query[2], op.integer("num_heads"))
        new, value_depth = _keys_and_values(op, batch, heads, depth)
    if op.integer("unidirectional", 0):
        op.pin(length, "a causal mask compares positions along it")
    op.fact(Fact.BATCHED, heads)
    relate_bias_of_three(op, 3, heads, depth, value_depth)
    relate_mask(op, 4, batch, length)
    relate_beams(op, 9, batch)
    total = relate_caches(op, 6, batch, heads, new, (depth, value_depth), shared=op.has(8))
    relate_bias(op, 5, (batch, heads, length, total))
    relate_scores(op, depth, value_depth, total)
    op.out((batch, length, Product((heads, value_depth))))
    op.out((batch, heads, length, total), index=3)


@edits("MultiHeadAttention", "PackedMultiHeadAttention", domain=MICROSOFT)
def edit_multi_head_attention(op: GrownOp) -> None:
    """Sets the number of heads and the scale of the scores."""
    query = op.axes(0, least=2)
    if len(query) > 3:  # (.., heads, 3, head_dim)
        heads, depth = query[-3], query[-1]
    else:
        heads, depth = head_terms(op, query[-1], op.integer("num_heads"))
    edit_heads(op, "num_heads", heads)
    edit_scale(op, depth)


@relates("PackedMultiHeadAttention", domain=MICROSOFT)
def packed_multi_head_attention(op: Op) -> None:
    """MultiHeadAttention of tokens without padding: Y[n, (h e)] attends to the tokens of its own sequence"""
    query, count = op.axes(0, least=2), op.integer("num_heads")
    if len(query) == 4:  # (tokens, heads, 3, head_dim)
        heads, depth, value_depth = query[1], query[3], query[3]
        op.pin(query[2], "queries, keys and values side by side")
    else:
        heads, depth = split_heads(op, query[1], count)
        kv_heads, key_depth = split_heads(op, op.axis_of(1, 1), count)
        value_heads, value_depth = split_heads(op, op.axis_of(2, 1), count)
        for one, other in ((kv_heads, heads), (value_heads, heads), (key_depth, depth)):
            op.unify(one, other)
        for index in (1, 2):
            op.unify(op.axis_of(index, 0), query[0])
    relate_bias_of_three(op, 3, heads, depth, value_depth)
    attend_tokens(op, 4, query[0], heads, depth, value_depth)


def attend_tokens(op: Op, offsets: int, tokens: Term, heads: Term, depth: Term, value_depth: Term) -> None:
    """Relate attention over tokens of several sequences. Inputs `offsets` and the next say where these begin."""
    op.pin(tokens, "tokens of several sequences")
    for index in (offsets, offsets + 1):
        op.parameter(index)
    batch, length = op.axes(offsets, rank=2)
    relate_bias(op, offsets + 2, (batch, heads, length, length))
    op.fact(Fact.BATCHED, heads)
    relate_scores(op, depth, value_depth, length)
    op.out((tokens, Product((heads, value_depth))))


@relates("DecoderMaskedMultiHeadAttention", domain=MICROSOFT)
def decoder_masked_multi_head_attention(op: Op) -> None:
    """MultiHeadAttention of one new query, with caches"""
    query, count = op.axes(0, rank=3), op.positive("num_heads")
    batch, length = query[:2]
    shared = bool(op.integer("past_present_share_buffer", 0))
    if op.has(1):
        heads, depth = split_heads(op, query[2], count)
        new, value_depth = _keys_and_values(op, batch, heads, depth)
    else:
        width = op.static(query[2])
        value_width = op.static(op.axis_of(6, 3)) if op.has(6) else None if width is None else width // (3 * count)
        if width is None or value_width is None or (width - count * value_width) % (2 * count):
            raise CannotTell("packed queries, keys and values of unknown widths")
        heads, value_depth = op.dim(count), op.dim(value_width)
        depth, new = op.dim((width - count * value_width) // (2 * count)), length
        parts = (Product((heads, depth)), Product((heads, depth)), Product((heads, value_depth)))
        op.unify(query[2], Concat(parts))
    if shared:
        op.pin(depth, "a shared buffer stores its keys in pieces of this axis")
    op.fact(Fact.BATCHED, heads)
    relate_mask(op, 3, batch, length)
    relate_beams(op, 9, batch)
    relate_bias_of_three(op, 10, heads, depth, value_depth)
    total = relate_caches(op, 5, batch, heads, new, (depth, value_depth), shared)
    relate_bias(op, 4, (batch, heads, length, total))
    relate_scores(op, depth, value_depth, total)
    op.out((batch, length, Product((heads, value_depth))))
    op.out((batch, heads, length, total), index=3)


@edits("DecoderMaskedMultiHeadAttention", domain=MICROSOFT)
def edit_decoder_masked_multi_head_attention(op: GrownOp) -> None:
    """Sets the number of heads and the scale of the scores."""
    query, count = op.axis_of(0, 2), op.integer("num_heads")
    heads, depth = head_terms(op, query if op.has(1) else first_of_three(op, query), count)
    edit_heads(op, "num_heads", heads)
    edit_scale(op, depth)
