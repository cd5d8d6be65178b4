"""The elements of small integer tensors, such as shapes, indices and lists of axes, before the model runs.

Exporters compute shapes at run time from `Shape`, `Gather`, `Concat` and arithmetic. We compute each element of such a
tensor as an exact `Size`, or None where it is unknown. The elements are sizes of the *source* model, in the grown graph
too (see `docs/design.md`, "Integers keep the source's sizes").

A rounded quotient or a maximum is no polynomial. It becomes a symbol that is named by its expression, so that two equal
computations give one symbol.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.algebra.sizes import FRACTION, Size, function

Known = npt.NDArray[np.object_]
"""An array of `Size | None` with the shape of the tensor."""

LIMIT = 1024
"""The most elements that we follow. Larger tensors are data, not shapes."""

Element = Size | None


def truncated(elements: Known) -> Known | None:
    """The elements after a conversion to integers, which rounds fractions towards zero."""
    return _mapped(lambda item: None if item is None else UNARY["Floor"](item), elements)


def known(values: Any) -> Known:
    """The known elements of nested lists, or of an array, of integers, booleans, sizes and Nones."""
    array = np.asarray(values, dtype=object)
    flat = [item if item is None else Size.of(_integer(item)) for item in array.ravel()]
    result = np.empty(len(flat), dtype=object)
    result[:] = flat
    return result.reshape(array.shape)


def _integer(item: Any) -> int | Size:
    return item if isinstance(item, Size) else int(item)


def static_values(elements: Known | None) -> list[int] | None:
    """The elements as integers in row-major order. None where one of them is not known."""
    if elements is None:
        return None
    values = [None if item is None else item.static for item in elements.ravel()]
    return None if None in values else values  # type: ignore[return-value]


def _sign(size: Size) -> int | None:
    """The sign of a size whose symbols are at least 0: 1, 0 or -1. None where the symbols decide."""
    if size.static is not None:
        return int(np.sign(size.static))
    constant = dict(size.terms).get((), 0)
    coefficients = [c for m, c in size.terms if m]
    if all(c > 0 for c in coefficients) and constant > 0:
        return 1
    if all(c < 0 for c in coefficients) and constant < 0:
        return -1
    return None


def _truth(answer: bool | None) -> Element:
    return None if answer is None else Size.of(int(answer))


def _compare(test: Callable[[int], bool]) -> Callable[[Size, Size], Element]:
    def compare(a: Size, b: Size) -> Element:
        sign = _sign(a - b)
        return None if sign is None else _truth(test(sign))

    return compare


def _divide(a: Size, b: Size) -> Element:
    exact = a.divided_by(b)
    if exact is not None:
        return exact
    if a.static is not None and b.static:
        quotient = abs(a.static) // abs(b.static)  # ONNX Div truncates towards zero
        return Size.of(quotient if (a.static < 0) == (b.static < 0) else -quotient)
    return floor_of(a, b)


def floor_of(a: Size, b: int | Size) -> Element:
    """The quotient, rounded down. None where an operand may be negative or a fraction."""
    divisor = Size.of(b)
    exact = a.divided_by(divisor)
    if exact is not None:
        return exact
    if a.static is not None and divisor.static:
        return Size.of(a.static // divisor.static)
    return function("floor", a, divisor) if _are_whole_lengths(a, divisor) else None


def ceil_of(a: Size, b: int | Size) -> Element:
    """The quotient, rounded up. None where an operand may be negative or a fraction."""
    divisor = Size.of(b)
    if a.static is not None and divisor.static:
        return Size.of(-(-a.static // divisor.static))
    exact = a.divided_by(divisor)
    if exact is not None:
        return exact
    return function("ceil", a, divisor) if _are_whole_lengths(a, divisor) else None


def _are_whole_lengths(*sizes: Size) -> bool:
    return all(size.is_length and size.is_whole for size in sizes)


def _quotient(a: Size, b: Size) -> Element:
    """The quotient in floating point. One that is no integer becomes a symbol, for the rounding that may follow."""
    exact = a.divided_by(b)
    if exact is not None or b == Size.of(0) or not _are_whole_lengths(a, b):
        return exact
    return Size.symbol(f"{FRACTION}{a}{FRACTION}{b}")


def _rounded(name: str, rounding: Callable[[Fraction], int]) -> Callable[[Size], Element]:
    """The function that rounds a size. `name` is for the symbol of a size that cannot be computed yet."""

    def rounded(size: Size) -> Element:
        if size.is_whole:
            return size
        symbol = size.lone_symbol
        if symbol is None or not symbol.startswith(FRACTION):
            return None
        above, below = symbol[len(FRACTION) :].split(FRACTION)
        if above.isdigit() and below.isdigit():
            return Size.of(rounding(Fraction(int(above), int(below))))
        return Size.symbol(f"{name}({above}, {below})")

    return rounded


def _modulo(a: Size, b: Size) -> Element:
    if a.divided_by(b) is not None:
        return Size.of(0)
    if a.static is not None and b.static:
        return Size.of(a.static % b.static)
    return function("mod", a, b) if _are_whole_lengths(a, b) else None


def _extreme(pick_larger: bool) -> Callable[[Size, Size], Element]:
    def extreme(a: Size, b: Size) -> Element:
        if a == b:
            return a
        sign = _sign(a - b)
        if sign:
            return a if (sign > 0) == pick_larger else b
        if not _are_whole_lengths(a, b):
            return None
        return function("max" if pick_larger else "min", *sorted((a, b), key=str))

    return extreme


def _both(a: Size, b: Size) -> Element:
    return _truth(bool(a.static and b.static)) if a.static is not None and b.static is not None else None


def _either(a: Size, b: Size) -> Element:
    return _truth(bool(a.static or b.static)) if a.static is not None and b.static is not None else None


BINARY: dict[str, Callable[[Size, Size], Element]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divide,
    "Mod": _modulo,
    "Max": _extreme(True),
    "Min": _extreme(False),
    "Equal": _compare(lambda sign: sign == 0),
    "Less": _compare(lambda sign: sign < 0),
    "LessOrEqual": _compare(lambda sign: sign <= 0),
    "Greater": _compare(lambda sign: sign > 0),
    "GreaterOrEqual": _compare(lambda sign: sign >= 0),
    "And": _both,
    "Or": _either,
}

UNARY: dict[str, Callable[[Size], Element]] = {
    "Neg": lambda a: -a,
    "Abs": lambda a: None if _sign(a) is None else (-a if _sign(a) == -1 else a),
    "Not": lambda a: None if a.static is None else Size.of(int(not a.static)),
    "Floor": _rounded("floor", math.floor),
    "Ceil": _rounded("ceil", math.ceil),
    "Round": _rounded("round", round),
}


def unary(op_type: str, operand: Known) -> Known | None:
    """The elements of the output of a unary operator."""
    function = UNARY[op_type]
    return _mapped(lambda item: None if item is None else function(item), operand)


def binary(op_type: str, left: Known, right: Known, integer: bool = True) -> Known | None:
    """The elements of the output of a broadcasting binary operator. Only a division of integers truncates."""
    function = BINARY[op_type] if integer or op_type != "Div" else _quotient
    return _mapped(lambda a, b: None if a is None or b is None else function(a, b), left, right)


FOLDS: dict[str, tuple[str, int | None]] = {
    "ReduceSum": ("Add", 0),
    "ReduceProd": ("Mul", 1),
    "ReduceMax": ("Max", None),
    "ReduceMin": ("Min", None),
}
"""For each reduction: the binary operator that combines two elements, and the result for no elements."""


def folded(op_type: str, elements: Known, axes: Collection[int]) -> Known | None:
    """The elements of a reduction without the reduced axes. None where nothing is known."""
    name, empty = FOLDS[op_type]
    moved = np.moveaxis(elements, sorted(axes), range(len(axes)))
    kept = moved.shape[len(axes) :]
    rows = moved.reshape(math.prod(moved.shape[: len(axes)]), math.prod(kept))
    if len(rows) == 0:
        return None if empty is None else known(np.full(kept, empty))
    total: Known = functools.reduce(functools.partial(_combined, name), rows[1:], rows[0])
    return total.reshape(kept)


def accumulated(elements: Known, axis: int, exclusive: bool, reverse: bool) -> Known:
    """The elements of the output of a CumSum along an axis."""
    moved = np.moveaxis(elements, axis, 0)[:: -1 if reverse else 1]
    rows = moved.reshape(len(moved), math.prod(moved.shape[1:]))
    sums, total = np.empty_like(rows), known(np.zeros(rows.shape[1:], dtype=int))
    for number, row in enumerate(rows):
        before, total = total, _combined("Add", total, row)
        sums[number] = before if exclusive else total
    return np.moveaxis(sums.reshape(moved.shape)[:: -1 if reverse else 1], 0, axis)


def _combined(name: str, left: Known, right: Known) -> Known:
    """The elements of a binary operator on two vectors of one length."""
    function = BINARY[name]
    both = _mapped(lambda a, b: None if a is None or b is None else function(a, b), left, right)
    assert both is not None, "both vectors are parts of a tensor that is small enough"
    return both


def where(condition: Known, left: Known, right: Known) -> Known | None:
    """The elements of the output of a ``Where``. Where the condition is unknown, both sides must be equal."""

    def choose(test: Element, a: Element, b: Element) -> Element:
        if test is None or test.static is None:
            return a if a == b else None
        return a if test.static else b

    return _mapped(choose, condition, left, right)


def span(first: int, last: int, step: int) -> tuple[int, Known | None]:
    """The length of a range, and its elements where they are few enough.

    Raises:
        ValueError: the step is 0.
    """
    if step == 0:
        raise ValueError("a step of 0")
    values = range(first, last, step)
    length = max(0, -(-(last - first) // step))  # len() ends at 2^63
    return length, known(list(values)) if length <= LIMIT else None


def _mapped(function: Callable[..., Element], *operands: Known) -> Known | None:
    try:
        shape = np.broadcast_shapes(*(elements.shape for elements in operands))
    except ValueError:  # operands that do not fit each other make nothing that is known
        return None
    if math.prod(shape) > LIMIT:
        return None
    result = np.frompyfunc(lambda *items: _bounded(function(*items)), len(operands), 1)(*operands)
    return known(result)


MOST_TERMS, LONGEST, LARGEST = 64, 4096, 2**63 - 1
"""The most terms of a size, the most letters of its symbols, and its largest coefficient.

No axis has a size beyond these.
"""


def _bounded(item: Element) -> Element:
    """The element, or None if no shape can have it. Without this, products of products would grow without end."""
    if not isinstance(item, Size):
        return item
    within = len(item.terms) <= MOST_TERMS and all(
        len(m) <= MOST_TERMS and abs(c) <= LARGEST and sum(map(len, m)) <= LONGEST for m, c in item.terms
    )
    return item if within else None
