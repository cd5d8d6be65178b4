"""The arithmetic of sizes in Python numbers. A value is a number, a tuple of numbers, or a tuple of such tuples.

A framework that traces passes symbols instead of numbers. So these functions avoid decisions that depend on a number's
value or type: such a decision would fix the size in the trace, or fail.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

from hyperclone_onnx.frameworks.compiling.registry import on_host

Value = Any


def zipped(function: Callable[..., Any], *operands: Value) -> Value:
    """Apply a function elementwise. Numbers, and tuples of one element, are repeated to the length of the others."""
    lengths = [len(operand) for operand in operands if isinstance(operand, tuple)]
    if not lengths:
        return function(*operands)
    length = 0 if 0 in lengths else max(lengths)
    rows = [operand if isinstance(operand, tuple) else (operand,) for operand in operands]
    return tuple(function(*(row[i if len(row) > 1 else 0] for row in rows)) for i in range(length))


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    return -(-a // b) if (a < 0) != (b < 0) else a // b


def _modulo(a: Any, b: Any, fmod: int = 0) -> Any:
    return math.fmod(a, b) if fmod and isinstance(a, float) else (a - b * _divide(a, b) if fmod else a % b)


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "And": operator.and_,
    "Div": _divide,
    "Equal": operator.eq,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Max": lambda a, b: max(a, b),
    "Min": lambda a, b: min(a, b),
    "Mul": operator.mul,
    "Or": operator.or_,
    "Pow": operator.pow,
    "Sub": operator.sub,
}

UNARY: dict[str, Callable[[Any], Any]] = {
    "Abs": abs,
    "Ceil": math.ceil,
    "Floor": math.floor,
    "Identity": lambda a: a,
    "Neg": operator.neg,
    "Not": lambda a: not a,
    "Sqrt": math.sqrt,
}


def _register() -> None:
    for name, binary in BINARY.items():
        on_host(name)(_elementwise(binary))
    for name, unary in UNARY.items():
        on_host(name)(_mapped(unary))


def _elementwise(function: Callable[[Any, Any], Any]) -> Callable[..., Value]:
    return lambda *operands: reduce(lambda a, b: zipped(function, a, b), operands)


def _mapped(function: Callable[[Any], Any]) -> Callable[[Value], Value]:
    return lambda x: zipped(function, x)


_register()


@on_host("Mod")
def modulo(a: Value, b: Value, *, fmod: int = 0) -> Value:
    """a mod b"""
    return zipped(lambda dividend, divisor: _modulo(dividend, divisor, fmod), a, b)


@on_host("Where")
def where(condition: Value, x: Value, y: Value) -> Value:
    """x where the condition holds, else y"""
    return zipped(lambda test, yes, no: yes if test else no, condition, x, y)


@on_host("Cast")
def cast(x: Value, *, to: int, saturate: int = 1, round_mode: str = "up") -> Value:
    """numbers as integers, floats or truth values"""
    kind: Callable[[Any], Any]
    if to == 9:
        return zipped(lambda a: a != 0, x)
    kind = float if to in (1, 10, 11, 16) else _integer
    return zipped(kind, x)


def _integer(a: Any) -> Any:
    return int(a) if isinstance(a, float | bool) else a


@on_host("Concat")
def concat(*operands: Value, axis: int) -> Value:
    """the operands one after another"""
    return tuple(element for operand in operands for element in operand)


@on_host("Gather")
def gather(data: Value, indices: Value, *, axis: int = 0) -> Value:
    """data[indices]"""
    return zipped(lambda i: data[i], indices)


def _bound(value: int) -> int | None:
    return None if abs(value) >= 2**31 - 1 else value


@on_host("Slice")
def slice_(data: Value, starts: Value, ends: Value, axes: Value = None, steps: Value = None) -> Value:
    """data[start : end : step]"""
    step = 1 if steps is None else steps[0]
    return data[slice(_bound(starts[0]), _bound(ends[0]), step)]


@on_host("Squeeze")
def squeeze(x: Value, axes: Value = None) -> Value:
    """the one element"""
    return x[0] if isinstance(x, tuple) and len(x) == 1 else x


@on_host("Unsqueeze")
def unsqueeze(x: Value, axes: Value) -> Value:
    """a number as a tuple of one"""
    if isinstance(x, tuple):
        raise ValueError("sizes must have at most one axis on the host")
    return (x,)


@on_host("Reshape")
def reshape(x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    """a number, or tuples of them"""
    flat = _flat(x)
    if len(shape) > 2:
        raise ValueError("sizes must have at most two axes on the host")
    for size in reversed(shape[1:]):
        size = len(flat) // math.prod(shape[:1]) if size == -1 else size
        flat = tuple(flat[i : i + size] for i in range(0, len(flat), size))
    return flat if shape else flat[0]


def _flat(x: Value) -> tuple[Any, ...]:
    """All numbers of a value in one tuple."""
    return tuple(number for part in x for number in _flat(part)) if isinstance(x, tuple) else (x,)


@on_host("Transpose")
def transpose(x: Value, *, perm: tuple[int, ...] | None = None) -> Value:
    """rows as columns"""
    return tuple(zip(*x, strict=True)) if x and isinstance(x[0], tuple) else x


@on_host("Split")
def split(x: Value, split: Value = None, *, axis: int = 0, num_outputs: int = 0, outputs: int) -> tuple[Value, ...]:
    """the elements in groups"""
    equal = -(-len(x) // outputs)
    sizes = split if split is not None else (*[equal] * (outputs - 1), len(x) - equal * (outputs - 1))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(x[start : start + size] for start, size in zip(starts, sizes, strict=True))


@on_host("Expand")
def expand(x: Value, shape: Value) -> Value:
    """a number or one element, repeated"""
    flat = x if isinstance(x, tuple) else (x,)
    if len(shape) > 1:
        raise ValueError("sizes must have at most one axis on the host")
    return flat * shape[0] if len(flat) == 1 and shape else flat


@on_host("Tile")
def tile(x: Value, repeats: Value) -> Value:
    """the elements, repeated"""
    return x * repeats[0]


@on_host("Range")
def arange(start: Value, limit: Value, delta: Value) -> Value:
    """start, start + delta, ... up to before limit"""
    return tuple(range(start, limit, delta))


@on_host("ConstantOfShape")
def constant_of_shape(shape: Value, *, value: tuple[int, tuple[Any]] | None = None) -> Value:
    """one number everywhere"""
    _, (item,) = value or (1, (0.0,))
    if len(shape) > 1:
        raise ValueError("sizes must have at most one axis on the host")
    return (item,) * shape[0] if shape else item


@on_host("ReduceProd")
def reduce_prod(x: Value, axes: Value = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Value:
    """the product of all elements"""
    product = math.prod(x)
    return (product,) if keepdims else product


@on_host("ReduceSum")
def reduce_sum(x: Value, axes: Value = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Value:
    """the sum of all elements"""
    total = sum(x)
    return (total,) if keepdims else total


@on_host("ReduceMax")
def reduce_max(x: Value, axes: Value = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Value:
    """the largest of all elements"""
    return (max(x),) if keepdims else max(x)


@on_host("ReduceMin")
def reduce_min(x: Value, axes: Value = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Value:
    """the smallest of all elements"""
    return (min(x),) if keepdims else min(x)


@on_host("Size")
def size(x: Value) -> Value:
    """how many elements"""
    return len(x) if isinstance(x, tuple) else 1


@on_host("Shape")
def shape(x: Value, *, start: int = 0, end: int | None = None) -> Value:
    """the sizes of a value on the host"""
    return ((len(x),) if isinstance(x, tuple) else ())[slice(start, end)]
