"""The mixture of experts of ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hyperclone_onnx.frameworks.compiling.ops import elementwise
from hyperclone_onnx.frameworks.compiling.ops.microsoft import MICROSOFT
from hyperclone_onnx.frameworks.compiling.registry import Array, implements

ACTIVATIONS: dict[str, Callable[[Any, Array], Array]] = {
    "identity": lambda xp, x: x,
    "relu": lambda xp, x: xp.relu(x),
    "gelu": lambda xp, x: elementwise.gelu(xp, x, approximate="tanh"),
    "silu": lambda xp, x: x * xp.sigmoid(x),
}


@implements("MoE", domain=MICROSOFT)
def mixture_of_experts(
    xp: Any,
    x: Array,
    router: Array,
    first: Array,
    first_bias: Array | None,
    second: Array,
    second_bias: Array | None = None,
    third: Array | None = None,
    third_bias: Array | None = None,
    *,
    activation_alpha: float = 1.0,
    activation_beta: float = 0.0,
    activation_type: str = "relu",
    k: int = 1,
    normalize_routing_weights: int = 0,
    swiglu_fusion: int = 0,
    swiglu_limit: float = math.inf,
    use_sparse_mixer: int = 0,
) -> Array:
    """out[n] = sum_e p[n, e] W2[e] f(W1[e] x[n], W3[e] x[n]), where p is 0 but for the k largest of each token

    Each expert computes all tokens. Otherwise sizes would depend on the router, and a compiled graph cannot have these.
    """
    tokens = xp.reshape(x, (-1, x.shape[-1]))
    inner = _projected(xp, tokens, first, first_bias)
    other: Any = None if third is None else _projected(xp, tokens, third, third_bias)
    if activation_type == "swiglu":
        if swiglu_fusion == 1:
            inner, other = inner[..., 0::2], inner[..., 1::2]
        elif swiglu_fusion == 2:
            half = inner.shape[-1] // 2
            inner, other = inner[..., :half], inner[..., half:]
        if swiglu_limit != math.inf:
            inner = xp.minimum(inner, xp.full_like(inner, swiglu_limit))
            other = xp.clip(other, -swiglu_limit, swiglu_limit)
        inner = inner * xp.sigmoid(activation_alpha * inner) * (other + activation_beta)
    else:
        inner = ACTIVATIONS[activation_type](xp, inner)
        inner = inner if other is None else inner * other
    projected = _projected(xp, inner, second, second_bias)
    shares = _shares(xp, router, k, bool(normalize_routing_weights))
    out = xp.sum(projected * xp.expand_dims(xp.permute_dims(shares, (1, 0)), axis=-1), axis=0, dtype=projected.dtype)
    return xp.reshape(out, x.shape)


def _projected(xp: Any, x: Array, weight: Array, bias: Array | None) -> Array:
    """The product of (n, d) or (experts, n, d) with (experts, i, d) as (experts, n, i)."""
    out = xp.matmul(x, weight.mT)
    return out if bias is None else out + xp.expand_dims(bias, axis=1)


def _shares(xp: Any, router: Array, k: int, normalised: bool) -> Array:
    """The softmax of the router, set to 0 but for the k largest of each row."""
    chances = xp.softmax(router, axis=-1)
    chosen = xp.argsort(chances, axis=-1, descending=True, stable=True)[:, :k]
    places = xp.arange(router.shape[-1], dtype=chosen.dtype, device=xp.device_of(router))
    among = xp.any(xp.expand_dims(chosen, axis=-1) == places, axis=1)
    shares = xp.where(among, chances, xp.zeros_like(chances))
    return shares / xp.sum(shares, axis=-1, keepdims=True, dtype=shares.dtype) if normalised else shares
