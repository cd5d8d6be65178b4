"""Operators that multiply and sum."""

from __future__ import annotations

from typing import Any

from hyperclone_onnx.frameworks.compiling.registry import INTERNAL, Array, implements


@implements("MatMul")
def matmul(xp: Any, a: Array, b: Array) -> Array:
    """out[.., m, n] = sum_k a[.., m, k] b[.., k, n]"""
    return xp.matmul(a, b)


@implements("Linear", domain=INTERNAL)
def linear(xp: Any, x: Array, weight: Array, bias: Array) -> Array:
    """out[.., n] = sum_k x[.., k] w[k, n] + b[n]"""
    return xp.matmul(x, weight) + bias


@implements("Gemm")
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
    """out[m, n] = alpha sum_k a'[m, k] b'[k, n] + beta c[m, n], where a', b' are a, b or their transposes"""
    product = xp.matmul(a.T if transA else a, b.T if transB else b)
    product = product if alpha == 1 else alpha * product
    if c is None or beta == 0:
        return product
    return product + (c if beta == 1 else beta * c)


@implements("Einsum")
def einsum(xp: Any, *operands: Array, equation: str) -> Array:
    """the sum that the equation writes"""
    return xp.einsum(equation.replace(" ", ""), *operands)
