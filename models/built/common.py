"""The blocks of every hand-built transformer of the zoo, and their sizes."""

from __future__ import annotations

from collections.abc import Callable

from models.built.graph import Graph

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, POSITIONS, LAYERS = 48, 6, 2, 10, 56, 101, 44, 2


def linear(g: Graph, x: str, name: str, inputs: int, outputs: int, bias: bool = False) -> str:
    """y = x W (+ b)"""
    y = g.MatMul(x, g.parameter(f"{name}.weight", (inputs, outputs)))
    return g.Add(y, g.parameter(f"{name}.bias", (outputs,))) if bias else y


def rms_norm(g: Graph, x: str, name: str, size: int) -> str:
    """y = x / sqrt(mean x^2 + eps) * gain"""
    mean = g.ReduceMean(g.Mul(x, x), [-1])
    unit = g.Div(x, g.Sqrt(g.Add(mean, 1e-6)))
    return g.Mul(unit, g.parameter(f"{name}.weight", (size,), mean=1.0))


def silu(g: Graph, x: str) -> str:
    return g.Mul(x, g.Sigmoid(x))


def gated(g: Graph, x: str, name: str, size: int = FFN) -> str:
    """y = (silu(x Wg) * x Wu) Wd"""
    gate, up = (linear(g, x, f"{name}.{part}_proj", HIDDEN, size) for part in ("gate", "up"))
    return linear(g, g.Mul(silu(g, gate), up), f"{name}.down_proj", size, HIDDEN)


def embed(g: Graph) -> str:
    ids = g.input("input_ids", "int64", ("batch", "sequence"))
    return g.Gather(g.parameter("embed_tokens.weight", (VOCAB, HIDDEN), std=0.5), ids)


def head(g: Graph, x: str, norm: Callable[..., str] = rms_norm) -> None:
    logits = linear(g, norm(g, x, "norm", HIDDEN), "lm_head", HIDDEN, VOCAB)
    g.output(logits, "logits", "float", ("batch", "sequence", VOCAB))


def length(g: Graph, x: str, axis: int) -> str:
    """The size of an axis, as a scalar."""
    return g.Gather(g.Shape(x), axis)


def rows(g: Graph, x: str) -> str:
    """All tokens of all sequences along one axis."""
    return g.Reshape(x, [-1, HIDDEN])


def like(g: Graph, x: str, shaped: str) -> str:
    return g.Reshape(x, g.Shape(shaped))
