"""Attention with as many query heads as key/value heads."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from rule_rows.references.registry import (
    Array,
    attend,
    join,
    reference,
    split,
)


@reference("MultiHeadAttention")
def multi_head_attention(
    query: Array,
    key: Any = None,
    value: Any = None,
    bias: Any = None,
    mask: Any = None,
    scores: Any = None,
    past_key: Any = None,
    past_value: Any = None,
    length: Any = None,
    beams: Any = None,
    *,
    num_heads: int,
    scale: float = 0.0,
    unidirectional: int = 0,
) -> Any:
    assert mask is None and bias is None
    if query.ndim == 5:
        q, k, v = (np.swapaxes(query[..., i, :], 1, 2) for i in range(3))
    elif key.ndim == 3:
        q, k, v = (split(x, num_heads) for x in (query, key, value))
    else:
        q = split(query, num_heads)
        k, v = (np.swapaxes(key[..., i, :], 1, 2) for i in range(2))
    if length is not None:
        whole = int(length[0]) + k.shape[-2]
        past_key, past_value = past_key.copy(), past_value.copy()
        for buffer, new in ((past_key, k), (past_value, v)):
            buffer[:, :, int(length[0]) : whole] = new
        k, v = past_key[:, :, :whole], past_value[:, :, :whole]
    elif past_key is not None:
        k, v = np.concatenate([past_key, k], -2), np.concatenate([past_value, v], -2)
    extra = 0.0 if scores is None else scores
    if unidirectional:
        extra = extra + np.triu(np.full((q.shape[-2], k.shape[-2]), -1e9), 1 + k.shape[-2] - q.shape[-2])
    kept = (k, v) if length is None else (past_key, past_value)
    return join(attend(q, k, v, scale, extra)), *kept


def _within(cumulative: Array, q: Array, k: Array, v: Array, heads: int, scale: float, bias: Any) -> Array:
    parts = []
    for number, (start, end) in enumerate(itertools.pairwise(cumulative)):
        part = slice(int(start), int(end))
        extra = 0.0
        if bias is not None:
            extra = bias[number % bias.shape[0]][:, : end - start, : end - start]
        parts.append(join(attend(*(split(x[part], heads) for x in (q, k, v)), scale, extra)))
    return np.concatenate(parts)


@reference("PackedMultiHeadAttention")
def packed_multi_head_attention(
    query: Array,
    key: Any,
    value: Any,
    bias: Any,
    offsets: Array,
    cumulative: Array,
    scores: Any = None,
    *,
    num_heads: int,
    scale: float = 0.0,
) -> Array:
    q, k, v = query, key, value
    if query.ndim == 4:
        q, k, v = (query[:, :, i].reshape(len(query), -1) for i in range(3))
    if bias is not None:
        parts = np.split(bias, [q.shape[1], 2 * q.shape[1]])
        q, k, v = (x + b for x, b in zip((q, k, v), parts, strict=True))
    return _within(cumulative, q, k, v, num_heads, scale, scores)


@reference("PackedAttention")
def packed_attention(
    x: Array,
    w: Array,
    b: Array,
    offsets: Array,
    cumulative: Array,
    scores: Any = None,
    *,
    num_heads: int,
    scale: float = 0.0,
    qkv_hidden_sizes: Any = None,
) -> Array:
    projected = x @ w + b
    sizes = qkv_hidden_sizes or [projected.shape[1] // 3] * 3
    q, k, v = np.split(projected, [sizes[0], sizes[0] + sizes[1]], axis=1)
    return _within(cumulative, q, k, v, num_heads, scale, scores)


@reference("DecoderMaskedMultiHeadAttention")
def decoder_masked_multi_head_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Any = None,
    scores: Any = None,
    past_key: Any = None,
    past_value: Any = None,
    length: Any = None,
    width: Any = None,
    beams: Any = None,
    bias: Any = None,
    *,
    num_heads: int,
    scale: float = 0.0,
) -> tuple[Array, Array, Array]:
    q, k, v = query, key, value
    if bias is not None:
        q, k, v = (x + b for x, b in zip((q, k, v), np.split(bias, 3), strict=True))
    q, k, v = split(q, num_heads), *(x if x.ndim == 4 else split(x, num_heads) for x in (k, v))
    if past_key is not None:
        k, v = np.concatenate([past_key, k], -2), np.concatenate([past_value, v], -2)
    extra = 0.0 if scores is None else scores
    if mask is not None:
        extra = extra + np.where(mask[:, None, None], 0.0, -1e4)
    return join(attend(q, k, v, scale, extra)), k, v


@reference("DecoderMaskedSelfAttention")
def decoder_masked_self_attention(
    x: Array,
    w: Array,
    b: Array,
    mask: Any,
    past: Array,
    scores: Any = None,
    length: Any = None,
    *,
    num_heads: int,
    scale: float = 0.0,
) -> tuple[Array, Array]:
    q, k, v = (split(part, num_heads) for part in np.split(x @ w + b, 3, axis=-1))
    k, v = np.concatenate([past[0], k], -2), np.concatenate([past[1], v], -2)
    extra = 0.0 if scores is None else scores
    if mask is not None:
        extra = extra + np.where(mask[:, None, None], 0.0, -1e4)
    return join(attend(q, k, v, scale, extra)), np.stack([k, v])


@reference("DecoderAttention")
def decoder_attention(
    query: Array,
    key: Array,
    wq: Array,
    wkv: Array,
    b: Array,
    padding: Any,
    key_cache: Any,
    value_cache: Any,
    static: Array,
    use_past: Array,
    has_state: Array,
    has_padding: Array,
    *,
    num_heads: int,
) -> tuple[Array, Array, Array]:
    assert not static and not has_padding
    width = wq.shape[1]
    q = query @ wq + b[:width]
    k, v = (key @ wkv[:, i * width : (i + 1) * width] + b[(i + 1) * width : (i + 2) * width] for i in (0, 1))
    q, k, v = (split(np.swapaxes(x, 0, 1), num_heads) for x in (q, k, v))
    if use_past:
        k, v = np.concatenate([key_cache, k], -2), np.concatenate([value_cache, v], -2)
    return np.swapaxes(join(attend(q, k, v)), 0, 1), k, v


@reference("LongformerAttention")
def longformer_attention(
    x: Array,
    w: Array,
    b: Array,
    mask: Array,
    global_w: Array,
    global_b: Array,
    flags: Array,
    *,
    num_heads: int,
    window: int,
) -> Array:
    local = [split(part, num_heads) for part in np.split(x @ w + b, 3, axis=-1)]
    whole = [split(part, num_heads) for part in np.split(x @ global_w + global_b, 3, axis=-1)]
    places = np.arange(x.shape[1])
    near = np.abs(places[:, None] - places) <= window
    seen = near | (flags[:, None, :] == 1)
    extra = np.where(seen, 0.0, -1e9)[:, None] + mask[:, None, None]
    out = attend(*local, bias=extra)
    everywhere = attend(*whole, bias=mask[:, None, None])
    return join(np.where((flags == 1)[:, None, :, None], everywhere, out))
