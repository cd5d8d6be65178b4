"""ONNX Runtime's own operators that encode positions: rotary angles, relative biases."""

from __future__ import annotations

import itertools

from hyperclone_onnx.algebra.dims import ONE, Product, Term
from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.attention import (
    edit_heads,
    edit_rotary,
    head_terms,
    rotary_embedding,
    rotate,
    split_heads,
)
from hyperclone_onnx.rules.dimensions import Fact
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates

relates("RotaryEmbedding", domain=MICROSOFT)(rotary_embedding)
edits("RotaryEmbedding", domain=MICROSOFT)(edit_rotary)


@relates("GemmaRotaryEmbedding", domain=MICROSOFT)
def gemma_rotary_embedding(op: Op) -> None:
    """Y[b, h, s, d] = x[b, h, s, d] cos(angles[b, s, d]) + rotated x[b, h, s, d] sin(angles[b, s, d])"""
    angles, query = op.axes(0, rank=3), op.axes(1, rank=4)
    for index in range(1, 5):
        op.unify_axes(op.axes(index), (angles[0], query[1], angles[1], angles[2]))
    op.out(query)
    op.out(query, index=1)


@relates("MRotaryEmbedding", domain=MICROSOFT)
def sectioned_rotary_embedding(op: Op) -> None:
    """RotaryEmbedding whose angles lie in sections, each with its own positions (time, height, width)"""
    axes, half = op.axes(0, least=3), op.axis_of(2, 1)
    op.unify(op.axis_of(3, 1), half)
    for index in (2, 3):
        op.pin(op.axis_of(index, 0), "its indices are positions")
    sections = [n for n in op.int_list("mrope_section", None) or [] if n]
    if op.integer("mrope_layout", 0):
        op.pin(half, "sections alternate along it")
    elif op.space.segments(half, sections) is None:
        raise CannotTell("sections that do not fit the rotary angles")
    depth = axes[3] if len(axes) == 4 else _depth(op, axes[2], half)
    rotary = op.integer("rotary_embedding_dim", 0) or (op.static(depth) or 0)
    rotate(op, depth, half, rotary, bool(op.integer("interleaved", 0)))
    places = (axes[0], axes[2 if len(axes) == 4 else 1])
    streams = op.axes(1, least=1)
    op.pin(streams[0], "one index for each stream of positions")
    if op.integer("is_packed_batching", 0):
        for term in (*places, *streams[1:]):
            op.pin(term, "tokens of several sequences")
    else:
        op.unify_axes(streams[1:], places)
    op.out(axes)


def _depth(op: Op, packed: Term, half: Term) -> Term:
    """The head_dim of an axis that holds all heads."""
    size, angles = op.static(packed) or 0, op.static(half) or 0
    heads = op.integer("num_heads", 0) or (size // (2 * angles) if angles else 0)
    return split_heads(op, packed, heads)[1]


@edits("MRotaryEmbedding", domain=MICROSOFT)
def edit_sectioned_rotary_embedding(op: GrownOp) -> None:
    """Sets the number of heads, the width of the rotated part and its sections."""
    axes, half, count = op.axes(0), op.axis_of(2, 1), op.integer("num_heads", 0)
    if len(axes) == 3 and count:
        edit_heads(op, "num_heads", head_terms(op, axes[2], count)[0])
    if not op.grows(half):
        return
    if op.integer("rotary_embedding_dim", 0):
        op.set_attribute("rotary_embedding_dim", 2 * op.grown(half))
    sections = op.int_list("mrope_section", None) or []
    bounds = [op.offset(half, sum(sections[:i])) for i in range(len(sections) + 1)]
    op.set_attribute("mrope_section", [end - start for start, end in itertools.pairwise(bounds)])


@relates("RelativePositionBias", domain=MICROSOFT)
def relative_position_bias(op: Op) -> None:
    """Y[0, h, i, j] = table[bucket(i - j), h]; the memory of the table is in the order (heads, buckets)"""
    buckets, heads = op.axes(0, rank=2)
    for term in (buckets, heads):
        op.pin(term, "a table that is transposed in memory")
    for index in (1, 2):
        op.parameter(index)
    places = [op.pinned_dim(op.element(index), "positions") for index in (1, 2)]
    op.out((ONE, heads, *places))


@relates("GatedRelativePositionBias", domain=MICROSOFT)
def gated_relative_position_bias(op: Op) -> None:
    """Y[b, h, i, j] = gate(sum_d (Q[b, i, (h d)] + B[(h d)]) W[d, :])[b, h, i] R[0, h, i, j]"""
    query, positions, w = op.axes(0, least=2), op.axes(2, rank=4), op.axes(3, rank=2)
    heads, depth = split_heads(op, query[-1], op.integer("num_heads"))
    op.unify(op.axis_of(1, 0), Product((heads, depth)))
    op.unify(w[0], depth)
    op.sum_over((3, 0))
    op.fact(Fact.CONTRACTED_WITH_WEIGHT, depth)
    op.fact(Fact.BATCHED, heads)
    for term in (w[1], op.axis_of(4, 0)):
        op.pin(term, "its two halves are summed")
    op.unify(positions[1], heads)
    op.unify(op.axis_of(5, 1), heads)
    batch, length = query[:2] if len(query) == 3 else op.axes(6, rank=2)
    for term in (length, *positions[2:], *(query[:1] if len(query) == 2 else ())):
        op.pin(term, "positions")
    if len(query) == 2:
        op.parameter(6)
    op.out((batch, heads, *positions[2:]))


@edits("GatedRelativePositionBias", domain=MICROSOFT)
def edit_gated_relative_position_bias(op: GrownOp) -> None:
    """Sets the number of heads."""
    edit_heads(op, "num_heads", head_terms(op, op.axis_of(0, -1), op.integer("num_heads"))[0])
