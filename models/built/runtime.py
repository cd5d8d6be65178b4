"""Decoders and an encoder in ONNX Runtime's own operators."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from models.built.common import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCAB,
    embed,
    gated,
    head,
    length,
    like,
    linear,
    rows,
)
from models.built.experts import CHOSEN, EXPERT_FFN, EXPERTS
from models.built.graph import MICROSOFT, Graph
from models.built.standard import PARTS, rotary_tables
from models.built.state_space import KERNEL

# GroupQueryAttention on the CPU needs head sizes that are multiples of 16.
WIDE = 16


def skip_norm(g: Graph, x: str, y: str, name: str) -> tuple[str, str]:
    """The sum of x and y, and its normalised form."""
    gain = g.parameter(f"{name}.weight", (HIDDEN,), mean=1.0)
    normed, _, _, total = g.SkipSimplifiedLayerNormalization(x, y, gain, outputs=4, domain=MICROSOFT, epsilon=1e-6)
    return total, normed


def first_norm(g: Graph, x: str, name: str, size: int = HIDDEN) -> str:
    gain = g.parameter(f"{name}.weight", (size,), mean=1.0)
    return g.SimplifiedLayerNormalization(x, gain, axis=-1, epsilon=1e-6)


def contributed_moe(g: Graph, x: str, name: str) -> str:
    tokens = rows(g, x)
    router = linear(g, tokens, f"{name}.gate", HIDDEN, EXPERTS)
    both = g.parameter(f"{name}.experts.gate_up", (EXPERTS, 2 * EXPERT_FFN, HIDDEN), std=0.144)
    both_bias = g.parameter(f"{name}.experts.gate_up_bias", (EXPERTS, 2 * EXPERT_FFN), std=0.2)
    down = g.parameter(f"{name}.experts.down", (EXPERTS, HIDDEN, EXPERT_FFN), std=0.224)
    down_bias = g.parameter(f"{name}.experts.down_bias", (EXPERTS, HIDDEN), std=0.2)
    y = g.MoE(
        tokens,
        router,
        both,
        both_bias,
        down,
        down_bias,
        domain=MICROSOFT,
        k=CHOSEN,
        activation_type="swiglu",
        swiglu_fusion=1,
        normalize_routing_weights=1,
        activation_alpha=1.702,
        activation_beta=1.0,
        swiglu_limit=7.0,
    )
    return like(g, y, x)


def runtime_decoder(packed: bool, feed: Callable[..., str], sinks: bool = False) -> onnx.ModelProto:
    """The dialect of ONNX Runtime GenAI's model builder: GroupQueryAttention that rotates by its own tables."""
    g = Graph()
    x = embed(g)
    mask = g.input("attention_mask", "int64", ("batch", "total_sequence"))
    used = g.Cast(g.Sub(g.ReduceSum(mask, [1], keepdims=0), 1), to=onnx.TensorProto.INT32)
    total = g.Cast(length(g, mask, 1), to=onnx.TensorProto.INT32)
    normed = first_norm(g, x, "layers.0.input_layernorm")
    for layer in range(LAYERS):
        name = f"layers.{layer}.self_attn"
        if packed:
            query = linear(g, normed, f"{name}.qkv_proj", HIDDEN, (HEADS + 2 * KV_HEADS) * WIDE)
            key = value = None
        else:
            query, key, value = (
                linear(g, normed, f"{name}.{part}_proj", HIDDEN, heads * WIDE) for part, heads in PARTS
            )
        shape = ("batch", KV_HEADS, "past", WIDE)
        past = [g.input(f"past_key_values.{layer}.{part}", "float", shape) for part in ("key", "value")]
        more = [None, None, g.parameter(f"{name}.sinks", (HEADS,), std=1.0)] if sinks else []
        y, new_key, new_value = g.GroupQueryAttention(
            query,
            key,
            value,
            *past,
            used,
            total,
            *rotary_tables(g, WIDE),
            *more,
            outputs=3,
            domain=MICROSOFT,
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
            scale=0.4,
        )
        g.output(new_key, f"present.{layer}.key", "float", ("batch", KV_HEADS, "total_sequence", WIDE))
        g.output(new_value, f"present.{layer}.value", "float", ("batch", KV_HEADS, "total_sequence", WIDE))
        x, normed = skip_norm(
            g, x, linear(g, y, f"{name}.o_proj", HEADS * WIDE, HIDDEN), f"layers.{layer}.post_attention_layernorm"
        )
        following = f"layers.{layer + 1}.input_layernorm" if layer + 1 < LAYERS else "norm"
        x, normed = skip_norm(g, x, feed(g, normed, f"layers.{layer}.mlp"), following)
    logits = linear(g, normed, "lm_head", HIDDEN, VOCAB)
    g.output(logits, "logits", "float", ("batch", "sequence", VOCAB))
    return g.model(21, MICROSOFT)


