"""Attention and rotary embedding as ONNX Runtime's optimiser and its model builder write them."""

from __future__ import annotations

import math
from typing import Any

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.compiling.ops.attention import (
    hidden_bias,
    join_heads,
    look_up,
    rotate,
    split_heads,
    with_sink,
    within,
)
from hyperclone_onnx.frameworks.compiling.ops.microsoft import MICROSOFT
from hyperclone_onnx.frameworks.compiling.registry import Array, implements


@implements("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding(
    xp: Any,
    x: Array,
    positions: Array,
    cos: Array,
    sin: Array,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Array:
    """the pairs of each head, rotated by the angles of their positions; a single position is that of the first token"""
    size = 2 * cos.shape[1]
    heads = split_heads(xp, x, num_heads or (x.shape[-1] // size if x.ndim == 3 else 0))
    if positions.ndim == 1:
        positions = positions + xp.arange(heads.shape[2], dtype=positions.dtype, device=xp.device_of(x))
        positions = xp.expand_dims(positions, axis=0)
    cos, sin = (xp.expand_dims(look_up(xp, table, positions), axis=1) for table in (cos, sin))
    out = rotate(xp, heads, cos, sin, interleaved)
    return join_heads(xp, out) if x.ndim == 3 else out


def _padding_bias(xp: Any, mask: Array, total: Any, like: Array, hidden: float) -> Array:
    """A mask as an addend to the scores. The mask holds 0 and 1 for the keys, or the number of visible keys."""
    if mask.ndim == 1:
        if mask.shape[0] != like.shape[0]:
            raise Refused("an attention mask that holds start and end positions has no handoff")
        mask = xp.arange(total, device=xp.device_of(like)) < xp.expand_dims(mask, axis=-1)
    visible = mask != 0 if not xp.isdtype(mask.dtype, "bool") else mask
    shape = (mask.shape[0], 1, 1 if mask.ndim == 2 else mask.shape[-2], mask.shape[-1])
    return hidden_bias(xp, xp.reshape(visible, shape), like, hidden)


@implements("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(
    xp: Any,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    padding: Array | None = None,
    attention_bias: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = -10000.0,
    scale: float = 0.0,
    unidirectional: int = 0,
    outputs: int = 1,
) -> Any:
    """softmax(scale Q K^T + biases) V for each head, where the past keys and values come before the new ones"""
    if bias is not None:
        width, depth = query.shape[-1], value.shape[-1]
        query = query + bias[:width]
        key, value = key + bias[width : 2 * width], value + bias[2 * width : 2 * width + depth]
    query, key, value = (split_heads(xp, x, num_heads) for x in (query, key, value))
    offset: Any = 0
    if past_key is not None:
        offset = past_key.shape[2]
        key, value = xp.concat([past_key, key], axis=2), xp.concat([past_value, value], axis=2)
    total = key.shape[2]
    biases = [] if attention_bias is None else [attention_bias]
    if padding is not None:
        biases.append(_padding_bias(xp, padding, total, query, mask_filter_value))
    if unidirectional:
        biases.append(hidden_bias(xp, within(xp, query, total, offset, -1, 0), query))
    out = xp.attend(query, key, value, *biases, scale=scale or 1 / math.sqrt(query.shape[3]))
    out = join_heads(xp, out)
    return out if outputs == 1 else (out, key, value)[:outputs]


@implements("Attention", domain=MICROSOFT)
def packed_attention(
    xp: Any,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    past: None = None,
    attention_bias: Array | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = -10000.0,
    qkv_hidden_sizes: tuple[int, ...] | None = None,
    scale: float = 0.0,
    unidirectional: int = 0,
) -> Array:
    """attention of x W + b, where the columns of W are queries, then keys, then values"""
    if past is not None:
        raise Refused("com.microsoft.Attention with a packed cache has no handoff")
    packed = xp.matmul(x, weight) if bias is None else xp.matmul(x, weight) + bias
    sizes = qkv_hidden_sizes or (packed.shape[-1] // 3,) * 3
    first, second = sizes[0], sizes[0] + sizes[1]
    query, key, value = packed[..., :first], packed[..., first:second], packed[..., second:]
    return multi_head_attention(
        xp,
        query,
        key,
        value,
        None,
        mask,
        attention_bias,
        num_heads=num_heads,
        mask_filter_value=mask_filter_value,
        scale=scale,
        unidirectional=unidirectional,
    )


@implements("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(
    xp: Any,
    query: Array,
    key: Array | None = None,
    value: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    last: Array | None = None,
    total_length: Array | None = None,
    cos: Array | None = None,
    sin: Array | None = None,
    positions: Array | None = None,
    attention_bias: Array | None = None,
    sink: Array | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    do_rotary: int = 0,
    local_window_size: int = -1,
    rotary_interleaved: int = 0,
    scale: float = 0.0,
    smooth_softmax: int = 0,
    softcap: float = 0.0,
    outputs: int = 1,
) -> Any:
    """causal attention in which groups of query heads share a key and value head; it can rotate queries and keys itself

    `last` is the place of the last token of each row. Without a past a row begins at place 0. A `sink` is one further
    score for each head; the value of its key is 0. A smooth softmax is a sink whose scores are 0.
    """
    if softcap:
        raise Refused("GroupQueryAttention with a soft cap has no handoff")
    if key is None:
        size = query.shape[-1] // (num_heads + 2 * kv_num_heads)
        first, second = num_heads * size, (num_heads + kv_num_heads) * size
        query, key, value = query[..., :first], query[..., first:second], query[..., second:]
    query = split_heads(xp, query, num_heads)
    key, value = split_heads(xp, key, kv_num_heads), split_heads(xp, value, kv_num_heads)
    length, device = query.shape[2], xp.device_of(query)
    has_past = past_key is not None and past_key.shape[2] != 0
    offset: Any = xp.reshape(last, (-1, 1)) + 1 - length if has_past else 0
    if do_rotary:
        places = xp.expand_dims(xp.arange(length, device=device), axis=0) + offset if positions is None else positions
        angles = [xp.expand_dims(look_up(xp, table, places), axis=1) for table in (cos, sin)]
        query, key = (rotate(xp, x, angles[0], angles[1], rotary_interleaved) for x in (query, key))
    if has_past:
        key, value = (_continued(xp, past, new, offset) for past, new in ((past_key, key), (past_value, value)))
        offset = xp.reshape(offset, (-1, 1, 1, 1))
    present = (key, value)
    groups = num_heads // kv_num_heads
    visible = within(xp, query, key.shape[2], offset, max(local_window_size, 0) - 1, 0)
    biases = [hidden_bias(xp, visible, query)]
    if attention_bias is not None:
        biases.append(attention_bias)
    if sink is None and smooth_softmax == 1:
        sink = xp.zeros((num_heads,), dtype=query.dtype, device=device)
    if sink is not None:
        key, value, biases = with_sink(xp, key, value, biases, sink)
    out = xp.attend(query, key, value, *biases, scale=scale or 1 / math.sqrt(query.shape[3]), grouped=groups > 1)
    out = join_heads(xp, out)
    return out if outputs == 1 else (out, *present)[:outputs]


def _continued(xp: Any, past: Array, new: Array, offset: Array) -> Array:
    """The past of each row up to its own length, then the new keys. Attention hides all that lies behind these."""
    before, length = past.shape[2], new.shape[2]
    both = xp.concat([past, new], axis=2)
    places = xp.expand_dims(xp.arange(before + length, device=xp.device_of(new)), axis=0)
    source = xp.where(
        places < offset, places, xp.minimum(places - offset + before, xp.full_like(places, before + length - 1))
    )
    source = xp.reshape(source, (source.shape[0], 1, before + length, 1))
    return xp.take_along_axis(both, xp.broadcast_to(source, both.shape), axis=2)
