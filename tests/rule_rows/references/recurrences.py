"""Linear attention and causal convolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rule_rows.references.registry import (
    ACTIVATIONS,
    Array,
    reference,
    sigmoid,
)


def recurrence(
    q: Array, k: Array, v: Array, decay: Any, beta: Any, s: Array, rule: str, scale: float
) -> tuple[Array, list[Array]]:
    """The outputs (batch, length, heads, e) and the state (batch, heads, e, d) after each token."""
    outs, states = [], []
    for t in range(q.shape[1]):
        if rule.startswith("gated"):
            g = np.exp(decay[:, t])
            s = s * (g[:, :, None, :] if g.ndim == 3 else g[:, :, None, None])
        new = v[:, t]
        if rule.endswith("delta"):
            new = beta[:, t, :, None] * (new - np.einsum("bhed,bhd->bhe", s, k[:, t]))
        s = s + np.einsum("bhe,bhd->bhed", new, k[:, t])
        outs.append((scale or 1 / math.sqrt(q.shape[3])) * np.einsum("bhed,bhd->bhe", s, q[:, t]))
        states.append(s)
    return np.stack(outs, 1), states


def windowed(states: Sequence[Array], window: int) -> Array:
    """The last states, zeros before the first."""
    if not window:
        return states[-1]
    none = [np.zeros_like(states[-1])] * max(window - len(states), 0)
    return np.stack([*none, *states[-window:]])


@reference("LinearAttention")
def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    past: Any = None,
    decay: Any = None,
    beta: Any = None,
    *,
    q_num_heads: int,
    kv_num_heads: int,
    update_rule: str = "gated_delta",
    scale: float = 0.0,
    state_window: int = 0,
) -> tuple[Array, Array]:
    many = max(q_num_heads, kv_num_heads)
    q, k, v = (
        x.reshape(*x.shape[:2], n, -1) for x, n in ((query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads))
    )
    spread = [np.repeat(x, many // x.shape[2], axis=2) for x in (q, k, v)]
    if decay is not None:
        decay = decay.reshape(*decay.shape[:2], kv_num_heads, -1)
        decay = np.repeat(np.broadcast_to(decay, k.shape), many // kv_num_heads, axis=2)
    if beta is not None:
        beta = np.repeat(np.broadcast_to(beta, k.shape[:3]), many // kv_num_heads, axis=2)
    state = np.zeros((len(q), kv_num_heads, k.shape[3], v.shape[3])) if past is None else past
    state = state[-1] if state.ndim == 5 else state
    first = np.swapaxes(np.repeat(state, many // kv_num_heads, axis=1), -1, -2)
    out, states = recurrence(*spread, decay, beta, first, update_rule, scale)
    own = [np.swapaxes(s[:, :: many // kv_num_heads], -1, -2) for s in states]
    return out.reshape(*out.shape[:2], -1), windowed(own, state_window)


@reference("CausalConvWithState")
def causal_convolution(
    x: Array,
    w: Array,
    bias: Any = None,
    past: Any = None,
    *,
    activation: str = "none",
    dilation: int = 1,
    channels_last: int = 0,
    state_window: int = 0,
) -> tuple[Array, Array]:
    shape = x.shape
    flat = x.reshape(*shape[:2], -1) if channels_last else np.swapaxes(x, 1, 2)
    count, length, rows = (w.shape[2] - 1) * dilation, flat.shape[1], len(flat)
    before = np.zeros((rows, count, flat.shape[2]))
    if past is not None:
        last = past[-1] if state_window else past
        before = last.reshape(rows, count, -1) if channels_last else np.swapaxes(last, 1, 2)
    whole = np.concatenate([before, flat], 1)
    summed = sum(w[:, 0, j] * whole[:, j * dilation : j * dilation + length] for j in range(w.shape[2]))
    summed = ACTIVATIONS[activation](summed + (0 if bias is None else bias))
    states = [whole[:, t + 1 : t + 1 + count] for t in range(length)]
    if channels_last:
        states = [s.reshape(rows, count, *shape[2:]) for s in states]
        return summed.reshape(shape), windowed(states, state_window)
    return np.swapaxes(summed, 1, 2), windowed([np.swapaxes(s, 1, 2) for s in states], state_window)


@reference("GatedDeltaNet")
def gated_delta_net(
    q: Array,
    k: Array,
    v: Array,
    cumulative: Any = None,
    decay: Any = None,
    beta: Any = None,
    state: Any = None,
    a_log: Any = None,
    dt_bias: Any = None,
    *,
    update_rule: str = "gated_delta",
    scale: float = 0.0,
    gate_activation: str = "none",
    beta_activation: str = "none",
    qk_l2_norm: int = 0,
) -> tuple[Array, Array]:
    if k is None:
        many, wide, width = state.shape[1:]
        keys = (q.shape[-1] - many * wide) // 2
        q, k, v = (
            x.reshape(*x.shape[:-1], -1, n)
            for x, n in zip(np.split(q, [keys, 2 * keys], axis=-1), (width, width, wide), strict=True)
        )
    if q.ndim == 3:
        ends = cumulative if cumulative is not None else np.linspace(0, len(q), len(state) + 1).astype(int)
        results = [
            gated_delta_net(
                *(x[None, start:end] for x in (q, k, v)),
                None,
                *(None if x is None else x[None, start:end] for x in (decay, beta)),
                None if state is None else state[i : i + 1],
                a_log,
                dt_bias,
                update_rule=update_rule,
                scale=scale,
                gate_activation=gate_activation,
                beta_activation=beta_activation,
                qk_l2_norm=qk_l2_norm,
            )
            for i, (start, end) in enumerate(itertools.pairwise(ends))
        ]
        return np.concatenate([out[0] for out, _ in results]), np.concatenate([last for _, last in results])
    many, width = v.shape[2], q.shape[3]
    if qk_l2_norm:
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True)) for x in (q, k))
    q, k = (np.repeat(x, many // x.shape[2], axis=2) for x in (q, k))
    if gate_activation == "qwen":
        decay = -np.exp(a_log) * np.log1p(np.exp(decay + dt_bias))
    if beta_activation == "sigmoid":
        beta = sigmoid(beta)
    first = np.zeros((len(q), many, v.shape[3], width)) if state is None else state
    out, states = recurrence(q, k, v, decay, beta, first, update_rule, scale)
    return out, states[-1]


@reference("VarlenCausalConvWithState")
def packed_causal_convolution(
    x: Array,
    w: Array,
    cumulative: Array,
    bias: Any,
    state: Array,
    counts: Any = None,
    *,
    activation: str = "none",
    dilation: int = 1,
    state_update_capacity: int = 0,
) -> tuple[Array, ...]:
    outs, lasts, updates = [], [], []
    kernel = w.shape[2]
    for b, (start, end) in enumerate(itertools.pairwise(cumulative)):
        whole = np.concatenate([state[b].T, x[start:end]])
        rows = end - start
        summed = sum(w[:, 0, j] * whole[j * dilation : j * dilation + rows] for j in range(kernel))
        outs.append(ACTIVATIONS[activation](summed + (0 if bias is None else bias)))
        lasts.append(whole[len(whole) - state.shape[2] :].T)
        update = np.zeros((state_update_capacity, x.shape[1]))
        if state_update_capacity:
            kept = int(np.clip(counts[b], 0, min(state_update_capacity, rows)))
            update[:kept] = x[start : start + kept]
        updates.append(update)
    return np.concatenate(outs), np.stack(lasts), np.stack(updates)
