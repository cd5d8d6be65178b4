"""Graphs of Llamas of any size. The weights lie in a data file: random numbers, or a hole in a sparse file.

    python models/large.py OUT.onnx --hidden 1024 --layers 24 [--sparse]

Written in small operators as exporters leave them: norms, rotary angles, masks and the repetition of heads are written
out in every layer, shapes are computed when running. No weight is ever in memory whole.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.built.attention import causal, frequencies, positions, rotate, split_heads  # noqa: E402
from models.built.common import length  # noqa: E402
from models.built.graph import Graph  # noqa: E402

CHUNK = 1 << 22


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Llama."""

    hidden: int = 1024
    layers: int = 24
    heads: int = 16
    kv_heads: int = 16
    ffn: int = 2880
    vocab: int = 51200

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SMALL = Sizes()
"""418 M parameters."""

LLAMA_405B = Sizes(hidden=16384, layers=126, heads=128, kv_heads=8, ffn=53248, vocab=128256)


def scaled(times: float) -> Sizes:
    """A Llama with about `times` as many parameters as SMALL: deeper, with a larger vocabulary, and as wide."""
    return Sizes(layers=max(1, round(SMALL.layers * times)), vocab=max(256, round(SMALL.vocab * times)))


def _norm(g: Graph, x: str, name: str, size: int) -> str:
    mean = g.ReduceMean(g.Pow(x, 2.0), [-1], keepdims=1)
    unit = g.Mul(x, g.Div(1.0, g.Sqrt(g.Add(mean, 1e-5))))
    return g.Mul(g.parameter(f"{name}.weight", (size,), mean=1.0), unit)


def _project(g: Graph, x: str, name: str, inputs: int, outputs: int) -> str:
    return g.MatMul(x, g.parameter(f"{name}.weight", (inputs, outputs)))


def _repeat(g: Graph, x: str, sizes: Sizes) -> str:
    """Repeat each key/value head for the query heads that share it, like PyTorch's exporter."""
    times = sizes.heads // sizes.kv_heads
    if times == 1:
        return x
    lengths = [g.Gather(g.Shape(x), i) for i in (0, 2)]
    batch, many = (g.Unsqueeze(length, [0]) for length in lengths)
    shape = g.Concat(batch, [sizes.kv_heads], [times], many, [sizes.head_dim], axis=0)
    wide = g.Expand(g.Unsqueeze(x, [2]), shape)
    return g.Reshape(wide, g.Concat(batch, [sizes.heads], many, [sizes.head_dim], axis=0))


def _attention(g: Graph, x: str, name: str, sizes: Sizes, past: str) -> str:
    """Causal attention; masks and rotary angles are made in each layer."""
    new, every = positions(g, past, 1)
    mask = causal(g, new, every)
    angles = g.Mul(g.Unsqueeze(g.Cast(new, to=onnx.TensorProto.FLOAT), [1]), frequencies(sizes.head_dim))
    both = g.Concat(angles, angles, axis=-1)
    turn = (g.Cos(both), g.Sin(both))
    parts = {}
    for part, heads in (("q", sizes.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads)):
        y = _project(g, x, f"{name}.{part}_proj", sizes.hidden, heads * sizes.head_dim)
        y = split_heads(g, y, heads, sizes.head_dim)
        parts[part] = y if part == "v" else rotate(g, y, turn, sizes.head_dim)
    key, value = (_repeat(g, parts[part], sizes) for part in "kv")
    scores = g.Div(g.MatMul(parts["q"], g.Transpose(key, perm=[0, 1, 3, 2])), sizes.head_dim**0.5)
    y = g.MatMul(g.Softmax(g.Add(scores, mask), axis=-1), value)
    batch, many = (g.Unsqueeze(g.Gather(g.Shape(x), i), [0]) for i in (0, 1))
    y = g.Reshape(g.Transpose(y, perm=[0, 2, 1, 3]), g.Concat(batch, many, [sizes.hidden], axis=0))
    return _project(g, y, f"{name}.o_proj", sizes.hidden, sizes.hidden)


def _feed_forward(g: Graph, x: str, name: str, sizes: Sizes) -> str:
    gate, up = (_project(g, x, f"{name}.{part}_proj", sizes.hidden, sizes.ffn) for part in ("gate", "up"))
    return _project(g, g.Mul(g.Mul(gate, g.Sigmoid(gate)), up), f"{name}.down_proj", sizes.ffn, sizes.hidden)


def llama(sizes: Sizes) -> tuple[onnx.ModelProto, dict[str, tuple[float, float]]]:
    """The graph of a Llama without weights, and the mean and the standard deviation of each weight."""
    g = Graph()
    ids = g.input("input_ids", "int64", ("batch", "sequence"))
    x = g.Gather(g.parameter("embed_tokens.weight", (sizes.vocab, sizes.hidden), std=0.5), ids)
    none = g.Mul(length(g, ids, 0), 0)
    past = g.ConstantOfShape(g.Concat([1], g.Unsqueeze(none, [0]), axis=0))
    for layer in range(sizes.layers):
        name = f"layers.{layer}"
        normed = _norm(g, x, f"{name}.input_layernorm", sizes.hidden)
        x = g.Add(x, _attention(g, normed, f"{name}.self_attn", sizes, past))
        normed = _norm(g, x, f"{name}.post_attention_layernorm", sizes.hidden)
        x = g.Add(x, _feed_forward(g, normed, f"{name}.mlp", sizes))
    logits = _project(g, _norm(g, x, "norm", sizes.hidden), "lm_head", sizes.hidden, sizes.vocab)
    g.output(logits, "logits", "float", ("batch", "sequence", sizes.vocab))
    graph = helper.make_graph(g.nodes, "llama", g.inputs, g.outputs, list(g.stored.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), g.random


def write(sizes: Sizes, path: Path, *, sparse: bool = False, seed: int = 0) -> int:
    """Write a Llama with its weights beside it, and return how many parameters it has."""
    model, spreads = llama(sizes)
    data = path.with_name(f"{path.name}.data")
    rng = np.random.Generator(np.random.SFC64(seed))
    total = 0
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.name not in spreads:
                continue
            mean, std = spreads[tensor.name]
            count = int(np.prod(tensor.dims))
            entries = {"location": data.name, "offset": str(4 * total), "length": str(4 * count)}
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in entries.items())
            total += count
            for start in range(0, 0 if sparse else count, CHUNK):
                block: Any = rng.standard_normal(min(CHUNK, count - start), dtype=np.float32)
                (block * np.float32(std) + np.float32(mean)).tofile(file)
        file.truncate(4 * total)
    path.write_bytes(model.SerializeToString())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in vars(SMALL).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--sparse", action="store_true", help="weights are zeros that take no space")
    options = vars(parser.parse_args())
    out, sparse = options.pop("out"), options.pop("sparse")
    print(f"{out}: {write(Sizes(**options), out, sparse=sparse):,} parameters")


if __name__ == "__main__":
    main()
