"""The namespace for JAX: jax.numpy already follows the standard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as _standard
import numpy as np
from jax.numpy import *

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.compiling.namespaces import dtype_name
from hyperclone_onnx.frameworks.compiling.ops import control as _control
from hyperclone_onnx.frameworks.compiling.ops.attention import attend as _attend

bool = _standard.bool
abs, all, any, max, min, round, sum, pow = (
    getattr(_standard, name) for name in ("abs", "all", "any", "max", "min", "round", "sum", "pow")
)
erf, sigmoid, softplus, relu = jax.scipy.special.erf, jax.nn.sigmoid, jax.nn.softplus, jax.nn.relu
softmax, log_softmax, logsumexp = jax.nn.softmax, jax.nn.log_softmax, jax.nn.logsumexp
NAME = "jax"


def dtype_named(name: str) -> Any:
    """The type of a name. It has 32 bits instead of 64 unless JAX is configured for 64."""
    return jax.dtypes.canonicalize_dtype(name)


def dtype_of(number: int) -> Any:
    """The type of an ONNX element type."""
    return dtype_named(dtype_name(number))


def device_of(_: Any) -> None:
    """None: JAX chooses the device of new arrays itself."""


def lift(value: Any, number: int, device: Any) -> Any:
    """An array of Python numbers."""
    return _standard.asarray(value, dtype=dtype_of(number))


def numbers(array: Any) -> Any:
    """The elements of an array as Python numbers. Under jit the array must be static."""
    return tuple(np.asarray(array).tolist()) if np.ndim(array) else np.asarray(array).item()


def fixed(x: Any) -> Any:
    """The same numbers, through which no gradient goes."""
    return jax.lax.stop_gradient(x)


def branch(condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """The results of one of two branches. If the condition is traced, both must have the same shapes."""
    if not isinstance(condition, jax.core.Tracer):
        return yes() if condition else no()
    shapes = [[(array.shape, array.dtype) for array in jax.eval_shape(way)] for way in (yes, no)]
    if shapes[0] != shapes[1]:
        raise Refused(
            "the branches of an If make different shapes: its condition must be a value under jit, not traced"
        )
    return jax.lax.cond(_standard.reshape(condition, ()), yes, no)


def nonzero(x: Any) -> Any:  # type: ignore[no-redef,unused-ignore]
    """For each axis, the indices of the elements that are not 0."""
    try:
        return _standard.nonzero(x)
    except jax.errors.ConcretizationTypeError as problem:
        raise Refused("NonZero makes a size of data, which jax.jit cannot have: call `apply` without jit") from problem


def scan(step: Any, carry: Any, slices: Any, length: Any) -> Any:
    """carry, results = step(carry, slices[i]) for each i"""
    return jax.lax.scan(step, carry, slices, length=length)


def loop(turn: Any, trips: Any, condition: Any, states: Any, *, numbered: Any, device: Any) -> Any:
    """ONNX's Loop.

    If the count of turns is known and there is no condition, the Loop is a scan. Otherwise Python runs the turns, as
    long as it knows whether a further turn follows. If it does not know, XLA runs a `while_loop`. A `while_loop` has no
    gradient in reverse mode.
    """
    import hyperclone_onnx.frameworks.compiling.namespaces.jax as xp

    if not numbered:
        states = tuple(map(_standard.asarray, states))
        bound = None if isinstance(trips, jax.core.Tracer) else _control.whole(trips)
        if condition is None and bound is not None and _keeps_shapes(turn, states):

            def step(carry: Any, number: Any) -> Any:
                outputs = turn(number, _standard.asarray(True), *carry)
                return outputs[: len(carry)], outputs[len(carry) :]

            carry, results = jax.lax.scan(step, states, _standard.arange(bound, dtype=dtype_of(7)))
            return (*carry, *results)
    try:
        return _control.loop_in_turns(xp, turn, trips, condition, states, numbered=numbered, device=device)
    except jax.errors.ConcretizationTypeError as problem:
        if numbered:
            raise Refused(
                "a Loop computes sizes from the number of its turn, so jax.jit must know the count of turns"
            ) from problem
        return _while(turn, trips, condition, states)


def _keeps_shapes(turn: Any, states: Any) -> Any:
    """Whether a turn leaves the shapes and types of the states as they are."""
    outputs = jax.eval_shape(turn, _standard.zeros((), dtype_of(7)), _standard.asarray(True), *states)
    kinds = [(state.shape, state.dtype) for state in states]
    return kinds == [(state.shape, state.dtype) for state in outputs[: len(kinds)]]


def _while(turn: Any, trips: Any, condition: Any, states: Any) -> Any:
    """A Loop under jit whose number of turns depends on data."""
    known = int(condition is not None)
    condition = _standard.asarray(True if condition is None else condition)
    shapes = jax.eval_shape(turn, _standard.zeros((), dtype_of(7)), condition, *states)
    if len(shapes) > known + len(states):
        raise Refused(
            "a Loop stacks a result for each turn, and the count depends on data: jax.jit cannot have such a size"
        )

    def goes_on(carry: Any) -> Any:
        number, on, _ = carry
        on = _standard.reshape(on, ())
        return on if trips is None else on & (number < _standard.reshape(_standard.asarray(trips), ()))

    def step(carry: Any) -> Any:
        number, on, states = carry
        outputs = turn(number, on, *states)
        return number + 1, (outputs[0] if known else on), tuple(outputs[known:])

    return jax.lax.while_loop(goes_on, step, (_standard.zeros((), dtype_of(7)), condition, tuple(states)))[2]


def grouped_matmul(rows: Any, weight: Any, sizes: Any) -> Any:
    """Products of rows, sorted by group, with the matrix of their group. Sizes may depend on data under jit."""
    return jax.lax.ragged_dot(
        rows, weight, _standard.astype(sizes, _standard.int32), precision=jax.lax.Precision.HIGHEST
    )


def attend(*operands: Any, **options: Any) -> Any:
    """Attention by the table's equation, which XLA fuses."""
    import hyperclone_onnx.frameworks.compiling.namespaces.jax as xp

    return _attend(xp, *operands, **options)


def scatter(flat: Any, places: Any, updates: Any, reduction: str) -> Any:
    """A copy of flat in which flat[places] is set to updates, or updates are added, multiplied, ..."""
    way = {"none": "set", "add": "add", "mul": "multiply", "max": "max", "min": "min"}[reduction]
    return getattr(_standard.asarray(flat).at[places], way)(_standard.reshape(updates, (-1,)))


def convolution(x: Any, w: Any, strides: Any, dilations: Any, around: Any, group: int) -> Any:
    """The convolution of JAX. Operands of two types are promoted, as in products."""
    kind = _standard.result_type(x, w)
    return jax.lax.conv_general_dilated(
        x.astype(kind),
        w.astype(kind),
        strides,
        around,
        rhs_dilation=dilations,
        feature_group_count=group,
        precision=jax.lax.Precision.HIGHEST,
    )
