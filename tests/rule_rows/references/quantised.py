"""Quantised operators that ONNX Runtime does not have on the CPU."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from hyperclone_onnx.tensors.packing import unpack
from rule_rows.references.registry import ACTIVATIONS, Array, reference, softmax


@reference("MulInteger")
def mul_integer(a: Array, a_zero: Array, b: Array, b_zero: Array) -> Array:
    return (a.astype(np.int32) - a_zero) * (b.astype(np.int32) - b_zero)


@reference("ReduceSumInteger")
def reduce_sum_integer(data: Array, *, axes: Any, keepdims: int = 1) -> Array:
    return data.astype(np.int32).sum(axis=tuple(axes), keepdims=bool(keepdims), dtype=np.int32)


@reference("QLinearReduceMean")
def qlinear_reduce_mean(
    data: Array, scale: Array, zero: Array, out_scale: Array, out_zero: Array, *, axes: Any, keepdims: int = 1
) -> Array:
    mean = ((data.astype(float) - zero) * scale).mean(axis=tuple(axes), keepdims=bool(keepdims))
    return np.clip(np.round(mean / out_scale) + out_zero, 0, 255).astype(np.uint8)


def weight(words: Array, scales: Array, zeros: Any, width: int, size: int, bits: int) -> Array:
    """The real weight [.., row, column] of packed codes with scales [.., row, block], or [.., row] if size is 0."""
    rows = scales.shape if not size else scales.shape[:-1]
    numbers = unpack(words.reshape(*rows, -1), (*rows, width), bits).astype(float)
    spread = np.repeat(scales, size, axis=-1) if size else scales[..., None]
    if zeros is None:
        shift: Any = 2 ** (bits - 1)
    else:
        shift = unpack(zeros, scales.shape, bits).astype(float)
        shift = np.repeat(shift, size, axis=-1) if size else shift[..., None]
    return np.asarray((numbers - shift) * spread)


def _normed(a: Array, skip: Any, norm: Any) -> tuple[Array, Array]:
    whole = a if skip is None else a + skip
    if norm is None:
        return whole, whole
    return whole / np.sqrt((whole**2).mean(-1, keepdims=True) + 1e-5) * norm, whole


def _project(x: Array, words: Array, scales: Array, bias: Any, size: int, bits: int) -> Array:
    out = x @ weight(words, scales, None, x.shape[-1], size, bits).T
    return out if bias is None else out + bias


@reference("MatMulNBitsMlp")
def nbits_mlp(
    a: Array,
    skip: Any,
    norm: Any,
    *weights: Any,
    K: int,
    N: int,
    bits: int,
    block_size: int,
    activation: str,
) -> Any:
    assert a.shape[-1] == K and len(weights[1]) == N
    x, whole = _normed(a, skip, norm)
    three = (*weights, None)[:6]
    gate, up = (_project(x, *three[i : i + 3], block_size, bits) for i in (0, 3))
    return ACTIVATIONS[activation](gate) * up, whole


@reference("MatMulNBitsQkv")
def nbits_qkv(
    a: Array,
    skip: Any,
    norm: Any,
    *weights: Any,
    K: int,
    Nq: int,
    Nkv: int,
    bits: int,
    block_size: int,
) -> Any:
    assert a.shape[-1] == K and (len(weights[1]), len(weights[4])) == (Nq, Nkv)
    x, whole = _normed(a, skip, norm)
    all_nine = (*weights, None)[:9]
    return *(_project(x, *all_nine[i : i + 3], block_size, bits) for i in (0, 3, 6)), whole


@reference("MatMulBlockQuantizedFp8Weight")
def fp8(a: Array, b: Array, scale: Array, a_scale: Any = None, bias: Any = None, *, block_size: int) -> Array:
    out = a @ (b.astype(float) * np.repeat(scale, block_size, axis=1)).T
    return out if bias is None else out + bias


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@reference("MatMulBlockQuantizedFp4Weight")
def fp4(
    a: Array, b: Array, scale: Array, whole: Array, a_scale: Any = None, bias: Any = None, *, block_size: int
) -> Array:
    numbers = FP4[unpack(b, (b.shape[0], 2 * b.shape[1]), 4)]
    real = numbers * np.repeat(scale.astype(ml_dtypes.float8_e4m3fn).astype(float), block_size, axis=1) * whole
    out = a @ real.T
    return out if bias is None else out + bias


@reference("QMoE")
def qmoe(
    x: Array,
    router: Array,
    *operands: Any,
    k: int,
    activation_type: str,
    expert_weight_bits: int,
    block_size: int = 0,
    swiglu_fusion: int = 0,
    normalize_routing_weights: int = 0,
) -> Array:
    padded = (*operands, *[None] * (12 - len(operands)))
    zeros = padded[9:12]
    weights: list[Any] = []
    for i, width in ((0, x.shape[-1]), (3, None), (6, x.shape[-1])):
        words, scales = padded[i : i + 2]
        if words is None:
            weights.append(None)
            continue
        width = width or words.shape[-1] * 8 // expert_weight_bits
        weights.append(weight(words, scales, zeros[i // 3], width, block_size, expert_weight_bits))
    first, second, third = weights
    chosen = np.argsort(-router, axis=1, kind="stable")[:, :k]
    shares = softmax(np.take_along_axis(router, chosen, 1), 1) if normalize_routing_weights else None
    if shares is None:
        shares = np.take_along_axis(softmax(router, 1), chosen, 1)
    out = np.zeros_like(x)
    for n, token in enumerate(x):
        for share, e in zip(shares[n], chosen[n], strict=True):
            hidden = first[e] @ token + (0 if padded[2] is None else padded[2][e])
            if activation_type == "swiglu":
                half = len(hidden) // 2
                gate, value = (hidden[::2], hidden[1::2]) if swiglu_fusion == 1 else (hidden[:half], hidden[half:])
                hidden = ACTIVATIONS["silu"](gate) * (value + 1)
            else:
                hidden = ACTIVATIONS[activation_type](hidden)
            if third is not None:
                hidden = hidden * (third[e] @ token + (0 if padded[8] is None else padded[8][e]))
            out[n] += share * (second[e] @ hidden + (0 if padded[5] is None else padded[5][e]))
    return out
