"""Computes the value of a size from numbers for its symbols, including functions in the names of symbols.

The name of a symbol may be an expression: `shape_values` makes ``floor(width, 2)``, exporters write
``floor(s43*s53, s72)`` or ``past_sequence_length + 1``. We read such a name as this expression.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from hyperclone_onnx.algebra.sizes import FRACTION, Size

Number = int | Fraction


@dataclass(frozen=True)
class Call:
    """A function of expressions, or an operator between them; a name without operands is a variable."""

    name: str
    operands: tuple[Expression, ...] = ()


Expression = Call | int


class _Undefined(Exception):
    """Raised for a division by zero."""


def _quotient(a: Number, b: Number) -> Fraction:
    if b == 0:
        raise _Undefined
    return Fraction(a) / Fraction(b)


def _remainder(a: Number, b: Number) -> Number:
    if b == 0:
        raise _Undefined
    return a % b


def _floor(a: Number, b: Number = 1) -> int:
    if b == 0:
        raise _Undefined
    return int(a // b)


def _ceil(a: Number, b: Number = 1) -> int:
    return -_floor(-a, b)


def _round(a: Number, b: Number = 1) -> int:
    return round(_quotient(a, b))


_FUNCTIONS: Mapping[str, tuple[int, int, Callable[..., Number]]] = {
    "+": (2, 2, lambda a, b: a + b),
    "-": (2, 2, lambda a, b: a - b),
    "*": (2, 2, lambda a, b: a * b),
    "/": (2, 2, _quotient),
    "//": (2, 2, _floor),
    "%": (2, 2, _remainder),
    "floor": (1, 2, _floor),
    "ceil": (1, 2, _ceil),
    "ceiling": (1, 2, _ceil),
    "round": (1, 2, _round),
    "mod": (2, 2, _remainder),
    "max": (1, 9, max),
    "min": (1, 9, min),
    "abs": (1, 1, abs),
}
"""For each function: its least and largest number of operands, and its computation."""

_ROUNDING = frozenset(["/", "//", "%", "floor", "ceil", "ceiling", "round", "mod"])


def evaluate(size: Size, values: Mapping[str, int]) -> Number | None:
    """The value of a size. None if one of its variables has no value.

    >>> evaluate(Size.symbol("floor(width, 2)") * 3 + 1, {"width": 7})
    10
    """
    total: Number = 0
    for monomial, coefficient in size.terms:
        product: Number = coefficient
        for name in monomial:
            value = value_of(name, values)
            if value is None:
                return None
            product *= value
        total += product
    return total


def value_of(name: str, values: Mapping[str, int]) -> Number | None:
    """The value of one symbol. None if one of its variables has no value."""
    if name in values:
        return values[name]
    expression = parse(name)
    try:
        return None if expression is None else _value(expression, values)
    except _Undefined:
        return None


def _value(expression: Expression, values: Mapping[str, int]) -> Number | None:
    if isinstance(expression, int):
        return expression
    if not expression.operands:
        return values.get(expression.name)
    operands = [_value(operand, values) for operand in expression.operands]
    if any(operand is None for operand in operands):
        return None
    return _FUNCTIONS[expression.name][2](*operands)


def variables(size: Size) -> frozenset[str]:
    """The variables in a size, also those inside functions."""
    return frozenset(name for symbol in size.symbols for name in variables_of(symbol))


@functools.lru_cache(maxsize=4096)
def variables_of(name: str) -> frozenset[str]:
    """The variables in one symbol: the symbol itself, unless it is an expression.

    >>> sorted(variables_of("floor(height, 2)")), sorted(variables_of("batch"))
    (['height'], ['batch'])
    """
    expression = parse(name)
    return frozenset([name]) if expression is None else frozenset(_names(expression))


def _names(expression: Expression) -> Iterator[str]:
    if isinstance(expression, Call):
        if not expression.operands:
            yield expression.name
        for operand in expression.operands:
            yield from _names(operand)


def divisors(size: Size) -> frozenset[int]:
    """The numbers by which a part of a size is divided, and the products of nested divisors.

    >>> sorted(divisors(Size.symbol("floor(floor(width, 4), 7)")))
    [4, 7, 28]
    """
    numbers: set[int] = set()
    for symbol in size.symbols:
        expression = parse(symbol)
        if expression is not None:
            numbers |= set(_divisors(expression, 1))
    return frozenset(number for number in numbers if number > 1)


def _divisors(expression: Expression, outer: int) -> Iterator[int]:
    if isinstance(expression, int) or not expression.operands:
        return
    inner = outer
    by = expression.operands[-1]
    if expression.name in _ROUNDING and len(expression.operands) == 2 and isinstance(by, int) and by > 1:
        inner = outer * by
        yield by
        yield inner
    for operand in expression.operands:
        yield from _divisors(operand, inner)


# -- reading expressions ----------------------------------------------------------------------------------

_TOKEN = re.compile(r"\s*(?:(?P<number>\d+)|(?P<name>[A-Za-z_?][\w.?:]*)|(?P<sign>//|[-+*/%(),]))")


@functools.lru_cache(maxsize=4096)
def parse(name: str) -> Expression | None:
    """A symbol's name as an expression. None if it is a plain name, or cannot be read as an expression."""
    if name.startswith(FRACTION):
        above, _, below = name[len(FRACTION) :].partition(FRACTION)
        operands = [_parse(above), _parse(below)]
        return None if None in operands else Call("/", (operands[0], operands[1]))  # type: ignore[arg-type]
    expression = _parse(name)
    return None if isinstance(expression, Call) and not expression.operands else expression


