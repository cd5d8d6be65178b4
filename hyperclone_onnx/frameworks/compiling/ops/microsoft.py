"""Operators that only ONNX Runtime has, as its optimiser writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hyperclone_onnx.frameworks.compiling.ops import elementwise
from hyperclone_onnx.frameworks.compiling.ops.attention import look_up
from hyperclone_onnx.frameworks.compiling.ops.contractions import gemm
from hyperclone_onnx.frameworks.compiling.ops.convolution import conv
from hyperclone_onnx.frameworks.compiling.ops.normalisation import layer_norm, rms_norm
from hyperclone_onnx.frameworks.compiling.registry import Array, implements

MICROSOFT = "com.microsoft"


@implements("Gelu", domain=MICROSOFT)
def gelu(xp: Any, x: Array) -> Array:
    """x (1 + erf(x / sqrt 2)) / 2"""
    return elementwise.gelu(xp, x)


@implements("QuickGelu", domain=MICROSOFT)
def quick_gelu(xp: Any, x: Array, *, alpha: float = 1.702) -> Array:
    """x sigmoid(alpha x)"""
    return x * xp.sigmoid(alpha * x)


@implements("BiasGelu", domain=MICROSOFT)
def bias_gelu(xp: Any, x: Array, bias: Array) -> Array:
    """gelu(x + bias)"""
    return elementwise.gelu(xp, x + bias)


@implements("FastGelu", domain=MICROSOFT)
def fast_gelu(xp: Any, x: Array, bias: Array | None = None) -> Array:
    """gelu(x + bias), approximated by tanh"""
    return elementwise.gelu(xp, x if bias is None else x + bias, approximate="tanh")


@implements("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(
    xp: Any,
    a: Array,
    b: Array,
    *,
    alpha: float = 1.0,
    transA: int = 0,  # noqa: N803 - the operator's own names
    transB: int = 0,  # noqa: N803
    transBatchA: int = 0,  # noqa: N803
    transBatchB: int = 0,  # noqa: N803
) -> Array:
    """alpha a' b', where a', b' are a, b with the first axis moved before the last, then transposed, if so asked"""
    a, b = (_batch_inside(xp, x) if moved else x for x, moved in ((a, transBatchA), (b, transBatchB)))
    product = xp.matmul(a.mT if transA else a, b.mT if transB else b)
    return product if alpha == 1 else alpha * product


def _batch_inside(xp: Any, x: Array) -> Array:
    """(m, batch.., k) as (batch.., m, k)"""
    return xp.permute_dims(x, (*range(1, x.ndim - 1), 0, x.ndim - 1))


def _sum(x: Array, skip: Array, bias: Array | None) -> Array:
    return x + skip if bias is None else x + skip + bias


@implements("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_norm(
    xp: Any,
    x: Array,
    skip: Array,
    gamma: Array,
    beta: Array | None = None,
    bias: Array | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> Any:
    """norm(x + skip + bias) gamma + beta; the last output is the sum"""
    total = _sum(x, skip, bias)
    out = layer_norm(xp, total, gamma, beta, epsilon=epsilon)
    return out if outputs == 1 else (out, None, None, total)[:outputs]


@implements("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_rms_norm(
    xp: Any,
    x: Array,
    skip: Array,
    gamma: Array,
    bias: Array | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> Any:
    """(x + skip + bias) / sqrt(mean of its squares + epsilon) gamma; the last output is the sum"""
    total = _sum(x, skip, bias)
    out = rms_norm(xp, total, gamma, epsilon=epsilon)
    return out if outputs == 1 else (out, None, None, total)[:outputs]


@implements("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_norm(
    xp: Any,
    ids: Array,
    segments: Array | None,
    words: Array,
    places: Array,
    kinds: Array | None,
    gamma: Array,
    beta: Array,
    mask: Array | None = None,
    positions: Array | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
    outputs: int = 1,
) -> Any:
    """norm(words[ids] + places[positions] + kinds[segments]) gamma + beta; then the number of tokens each mask shows"""
    length, device = ids.shape[1], xp.device_of(ids)
    if positions is None:
        positions = xp.expand_dims(xp.arange(length, dtype=ids.dtype, device=device), axis=0)
    total = look_up(xp, words, ids) + look_up(xp, places, positions)
    if segments is not None:
        total = total + look_up(xp, kinds, segments)
    out = layer_norm(xp, total, gamma, beta, epsilon=epsilon)
    shown = xp.zeros(ids.shape, dtype=xp.dtype_of(6), device=device) if mask is None else mask
    count = xp.sum(xp.astype(shown == 1, xp.dtype_of(6)), axis=1, dtype=xp.dtype_of(6))
    return out if outputs == 1 else (out, count, total)[:outputs]


ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "Relu": lambda xp, x: xp.relu(x),
    "Tanh": lambda xp, x: xp.tanh(x),
    "Sigmoid": lambda xp, x: xp.sigmoid(x),
    "LeakyRelu": lambda xp, x, alpha=0.01: elementwise.leaky_relu(xp, x, alpha=alpha),
    "Clip": lambda xp, x, low, high: xp.clip(x, low, high),
    "HardSigmoid": lambda xp, x, alpha=0.2, beta=0.5: elementwise.hard_sigmoid(xp, x, alpha=alpha, beta=beta),
}


@implements("FusedConv", domain=MICROSOFT)
def fused_conv(
    xp: Any,
    x: Array,
    w: Array,
    b: Array | None = None,
    z: Array | None = None,
    *,
    activation: str = "",
    activation_params: tuple[float, ...] = (),
    auto_pad: str = "NOTSET",
    dilations: tuple[int, ...] | None = None,
    group: int = 1,
    kernel_shape: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> Array:
    """activation(conv(x, w) + b + z)"""
    out = conv(xp, x, w, b, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    out = out if z is None else out + z
    return ACTIVATIONS[activation](xp, out, *activation_params) if activation else out


@implements("FusedGemm", domain=MICROSOFT)
def fused_gemm(
    xp: Any,
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - the operator's own names
    transB: int = 0,  # noqa: N803
) -> Array:
    """activation(alpha a' b' + beta c)"""
    out = gemm(xp, a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    numbers = [number for number in (activation_alpha, activation_beta, activation_gamma) if number is not None]
    return ACTIVATIONS[activation](xp, out, *numbers) if activation else out
