"""Routed experts in four forms: dense, scattered, in a Loop, and gathered for each token."""

from __future__ import annotations

import onnx

from models.built.common import HIDDEN, gated, linear, silu
from models.built.graph import Graph

EXPERTS, CHOSEN, EXPERT_FFN = 5, 3, 20


def route(g: Graph, x: str, name: str, normalise: bool, bias: bool = False) -> tuple[str, str]:
    """The chosen experts of each token, and their weights: the largest values of a softmax over all experts."""
    logits = linear(g, x, f"{name}.gate", HIDDEN, EXPERTS, bias)
    weights, chosen = g.TopK(g.Softmax(logits, axis=-1), [CHOSEN], outputs=2)
    if normalise:
        weights = g.Div(weights, g.ReduceSum(weights, [-1]))
    return weights, chosen


def dense_gates(g: Graph, weights: str, chosen: str, experts: int = EXPERTS) -> str:
    """The weight of every expert for every token, 0 where it was not chosen."""
    shape = g.Concat(g.Shape(chosen, start=0, end=1), [experts], axis=0)
    zeros = g.Expand(0.0, shape)
    return g.ScatterElements(zeros, chosen, weights, axis=1)


def stacked(g: Graph, name: str, experts: int = EXPERTS) -> tuple[str, str, str]:
    """The weights of all experts: gate, up and down."""
    gate, up = (g.parameter(f"{name}.experts.{part}", (experts, HIDDEN, EXPERT_FFN)) for part in ("gate", "up"))
    return gate, up, g.parameter(f"{name}.experts.down", (experts, EXPERT_FFN, HIDDEN))


def experts_dense(g: Graph, x: str, gates: str, name: str, experts: int = EXPERTS) -> str:
    """Every expert for every token, weighted: [experts, tokens, hidden], summed over experts."""
    gate, up, down = stacked(g, name, experts)
    tokens = g.Unsqueeze(x, [0])
    inner = g.Mul(silu(g, g.MatMul(tokens, gate)), g.MatMul(tokens, up))
    weighted = g.Mul(g.MatMul(inner, down), g.Unsqueeze(g.Transpose(gates, perm=[1, 0]), [2]))
    return g.ReduceSum(weighted, [0], keepdims=0)


def experts_scattered(g: Graph, x: str, weights: str, chosen: str, name: str) -> str:
    """For each expert: find its tokens, gather them, compute, and add the results where the tokens came from."""
    total = g.Mul(x, 0.0)
    for expert in range(EXPERTS):
        token, place = g.Split(g.NonZero(g.Equal(chosen, expert)), [1, 1], outputs=2, axis=0)
        token, place = g.Squeeze(token, [0]), g.Squeeze(place, [0])
        y = gated(g, g.Gather(x, token), f"{name}.experts.{expert}", EXPERT_FFN)
        where = g.Concat(g.Unsqueeze(token, [1]), g.Unsqueeze(place, [1]), axis=1)
        y = g.Mul(y, g.Unsqueeze(g.GatherND(weights, where), [1]))
        total = g.ScatterND(total, g.Unsqueeze(token, [1]), y, reduction="add")
    return total


def experts_looped(g: Graph, x: str, gates: str, name: str) -> str:
    """A Loop over experts, which takes each weight from its stack by the number of the iteration."""
    stacks = stacked(g, name)
    inner = Graph(g)
    number = inner.input("expert", "int64", ())
    go_on = inner.input("go_in", "bool", ())
    total = inner.input("total_in", "float")
    gate, up, down = (inner.Gather(stack, number, axis=0) for stack in stacks)
    y = inner.MatMul(inner.Mul(silu(inner, inner.MatMul(x, gate)), inner.MatMul(x, up)), down)
    weight = inner.Unsqueeze(inner.Gather(gates, number, axis=1), [1])
    inner.output(go_on, "go_out", "bool", ())
    inner.output(inner.Add(total, inner.Mul(y, weight)), "total_out", "float")
    return g.Loop(EXPERTS, None, g.Mul(x, 0.0), body=inner.body(name))


def experts_gathered(g: Graph, x: str, weights: str, chosen: str, name: str) -> str:
    """The weights of each token's experts, gathered for it; gate and up interleaved, clamped (gpt-oss)."""
    both = g.parameter(f"{name}.experts.gate_up_proj", (EXPERTS, HIDDEN, 2 * EXPERT_FFN))
    both_bias = g.parameter(f"{name}.experts.gate_up_proj_bias", (EXPERTS, 2 * EXPERT_FFN), std=0.2)
    down = g.parameter(f"{name}.experts.down_proj", (EXPERTS, EXPERT_FFN, HIDDEN))
    down_bias = g.parameter(f"{name}.experts.down_proj_bias", (EXPERTS, HIDDEN), std=0.2)
    tokens = g.Unsqueeze(x, [1, 2])
    y = g.Squeeze(g.MatMul(tokens, g.Gather(both, chosen, axis=0)), [2])
    y = g.Add(y, g.Gather(both_bias, chosen, axis=0))
    gate, up = (g.Slice(y, [start], [2**31], [-1], [2]) for start in (0, 1))
    gate, up = g.Min(gate, 7.0), g.Clip(up, -7.0, 7.0)
    y = g.Mul(g.Add(up, 1.0), g.Mul(gate, g.Sigmoid(g.Mul(gate, 1.702))))
    y = g.Squeeze(g.MatMul(g.Unsqueeze(y, [2]), g.Gather(down, chosen, axis=0)), [2])
    y = g.Add(y, g.Gather(down_bias, chosen, axis=0))
    return g.ReduceSum(g.Mul(y, g.Unsqueeze(weights, [2])), [1], keepdims=0)


GROUPS, GROUPED_EXPERTS = 3, 12


def grouped_experts(g: Graph, x: str, name: str) -> str:
    """DeepSeek's router: the best two groups of experts by their best two, then the best experts in those.

    The bias decides who is chosen; the weights are without it.
    """
    scores = g.Sigmoid(linear(g, x, f"{name}.gate", HIDDEN, GROUPED_EXPERTS))
    biased = g.Add(scores, g.parameter(f"{name}.gate.e_score_correction_bias", (GROUPED_EXPERTS,)))
    grouped = g.Reshape(biased, [-1, GROUPS, GROUPED_EXPERTS // GROUPS])
    best = g.ReduceSum(g.TopK(grouped, [2], outputs=2)[0], [2], keepdims=0)
    groups = g.TopK(best, [2], outputs=2)[1]
    zeros, ones = g.Mul(best, 0.0), g.Add(g.Mul(g.Cast(groups, to=onnx.TensorProto.FLOAT), 0.0), 1.0)
    allowed = g.Cast(g.Unsqueeze(g.ScatterElements(zeros, groups, ones, axis=1), [2]), to=onnx.TensorProto.BOOL)
    masked = g.Reshape(g.Where(allowed, grouped, 0.0), [-1, GROUPED_EXPERTS])
    chosen = g.TopK(masked, [CHOSEN], outputs=2)[1]
    weights = g.GatherElements(scores, chosen, axis=1)
    weights = g.Mul(g.Div(weights, g.ReduceSum(weights, [-1])), 2.5)
    gates = dense_gates(g, weights, chosen, GROUPED_EXPERTS)
    routed = experts_dense(g, x, gates, name, GROUPED_EXPERTS)
    return g.Add(routed, gated(g, x, f"{name}.shared_experts", EXPERT_FFN))
