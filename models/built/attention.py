"""Attention built from small operators: grouped queries with caches and sinks, and multi-head latent attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx

from models.built.common import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, length, linear, rms_norm
from models.built.graph import Graph


def positions(g: Graph, past: str, axis: int = 2) -> tuple[str, str]:
    """The positions of the new tokens, and the positions of all tokens; cached tokens come first."""
    before = length(g, past, axis)
    total = g.Add(before, length(g, "input_ids", 1))
    return g.Range(before, total, 1), g.Range(0, total, 1)


def causal(g: Graph, new: str, every: str) -> str:
    """A mask: 0 where a token may attend, a large negative number elsewhere."""
    sees = g.LessOrEqual(g.Unsqueeze(every, [0]), g.Unsqueeze(new, [1]))
    return g.Where(sees, 0.0, -1e9)


def frequencies(size: int) -> np.ndarray[Any, Any]:
    return (10000.0 ** (-np.arange(0, size, 2) / size)).astype(np.float32)


def rotation(g: Graph, new: str, size: int) -> tuple[str, str]:
    """cos and sin of each position's angles, each angle twice."""
    angles = g.Mul(g.Unsqueeze(g.Cast(new, to=onnx.TensorProto.FLOAT), [1]), frequencies(size))
    both = g.Concat(angles, angles, axis=-1)
    return g.Cos(both), g.Sin(both)