def linear_attention() -> onnx.ModelProto:
    """Gated delta networks (Qwen3-Next): a causal convolution with a state, linear attention with a state."""
    g = Graph()
    x = embed(g)
    wide = HEADS * HEAD_DIM
    for layer in range(LAYERS):
        name = f"layers.{layer}.linear_attn"
        normed = first_norm(g, x, f"layers.{layer}.input_layernorm")
        packed = g.Transpose(linear(g, normed, f"{name}.in_proj", HIDDEN, 3 * wide), perm=[0, 2, 1])
        past = g.input(f"past_conv.{layer}", "float", ("batch", 3 * wide, KERNEL - 1))
        packed, after = g.CausalConvWithState(
            packed,
            g.parameter(f"{name}.conv1d.weight", (3 * wide, 1, KERNEL), std=0.5),
            None,
            past,
            outputs=2,
            domain=MICROSOFT,
            activation="silu",
        )
        g.output(after, f"present_conv.{layer}", "float", ("batch", 3 * wide, KERNEL - 1))
        q, k, v = g.Split(g.Transpose(packed, perm=[0, 2, 1]), [wide] * 3, outputs=3, axis=-1)
        q, k = (g.Reshape(unit(g, g.Reshape(packed, [0, 0, HEADS, HEAD_DIM])), [0, 0, wide]) for packed in (q, k))
        decay = g.Neg(g.Softplus(linear(g, normed, f"{name}.a_proj", HIDDEN, HEADS)))
        beta = g.Sigmoid(linear(g, normed, f"{name}.b_proj", HIDDEN, HEADS))
        state = g.input(f"past_state.{layer}", "float", ("batch", HEADS, HEAD_DIM, HEAD_DIM))
        y, after = g.LinearAttention(
            q,
            k,
            v,
            state,
            decay,
            beta,
            outputs=2,
            domain=MICROSOFT,
            q_num_heads=HEADS,
            kv_num_heads=HEADS,
            update_rule="gated_delta",
            scale=1.0,
        )
        g.output(after, f"present_state.{layer}", "float", ("batch", HEADS, HEAD_DIM, HEAD_DIM))
        x, normed = skip_norm(g, x, linear(g, y, f"{name}.out_proj", wide, HIDDEN), f"layers.{layer}.post_norm")
        x = g.Add(x, gated(g, normed, f"layers.{layer}.mlp"))
    head(g, x, first_norm)
    return g.model(21, MICROSOFT)


def unit(g: Graph, x: str) -> str:
    """x / sqrt(sum x^2 + eps)"""
    return g.Div(x, g.Sqrt(g.Add(g.ReduceSum(g.Mul(x, x), [-1]), 1e-6)))


def multi_head_encoder() -> onnx.ModelProto:
    """A BERT in ONNX Runtime's operators: MultiHeadAttention with a bias of its own and a padding mask."""
    g = Graph()
    x = embed(g)
    mask = g.input("attention_mask", "int64", ("batch", "sequence"))
    lengths = g.Cast(mask, to=onnx.TensorProto.INT32)
    for layer in range(LAYERS):
        name = f"layers.{layer}"
        q, k, v = (linear(g, x, f"{name}.{part}_proj", HIDDEN, HEADS * HEAD_DIM) for part in "qkv")
        bias = g.parameter(f"{name}.qkv_bias", (3 * HEADS * HEAD_DIM,))
        y = g.MultiHeadAttention(q, k, v, bias, lengths, domain=MICROSOFT, num_heads=HEADS)
        y = linear(g, y, f"{name}.o_proj", HEADS * HEAD_DIM, HIDDEN)
        x = skip_layer_norm(g, x, y, f"{name}.norm1")
        inner = g.BiasGelu(
            linear(g, x, f"{name}.up", HIDDEN, FFN), g.parameter(f"{name}.up.bias", (FFN,)), domain=MICROSOFT
        )
        x = skip_layer_norm(g, x, linear(g, inner, f"{name}.down", FFN, HIDDEN), f"{name}.norm2")
    g.output(x, "last_hidden_state", "float", ("batch", "sequence", HIDDEN))
    return g.model(21, MICROSOFT)


def skip_layer_norm(g: Graph, x: str, y: str, name: str) -> str:
    gain, shift, bias = (
        g.parameter(f"{name}.{part}", (HIDDEN,), mean=float(part == "weight"))
        for part in ("weight", "bias", "skip_bias")
    )
    return g.SkipLayerNormalization(x, y, gain, shift, bias, domain=MICROSOFT)
