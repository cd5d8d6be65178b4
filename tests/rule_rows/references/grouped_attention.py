"""Attention whose query heads share key/value heads in groups."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from rule_rows.references.registry import (
    Array,
    attend,
    join,
    reference,
    rms,
    rotated,
)


def _heads(query: Array, key: Any, value: Any, many: int, few: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values (tokens, heads, width) of packed ones, or of all three side by side."""
    if key is None:
        width = query.shape[-1] // (many + 2 * few)
        query, key, value = np.split(query, [many * width, (many + few) * width], axis=-1)
    return tuple(x.reshape(len(x), heads, -1) for x, heads in ((query, many), (key, few), (value, few)))  # type: ignore


def _selected(
    q: Array, k: Array, v: Array, seen: Array, aux: Any, aux_seen: Any, scale: float, softcap: float, sink: Any
) -> Array:
    """Queries (s, heads, d) to keys (t, fewer heads, d) that they see (s, t), and to auxiliary ones."""
    if aux is not None:
        k, v = np.concatenate([k, aux[0]]), np.concatenate([v, aux[1]])
        seen = np.concatenate([seen, aux_seen], 1)
    swap = (np.swapaxes(x, 0, 1) for x in (q, k, v))
    return join(attend(*swap, scale, np.where(seen, 0.0, -1e9), softcap, sink))


def _marked(indices: Array, counts: Array, width: int) -> Array:
    """A mask over `width` places: those that the first `count` indices of each row name."""
    seen = np.zeros((len(indices), width), bool)
    for row, count in enumerate(counts):
        seen[row, indices[row, :count]] = True
    return seen


def _causal(first: int, count: int, total: int, window: int) -> Array:
    where, keys = first + np.arange(count)[:, None], np.arange(total)
    return (keys <= where) & ((window <= 0) | (keys > where - max(window, 1)))


@reference("GroupQueryAttention")
def group_query_attention(
    query: Array,
    key: Any,
    value: Any,
    past_key: Any,
    past_value: Any,
    lengths: Array,
    total: Array,
    cosines: Any = None,
    sines: Any = None,
    positions: Any = None,
    bias: Any = None,
    sink: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    q_norm: Any = None,
    k_norm: Any = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
    softcap: float = 0.0,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    local_window_size: int = -1,
    qk_norm_epsilon: float = 1e-6,
) -> tuple[Array, Array, Array]:
    outs, keys, values = [], [], []
    for b in range(len(query)):
        past = int(lengths[b]) + 1 - query.shape[1]
        none = (None, None) if key is None else (key[b], value[b])
        q, k, v = _heads(query[b], *none, num_heads, kv_num_heads)
        if q_norm is not None:
            q, k = rms(q, qk_norm_epsilon) * q_norm, rms(k, qk_norm_epsilon) * k_norm
        if do_rotary:
            where = slice(past, past + len(q))
            q, k = (rotated(x, cosines[where], sines[where], rotary_interleaved) for x in (q, k))
        k = np.concatenate([np.swapaxes(past_key[b], 0, 1)[:past], k])
        v = np.concatenate([np.swapaxes(past_value[b], 0, 1)[:past], v])
        seen = np.where(_causal(past, len(q), len(k), local_window_size), 0.0, -1e9)
        swapped = [np.swapaxes(x, 0, 1) for x in (q, k, v)]
        extra = seen if bias is None else seen + bias[b % len(bias)][..., : len(k)]
        outs.append(join(attend(*swapped, scale, extra, softcap, sink)))
        keys.append(swapped[1])
        values.append(swapped[2])
    return np.stack(outs), np.stack(keys), np.stack(values)


