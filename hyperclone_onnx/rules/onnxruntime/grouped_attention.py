"""ONNX Runtime's own attention operators in which a group of query heads shares one key/value head."""

from __future__ import annotations

from hyperclone_onnx.algebra.dims import Concat, Product, Term
from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.attention import (
    edit_heads,
    edit_scale,
    head_terms,
    relate_heads,
    relate_scores,
    rotate,
)
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates


def _operands(op: Op) -> tuple[Term, Term, Term]:
    """(query heads, key/value heads, head_dim) of inputs 0 to 2, or of input 0 that holds all three side by side."""
    query, many, few = op.axes(0, least=2), op.positive("num_heads"), op.positive("kv_num_heads")
    packed = not op.has(1)
    if not packed and not op.has(2):
        raise CannotTell("values that are a part of the keys")
    width, parts = op.static(query[-1]), many + 2 * few if packed else many
    if width is None or width % parts:
        raise CannotTell("a width that is not a multiple of the number of heads")
    heads, kv_heads, depth = op.dim(many), op.dim(few), op.dim(width // parts)
    relate_heads(op, heads, kv_heads)
    keys = Product((kv_heads, depth))
    if packed:
        op.unify(query[-1], Concat((Product((heads, depth)), keys, keys)))
    else:
        op.space.match([query[-1]], [heads, depth])
        for index in (1, 2):
            axes = op.axes(index, rank=len(query))
            op.space.match([axes[-1]], [kv_heads, depth])
            if len(query) == 3:
                op.unify(axes[0], query[0])
            op.pin(axes[-2], "positions of a cache")
    op.pin(query[-2], "a causal mask compares positions along it")
    return heads, kv_heads, depth


def _rotate(op: Op, cosines: int, depth: Term) -> None:
    """Relate the inputs of cosines and sines: they rotate queries and keys from channel `rotary_offset` on."""
    if not op.integer("do_rotary", 0) or not op.has(cosines):
        return
    half = op.axis_of(cosines, 1)
    op.unify(op.axis_of(cosines + 1, 1), half)
    for index in (cosines, cosines + 1):
        op.pin(op.axis_of(index, 0), "its indices are positions")
    interleaved = bool(op.integer("rotary_interleaved", 0))
    turned, size, offset = 2 * (op.static(half) or 0), op.static(depth), op.integer("rotary_offset", 0)
    if not offset:
        rotate(op, depth, half, turned, interleaved)
        return
    parts = op.space.segments(depth, [offset, (size or 0) - offset])
    if parts is None:
        raise CannotTell("a rotated part that begins inside a part of head_dim")
    rotate(op, parts[1], half, turned, interleaved)


def _norms(op: Op, first: int, depth: Term) -> None:
    """Relate the scales of the norms of query heads and key heads."""
    for index in (first, first + 1):
        if op.has(index):
            op.unify(op.axis_of(index, 0), depth)


def _sink(op: Op, index: int, heads: Term) -> None:
    """Relate the sinks: one logit for each head that is only in the denominator of the softmax."""
    if op.has(index):
        op.unify(op.axis_of(index, 0), heads)


def _caches(op: Op, index: int, axes: tuple[Term, ...], capacity: Term | None = None) -> None:
    """Relate caches (batch, heads, length, width). The output caches have `capacity`, or the declared length."""
    if capacity is None:
        capacity = _present(op, index)
    for offset in (0, 1):
        if op.has(index + offset):
            past = op.axes(index + offset, rank=4)
            op.pin(past[2], "positions of a cache")
            op.unify_axes(past, (*axes[:2], past[2], axes[2]))
        op.out((*axes[:2], capacity, axes[2]), index=1 + offset)


def _present(op: Op, past: int) -> Term:
    """The length of the output caches: that of a shared buffer, or the sum of past and new keys."""
    declared = op.declared(op.node.outputs[1]) if len(op.node.outputs) > 1 else None
    size = declared[2] if declared is not None and len(declared) == 4 else None
    length = op.pinned_dim(size, "positions of a cache")
    if op.has(past) and size is not None and size.static is None and size != op.size(op.axis_of(past, 2)):
        # The file names the two lengths differently. So no buffer is shared, and the length is the sum.
        whole = op.size(op.axis_of(past, 2)) + op.size(op.axis_of(0, 1))
        op.unify(length, op.pinned_dim(whole, "positions of a cache"))
    return length


def _refuse_codes(op: Op, cache: int, scales: int) -> None:
    """Refuse quantised caches, which have scales: the rule describes none."""
    kinds = [op.text(name, "NONE") for name in ("k_quant_type", "v_quant_type")]
    types = [op.value(index).dtype for index in (0, cache) if op.has(index)]
    known = [dtype for dtype in types if dtype is not None]
    if any(kind != "NONE" for kind in kinds) or op.has(scales) or op.has(scales + 1) or len(set(known)) > 1:
        raise CannotTell(f"{op.node.op_type} with quantised caches")


@relates("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(op: Op) -> None:
    """MultiHeadAttention whose query heads are (key/value heads, group), causal, with rotary angles inside"""
    _refuse_codes(op, 3, 12)
    batch, length, _ = op.axes(0, rank=3)
    heads, kv_heads, depth = _operands(op)
    _rotate(op, 7, depth)
    _norms(op, 14, depth)
    _sink(op, 11, heads)
    if op.has(5):
        op.unify(op.axis_of(5, 0), batch) if op.rank(5) == 1 else op.parameter(5)
    op.parameter(6)
    lengths = op.known(6)
    if lengths is not None and op.has(3) and (size := lengths.ravel()[0]) is not None:
        op.space.relate(size, op.size(op.axes(3)[2]) + op.size(length), hint=True)
    if op.has(9):
        op.pin(batch, "the operator reads only the first position of a prompt")
        op.parameter(9)
    if op.has(10):
        bias = op.axes(10, rank=4)
        op.merge([bias[0], batch])
        op.merge([bias[1], heads])
        for term in bias[2:]:
            op.pin(term, "positions")
    _caches(op, 3, (batch, kv_heads, depth))
    total = op.pinned_dim(None, "positions of a cache")
    relate_scores(op, depth, depth, total)
    op.out((batch, length, Product((heads, depth))))
    op.out((batch, heads, length, total), index=3)


@edits(
    "GroupQueryAttention",
    *("SparseAttention", "PagedAttention", "SparsePagedAttention", "DynamicSparseAttention"),
    domain=MICROSOFT,
)
def edit_grouped_attention(op: GrownOp) -> None:
    """Sets the numbers of heads, the offset of the rotated part and the scale of the scores."""
    heads, depth = head_terms(op, op.out_axes(0)[-1], op.integer("num_heads"))
    count = op.integer("kv_num_heads")
    kv_heads = head_terms(op, op.axis_of(1, -1) if op.has(1) else heads, count)[0]
    edit_heads(op, "num_heads", heads)
    edit_heads(op, "kv_num_heads", kv_heads)
    offset = op.integer("rotary_offset", 0)
    if offset and op.grows(depth):
        op.set_attribute("rotary_offset", op.offset(depth, offset))
    edit_scale(op, depth)


@relates("SparseAttention", domain=MICROSOFT)
def sparse_attention(op: Op) -> None:
    """GroupQueryAttention within the blocks of keys that its layouts list, where head h uses layout h % layouts"""
    batch, length, _ = op.axes(0, rank=3)
    heads, kv_heads, depth = _operands(op)
    _rotate(op, 9, depth)
    for index in (5, 6, 7):
        op.parameter(index)
    if op.static(op.axis_of(5, 0)) != 1:
        op.pin(heads, "its heads use the layouts in turn")
    op.unify(op.axis_of(8, 0), batch)
    capacity = op.axis_of(3, 2)
    _caches(op, 3, (batch, kv_heads, depth), capacity)
    relate_scores(op, depth, depth, capacity)
    op.out((batch, length, Product((heads, depth))))


@relates("PagedAttention", domain=MICROSOFT)
def paged_attention(op: Op) -> None:
    """GroupQueryAttention of tokens of several sequences, whose caches lie in blocks that a table lists"""
    _refuse_codes(op, 3, 14)
    if op.text("kv_cache_layout", "SEPARATE") != "SEPARATE":
        raise CannotTell("values that are a part of the keys")
    _sequences(op, rotary=8, sink=11, norms=12, places=(5, 6, 7, 10, 16))


@relates("SparsePagedAttention", domain=MICROSOFT)
def sparse_paged_attention(op: Op) -> None:
    """PagedAttention to the keys that another operator selected, in its own caches or in auxiliary ones"""
    _refuse_codes(op, 3, 19)
    kv_heads, depth = _sequences(op, rotary=14, sink=16, norms=17, places=(5, 6, 7, 8, 9, 10, 13, 21))
    for index in (11, 12):
        if op.has(index):
            auxiliary = op.axes(index, rank=4)
            for term in auxiliary[:2]:
                op.pin(term, "positions of a cache")
            op.merge([auxiliary[2], kv_heads])
            op.unify(auxiliary[3], depth)


def _sequences(op: Op, rotary: int, sink: int, norms: int, places: tuple[int, ...]) -> tuple[Term, Term]:
    """Relate tokens of several sequences and their caches (blocks, block, key/value heads, head_dim).

    Returns (key/value heads, head_dim).
    """
    tokens = op.axis_of(0, 0)
    heads, kv_heads, depth = _operands(op)
    _rotate(op, rotary, depth)
    _sink(op, sink, heads)
    _norms(op, norms, depth)
    for index in places:
        op.parameter(index)
    for index in (3, 4):
        cache = op.axes(index, rank=4)
        for term in cache[:2]:
            op.pin(term, "positions of a cache")
        op.unify(cache[2], kv_heads)
        op.unify(cache[3], depth)
        op.out(cache, index=index - 2)
    relate_scores(op, depth, depth, tokens)
    op.out((tokens, Product((heads, depth))))
    return kv_heads, depth


@relates("DynamicSparseAttention", domain=MICROSOFT)
def dynamic_sparse_attention(op: Op) -> None:
    """GroupQueryAttention to the keys that another operator selected, in its own caches or in auxiliary ones"""
    batch, length, _ = op.axes(0, rank=3)
    heads, kv_heads, depth = _operands(op)
    _rotate(op, 11, depth)
    _norms(op, 14, depth)
    _sink(op, 16, heads)
    op.pin(batch, "its indices are numbered together with those of the sequence")
    for index in (7, 8, 9, 10, 13):
        op.parameter(index)
    for index in (5, 6):
        if op.has(index):
            places = op.axis_of(index, 2)
            op.pin(places, "positions of a cache")
            op.unify_axes(op.axes(index), (batch, kv_heads, places, depth))
    _caches(op, 3, (batch, kv_heads, depth))
    relate_scores(op, depth, depth, length)
    op.out((batch, length, Product((heads, depth))))
