"""Decoders and an encoder in the one-piece operators of the ONNX standard, opsets 23 and 24."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from models.built.attention import cache_inputs, causal, frequencies, positions, split_heads
from models.built.common import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    POSITIONS,
    embed,
    head,
    length,
    linear,
)
from models.built.graph import Graph

Array = np.ndarray[Any, Any]

CACHE = ("batch", KV_HEADS, "past + sequence", HEAD_DIM)
PARTS = (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))


def rotary_tables(g: Graph, size: int = HEAD_DIM) -> tuple[Array, Array]:
    """cos and sin of every position's angles: [positions, size / 2]."""
    angles = np.arange(POSITIONS, dtype=np.float32)[:, None] * frequencies(size)
    return np.cos(angles), np.sin(angles)


def standard_norm(g: Graph, x: str, name: str, size: int) -> str:
    return g.RMSNormalization(x, g.parameter(f"{name}.weight", (size,), mean=1.0), axis=-1, epsilon=1e-6)


def standard_gated(g: Graph, x: str, name: str) -> str:
    gate, up = (linear(g, x, f"{name}.{part}_proj", HIDDEN, FFN) for part in ("gate", "up"))
    return linear(g, g.Mul(g.Swish(gate), up), f"{name}.down_proj", FFN, HIDDEN)


def standard_attention(g: Graph, x: str, layer: int, turn: tuple[Any, ...], mask: str) -> str:
    """Attention over 4-D queries, keys and values. The operator itself repeats the heads of keys and values."""
    name = f"layers.{layer}.self_attn"
    parts = {}
    for part, heads in PARTS:
        y = split_heads(g, linear(g, x, f"{name}.{part}_proj", HIDDEN, heads * HEAD_DIM), heads, HEAD_DIM)
        if part != "v":
            y = standard_norm(g, y, f"{name}.{part}_norm", HEAD_DIM)
            y = g.RotaryEmbedding(y, *turn)
        parts[part] = y
    y, key, value = g.Attention(
        parts["q"],
        parts["k"],
        parts["v"],
        mask,
        *(f"past_key_values.{layer}.{part}" for part in ("key", "value")),
        outputs=3,
    )
    g.output(key, f"present.{layer}.key", "float", CACHE)
    g.output(value, f"present.{layer}.value", "float", CACHE)
    y = g.Reshape(g.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, HEADS * HEAD_DIM])
    return linear(g, y, f"{name}.o_proj", HEADS * HEAD_DIM, HIDDEN)


def flat_attention(g: Graph, x: str, layer: int, turn: tuple[Any, ...], mask: str) -> str:
    """The same over 3-D values; attributes give the number of heads."""
    name = f"layers.{layer}.self_attn"
    parts = {part: linear(g, x, f"{name}.{part}_proj", HIDDEN, heads * HEAD_DIM) for part, heads in PARTS}
    for part, heads in PARTS[:2]:
        parts[part] = g.RotaryEmbedding(parts[part], *turn, num_heads=heads, rotary_embedding_dim=6)
    y, key, value = g.Attention(
        parts["q"],
        parts["k"],
        parts["v"],
        mask,
        *(f"past_key_values.{layer}.{part}" for part in ("key", "value")),
        outputs=3,
        q_num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        softcap=20.0,
    )
    g.output(key, f"present.{layer}.key", "float", CACHE)
    g.output(value, f"present.{layer}.value", "float", CACHE)
    return linear(g, y, f"{name}.o_proj", HEADS * HEAD_DIM, HIDDEN)


def standard(attention: Callable[..., str], opset: int, rotated: int, feed: Callable[..., str]) -> onnx.ModelProto:
    g = Graph()
    x = embed(g)
    new, every = positions(g, cache_inputs(g, *range(LAYERS)))
    batch = g.Shape("input_ids", start=0, end=1)
    ids = g.Expand(g.Unsqueeze(new, [0]), g.Concat(batch, [1], axis=0))
    turn = (*rotary_tables(g, rotated), ids)
    mask = causal(g, new, every)
    for layer in range(LAYERS):
        x = g.Add(x, attention(g, standard_norm(g, x, f"layers.{layer}.input_layernorm", HIDDEN), layer, turn, mask))
        normed = standard_norm(g, x, f"layers.{layer}.post_attention_layernorm", HIDDEN)
        x = g.Add(x, feed(g, normed, f"layers.{layer}.mlp"))
    head(g, x, standard_norm)
    return g.model(opset)


