"""Operators that carry a state along a sequence: linear attention and causal convolution."""

from __future__ import annotations

import math
from typing import Any

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.compiling.ops.attention import join_heads, split_heads
from hyperclone_onnx.frameworks.compiling.ops.microsoft import MICROSOFT
from hyperclone_onnx.frameworks.compiling.ops.normalisation import wide
from hyperclone_onnx.frameworks.compiling.registry import Array, implements


@implements("CausalConvWithState")
@implements("CausalConvWithState", domain=MICROSOFT)
def causal_conv(
    xp: Any,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    past: Array | None = None,
    *,
    activation: str = "none",
    channels_last: int = 0,
    dilation: int = 1,
    ndim: int = 1,
    state_window: int = 0,
    outputs: int = 1,
) -> Any:
    """out[b, c, t] = f(sum_k w[c, 0, k] x[b, c, t + k - K + 1] + bias[c]); the state is the last K - 1 elements of x"""
    if channels_last or ndim != 1 or state_window:
        raise Refused("CausalConvWithState with the channels last, with several axes or with a window has no handoff")
    count = (weight.shape[-1] - 1) * dilation
    if past is None:
        past = xp.zeros((x.shape[0], x.shape[1], count), dtype=x.dtype, device=xp.device_of(x))
    whole = xp.concat([past, x], axis=2)
    out = xp.convolution(whole, weight, (1,), (dilation,), [(0, 0)], x.shape[1])
    out = out if bias is None else out + xp.reshape(bias, (-1, 1))
    if activation in ("silu", "swish"):
        out = out * xp.sigmoid(out)
    return out if outputs == 1 else (out, whole[..., whole.shape[2] - count :])


@implements("LinearAttention")
@implements("LinearAttention", domain=MICROSOFT)
def linear_attention(
    xp: Any,
    query: Array,
    key: Array,
    value: Array,
    past: Array | None = None,
    decay: Array | None = None,
    beta: Array | None = None,
    *,
    chunk_size: int = 64,
    kv_num_heads: int,
    q_num_heads: int,
    scale: float = 0.0,
    state_window: int = 0,
    update_rule: str = "gated_delta",
    outputs: int = 1,
) -> Any:
    """o_t = scale q_t S_t for each head, token by token, where S_t = e^g_t S_(t-1) + b_t k_t (v_t - k_t e^g_t S_(t-1))

    If the rule is not "gated", e^g is 1. If it has no "delta", k_t v_t is added instead.
    """
    if state_window or q_num_heads % kv_num_heads:
        raise Refused(
            "LinearAttention needs query heads in whole groups and no window of states: this form has no handoff"
        )
    batch, length, _ = query.shape
    kind = query.dtype if past is None else past.dtype
    q, k, v = (split_heads(xp, x, n) for x, n in ((query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads)))
    depth, width, groups = k.shape[3], v.shape[3], q_num_heads // kv_num_heads
    q = xp.reshape(q, (batch, kv_num_heads, groups, length, depth))
    if past is None:
        past = xp.zeros((batch, kv_num_heads, depth, width), dtype=q.dtype, device=xp.device_of(q))
    slices = [wide(xp, xp.moveaxis(q, 3, 0)), *(wide(xp, xp.moveaxis(x, 2, 0)) for x in (k, v))]
    if "gated" in update_rule:
        slices.append(xp.exp(wide(xp, _by_head(xp, decay, kv_num_heads))))
    if "delta" in update_rule:
        slices.append(wide(xp, _by_head(xp, beta, kv_num_heads)))

    def token(carry: tuple[Array, ...], now: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        (state,), (q, k, v, *rest) = carry, now
        state = state * rest.pop(0) if "gated" in update_rule else state
        new = xp.expand_dims(v, axis=-2)
        if "delta" in update_rule:
            new = rest.pop(0) * (new - xp.matmul(xp.expand_dims(k, axis=-2), state))
        state = state + xp.matmul(xp.expand_dims(k, axis=-1), new)
        return (state,), (xp.matmul(q, state),)

    (state,), (results,) = xp.scan(token, (wide(xp, past),), tuple(slices), length)
    out = join_heads(xp, xp.reshape(xp.moveaxis(results, 0, 3), (batch, q_num_heads, length, width)))
    out = xp.astype(out * (scale or 1 / math.sqrt(depth)), query.dtype)
    return out if outputs == 1 else (out, xp.astype(state, kind))


def _by_head(xp: Any, x: Array, heads: int) -> Array:
    """(batch, length, 1 or heads, or heads * size) as (length, batch, 1 or heads, 1 or size, 1)"""
    batch, length, width = x.shape
    shape = (batch, length, min(width, heads), -1, 1)
    return xp.moveaxis(xp.reshape(x, shape), 1, 0)
