"""Transformers that no exporter writes well, built by hand from the blocks in built/. They are the variant `built`.

    python models/zoo_built.py [NAME,...]     builds every graph (or those) into models/zoo/

Routed experts in the four forms that graphs have them in, selective state spaces by Scan and by Loop, latent
attention, attention sinks, and decoders in the standard's own attention operators and in ONNX Runtime's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

# A module that runs as a script finds only modules in its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import zoo_store
from models.built import runtime, standard
from models.built.attention import ROTATED, attention, cache_inputs, causal, latent_attention, positions, rotation
from models.built.common import HEAD_DIM, HIDDEN, LAYERS, embed, gated, head, like, linear, rms_norm, rows
from models.built.experts import (
    CHOSEN,
    EXPERTS,
    dense_gates,
    experts_dense,
    experts_gathered,
    experts_looped,
    experts_scattered,
    grouped_experts,
    route,
)
from models.built.graph import Graph
from models.built.state_space import looped, scanned, state_space
from models.zoo_changes import refresh


def decoder(mix: Callable[..., str], feed: Callable[[Graph, str, int], str], **options: Any) -> Graph:
    """x = x + attention(norm(x)), x = x + feed(norm(x)), twice; with caches and rotary positions."""
    g = Graph()
    x = embed(g)
    new, every = positions(g, cache_inputs(g, *range(LAYERS)))
    turn, mask = rotation(g, new, HEAD_DIM), causal(g, new, every)
    for layer in range(LAYERS):
        x = g.Add(x, mix(g, rms_norm(g, x, f"layers.{layer}.input_layernorm", HIDDEN), layer, turn, mask, **options))
        normed = rms_norm(g, x, f"layers.{layer}.post_attention_layernorm", HIDDEN)
        x = g.Add(x, feed(g, normed, layer))
    head(g, x)
    return g


def mixtral() -> onnx.ModelProto:
    def feed(g: Graph, x: str, layer: int) -> str:
        name, tokens = f"layers.{layer}.block_sparse_moe", rows(g, x)
        gates = dense_gates(g, *route(g, tokens, name, normalise=True))
        return like(g, experts_dense(g, tokens, gates, name), x)

    return decoder(attention, feed).model(21)


def qwen3_moe() -> onnx.ModelProto:
    def feed(g: Graph, x: str, layer: int) -> str:
        name, tokens = f"layers.{layer}.mlp", rows(g, x)
        return like(g, experts_scattered(g, tokens, *route(g, tokens, name, normalise=True), name), x)

    return decoder(attention, feed, head_norm=True).model(21)


def olmoe() -> onnx.ModelProto:
    def feed(g: Graph, x: str, layer: int) -> str:
        name, tokens = f"layers.{layer}.mlp", rows(g, x)
        gates = dense_gates(g, *route(g, tokens, name, normalise=False))
        return like(g, experts_looped(g, tokens, gates, name), x)

    return decoder(attention, feed, width_norm=True).model(21)


def gpt_oss() -> onnx.ModelProto:
    def feed(g: Graph, x: str, layer: int) -> str:
        name, tokens = f"layers.{layer}.mlp", rows(g, x)
        logits = linear(g, tokens, f"{name}.router", HIDDEN, EXPERTS, bias=True)
        largest, chosen = g.TopK(logits, [CHOSEN], outputs=2)
        return like(g, experts_gathered(g, tokens, g.Softmax(largest, axis=-1), chosen, name), x)

    return decoder(attention, feed, bias=True, sinks=True).model(21)


def deepseek_v3() -> onnx.ModelProto:
    g = Graph()
    x = embed(g)
    new, every = positions(g, "past_latent.0", axis=1)
    turn, mask = rotation(g, new, ROTATED), causal(g, new, every)
    for layer in range(LAYERS):
        normed = rms_norm(g, x, f"layers.{layer}.input_layernorm", HIDDEN)
        x = g.Add(x, latent_attention(g, normed, layer, turn, mask))
        normed = rms_norm(g, x, f"layers.{layer}.post_attention_layernorm", HIDDEN)
        if layer == 0:
            x = g.Add(x, gated(g, normed, "layers.0.mlp"))
        else:
            x = g.Add(x, like(g, grouped_experts(g, rows(g, normed), f"layers.{layer}.mlp"), x))
    head(g, x)
    return g.model(21)


def mamba(recurrence: Callable[..., tuple[str, str]] = scanned) -> onnx.ModelProto:
    g = Graph()
    x = embed(g)
    for layer in range(LAYERS):
        normed = rms_norm(g, x, f"layers.{layer}.norm", HIDDEN)
        x = g.Add(x, state_space(g, normed, layer, recurrence))
    head(g, x)
    return g.model(21)


def jamba() -> onnx.ModelProto:
    """A state space with a plain feed-forward, then attention without positions and with experts."""
    g = Graph()
    x = embed(g)
    mask = causal(g, *positions(g, cache_inputs(g, 1)))
    for layer in range(LAYERS):
        normed = rms_norm(g, x, f"layers.{layer}.input_layernorm", HIDDEN)
        if layer == 0:
            x = g.Add(x, state_space(g, normed, layer, looped, normalised=True))
        else:
            x = g.Add(x, attention(g, normed, layer, None, mask))
        normed = rms_norm(g, x, f"layers.{layer}.pre_ff_layernorm", HIDDEN)
        name = f"layers.{layer}.feed_forward"
        if layer == 0:
            x = g.Add(x, gated(g, normed, name))
        else:
            tokens = rows(g, normed)
            gates = dense_gates(g, *route(g, tokens, name, normalise=False))
            x = g.Add(x, like(g, experts_dense(g, tokens, gates, name), x))
    head(g, x)
    return g.model(21)


GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
    "mamba": mamba,
    "mamba_loop": lambda: mamba(looped),
    "jamba": jamba,
    "llama_opset23": lambda: standard.standard(standard.standard_attention, 23, HEAD_DIM, gated),
    "llama_opset24": lambda: standard.standard(standard.flat_attention, 24, 6, standard.standard_gated),
    "llama_scatter": standard.scattered,
    "bert_opset23": standard.encoder,
    "bert_runtime": runtime.multi_head_encoder,
    "llama_runtime": lambda: runtime.runtime_decoder(False, gated),
    "phi3_runtime": lambda: runtime.runtime_decoder(True, gated),
    "gpt_oss_runtime": lambda: runtime.runtime_decoder(False, runtime.contributed_moe, sinks=True),
    "qwen3_next_runtime": runtime.linear_attention,
}


def main() -> None:
    """Build the requested graphs, all by default."""
    chosen = sys.argv[1].split(",") if len(sys.argv) > 1 else GRAPHS
    for name in chosen:
        model = GRAPHS[name]()
        # ONNX Runtime writes its own operator SimplifiedLayerNormalization with the standard's domain.
        if not name.endswith("_runtime"):
            filled = zoo_store.fill(onnx.ModelProto.FromString(model.SerializeToString()))
            onnx.checker.check_model(filled, full_check=True)
        refresh(f"{name}.built", model)


if __name__ == "__main__":
    main()