def scattered() -> onnx.ModelProto:
    """A cache of fixed length: TensorScatter writes into it, and Attention gets the length in use (opset 24)."""
    g = Graph()
    x = embed(g)
    write = g.input("cache_position", "int64", ("batch",))
    new = g.Add(g.Unsqueeze(write, [1]), g.Unsqueeze(g.Range(0, length(g, "input_ids", 1), 1), [0]))
    turn = (*rotary_tables(g), new)
    used = g.Add(write, length(g, "input_ids", 1))
    for layer in range(LAYERS):
        name = f"layers.{layer}.self_attn"
        normed = standard_norm(g, x, f"layers.{layer}.input_layernorm", HIDDEN)
        parts = {}
        for part, heads in PARTS:
            y = split_heads(g, linear(g, normed, f"{name}.{part}_proj", HIDDEN, heads * HEAD_DIM), heads, HEAD_DIM)
            parts[part] = y if part == "v" else g.RotaryEmbedding(y, *turn)
        whole = []
        for part, long in (("k", "key"), ("v", "value")):
            shape = ("batch", KV_HEADS, 19, HEAD_DIM)
            cache = g.input(f"cache.{layer}.{long}", "float", shape)
            whole.append(g.TensorScatter(cache, parts[part], write, axis=2))
            g.output(whole[-1], f"updated.{layer}.{long}", "float", shape)
        y = g.Attention(parts["q"], *whole, None, None, None, used)
        y = g.Reshape(g.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, HEADS * HEAD_DIM])
        x = g.Add(x, linear(g, y, f"{name}.o_proj", HEADS * HEAD_DIM, HIDDEN))
        normed = standard_norm(g, x, f"layers.{layer}.post_attention_layernorm", HIDDEN)
        x = g.Add(x, standard_gated(g, normed, f"layers.{layer}.mlp"))
    head(g, x, standard_norm)
    return g.model(24)


def encoder() -> onnx.ModelProto:
    """A BERT in the standard's operators: packed projections split in three, a padding mask, GELU."""
    g = Graph()
    x = embed(g)
    mask = g.input("attention_mask", "int64", ("batch", "sequence"))
    places = g.Gather(g.parameter("positions.weight", (POSITIONS, HIDDEN), std=0.5), g.Range(0, length(g, mask, 1), 1))
    x = layer_norm(g, g.Add(x, places), "embeddings_norm")
    sees = g.Cast(g.Unsqueeze(mask, [1, 2]), to=onnx.TensorProto.BOOL)
    sees = g.Expand(sees, g.Concat([1, 1], g.Shape(mask, start=1), [1], axis=0))
    for layer in range(LAYERS):
        name = f"layers.{layer}"
        packed = linear(g, x, f"{name}.qkv", HIDDEN, 3 * HEADS * HEAD_DIM, bias=True)
        q, k, v = g.Split(packed, num_outputs=3, outputs=3, axis=-1)
        y = g.Attention(q, k, v, sees, q_num_heads=HEADS, kv_num_heads=HEADS)
        y = linear(g, y, f"{name}.o_proj", HEADS * HEAD_DIM, HIDDEN, bias=True)
        x = layer_norm(g, g.Add(x, y), f"{name}.norm1")
        y = linear(
            g, g.Gelu(linear(g, x, f"{name}.up", HIDDEN, FFN, bias=True)), f"{name}.down", FFN, HIDDEN, bias=True
        )
        x = layer_norm(g, g.Add(x, y), f"{name}.norm2")
    g.output(x, "last_hidden_state", "float", ("batch", "sequence", HIDDEN))
    return g.model(23)


def layer_norm(g: Graph, x: str, name: str) -> str:
    gain, bias = g.parameter(f"{name}.weight", (HIDDEN,), mean=1.0), g.parameter(f"{name}.bias", (HIDDEN,))
    return g.LayerNormalization(x, gain, bias, axis=-1)
