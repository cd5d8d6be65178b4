"""The reference implementations by name, and the pieces that they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

Array = np.ndarray[Any, Any]
REFERENCES: list[type[OpRun]] = []


def reference(name: str, domain: str = "com.microsoft") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what an operator computes: inputs in order, attributes by name. The domain of ONNX itself is ``""``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def _run(self: OpRun, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
            result = function(*inputs, **attributes)
            return result[: len(self.onnx_node.output)] if isinstance(result, tuple) else (result,)

        members = {"op_domain": domain, "op_schema": None, "_run": _run}
        REFERENCES.append(type(name, (OpRun,), members))
        return function

    return register


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))


def fast_gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "": lambda x: x,
    "none": lambda x: x,
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "gelu": gelu,
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "softmax": lambda x: softmax(x, -1),
}


def softmax(x: Array, axis: Any) -> Array:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(e / e.sum(axis=axis, keepdims=True))


def rms(x: Array, epsilon: float) -> Array:
    return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon))


def split(x: Array, heads: int) -> Array:
    """(.., length, heads * width) as (.., heads, length, width)."""
    return np.swapaxes(x.reshape(*x.shape[:-1], heads, -1), -2, -3)


def join(x: Array) -> Array:
    """(.., heads, length, width) as (.., length, heads * width)."""
    x = np.swapaxes(x, -2, -3)
    return np.asarray(x.reshape(*x.shape[:-2], -1))


def attend(
    q: Array, k: Array, v: Array, scale: float = 0.0, bias: Any = 0.0, softcap: float = 0.0, sink: Any = None
) -> Array:
    """Queries (.., heads, s, d), keys (.., fewer heads, t, d), values (.., fewer heads, t, e)."""
    group = q.shape[-3] // k.shape[-3]
    k, v = np.repeat(k, group, axis=-3), np.repeat(v, group, axis=-3)
    scores = q @ np.swapaxes(k, -1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = scores + bias
    if sink is None:
        return np.asarray(softmax(scores, -1) @ v)
    e = np.exp(scores)
    return np.asarray(e / (e.sum(axis=-1, keepdims=True) + np.exp(sink)[:, None, None]) @ v)


def rotated(x: Array, cosines: Array, sines: Array, interleaved: int = 0, offset: int = 0) -> Array:
    """Turn channels of x (tokens, heads, width) from `offset` on, by angles (tokens, half)."""
    half = cosines.shape[-1]
    part = x[..., offset : offset + 2 * half]
    first, second = (part[..., ::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])
    c, s = cosines[:, None], sines[:, None]
    turned = first * c - second * s, first * s + second * c
    out = x.copy()
    new = np.stack(turned, -1).reshape(part.shape) if interleaved else np.concatenate(turned, -1)
    out[..., offset : offset + 2 * half] = new
    return np.asarray(out)
