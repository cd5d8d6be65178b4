"""Rotary angles and relative biases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rule_rows.references.registry import (
    Array,
    reference,
    sigmoid,
    split,
)


@reference("GemmaRotaryEmbedding")
def gemma_rotary_embedding(angles: Array, q: Array, q_turned: Array, k: Array, k_turned: Array) -> Any:
    c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return q * c + q_turned * s, k * c + k_turned * s


@reference("RelativePositionBias")
def relative_position_bias(table: Array, rows: Array, columns: Array, *, max_distance: int, **_: Any) -> Array:
    buckets, heads = table.shape
    distance = np.maximum(np.arange(rows.item())[:, None] - np.arange(columns.item()), 0)
    exact = buckets // 2
    far = exact + np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact) * (buckets - exact)
    bucket = np.where(distance < exact, distance, np.minimum(far.astype(int), buckets - 1))
    return table.reshape(heads, buckets)[:, bucket][None]


@reference("GatedRelativePositionBias")
def gated_relative_position_bias(
    query: Array, bias: Array, relative: Array, w: Array, b: Array, eco: Array, *, num_heads: int
) -> Array:
    gates = split(query + bias, num_heads) @ w + b
    gates = sigmoid(gates.reshape(*gates.shape[:-1], 2, -1).sum(-1))
    return np.asarray((gates[..., :1] * (gates[..., 1:] * eco - 1.0) + 2.0) * relative)
