"""Rows for the rules of `hyperclone_onnx.rules.microsoft`."""

from __future__ import annotations

import numpy as np
from onnx import helper

from rule_rows.harness import MICROSOFT, Model, letters, narrow, row


@row("Gelu", "QuickGelu", domain=MICROSOFT, seeds=3)
def microsoft_unary(m: Model, op: str) -> None:
    dims = m.shape()
    x = m.operand(dims, stored=False)
    narrow(m)
    m.node(op, x, domain=MICROSOFT, want=letters(dims))


@row("BiasGelu", "FastGelu", domain=MICROSOFT, seeds=4)
def biased_activation(m: Model, op: str) -> None:
    dims = m.shape()
    inputs = [m.operand(dims, stored=False)]
    if op == "BiasGelu" or m.coin():
        inputs.append(m.operand(dims[-1:]))
    narrow(m)
    m.node(op, *inputs, domain=MICROSOFT, want=letters(dims))


@row("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT, seeds=8)
def skip_layer_norm(m: Model, op: str) -> None:
    m.equal = True
    b, s, n = m.size(), m.size(), m.size()
    inputs = [m.operand((b, s, n), "ggg", stored=False), m.operand(m.pick((b, s, n), (1, s, n), (s, n)))]
    inputs.append(m.operand((n,)))
    if m.coin():
        if op == "SkipLayerNormalization":
            inputs.append(m.operand((n,)))
        inputs.append(m.operand((n,)))
    narrow(m, 3e-4)
    names = [op.lower(), "", "", op.lower() + "_sum"] if m.coin() else [op.lower()]
    m.nodes.append(helper.make_node(op, inputs, names, name="skip", domain=MICROSOFT, epsilon=1e-5))
    m.outputs += [name for name in names if name]


@row("EmbedLayerNormalization", domain=MICROSOFT, seeds=8)
def embed_layer_norm(m: Model) -> None:
    m.equal = True
    b, s, n = m.size(), m.size(), m.size()
    ids = m.operand(m.rng.integers(0, 7, (b, s)).astype(np.int32), stored=False)
    kinds = m.operand(m.rng.integers(0, 2, (b, s)).astype(np.int32), stored=False) if m.coin() else ""
    tables = [m.operand((rows, n), "pg", stored=True) for rows in (7, 6)]
    tables.append(m.operand((2, n), "pg", stored=True) if kinds else "")
    inputs = [ids, kinds, *tables, m.operand((n,), stored=True), m.operand((n,), stored=True)]
    narrow(m, 3e-4)
    m.nodes.append(
        helper.make_node("EmbedLayerNormalization", inputs, ["embedded", "mask"], name="e", domain=MICROSOFT)
    )
    m.outputs.append("embedded")


@row("FusedMatMul", "TransposeMatMul", domain=MICROSOFT, seeds=12)
def fused_matmul(m: Model, op: str) -> None:
    batch = tuple(m.size() for _ in range(m.size(0, 2)))
    n, k, p = m.size(), m.size(), m.size()
    a, b = m.size(0, 1), m.size(0, 1)
    x = m.operand((*batch, k, n) if a else (*batch, n, k))
    w = m.operand((*batch, p, k) if b else (*batch, k, p))
    if x in m.stored and w in m.stored:
        m.inputs[x] = m.stored.pop(x)
    narrow(m)
    m.node(op, x, w, domain=MICROSOFT, transA=a, transB=b, alpha=0.5, want="g" * len(batch) + "gg")