@reference("SparseAttention")
def sparse_attention(
    query: Array,
    key: Any,
    value: Any,
    past_key: Array,
    past_value: Array,
    rows: Array,
    columns: Array,
    total: Array,
    lengths: Array,
    cosines: Any = None,
    sines: Any = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    sparse_block_size: int,
    scale: float = 0.0,
    do_rotary: int = 0,
) -> tuple[Array, Array, Array]:
    outs, caches = [], (past_key.copy(), past_value.copy())
    places = np.arange(past_key.shape[2])
    for b in range(len(query)):
        past, count = int(lengths[b]) - query.shape[1], query.shape[1]
        none = (None, None) if key is None else (key[b], value[b])
        q, k, v = _heads(query[b], *none, num_heads, kv_num_heads)
        mine = slice(past, past + count)
        if do_rotary:
            q, k = (rotated(x, cosines[mine], sines[mine]) for x in (q, k))
        for cache, new in zip(caches, (k, v), strict=True):
            cache[b, :, mine] = np.swapaxes(new, 0, 1)
        extra = np.full((num_heads, count, len(places)), -1e9)
        for h, i in itertools.product(range(num_heads), range(count)):
            layout, block = h % len(rows), (past + i) // sparse_block_size
            listed = columns[layout, rows[layout, block] : rows[layout, block + 1]]
            extra[h, i, np.isin(places // sparse_block_size, listed) & (places <= past + i)] = 0.0
        outs.append(join(attend(np.swapaxes(q, 0, 1), caches[0][b], caches[1][b], scale, extra)))
    return np.stack(outs), *caches


@reference("PagedAttention")
def paged_attention(
    query: Array,
    key: Any,
    value: Any,
    key_cache: Array,
    value_cache: Array,
    cumulative: Array,
    past: Array,
    table: Array,
    cosines: Any = None,
    sines: Any = None,
    slots: Any = None,
    sink: Any = None,
    q_norm: Any = None,
    k_norm: Any = None,
    *,
    selected: Any = None,
    auxiliary: Any = None,
    num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
    softcap: float = 0.0,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    rotary_offset: int = 0,
    local_window_size: int = -1,
    qk_norm_epsilon: float = 1e-6,
    **_: Any,
) -> tuple[Array, Array, Array]:
    q, k, v = _heads(query, key, value, num_heads, kv_num_heads)
    if q_norm is not None:
        q, k = rms(q, qk_norm_epsilon) * q_norm, rms(k, qk_norm_epsilon) * k_norm
    caches = key_cache.copy(), value_cache.copy()
    block, outs = key_cache.shape[1], []
    for b, (start, end) in enumerate(itertools.pairwise(cumulative)):
        first, part = int(past[b]), slice(int(start), int(end))
        places = first + np.arange(end - start)
        mine, new = q[part], k[part]
        if do_rotary:
            turn = cosines[places], sines[places], rotary_interleaved, rotary_offset
            mine, new = rotated(mine, *turn), rotated(new, *turn)
        for cache, rows in zip(caches, (new, v[part]), strict=True):
            cache[table[b, places // block], places % block] = rows
        every = np.arange(first + end - start)
        keys, values = (cache[table[b, every // block], every % block] for cache in caches)
        seen = _causal(first, int(end - start), len(every), local_window_size)
        aux = aux_seen = None
        if auxiliary is not None:
            aux = auxiliary[0][b], auxiliary[1][b]
            aux_seen = _marked(selected[0][part], selected[1][part], auxiliary[0].shape[1])
        elif selected is not None:
            seen = seen & _marked(selected[0][part], selected[1][part], len(every))
        outs.append(_selected(mine, keys, values, seen, aux, aux_seen, scale, softcap, sink))
    return np.concatenate(outs), *caches


@reference("SparsePagedAttention")
def sparse_paged_attention(*inputs: Any, selected_kv_source: str, **attributes: Any) -> Any:
    padded = [*inputs, *[None] * (19 - len(inputs))]
    auxiliary = (padded[11], padded[12]) if selected_kv_source == "auxiliary" else None
    return paged_attention(
        *padded[:8],
        *(padded[14], padded[15], padded[8], *padded[16:19]),
        selected=(padded[9], padded[10]),
        auxiliary=auxiliary,
        **attributes,
    )


@reference("DynamicSparseAttention")
def dynamic_sparse_attention(
    query: Array,
    key: Any,
    value: Any,
    past_key: Array,
    past_value: Array,
    aux_key: Any,
    aux_value: Any,
    indices: Array,
    counts: Array,
    lengths: Array,
    total: Array,
    cosines: Any = None,
    sines: Any = None,
    positions: Any = None,
    q_norm: Any = None,
    k_norm: Any = None,
    sink: Any = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    selected_kv_source: str,
    local_window_size: int = -1,
    scale: float = 0.0,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    rotary_offset: int = 0,
    **_: Any,
) -> tuple[Array, Array, Array]:
    outs, keys, values = [], [], []
    for b in range(len(query)):
        past, count = past_key.shape[2], query.shape[1]
        none = (None, None) if key is None else (key[b], value[b])
        q, k, v = _heads(query[b], *none, num_heads, kv_num_heads)
        if q_norm is not None:
            q, k = rms(q, 1e-6) * q_norm, rms(k, 1e-6) * k_norm
        if do_rotary:
            where = slice(past, past + count)
            turn = cosines[where], sines[where], rotary_interleaved, rotary_offset
            q, k = rotated(q, *turn), rotated(k, *turn)
        k = np.concatenate([np.swapaxes(past_key[b], 0, 1), k])
        v = np.concatenate([np.swapaxes(past_value[b], 0, 1), v])
        rows = slice(b * count, (b + 1) * count)
        seen, aux, aux_seen = _causal(past, count, len(k), local_window_size), None, None
        if selected_kv_source == "auxiliary":
            aux = np.swapaxes(aux_key[b], 0, 1), np.swapaxes(aux_value[b], 0, 1)
            aux_seen = _marked(indices[rows], counts[rows], len(aux[0]))
        else:
            seen = seen & _marked(indices[rows], counts[rows], len(k))
        outs.append(_selected(q, k, v, seen, aux, aux_seen, scale, 0.0, sink))
        keys.append(np.swapaxes(k, 0, 1))
        values.append(np.swapaxes(v, 0, 1))
    return np.stack(outs), np.stack(keys), np.stack(values)