def _parse(text: str) -> Expression | None:
    tokens = _tokens(text)
    if not tokens:
        return None
    reader = _Reader(tokens)
    try:
        expression = reader.sum()
    except _Unreadable:
        return None
    return expression if reader.at_end else None


def _tokens(text: str) -> Sequence[tuple[str, str]]:
    """Pairs of a kind and a text. None if a character is unknown."""
    tokens: list[tuple[str, str]] = []
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            return ()
        tokens.append((match.lastgroup, match[match.lastgroup]))
        position = match.end()
    return tokens


class _Unreadable(Exception):
    """Raised if a text is no expression."""


class _Reader:
    """Reads sums of products of numbers, names, calls and parentheses."""

    def __init__(self, tokens: Sequence[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._next = 0

    @property
    def at_end(self) -> bool:
        return self._next == len(self._tokens)

    def _peek(self) -> tuple[str, str]:
        return ("end", "") if self.at_end else self._tokens[self._next]

    def _take(self, sign: str | None = None) -> tuple[str, str]:
        token = self._peek()
        if token[0] == "end" or (sign is not None and token[1] != sign):
            raise _Unreadable
        self._next += 1
        return token

    def sum(self) -> Expression:
        left = self._product()
        while self._peek() in (("sign", "+"), ("sign", "-")):
            left = Call(self._take()[1], (left, self._product()))
        return left

    def _product(self) -> Expression:
        left = self._unit()
        while self._peek()[0] == "sign" and self._peek()[1] in ("*", "/", "//", "%"):
            left = Call(self._take()[1], (left, self._unit()))
        return left

    def _unit(self) -> Expression:
        kind, text = self._take()
        if kind == "number":
            return int(text)
        if text == "-":
            return Call("-", (0, self._unit()))
        if text == "(":
            inside = self.sum()
            self._take(")")
            return inside
        if kind != "name":
            raise _Unreadable
        if self._peek() != ("sign", "("):
            return Call(text)
        self._take("(")
        operands = [self.sum()]
        while self._peek() == ("sign", ","):
            self._take()
            operands.append(self.sum())
        self._take(")")
        name = text.lower()
        least, most, _ = _FUNCTIONS.get(name, (1, 0, max))
        if not least <= len(operands) <= most:
            raise _Unreadable
        return Call(name, tuple(operands))
