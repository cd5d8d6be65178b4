"""A mixture of experts that computes only the chosen experts. `fusions.experts` puts these operators into a graph.

A *row* is one choice: a token, for one of the experts that were chosen for it. The rows are sorted by expert, so that
the rows of each expert follow one another, and one product with the weights of each expert computes them.
"""

from __future__ import annotations

from typing import Any

from hyperclone_onnx.frameworks.compiling.registry import INTERNAL, Array, implements


@implements("Dispatch", domain=INTERNAL)
def dispatch(
    xp: Any, tokens: Array, which: Array, *, experts: int = 1, outputs: int = 4
) -> tuple[Array, Array, Array, Array]:
    """The tokens of all rows, the number of rows of each expert, the expert of each row, and the order of the choices.

    Args:
        xp: the namespace.
        tokens: shape (n, features).
        which: the chosen experts of each token, shape (n, k).
        experts: the number of experts.
        outputs: the number of outputs that are needed.
    """
    choices = xp.reshape(which, (-1,))
    order = xp.argsort(choices, stable=True)
    owner = xp.take(choices, order, axis=0)
    rows = xp.take(tokens, order // which.shape[1], axis=0)
    places = xp.arange(experts, dtype=owner.dtype, device=xp.device_of(owner))
    sizes = xp.sum(xp.astype(xp.expand_dims(owner, axis=1) == places, owner.dtype), axis=0, dtype=owner.dtype)
    return rows, sizes, owner, order


@implements("GroupedMatMul", domain=INTERNAL)
def grouped_matmul(xp: Any, rows: Array, weight: Array, sizes: Array) -> Array:
    """out[r] = rows[r] W[expert of r], for rows that are sorted by expert"""
    return xp.grouped_matmul(rows, weight, sizes)


@implements("OfExperts", domain=INTERNAL)
def of_experts(xp: Any, vectors: Array, owner: Array) -> Array:
    """out[r] = v[expert of r, 0], with v of the shape (experts, 1, n)"""
    return xp.take(vectors, owner, axis=0)[:, 0, :]


@implements("Combine", domain=INTERNAL)
def combine(xp: Any, rows: Array, shares: Array, order: Array) -> Array:
    """out[n] = sum over the choices of token n of share times row"""
    back = xp.argsort(order, stable=True)
    chosen = xp.reshape(xp.take(rows, back, axis=0), (shares.shape[0], shares.shape[1], rows.shape[-1]))
    weighed = chosen * xp.expand_dims(xp.astype(shares, rows.dtype), axis=-1)
    return xp.sum(weighed, axis=1, dtype=rows.dtype)
