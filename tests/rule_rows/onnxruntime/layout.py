"""Rows for the rules of `hyperclone_onnx.rules.onnxruntime.layout`."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from rule_rows.harness import MICROSOFT, Model, activation, letters, narrow, row
from rule_rows.onnxruntime.attention import fixed, offsets


@row("ExpandDims", domain=MICROSOFT, seeds=4)
def expand_dims(m: Model) -> None:
    m.opset = 17
    shape = m.shape()
    x, axis = activation(m, shape), m.operand(np.array(m.pick(0, -1), np.int32), stored=True)
    narrow(m)
    m.node("ExpandDims", x, axis, domain=MICROSOFT)


@row("Pad", domain=MICROSOFT, seeds=12)
def pad(m: Model) -> None:
    m.opset = 17
    shape = tuple(m.size(3, 5) for _ in range(m.size(1, 3)))
    pads = m.rng.integers(-1 if m.coin(0.3) else 0, 2, 2 * len(shape))
    x, mode = activation(m, shape), m.pick("constant", "constant", "edge")
    inputs = [x, m.operand(pads if m.coin() else pads[None], stored=True)]
    inputs += [m.operand(np.array([0.5]), stored=True)] if m.coin() else []
    narrow(m)
    m.node("Pad", *inputs, domain=MICROSOFT, mode=mode)


@row("GatherND", domain=MICROSOFT, seeds=6)
def gather_nd(m: Model) -> None:
    m.opset = 17
    shape = (4, 3, m.size())
    depth = m.size(1, 2)
    x, where = activation(m, shape), m.operand(m.rng.integers(0, 3, (m.size(), depth)), "gp")
    narrow(m)
    m.node("GatherND", x, where, domain=MICROSOFT, want="g" * (4 - depth))


@row("Range", domain=MICROSOFT, seeds=6)
def range_(m: Model) -> None:
    m.opset, m.runtime, m.kind = 17, True, TensorProto.INT64
    inputs = [m.operand(np.array(n), stored=True) for n in (1, 1 + m.size(3, 6) * 2)]
    inputs += [m.operand(np.array(2), stored=True)] if m.coin() else []
    m.node("Range", *inputs, domain=MICROSOFT, want="g")


@row("Trilu", domain=MICROSOFT, seeds=4)
def trilu(m: Model) -> None:
    m.opset = 17
    x = activation(m, (m.size(), m.size(), m.size()), "gpp")
    narrow(m)
    m.node("Trilu", x, domain=MICROSOFT, want="gpp", upper=m.size(0, 1))


@row("TorchEmbedding", domain=MICROSOFT, seeds=4)
def embedding(m: Model) -> None:
    ids = m.operand(m.rng.integers(0, 7, (m.size(), m.size())), "gg", stored=False)
    m.node("TorchEmbedding", m.operand((7, m.size()), "pg"), ids, domain=MICROSOFT, want="ggg")


@row("RemovePadding", domain=MICROSOFT, seeds=4)
def remove_padding(m: Model) -> None:
    x = activation(m, (2, 4, m.size()), "ppg")
    m.node("RemovePadding", x, fixed(m, [3, 2]), outputs=4, domain=MICROSOFT, want="pg")


@row("RestorePadding", domain=MICROSOFT, seeds=4)
def restore_padding(m: Model) -> None:
    x = activation(m, (5, m.size()), "pg")
    m.node("RestorePadding", x, fixed(m, offsets([3, 2])), domain=MICROSOFT, want="ppg")


@row("UnfoldTensor", domain=MICROSOFT, seeds=6)
def unfold(m: Model) -> None:
    m.opset = 17
    x = activation(m, (m.size(), 7, m.size()), "gpg")
    narrow(m)
    m.node("UnfoldTensor", x, domain=MICROSOFT, want="gpgp", dim=1, size=3, step=m.size(1, 2))


@row("ComplexMul", "ComplexMulConj", domain=MICROSOFT, seeds=4)
def complex_product(m: Model, op: str) -> None:
    shape = (*m.shape(1, 2), 2)
    want = letters(shape[:-1]) + "p"
    m.node(op, m.operand(shape, stored=False), m.operand(shape), domain=MICROSOFT, want=want)


@row("Rfft", "Irfft", domain=MICROSOFT, seeds=4)
def fourier(m: Model, op: str) -> None:
    shape = (m.size(), 8) if op == "Rfft" else (m.size(), 5, 2)
    x = m.operand(shape, "g" + "p" * (len(shape) - 1))
    want = "gpp" if op == "Rfft" else "gp"
    m.node(op, x, domain=MICROSOFT, want=want, signal_ndim=1, onesided=1, normalized=0)


@row("Inverse", domain=MICROSOFT, seeds=4)
def inverse(m: Model) -> None:
    m.opset = 17
    x = activation(m, (m.size(), n := m.size(), n), "gpp")
    m.inputs["x0"] += 3 * np.eye(n)
    narrow(m, 1e-4)
    m.node("Inverse", x, domain=MICROSOFT, want="gpp")


@row("CDist", domain=MICROSOFT, seeds=4)
def distance(m: Model) -> None:
    m.opset = 17
    x, y = activation(m, (m.size(), n := m.size()), "gp"), m.operand((m.size(), n), "gp")
    narrow(m, 1e-3)
    m.node("CDist", x, y, domain=MICROSOFT, want="gg", metric=m.pick("euclidean", "sqeuclidean"))


@row("IsAllFinite", domain=MICROSOFT, seeds=3)
def is_all_finite(m: Model) -> None:
    m.kind = TensorProto.BOOL
    inputs = [m.operand(shape := m.shape(), letters(shape), stored=False) for _ in range(m.size(1, 3))]
    m.node("IsAllFinite", *inputs, domain=MICROSOFT)
