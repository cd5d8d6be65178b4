"""ONNX's attention and rotary embedding, and the equation that all forms of attention share (`attend`)."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

from hyperclone_onnx.frameworks.compiling.ops.layout import expand, reshape
from hyperclone_onnx.frameworks.compiling.registry import INTERNAL, Array, Host, implements


@implements("Attention", domain=INTERNAL)
def recognised_attention(xp: Any, *operands: Array, scale: float) -> Array:
    """softmax(scale Q K^T + biases) V, of Q, K^T, V and the biases"""
    return xp.attend(*operands, scale=scale, key_transposed=1)


@implements("GroupedAttention", domain=INTERNAL)
def recognised_grouped_attention(
    xp: Any,
    query: Array,
    key: Array,
    key_spread: Host,
    key_joined: Host,
    value: Array,
    value_spread: Host,
    value_joined: Host,
    *biases: Array,
    scale: float,
) -> Array:
    """softmax(scale Q K^T + biases) V, where K and V are first expanded along a new third axis and then reshaped"""
    if _repeats_heads(query, key, key_spread, key_joined) and _repeats_heads(query, value, value_spread, value_joined):
        return xp.attend(query, key, value, *biases, scale=scale, grouped=True)
    key, value = (
        reshape(xp, expand(xp, xp.expand_dims(x, axis=2), spread), joined)
        for x, spread, joined in ((key, key_spread, key_joined), (value, value_spread, value_joined))
    )
    return xp.attend(query, key, value, *biases, scale=scale)


def _repeats_heads(query: Array, x: Array, spread: tuple[Any, ...], joined: tuple[Any, ...]) -> bool:
    """Whether (batch, few, length, size) becomes (batch, few * groups, length, size), with as many heads as queries."""
    if not x.ndim == query.ndim == len(joined) == len(spread) - 1 == 4:
        return False
    batch, few, length, size = x.shape
    groups = spread[2]
    wide = zip(spread, (batch, few, groups, length, size), strict=True)
    flat = zip(joined, (batch, few * groups, length, size), strict=True)
    return (
        all(target in (1, expected) for target, expected in wide)
        and all(target in (0, -1, expected) for target, expected in flat)
        and tuple(query.shape[:2]) == (batch, few * groups)
    )


def attend(
    xp: Any,
    query: Array,
    key: Array,
    value: Array,
    *biases: Array,
    scale: float,
    key_transposed: int = 0,
    grouped: bool = False,
) -> Array:
    """softmax(scale Q K^T + biases) V; a row of the result is 0 if its query sees no key

    If `grouped`, keys and values have fewer heads than queries, and each of their heads serves a group of query heads.
    """
    if grouped:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_heads(xp, key, groups), repeat_heads(xp, value, groups)
    scores = xp.matmul(query * scale, key if key_transposed else key.mT)
    if not biases:
        return xp.matmul(xp.softmax(scores, axis=-1), value)
    bias = reduce(lambda a, b: a + b, biases)
    return xp.matmul(visible_softmax(xp, _zero_masked_rows(xp, scores + bias, bias)), value)


def _zero_masked_rows(xp: Any, scores: Array, bias: Array) -> Array:
    """Scores, set to 0 in rows whose mask is finite but rounds away all scores. Such a row then has no gradient."""
    if isinstance(bias.shape[-1], int) and bias.shape[-1] == 0:
        return scores
    highest = xp.max(bias, axis=-1, keepdims=True)
    return xp.where((highest <= lowest_useful_mask(xp, scores)) & (highest > -math.inf), xp.zeros_like(scores), scores)


def lowest_useful_mask(xp: Any, scores: Array) -> float:
    """The addend that is so low that scores up to some tens are rounded away in the sum."""
    return -16 / float(xp.finfo(scores.dtype).eps)


def visible_softmax(xp: Any, scores: Array) -> Array:
    """The softmax of each row. A row whose scores are all minus infinity is 0 without a gradient, instead of NaN."""
    if isinstance(scores.shape[-1], int) and scores.shape[-1] == 0:
        return scores
    hidden = xp.max(scores, axis=-1, keepdims=True) == -math.inf
    weights = xp.softmax(xp.where(hidden, xp.zeros_like(scores), scores), axis=-1)
    return xp.where(hidden, xp.zeros_like(weights), weights)


def split_heads(xp: Any, x: Array, heads: int) -> Array:
    """(batch, length, heads * size) as (batch, heads, length, size); an array of four axes stays as it is"""
    if x.ndim == 4:
        return x
    batch, length, width = x.shape
    return xp.permute_dims(xp.reshape(x, (batch, length, heads, width // heads)), (0, 2, 1, 3))


def join_heads(xp: Any, x: Array) -> Array:
    """(batch, heads, length, size) as (batch, length, heads * size)"""
    batch, heads, length, size = x.shape
    return xp.reshape(xp.permute_dims(x, (0, 2, 1, 3)), (batch, length, heads * size))


def repeat_heads(xp: Any, x: Array, groups: int) -> Array:
    """Repeat each head `groups` times, side by side: the key and value heads that groups of query heads share."""
    if groups == 1:
        return x
    batch, heads, length, size = x.shape
    repeated = xp.broadcast_to(xp.expand_dims(x, axis=2), (batch, heads, groups, length, size))
    return xp.reshape(repeated, (batch, heads * groups, length, size))


def hidden_bias(xp: Any, visible: Array, like: Array, hidden: float | None = None) -> Array:
    """0 where visible, else the lowest number (or `hidden`), in the type of `like`"""
    lowest = float(xp.finfo(like.dtype).min) if hidden is None else hidden
    zero = xp.zeros_like(visible, dtype=like.dtype)
    return xp.where(visible, zero, xp.full_like(zero, lowest))


def within(xp: Any, query: Array, total: Any, offset: Any, left: int, right: int) -> Array:
    """Whether query i, at place p = offset + i, sees key t: p - left <= t <= p + right; a negative bound is no bound"""
    device = xp.device_of(query)
    places = xp.expand_dims(xp.arange(query.shape[-2], device=device), axis=-1) + offset
    keys = xp.arange(total, device=device)
    bounds = [keys <= places + right] if right >= 0 else []
    bounds += [keys >= places - left] if left >= 0 else []
    return reduce(lambda a, b: a & b, bounds)


def with_sink(xp: Any, key: Array, value: Array, biases: list[Array], sink: Array) -> tuple[Array, Array, list[Array]]:
    """Keys, values and biases with one further key. Its score is the sink of its head, and its value is 0."""
    total: Any = 0
    for bias in biases:
        total = total + bias
    total = xp.reshape(total, (*[1] * (4 - total.ndim), *total.shape))
    heads = xp.reshape(xp.astype(sink, key.dtype), (1, -1, 1, 1))
    shape = (total.shape[0], heads.shape[1], total.shape[2], 1)
    bias = xp.concat([xp.broadcast_to(total, (*shape[:-1], total.shape[-1])), xp.broadcast_to(heads, shape)], axis=-1)
    longer = [xp.concat([x, xp.zeros_like(x[..., :1, :])], axis=-2) for x in (key, value)]
    return longer[0], longer[1], [bias]


def soft_cap(xp: Any, scores: Array, softcap: float) -> Array:
    """softcap tanh(scores / softcap), or the scores themselves if softcap is 0"""
    return softcap * xp.tanh(scores / softcap) if softcap else scores


def _shape_bias(xp: Any, bias: Array, total: Any, like: Array) -> Array:
    """A mask as an addend to the scores. If it is too short, the keys behind its end are hidden."""
    short = total - bias.shape[-1]
    if xp.isdtype(bias.dtype, "bool"):
        bias = hidden_bias(xp, bias, like, -math.inf)
    if isinstance(short, int) and short == 0:
        return bias
    fill = xp.full((*bias.shape[:-1], short), -math.inf, dtype=bias.dtype, device=xp.device_of(bias))
    return xp.concat([bias, fill], axis=-1)


@implements("Attention")
def attention(
    xp: Any,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    lengths: Array | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int = 0,
    left_window_size: int = -1,
    right_window_size: int = -1,
    q_num_heads: int = 0,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int = 0,
    outputs: int = 1,
) -> Any:
    """softmax(scale Q K^T + mask) V for each head, where the past keys and values come before the new ones"""
    packed = query.ndim == 3
    query = split_heads(xp, query, q_num_heads)
    key, value = split_heads(xp, key, kv_num_heads), split_heads(xp, value, kv_num_heads)
    offset: Any = 0
    if past_key is not None:
        key = xp.concat([past_key, key], axis=2)
        value = xp.concat([past_value, value], axis=2)
        offset = past_key.shape[2]
    elif lengths is not None:
        offset = xp.reshape(lengths, (-1, 1, 1, 1)) - query.shape[2]
    present = (key, value)
    total = key.shape[2]
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    biases = [] if mask is None else [_shape_bias(xp, mask, total, query)]
    right = 0 if is_causal else right_window_size
    if right >= 0 or left_window_size >= 0:
        visible = within(xp, query, total, offset, left_window_size, right)
        biases.append(hidden_bias(xp, visible, query, -math.inf))
    if lengths is not None:
        visible = xp.arange(total, device=xp.device_of(query)) < xp.reshape(lengths, (-1, 1, 1, 1))
        biases.append(hidden_bias(xp, visible, query, -math.inf))
    groups = query.shape[1] // key.shape[1]
    if softcap == 0 and outputs < 4 and not softmax_precision:
        out, stages = xp.attend(query, key, value, *biases, scale=scale, grouped=groups > 1), None
    else:
        key, value = repeat_heads(xp, key, groups), repeat_heads(xp, value, groups)
        root = math.sqrt(scale)
        products = xp.matmul(query * root, xp.permute_dims(key, (0, 1, 3, 2)) * root)
        capped = soft_cap(xp, products, softcap)
        scores = capped
        for bias in biases:
            scores = scores + bias
        broad = xp.astype(scores, xp.dtype_of(softmax_precision)) if softmax_precision else scores
        weights = xp.astype(visible_softmax(xp, broad), query.dtype)
        out = xp.matmul(weights, value)
        stages = (products, capped, scores, weights)
    out = join_heads(xp, out) if packed else out
    if outputs == 1:
        return out
    return (out, *present, stages[qk_matmul_output_mode] if stages else None)[:outputs]


def rotate(xp: Any, x: Array, cos: Array, sin: Array, interleaved: int) -> Array:
    """(x1 cos - x2 sin, x1 sin + x2 cos) for halves (if interleaved: pairs) x1, x2 of the last axis; the rest stays"""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    rotated_first, rotated_second = first * cos - second * sin, first * sin + second * cos
    if interleaved:
        joined = xp.reshape(xp.stack([rotated_first, rotated_second], axis=-1), turned.shape)
    else:
        joined = xp.concat([rotated_first, rotated_second], axis=-1)
    return xp.concat([joined, rest], axis=-1) if 2 * half < x.shape[-1] else joined


def look_up(xp: Any, table: Array, positions: Array) -> Array:
    """table[positions[i..], ..]"""
    rows = xp.take(table, xp.reshape(positions, (-1,)), axis=0)
    return xp.reshape(rows, (*positions.shape, *table.shape[1:]))


@implements("RotaryEmbedding")
def rotary_embedding(
    xp: Any,
    x: Array,
    cos: Array,
    sin: Array,
    positions: Array | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Array:
    """the pairs of each head, rotated by the angles of their positions"""
    heads = split_heads(xp, x, num_heads)
    if positions is not None:
        cos, sin = look_up(xp, cos, positions), look_up(xp, sin, positions)
    cos, sin = (xp.expand_dims(table, axis=1) for table in (cos, sin))
    out = rotate(xp, heads, cos, sin, interleaved)
    return join_heads(xp, out) if x.ndim == 3 else out
