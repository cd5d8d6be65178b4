"""Elementwise operators: tables of equations, then the operators that depend on attributes or types."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.compiling.registry import Array, Host, implements

UNARY: dict[str, Callable[[Any, Array], Array]] = {
    "Abs": lambda xp, x: xp.abs(x),
    "Acos": lambda xp, x: xp.acos(x),
    "Acosh": lambda xp, x: xp.acosh(x),
    "Asin": lambda xp, x: xp.asin(x),
    "Asinh": lambda xp, x: xp.asinh(x),
    "Atan": lambda xp, x: xp.atan(x),
    "Atanh": lambda xp, x: xp.atanh(x),
    "BitwiseNot": lambda xp, x: xp.bitwise_invert(x),
    "Ceil": lambda xp, x: xp.ceil(x),
    "Cos": lambda xp, x: xp.cos(x),
    "Cosh": lambda xp, x: xp.cosh(x),
    "Erf": lambda xp, x: xp.erf(x),
    "Exp": lambda xp, x: xp.exp(x),
    "Floor": lambda xp, x: xp.floor(x),
    "HardSwish": lambda xp, x: x * xp.clip(x / 6 + 0.5, 0.0, 1.0),
    "Identity": lambda xp, x: x,
    "IsNaN": lambda xp, x: xp.isnan(x),
    "Log": lambda xp, x: xp.log(x),
    "Mish": lambda xp, x: x * xp.tanh(xp.softplus(x)),
    "Neg": lambda xp, x: -x,
    "Not": lambda xp, x: xp.logical_not(x),
    "Reciprocal": lambda xp, x: 1 / x,
    "Relu": lambda xp, x: xp.relu(x),
    "Round": lambda xp, x: xp.round(x),
    "Sigmoid": lambda xp, x: xp.sigmoid(x),
    "Sign": lambda xp, x: xp.sign(x),
    "Sin": lambda xp, x: xp.sin(x),
    "Sinh": lambda xp, x: xp.sinh(x),
    "Softplus": lambda xp, x: xp.softplus(x),
    "Softsign": lambda xp, x: x / (1 + xp.abs(x)),
    "Sqrt": lambda xp, x: xp.sqrt(x),
    "Tan": lambda xp, x: xp.tan(x),
    "Tanh": lambda xp, x: xp.tanh(x),
}

BINARY: dict[str, Callable[[Any, Array, Array], Array]] = {
    "Add": lambda xp, a, b: a + b,
    "And": lambda xp, a, b: a & b,
    "BitwiseAnd": lambda xp, a, b: a & b,
    "BitwiseOr": lambda xp, a, b: a | b,
    "BitwiseXor": lambda xp, a, b: a ^ b,
    "Equal": lambda xp, a, b: a == b,
    "Greater": lambda xp, a, b: a > b,
    "GreaterOrEqual": lambda xp, a, b: a >= b,
    "Less": lambda xp, a, b: a < b,
    "LessOrEqual": lambda xp, a, b: a <= b,
    "Mul": lambda xp, a, b: a * b,
    "Or": lambda xp, a, b: a | b,
    "Sub": lambda xp, a, b: a - b,
    "Xor": lambda xp, a, b: a ^ b,
}


def _register() -> None:
    for name, unary in UNARY.items():
        implements(name)(_unary(unary))
    for name, binary in BINARY.items():
        implements(name, scalars=True)(_binary(binary))


def _unary(function: Callable[[Any, Array], Array]) -> Callable[..., Array]:
    return lambda xp, x: function(xp, x)


def _binary(function: Callable[[Any, Array, Array], Array]) -> Callable[..., Array]:
    return lambda xp, a, b: function(xp, a, b)


_register()


def _is_integer(xp: Any, *operands: Array) -> bool:
    return all(
        isinstance(operand, int) if isinstance(operand, int | float) else xp.isdtype(operand.dtype, "integral")
        for operand in operands
    )


@implements("Div", scalars=True)
def divide(xp: Any, a: Array, b: Array) -> Array:
    """a / b; integers truncate towards zero"""
    if not _is_integer(xp, a, b):
        return a / b
    quotient = a // b
    inexact = (quotient * b != a) & ((a < 0) != (b < 0))
    return quotient + xp.astype(inexact, quotient.dtype)


@implements("Mod", scalars=True)
def modulo(xp: Any, a: Array, b: Array, *, fmod: int = 0) -> Array:
    """a - b floor(a / b), with the sign of b; if fmod, with the sign of a"""
    rest = a % b
    if not fmod:
        return rest
    return xp.where((rest != 0) & ((a < 0) != (b < 0)), rest - b, rest)


@implements("Pow", scalars=True)
def power(xp: Any, base: Array, exponent: Array) -> Array:
    """base ^ exponent, in the type of the base"""
    if isinstance(exponent, float) and exponent == 2:
        return base * base
    if isinstance(base, int | float):
        return base**exponent
    if not isinstance(exponent, int | float) and exponent.dtype != base.dtype:
        if _is_integer(xp, base):
            return xp.astype(xp.astype(base, xp.float64) ** xp.astype(exponent, xp.float64), base.dtype)
        exponent = xp.astype(exponent, base.dtype)
    if isinstance(exponent, float) and _is_integer(xp, base):
        return xp.astype(xp.astype(base, xp.float64) ** exponent, base.dtype)
    return base**exponent


@implements("Max", scalars=True)
def maximum(xp: Any, *operands: Array) -> Array:
    """the largest of the operands"""
    return reduce(xp.maximum, operands)


@implements("Min", scalars=True)
def minimum(xp: Any, *operands: Array) -> Array:
    """the smallest of the operands"""
    return reduce(xp.minimum, operands)


@implements("Sum")
def total(xp: Any, *operands: Array) -> Array:
    """the sum of the operands"""
    return reduce(lambda a, b: a + b, operands)


@implements("Mean")
def average(xp: Any, *operands: Array) -> Array:
    """the mean of the operands"""
    return total(xp, *operands) / len(operands)


@implements("Where", scalars=True)
def where(xp: Any, condition: Array, x: Array, y: Array) -> Array:
    """x where the condition holds, else y"""
    return xp.where(condition, x, y)


@implements("BitShift")
def bit_shift(xp: Any, x: Array, y: Array, *, direction: str) -> Array:
    """x << y or x >> y"""
    return xp.bitwise_left_shift(x, y) if direction == "LEFT" else xp.bitwise_right_shift(x, y)


@implements("PRelu")
def prelu(xp: Any, x: Array, slope: Array) -> Array:
    """x where it is at least 0, else slope x"""
    return xp.where(x < 0, slope * x, x)


@implements("Clip")
def clip(xp: Any, x: Array, min: Array | None = None, max: Array | None = None) -> Array:
    """min(max(x, min), max)"""
    if min is not None:
        x = xp.maximum(x, min if hasattr(min, "dtype") else xp.full_like(x, min))
    if max is not None:
        x = xp.minimum(x, max if hasattr(max, "dtype") else xp.full_like(x, max))
    return x


@implements("Cast")
def cast(xp: Any, x: Array, *, to: int, saturate: int = 1, round_mode: str = "up") -> Array:
    """x in another type"""
    return xp.astype(x, xp.dtype_of(to))


@implements("CastLike")
def cast_like(xp: Any, x: Array, like: Array, *, saturate: int = 1, round_mode: str = "up") -> Array:
    """x in the type of `like`"""
    return xp.astype(x, like.dtype)


@implements("Dropout")
def dropout(
    xp: Any,
    x: Array,
    ratio: Array | None = None,
    training_mode: Host | None = None,
    *,
    seed: int = 0,
    outputs: int = 1,
) -> Any:
    """x, because a graph for inference drops no elements"""
    if training_mode:
        raise Refused("Dropout in training mode has no handoff: export the model for inference")
    return x if outputs == 1 else (x, xp.ones_like(x, dtype=xp.bool))


@implements("IsInf")
def is_inf(xp: Any, x: Array, *, detect_negative: int = 1, detect_positive: int = 1) -> Array:
    """whether x is infinite, with a sign that the attributes ask for"""
    infinite = xp.isinf(x)
    if not detect_negative:
        infinite = infinite & (x > 0)
    return infinite if detect_positive else infinite & (x < 0)


@implements("Elu")
def elu(xp: Any, x: Array, *, alpha: float = 1.0) -> Array:
    """x where it is above 0, else alpha (e^x - 1)"""
    return xp.where(x > 0, x, alpha * xp.expm1(xp.minimum(x, xp.zeros_like(x))))


@implements("Celu")
def celu(xp: Any, x: Array, *, alpha: float = 1.0) -> Array:
    """max(0, x) + min(0, alpha (e^(x / alpha) - 1))"""
    return xp.where(x > 0, x, alpha * xp.expm1(xp.minimum(x, xp.zeros_like(x)) / alpha))


@implements("Selu")
def selu(xp: Any, x: Array, *, alpha: float = 1.6732632423543772, gamma: float = 1.0507009873554805) -> Array:
    """gamma x where it is above 0, else gamma alpha (e^x - 1)"""
    return gamma * elu(xp, x, alpha=alpha)


@implements("LeakyRelu")
def leaky_relu(xp: Any, x: Array, *, alpha: float = 0.01) -> Array:
    """x where it is at least 0, else alpha x"""
    return xp.where(x < 0, alpha * x, x)


@implements("ThresholdedRelu")
def thresholded_relu(xp: Any, x: Array, *, alpha: float = 1.0) -> Array:
    """x where it is above alpha, else 0"""
    return xp.where(x > alpha, x, xp.zeros_like(x))


@implements("HardSigmoid")
def hard_sigmoid(xp: Any, x: Array, *, alpha: float = 0.2, beta: float = 0.5) -> Array:
    """alpha x + beta, between 0 and 1"""
    return xp.clip(alpha * x + beta, 0.0, 1.0)


@implements("Shrink")
def shrink(xp: Any, x: Array, *, bias: float = 0.0, lambd: float = 0.5) -> Array:
    """x + bias below -lambd, x - bias above lambd, else 0"""
    return xp.where(x < -lambd, x + bias, xp.where(x > lambd, x - bias, xp.zeros_like(x)))


@implements("Swish")
def swish(xp: Any, x: Array, *, alpha: float = 1.0) -> Array:
    """x sigmoid(alpha x)"""
    return x * xp.sigmoid(x if alpha == 1 else alpha * x)


@implements("Gelu")
def gelu(xp: Any, x: Array, *, approximate: str = "none") -> Array:
    """x (1 + erf(x / sqrt 2)) / 2, or its approximation by tanh"""
    if approximate == "tanh":
        return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + xp.erf(x * math.sqrt(0.5)))