def rotate(g: Graph, x: str, turn: tuple[str, str], size: int) -> str:
    """y = x cos + (-x2, x1) sin, with x = (x1, x2) in halves"""
    first, second = g.Split(x, [size // 2, size // 2], outputs=2, axis=-1)
    return g.Add(g.Mul(x, turn[0]), g.Mul(g.Concat(g.Neg(second), first, axis=-1), turn[1]))


def split_heads(g: Graph, x: str, heads: int, size: int) -> str:
    return g.Transpose(g.Reshape(x, [0, 0, heads, size]), perm=[0, 2, 1, 3])


def repeat_heads(g: Graph, x: str, times: int, heads: int = KV_HEADS, size: int = HEAD_DIM) -> str:
    """Repeat each key/value head `times` times, side by side."""
    shape = g.Concat(g.Shape(x, start=0, end=2), [times], g.Shape(x, start=2), axis=0)
    wide = g.Expand(g.Unsqueeze(x, [2]), shape)
    return g.Reshape(wide, g.Concat([0, heads * times], g.Shape(x, start=2, end=3), [size], axis=0))


def cached(g: Graph, x: str, name: str) -> str:
    """Join the cache and the new values along the third axis. The result is also an output."""
    every = g.Concat(f"past_key_values.{name}", x, axis=2)
    g.output(every, f"present.{name}", "float", ("batch", KV_HEADS, "past + sequence", HEAD_DIM))
    return every


def cache_inputs(g: Graph, *layers: int) -> str:
    """Declare the caches of some layers. Return one cache, from which the length is read."""
    for layer in layers:
        for part in ("key", "value"):
            past = g.input(f"past_key_values.{layer}.{part}", "float", ("batch", KV_HEADS, "past", HEAD_DIM))
    return past


def softmax_with_sinks(g: Graph, scores: str, name: str) -> str:
    """p = softmax over (scores, sink) without the sink's own column; a sink is one logit for each head."""
    sinks = g.Reshape(g.parameter(f"{name}.sinks", (HEADS,), std=1.0), [1, HEADS, 1, 1])
    shape = g.Concat(g.Shape(scores, start=0, end=3), [1], axis=0)
    both = g.Concat(scores, g.Expand(sinks, shape), axis=-1)
    return g.Slice(g.Softmax(both, axis=-1), [0], [-1], [-1])


def attention(
    g: Graph,
    x: str,
    layer: int,
    turn: tuple[str, str] | None,
    mask: str,
    *,
    bias: bool = False,
    head_norm: bool = False,
    width_norm: bool = False,
    sinks: bool = False,
) -> str:
    """Grouped-query attention over the cache and the new tokens.

    Queries and keys may be normalised by head (Qwen3) or in their whole width (OLMoE).
    """
    name = f"layers.{layer}.self_attn"
    parts = {}
    for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        y = linear(g, x, f"{name}.{part}_proj", HIDDEN, heads * HEAD_DIM, bias)
        if width_norm and part != "v":
            y = rms_norm(g, y, f"{name}.{part}_norm", heads * HEAD_DIM)
        y = g.Reshape(y, [0, 0, heads, HEAD_DIM])
        if head_norm and part != "v":
            y = rms_norm(g, y, f"{name}.{part}_norm", HEAD_DIM)
        y = g.Transpose(y, perm=[0, 2, 1, 3])
        parts[part] = rotate(g, y, turn, HEAD_DIM) if turn and part != "v" else y
    key, value = (
        repeat_heads(g, cached(g, parts[part], f"{layer}.{long}"), HEADS // KV_HEADS)
        for part, long in (("k", "key"), ("v", "value"))
    )
    scores = g.MatMul(parts["q"], g.Transpose(key, perm=[0, 1, 3, 2]))
    scores = g.Add(g.Mul(scores, 1 / math.sqrt(HEAD_DIM)), mask)
    weights = softmax_with_sinks(g, scores, name) if sinks else g.Softmax(scores, axis=-1)
    y = g.Transpose(g.MatMul(weights, value), perm=[0, 2, 1, 3])
    return linear(g, g.Reshape(y, [0, 0, HEADS * HEAD_DIM]), f"{name}.o_proj", HEADS * HEAD_DIM, HIDDEN, bias)


QUERY_RANK, LATENT, PLAIN, ROTATED, VALUE = 22, 18, 6, 4, 14


def latent_attention(g: Graph, x: str, layer: int, turn: tuple[str, str], mask: str) -> str:
    """Multi-head latent attention. The cache holds one latent for keys and values, and one rotated key."""
    name = f"layers.{layer}.self_attn"
    low = rms_norm(g, linear(g, x, f"{name}.q_a_proj", HIDDEN, QUERY_RANK), f"{name}.q_a_layernorm", QUERY_RANK)
    query = linear(g, low, f"{name}.q_b_proj", QUERY_RANK, HEADS * (PLAIN + ROTATED))
    plain, rotated = g.Split(split_heads(g, query, HEADS, PLAIN + ROTATED), [PLAIN, ROTATED], outputs=2, axis=-1)
    query = g.Concat(plain, rotate(g, paired(g, rotated), turn, ROTATED), axis=-1)

    both = linear(g, x, f"{name}.kv_a_proj_with_mqa", HIDDEN, LATENT + ROTATED)
    latent, key = g.Split(both, [LATENT, ROTATED], outputs=2, axis=-1)
    latent = rms_norm(g, latent, f"{name}.kv_a_layernorm", LATENT)
    key = rotate(g, paired(g, g.Unsqueeze(key, [1])), turn, ROTATED)
    latent = g.Concat(g.input(f"past_latent.{layer}", "float", ("batch", "past", LATENT)), latent, axis=1)
    g.output(latent, f"present_latent.{layer}", "float", ("batch", "past + sequence", LATENT))
    key = g.Concat(g.input(f"past_rotated.{layer}", "float", ("batch", 1, "past", ROTATED)), key, axis=2)
    g.output(key, f"present_rotated.{layer}", "float", ("batch", 1, "past + sequence", ROTATED))

    wide = linear(g, latent, f"{name}.kv_b_proj", LATENT, HEADS * (PLAIN + VALUE))
    plain, value = g.Split(split_heads(g, wide, HEADS, PLAIN + VALUE), [PLAIN, VALUE], outputs=2, axis=-1)
    shape = g.Concat(g.Shape(plain, start=0, end=3), [ROTATED], axis=0)
    key = g.Concat(plain, g.Expand(key, shape), axis=-1)
    scores = g.Mul(g.MatMul(query, g.Transpose(key, perm=[0, 1, 3, 2])), 1 / math.sqrt(PLAIN + ROTATED))
    y = g.MatMul(g.Softmax(g.Add(scores, mask), axis=-1), value)
    y = g.Reshape(g.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, HEADS * VALUE])
    return linear(g, y, f"{name}.o_proj", HEADS * VALUE, HIDDEN)


def paired(g: Graph, x: str) -> str:
    """Reorder neighbours (x0, x1, x2, x3) into halves (x0, x2, x1, x3)."""
    pairs = g.Reshape(x, [0, 0, 0, ROTATED // 2, 2])
    return g.Reshape(g.Transpose(pairs, perm=[0, 1, 2, 4, 3]), [0, 0, 0, ROTATED])
