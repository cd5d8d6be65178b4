"""Operators for which PyTorch has a faster kernel that computes the same values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it

from hyperclone_onnx.frameworks.compiling.ops import contractions, indexing, normalisation
from hyperclone_onnx.frameworks.compiling.registry import INTERNAL, Array, faster


@faster("torch", "Gather")
def gather(xp: Any, data: Array, indices: Array, *, axis: int = 0) -> Array:
    """A lookup in a table. We use an embedding, because its gradient does not sort the indices."""
    if axis == 0 and data.ndim == 2 and data.is_floating_point():
        return F.embedding(torch.where(indices < 0, indices + data.shape[0], indices), data)
    return indexing.gather(xp, data, indices, axis=axis)


@faster("torch", "LayerNormalization")
def layer_norm(
    xp: Any,
    x: Array,
    scale: Array,
    bias: Array | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Any:
    """PyTorch's kernel where it applies, otherwise the table's implementation."""
    if outputs == 1 and scale.dtype == x.dtype and scale.ndim == x.ndim - axis % x.ndim:
        return F.layer_norm(x, tuple(scale.shape), scale, bias, epsilon)
    return normalisation.layer_norm(xp, x, scale, bias, axis=axis, epsilon=epsilon, outputs=outputs)


@faster("torch", "RMSNormalization", "SimplifiedLayerNormalization")
def rms_norm(
    xp: Any,
    x: Array,
    scale: Array,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Any:
    """PyTorch's kernel where it applies, otherwise the table's implementation."""
    if outputs == 1 and scale.dtype == x.dtype and scale.ndim == x.ndim - axis % x.ndim:
        return F.rms_norm(x, tuple(scale.shape), scale, epsilon)
    return normalisation.rms_norm(xp, x, scale, axis=axis, epsilon=epsilon, outputs=outputs)


@faster("torch", "RootMeanSquare", domain=INTERNAL)
def root_mean_square(xp: Any, x: Array, *, epsilon: float) -> Array:
    """PyTorch's kernel, without a gain."""
    return F.rms_norm(x, (x.shape[-1],), None, epsilon)


@faster("torch", "Gelu")
def gelu(xp: Any, x: Array, *, approximate: str = "none") -> Array:
    """PyTorch's kernel."""
    return F.gelu(x, approximate=approximate)


@faster("torch", "Swish")
def swish(xp: Any, x: Array, *, alpha: float = 1.0) -> Array:
    """PyTorch's kernel for SiLU (alpha is 1), otherwise the equation."""
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@faster("torch", "Gelu", domain="com.microsoft")
def microsoft_gelu(xp: Any, x: Array) -> Array:
    """PyTorch's kernel."""
    return F.gelu(x)


@faster("torch", "Linear", domain=INTERNAL)
def linear(xp: Any, x: Array, weight: Array, bias: Array) -> Array:
    """One kernel for the product and the sum."""
    return F.linear(x, weight.t(), bias)


@faster("torch", "Gemm")
def gemm(
    xp: Any,
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - the operator's own names
    transB: int = 0,  # noqa: N803
) -> Array:
    """One kernel for the product and the sum."""
    if c is None or beta == 0 or not a.is_floating_point():
        return contractions.gemm(xp, a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    return torch.addmm(c, a.T if transA else a, b.T if transB else b, beta=beta, alpha=alpha)
