"""Experts, normalisations, activations, contractions, images, layout."""

from __future__ import annotations

from typing import Any

import numpy as np

from rule_rows.references.registry import (
    ACTIVATIONS,
    Array,
    fast_gelu,
    gelu,
    reference,
    sigmoid,
    softmax,
)


@reference("MoE")
def mixture_of_experts(
    x: Array,
    router: Array,
    w1: Array,
    b1: Any,
    w2: Array,
    b2: Any = None,
    w3: Any = None,
    b3: Any = None,
    *,
    k: int = 1,
    activation_type: str = "relu",
    swiglu_fusion: int = 0,
    normalize_routing_weights: int = 0,
    activation_alpha: float = 1.0,
    activation_beta: float = 0.0,
    **_: Any,
) -> Array:
    tokens = x.reshape(-1, x.shape[-1])
    weights = softmax(router, -1)
    out = np.zeros_like(tokens)
    for n, token in enumerate(tokens):
        chosen = np.argsort(-weights[n], kind="stable")[:k]
        shares = weights[n, chosen] / (weights[n, chosen].sum() if normalize_routing_weights else 1)
        for e, share in zip(chosen, shares, strict=True):
            h = w1[e] @ token + (0 if b1 is None else b1[e])
            other = None if w3 is None else w3[e] @ token + (0 if b3 is None else b3[e])
            if activation_type == "swiglu":
                if swiglu_fusion:
                    h, other = (h[::2], h[1::2]) if swiglu_fusion == 1 else np.split(h, 2)
                h = h * sigmoid(activation_alpha * h) * (other + activation_beta)
            else:
                h = ACTIVATIONS[activation_type](h) * (1 if other is None else other)
            out[n] += share * (w2[e] @ h + (0 if b2 is None else b2[e]))
    return out.reshape(x.shape)


@reference("GroupNorm")
def group_norm(
    x: Array, gamma: Array, beta: Array, *, groups: int, activation: int, channels_last: int = 1, epsilon: float = 1e-5
) -> Array:
    x = x if channels_last else np.moveaxis(x, 1, -1)
    parts = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean = parts.mean((1, 3), keepdims=True)
    parts = (parts - mean) / np.sqrt(((parts - mean) ** 2).mean((1, 3), keepdims=True) + epsilon)
    y = parts.reshape(x.shape) * gamma + beta
    y = y * sigmoid(y) if activation else y
    return y if channels_last else np.moveaxis(y, -1, 1)


@reference("SkipGroupNorm")
def skip_group_norm(
    x: Array, gamma: Array, beta: Array, skip: Array, bias: Any = None, *, channels_last: int = 1, **attributes: Any
) -> Any:
    def spread(array: Array) -> Array:
        return array[:, None, None] if channels_last else array[:, :, None, None]

    s = x + (spread(skip) if skip.ndim == 2 else skip)
    if bias is not None:
        s = s + spread(bias[None])
    return group_norm(s, gamma, beta, channels_last=channels_last, **attributes), s


@reference("BiasSplitGelu")
def bias_split_gelu(x: Array, bias: Array) -> Array:
    left, right = np.split(x + bias, 2, axis=-1)
    return np.asarray(left * gelu(right))


@reference("BiasAdd")
def bias_add(x: Array, bias: Array, skip: Array) -> Array:
    return np.asarray(x + bias + skip)


@reference("BiasSoftmax")
def bias_softmax(x: Array, bias: Array, *, axis: int = 1, is_inner_broadcast: int) -> Array:
    return softmax(x + bias, tuple(range(axis % x.ndim, x.ndim)))


@reference("BiasDropout")
def bias_dropout(x: Array, bias: Array, residual: Any = None, *_: Any) -> Any:
    y = x + bias + (0 if residual is None else residual)
    return y, np.ones(y.shape, bool)


