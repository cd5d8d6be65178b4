"""Rows for the rules of `hyperclone_onnx.rules.onnxruntime.fused`."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from rule_rows.harness import MICROSOFT, Model, activation, letters, narrow, row


@row("Gelu", "QuickGelu", "ScaledSiLU", "SampleOp", domain=MICROSOFT, seeds=3)
def microsoft_unary(m: Model, op: str) -> None:
    m.opset = 17
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


@row("MurmurHash3", domain=MICROSOFT, seeds=3)
def murmur_hash(m: Model) -> None:
    m.runtime, m.opset, m.kind = True, 17, TensorProto.UINT32
    dims = m.shape()
    m.node("MurmurHash3", activation(m, dims, kind=np.int32), domain=MICROSOFT, want=letters(dims))


@row("BiasAdd", domain=MICROSOFT, seeds=4)
def biased_addition(m: Model) -> None:
    dims = (m.size(), m.size(), m.size())
    m.node("BiasAdd", activation(m, dims), m.operand(dims[-1:]), m.operand(dims), domain=MICROSOFT, want="ggg")


@row("BiasSplitGelu", domain=MICROSOFT, seeds=6)
def split_activation(m: Model) -> None:
    half = m.size()
    x = activation(m, (m.size(), m.size(), 2 * half), "ggg")
    m.node("BiasSplitGelu", x, m.operand((2 * half,), "g"), domain=MICROSOFT, want="ggg")


@row("BiasDropout", "BitmaskBiasDropout", "BitmaskDropout", domain=MICROSOFT, seeds=6)
def biased_dropout(m: Model, op: str) -> None:
    dims = (m.size(), m.size(), m.size())
    masked = m.coin()
    inputs = [activation(m, dims, "ppp" if masked and op != "BiasDropout" else "ggg")]
    if op != "BitmaskDropout":
        inputs.append(m.operand(m.pick(dims, dims[-1:])))
        inputs += [m.operand(dims)] if m.coin() else []
    names = [op.lower(), *([op.lower() + "_mask"] if masked else [])]
    m.nodes.append(helper.make_node(op, inputs, names, name="dropped", domain=MICROSOFT))
    m.outputs.append(names[0])


@row("BiasSoftmax", domain=MICROSOFT, seeds=8)
def biased_softmax(m: Model) -> None:
    dims = (m.size(), m.size(), m.size(), m.size())
    axis = m.pick(2, 3, -1)
    bias = m.operand(m.pick((dims[0], 1, *dims[2:]), (1, *dims[1:]), (1, 1, *dims[2:])))
    want = "ggpp" if axis == 2 else "gggp"
    x = activation(m, dims, want)
    m.node("BiasSoftmax", x, bias, domain=MICROSOFT, want=want, axis=axis, is_inner_broadcast=1)


@row("GroupNorm", "SkipGroupNorm", domain=MICROSOFT, seeds=12)
def group_norm(m: Model, op: str) -> None:
    m.equal, last = True, m.coin()
    n, groups, c = m.size(), m.size(2, 3), m.size(2, 3)
    channels = groups * c
    dims = (n, 2, 3, channels) if last else (n, channels, 2, 3)
    x = activation(m, dims, "g..g" if last else "gg..")
    inputs = [x, m.operand((channels,), "g"), m.operand((channels,), "g")]
    if op == "SkipGroupNorm":
        inputs.append(m.operand(m.pick(dims, (n, channels))))
        inputs += [m.operand((channels,), "g")] if m.coin() else []
    attributes = {"groups": groups, "activation": m.size(0, 1), "channels_last": int(last)}
    m.node(op, *inputs, outputs=2 if op == "SkipGroupNorm" else 1, domain=MICROSOFT, **attributes)


@row("FusedGemm", domain=MICROSOFT, seeds=8)
def fused_gemm(m: Model) -> None:
    m.opset = 17
    n, k, p, a, b = m.size(), m.size(), m.size(), m.size(0, 1), m.size(0, 1)
    inputs = [activation(m, (k, n) if a else (n, k), "gg"), m.operand((p, k) if b else (k, p), "gg")]
    inputs += [m.operand(m.pick((p,), (n, p)))] if m.coin() else []
    narrow(m)
    m.node("FusedGemm", *inputs, domain=MICROSOFT, want="gg", activation="Relu", transA=a, transB=b, alpha=0.5)


@row("GemmFastGelu", domain=MICROSOFT, seeds=6)
def gemm_activation(m: Model) -> None:
    x, w = activation(m, (m.size(), m.size(), k := m.size()), "ggg"), m.operand((k, n := m.size()), "gg")
    m.node("GemmFastGelu", x, w, *([m.operand((n,), "g")] if m.coin() else []), domain=MICROSOFT, want="ggg")


def matrix(m: Model, batch: tuple[int, ...], rows: int, columns: int, transposed: int, batch_last: int) -> str:
    """An operand whose rows and columns, and rows and batch, may be exchanged."""
    first, last = (columns, rows) if transposed else (rows, columns)
    return m.operand((first, *batch, last) if batch_last else (*batch, first, last))


@row("FusedMatMul", "FusedMatMulActivation", domain=MICROSOFT, seeds=16)
def fused_matmul_of_batches(m: Model, op: str) -> None:
    m.opset = 17
    batch = (m.size(), *m.shape(1, 1)) if m.coin() else (m.size(),)
    n, k, p = m.size(), m.size(), m.size()
    flags = [m.size(0, 1) for _ in range(4)]
    x, w = matrix(m, batch, n, k, flags[0], flags[2]), matrix(m, batch, k, p, flags[1], flags[3])
    if x in m.stored and w in m.stored:
        m.inputs[x] = m.stored.pop(x)
    attributes = dict(zip(("transA", "transB", "transBatchA", "transBatchB"), flags, strict=True))
    want = "g" * len(batch) + "gg"
    if op == "FusedMatMul":
        narrow(m)
    else:
        attributes["activation"] = m.pick("Relu", "Softmax")
        want = want[:-1] + ("p" if attributes["activation"] == "Softmax" else "g")
    m.node(op, x, w, domain=MICROSOFT, alpha=0.5, want=want, **attributes)


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
