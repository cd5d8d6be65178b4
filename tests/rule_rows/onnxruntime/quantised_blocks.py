"""Rows for the rules of `hyperclone_onnx.rules.onnxruntime.quantised_blocks`."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from hyperclone_onnx.tensors.packing import pack
from rule_rows.harness import MICROSOFT, Model, activation, row
from rule_rows.quantised import codes, scale_for, single

BLOCK = 16


def blocked(m: Model, n: int, count: int, bits: int) -> tuple[str, str, str]:
    """The names of a blocked weight's codes, scales and zero points."""
    flat = m.coin()
    words = m.operand(codes(m, (n, count, BLOCK * bits // 8), np.uint8), stored=True)
    scales = scale_for(m, n, count)
    zeros = codes(m, (n, count), np.uint8, bits)
    stored = pack(zeros, bits) if m.coin(0.8) else zeros.astype(np.float32)
    names = [m.operand(array.reshape(-1) if flat else array, stored=True) for array in (scales, stored)]
    return words, names[0], names[1] if m.coin(0.8) else ""


@row("MatMulNBits", domain=MICROSOFT, seeds=20)
def matmul_nbits(m: Model) -> None:
    m.runtime, m.equal, m.tolerance = True, True, 3e-5
    n, count, bits = m.size(), m.size(1, 4), m.pick(4, 4, 8)
    k = count * BLOCK
    names = blocked(m, n, count, bits)
    bias = m.operand(scale_for(m, n), stored=True) if m.coin() else ""
    attributes = {"K": k, "N": n, "bits": bits, "block_size": BLOCK}
    x = single(m, (2, 3, k))
    m.node("MatMulNBits", x, *names, "", bias, domain=MICROSOFT, want="ggg", **attributes)


@row("GatherBlockQuantized", domain=MICROSOFT, seeds=10)
def gather_block_quantized(m: Model) -> None:
    m.runtime, m.tolerance = True, 1e-6
    count, bits = m.size(2, 4), m.pick(4, 8)
    rows = 5
    words = m.operand(codes(m, (rows, count * BLOCK * bits // 8), np.uint8), stored=True)
    operands = [words, m.operand(m.rng.integers(0, rows, (2, 3)), stored=False), m.operand(scale_for(m, rows, count))]
    m.stored.update({operands[2]: (m.stored | m.inputs)[operands[2]]})
    m.inputs.pop(operands[2], None)
    if m.coin():
        operands.append(m.operand(pack(codes(m, (rows, count), np.uint8, bits), bits), stored=True))
    attributes = {"bits": bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    m.node("GatherBlockQuantized", *operands, domain=MICROSOFT, want="ggg", **attributes)


@row("MatMulBnb4", domain=MICROSOFT, seeds=6)
def matmul_bnb4(m: Model) -> None:
    m.runtime, m.equal, m.tolerance = True, True, 3e-5
    n, count = m.size(), m.size(2, 4)
    k = count * BLOCK
    words = m.operand(codes(m, (n * k // 2,), np.uint8), stored=True)
    scales = m.operand(scale_for(m, n * count), stored=True)
    attributes = {"K": k, "N": n, "block_size": BLOCK, "quant_type": m.pick(0, 1)}
    m.node("MatMulBnb4", single(m, (3, k)), words, scales, domain=MICROSOFT, want="gg", **attributes)


def projections(m: Model, count: int, bits: int, *columns: int) -> list[str]:
    """Codes, scales and biases of several weights of one input."""
    names: list[str] = []
    for n in columns:
        names.append(m.operand(codes(m, (n, count, BLOCK * bits // 8), np.uint8), stored=True))
        names.append(m.operand(scale_for(m, n, count).astype(np.float64), stored=True))
        names.append(m.operand((n,), "g", stored=True) if m.coin() else "")
    return names


@row("MatMulNBitsMlp", "MatMulNBitsQkv", domain=MICROSOFT, seeds=10)
def several_projections(m: Model, op: str) -> None:
    m.equal = True
    count, bits, n, other = m.size(2, 3), m.pick(4, 8), m.size(), m.size()
    k = count * BLOCK
    skip = activation(m, (2, k)) if m.coin() else ""
    norm = m.operand((k,), "g", stored=True) if skip or m.coin() or op == "MatMulNBitsQkv" else ""
    columns = (n, n) if op == "MatMulNBitsMlp" else (n, other, other)
    sizes: dict[str, Any] = {"K": k} | ({"N": n} if op == "MatMulNBitsMlp" else {"Nq": n, "Nkv": other})
    attributes = sizes | {"bits": bits, "block_size": BLOCK} | ({"activation": "silu"} if len(columns) == 2 else {})
    operands = [activation(m, (2, k)), skip, norm, *projections(m, count, bits, *columns)]
    m.node(op, *operands, outputs=1 if len(columns) == 2 else 3, domain=MICROSOFT, want="gg", **attributes)


@row("MatMulBlockQuantizedFp8Weight", domain=MICROSOFT, seeds=4)
def fp8(m: Model) -> None:
    m.equal = True
    n, count = m.size(), m.size(2, 3)
    k = count * BLOCK
    b = m.values((n, k)).astype(ml_dtypes.float8_e4m3fn)
    scale = m.operand(scale_for(m, n, count).astype(np.float64), stored=True)
    bias = m.operand((n,), "g", stored=True) if m.coin() else ""
    x = activation(m, (2, k))
    m.node(
        "MatMulBlockQuantizedFp8Weight",
        x,
        m.operand(b, stored=True),
        scale,
        "",
        bias,
        domain=MICROSOFT,
        want="gg",
        block_size=BLOCK,
    )


@row("MatMulBlockQuantizedFp4Weight", domain=MICROSOFT, seeds=4)
def fp4(m: Model) -> None:
    m.equal = True
    n, count = m.size(), m.size(2, 3)
    k = count * BLOCK
    b = m.operand(codes(m, (n, k // 2), np.uint8), stored=True)
    scale = m.operand(m.values((n, count)).astype(ml_dtypes.float8_e4m3fn), stored=True)
    whole = m.operand(np.asarray(0.5), stored=True)
    bias = m.operand((n,), "g", stored=True) if m.coin() else ""
    x = activation(m, (2, k))
    m.node("MatMulBlockQuantizedFp4Weight", x, b, scale, whole, "", bias, domain=MICROSOFT, want="gg", block_size=BLOCK)


@row("QMoE", domain=MICROSOFT, seeds=16)
def quantised_experts(m: Model) -> None:
    m.equal = True
    tokens, experts, bits, blocks = m.size(2, 3), 3, m.pick(4, 8), m.coin()
    hidden, inter = m.size(2, 3) * BLOCK, m.size(2, 3) * BLOCK
    kind, fusion = m.pick(("relu", 0), ("silu", 0), ("swiglu", 1), ("swiglu", 2))
    gated = kind == "silu" and m.coin()
    rows = inter * (2 if fusion else 1)
    inputs = [activation(m, (tokens, hidden)), activation(m, (tokens, experts), "gp")]
    zeros: list[str] = []
    for out, width in ((rows, hidden), (hidden, inter), (inter, hidden)):
        if len(inputs) == 8 and not gated:
            inputs += ["", "", ""]
            zeros.append("")
            continue
        inputs.append(m.operand(codes(m, (experts, out, width * bits // 8), np.uint8), stored=True))
        shape = (experts, out, width // BLOCK) if blocks else (experts, out)
        inputs.append(m.operand(scale_for(m, *shape).astype(np.float64), stored=True))
        inputs.append(m.operand((experts, out), "pg", stored=True) if m.coin() else "")
        zeros.append(m.operand(pack(codes(m, shape, np.uint8, bits), bits), stored=True) if m.coin() else "")
    attributes: dict[str, Any] = {"k": m.size(1, 2), "activation_type": kind, "expert_weight_bits": bits}
    attributes |= ({"block_size": BLOCK} if blocks else {}) | {"swiglu_fusion": fusion, "normalize_routing_weights": 1}
    m.node("QMoE", *inputs, *zeros, domain=MICROSOFT, want="gg", **attributes)
