"""Operators that reduce over axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hyperclone_onnx.frameworks.compiling.registry import Array, Host, implements

REDUCTIONS: dict[str, Callable[..., Array]] = {
    "ReduceL1": lambda xp, x, **over: xp.sum(xp.abs(x), dtype=x.dtype, **over),
    "ReduceL2": lambda xp, x, **over: xp.astype(xp.sqrt(_real(xp, xp.sum(x * x, dtype=x.dtype, **over))), x.dtype),
    "ReduceLogSum": lambda xp, x, **over: xp.log(xp.sum(x, dtype=x.dtype, **over)),
    "ReduceLogSumExp": lambda xp, x, **over: xp.logsumexp(x, **over),
    "ReduceMax": lambda xp, x, **over: xp.max(x, **over),
    "ReduceMean": lambda xp, x, **over: xp.mean(x, **over),
    "ReduceMin": lambda xp, x, **over: xp.min(x, **over),
    "ReduceProd": lambda xp, x, **over: xp.prod(x, dtype=x.dtype, **over),
    "ReduceSum": lambda xp, x, **over: xp.sum(x, dtype=x.dtype, **over),
    "ReduceSumSquare": lambda xp, x, **over: xp.sum(x * x, dtype=x.dtype, **over),
}


def _real(xp: Any, x: Array) -> Array:
    return x if xp.isdtype(x.dtype, "real floating") else xp.astype(x, xp.float32)


def _reduction(equation: Callable[..., Array]) -> Callable[..., Array]:
    def reduction(
        xp: Any, x: Array, axes: Host | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Array:
        if not axes and noop_with_empty_axes:
            return equation(xp, xp.expand_dims(x, axis=0), axis=(0,), keepdims=False)
        over = tuple(axis % x.ndim for axis in axes) if axes else tuple(range(x.ndim))
        return equation(xp, x, axis=over, keepdims=bool(keepdims))

    return reduction


for _name, _equation in REDUCTIONS.items():
    implements(_name)(_reduction(_equation))
