"""JAX: its NumPy is the standard's namespace as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as _standard
import numpy as np
from jax.numpy import *

from hyperclone_onnx.frameworks.namespaces import dtype_name
from hyperclone_onnx.frameworks.ops.attention import attend as _attend

bool = _standard.bool
abs, all, any, max, min, round, sum, pow = (
    getattr(_standard, name) for name in ("abs", "all", "any", "max", "min", "round", "sum", "pow")
)
erf, sigmoid, softplus, relu = jax.scipy.special.erf, jax.nn.sigmoid, jax.nn.softplus, jax.nn.relu
softmax, log_softmax, logsumexp = jax.nn.softmax, jax.nn.log_softmax, jax.nn.logsumexp
NAME = "jax"


def dtype_named(name: str) -> Any:
    """The type of that name, in 32 bits where JAX is not told to have 64."""
    return jax.dtypes.canonicalize_dtype(name)


def dtype_of(number: int) -> Any:
    """The type of an ONNX element type."""
    return dtype_named(dtype_name(number))


def device_of(_: Any) -> None:
    """JAX places what it makes by itself."""


def lift(value: Any, number: int, device: Any) -> Any:
    """Python numbers as an array."""
    return _standard.asarray(value, dtype=dtype_of(number))


def numbers(array: Any) -> Any:
    """An array as Python numbers; under jit it must be static."""
    return tuple(np.asarray(array).tolist()) if np.ndim(array) else np.asarray(array).item()


def branch(condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """What one of two branches gives; both must give the same shapes where the condition is traced."""
    if isinstance(condition, jax.core.Tracer):
        return jax.lax.cond(_standard.reshape(condition, ()), yes, no)
    return yes() if condition else no()


def attend(*operands: Any, **options: Any) -> Any:
    """Attention as the table writes it: XLA fuses it."""
    import hyperclone_onnx.frameworks.namespaces.jax as xp

    return _attend(xp, *operands, **options)


def scatter(flat: Any, places: Any, updates: Any, reduction: str) -> Any:
    """flat with updates put at places, or added, multiplied, ..."""
    way = {"none": "set", "add": "add", "mul": "multiply", "max": "max", "min": "min"}[reduction]
    return getattr(flat.at[places], way)(_standard.reshape(updates, (-1,)))


def convolution(x: Any, w: Any, strides: Any, dilations: Any, around: Any, group: int) -> Any:
    """The framework's own convolution."""
    return jax.lax.conv_general_dilated(
        x, w, strides, around, rhs_dilation=dilations, feature_group_count=group, precision=jax.lax.Precision.HIGHEST
    )