@reference("BitmaskBiasDropout")
def bitmask_bias_dropout(x: Array, bias: Array, residual: Any = None, *_: Any) -> Any:
    y = x + bias + (0 if residual is None else residual)
    return y, np.full((y.size + 31) // 32, 2**32 - 1, np.uint32)


@reference("BitmaskDropout")
def bitmask_dropout(x: Array, *_: Any) -> Any:
    return x, np.full((x.size + 31) // 32, 2**32 - 1, np.uint32)


@reference("GemmFastGelu")
def gemm_fast_gelu(x: Array, w: Array, bias: Any = None) -> Array:
    return fast_gelu(x @ w + (0 if bias is None else bias))


@reference("FusedMatMulActivation")
def fused_matmul_activation(
    a: Array,
    b: Array,
    *,
    activation: str,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
    alpha: float = 1.0,
    activation_axis: int = -1,
) -> Array:
    if transBatchA:
        a = np.moveaxis(a, 0, -2)
    if transBatchB:
        b = np.moveaxis(b, 0, -2)
    product = alpha * (np.swapaxes(a, -1, -2) if transA else a) @ (np.swapaxes(b, -1, -2) if transB else b)
    return softmax(product, activation_axis) if activation == "Softmax" else ACTIVATIONS[activation.lower()](product)


@reference("NhwcConv")
def channels_last_convolution(x: Array, w: Array, bias: Any = None, *, group: int = 1, **_: Any) -> Array:
    out, inner, high, wide = w.shape
    rows, columns = x.shape[1] - high + 1, x.shape[2] - wide + 1
    parts = []
    for g in range(group):
        part, kernel = x[..., g * inner : (g + 1) * inner], w[g * (out // group) : (g + 1) * (out // group)]
        parts.append(
            sum(part[:, i : i + rows, j : j + columns] @ kernel[:, :, i, j].T for i in range(high) for j in range(wide))
        )
    return np.asarray(np.concatenate(parts, -1) + (0 if bias is None else bias))


@reference("NhwcFusedConv")
def channels_last_fused_convolution(
    x: Array, w: Array, bias: Any = None, z: Any = None, *, activation: str = "", **attributes: Any
) -> Array:
    output = channels_last_convolution(x, w, bias, **attributes)
    return ACTIVATIONS[activation.lower()](output + (0 if z is None else z))


@reference("TorchEmbedding")
def torch_embedding(table: Array, indices: Array, *_: Any) -> Array:
    return np.asarray(table[indices])


@reference("RemovePadding")
def remove_padding(x: Array, counts: Array) -> Any:
    kept = np.concatenate([row[:count] for row, count in zip(x, counts, strict=True)])
    real = (np.arange(x.shape[1]) < counts[:, None]).ravel()
    offsets = np.argsort(~real, kind="stable").astype(np.int32).reshape(x.shape[:2])
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return kept, offsets, ends, np.asarray([counts.max()], np.int32)


@reference("RestorePadding")
def restore_padding(x: Array, offsets: Array) -> Array:
    out = np.zeros((offsets.size, x.shape[1]))
    out[offsets.ravel()[: len(x)]] = x
    return out.reshape(*offsets.shape, -1)


@reference("ComplexMul")
def complex_product(a: Array, b: Array) -> Array:
    real = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
    return np.stack([real, a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]], -1)


@reference("ComplexMulConj")
def complex_product_with_conjugate(a: Array, b: Array) -> Array:
    return complex_product(a, b * np.array([1.0, -1.0]))


@reference("Rfft")
def fourier(x: Array, **_: Any) -> Array:
    y = np.fft.rfft(x)
    return np.stack([y.real, y.imag], -1)


@reference("Irfft")
def inverse_fourier(x: Array, **_: Any) -> Array:
    return np.asarray(np.fft.irfft(x[..., 0] + 1j * x[..., 1]))


@reference("IsAllFinite")
def is_all_finite(*inputs: Array, **_: Any) -> Array:
    return np.asarray(all(np.isfinite(x).all() for x in inputs))
