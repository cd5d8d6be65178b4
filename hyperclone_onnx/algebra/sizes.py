"""The sizes of axes: polynomials over symbols, such as ``batch``, ``12*batch`` and ``past + sequence``."""

from __future__ import annotations

from dataclasses import dataclass

Monomial = tuple[str, ...]
"""A product of symbols, sorted, with repetition: ``("batch", "sequence")`` is batch * sequence, ``()`` is 1."""


FRACTION = "="
"""The first character of a symbol that stands for a quotient, which need not be an integer."""


def function(name: str, *operands: Size) -> Size:
    """The symbol for a function that is no polynomial. Equal functions of equal sizes are one symbol.

    >>> function("floor", Size.symbol("width"), Size.of(2)) == function("floor", Size.symbol("width"), Size.of(2))
    True
    """
    return Size.symbol(f"{name}({', '.join(map(str, operands))})")


@dataclass(frozen=True)
class Size:
    """A polynomial with integer coefficients. It is immutable, can be hashed, and is compared exactly.

    >>> str(Size.of(12) * Size.symbol("batch") + 1)
    '12*batch + 1'
    >>> (Size.symbol("batch") * 12).divided_by(Size.symbol("batch"))
    Size('12')
    """

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def of(value: int | Size) -> Size:
        """A constant as a size. A size is returned as it is."""
        if isinstance(value, Size):
            return value
        return Size((((), int(value)),)) if value else Size(())

    @staticmethod
    def symbol(name: str) -> Size:
        """The size that is one symbol."""
        return Size((((name,), 1),))

    @staticmethod
    def _from(terms: dict[Monomial, int]) -> Size:
        return Size(tuple(sorted((m, c) for m, c in terms.items() if c)))

    @property
    def static(self) -> int | None:
        """This size as an integer, None when it depends on a symbol."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and self.terms[0][0] == ():
            return self.terms[0][1]
        return None

    def static_or(self, default: int) -> int:
        """This size as an integer, `default` when it depends on a symbol."""
        value = self.static
        return default if value is None else value

    @property
    def lone_symbol(self) -> str | None:
        """The name of the symbol, where this size is one symbol and nothing else."""
        if len(self.terms) == 1:
            monomial, coefficient = self.terms[0]
            if coefficient == 1 and len(monomial) == 1:
                return monomial[0]
        return None

    @property
    def is_length(self) -> bool:
        """Whether this size is 0 or more for certain: symbols stand for sizes of axes, and none is subtracted."""
        symbolic = [coefficient for monomial, coefficient in self.terms if monomial]
        return all(c > 0 for c in symbolic) if symbolic else self.static_or(0) >= 0

    @property
    def is_whole(self) -> bool:
        """Whether this size is an integer for certain: none of its symbols stands for a quotient."""
        return not any(name.startswith(FRACTION) for name in self.symbols)

    @property
    def symbols(self) -> frozenset[str]:
        """The names of all symbols in this size."""
        return frozenset(name for monomial, _ in self.terms for name in monomial)

    def __add__(self, other: int | Size) -> Size:
        total = dict(self.terms)
        for monomial, coefficient in Size.of(other).terms:
            total[monomial] = total.get(monomial, 0) + coefficient
        return Size._from(total)

    def __neg__(self) -> Size:
        return Size(tuple((m, -c) for m, c in self.terms))

    def __sub__(self, other: int | Size) -> Size:
        return self + -Size.of(other)

    def __mul__(self, other: int | Size) -> Size:
        product: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in Size.of(other).terms:
                monomial = tuple(sorted(left + right))
                product[monomial] = product.get(monomial, 0) + a * b
        return Size._from(product)

    def divided_by(self, divisor: int | Size) -> Size | None:
        """The exact quotient, None where we find none.

        The divisor is a single monomial, or a polynomial of which this one is a multiple.
        """
        by = Size.of(divisor)
        if not by.terms:
            return None
        if len(by.terms) == 1:
            return self._divided_by_monomial(*by.terms[0])
        if len(self.terms) != len(by.terms):
            return None
        first = Size((self.terms[0],))._divided_by_monomial(*by.terms[0])
        return first if first is not None and first * by == self else None

    def _divided_by_monomial(self, monomial: Monomial, coefficient: int) -> Size | None:
        quotient: dict[Monomial, int] = {}
        for own, factor in self.terms:
            rest = list(own)
            for name in monomial:
                if name not in rest:
                    return None
                rest.remove(name)
            if factor % coefficient:
                return None
            quotient[tuple(rest)] = factor // coefficient
        return Size._from(quotient)

    def substituted(self, values: dict[str, Size]) -> Size:
        """This size with its symbols replaced by sizes, until no symbol of `values` is left."""
        if self.static is not None:
            return self
        result = self
        while not values.keys().isdisjoint(result.symbols):
            total = Size.of(0)
            for monomial, coefficient in result.terms:
                part = Size.of(coefficient)
                for name in monomial:
                    part = part * values.get(name, Size.symbol(name))
                total = total + part
            result = total
        return result

    def __str__(self) -> str:
        parts = []
        for monomial, coefficient in sorted(self.terms, key=lambda term: (-len(term[0]), term)):
            factors = ([str(coefficient)] if coefficient != 1 or not monomial else []) + list(monomial)
            parts.append("*".join(factors))
        return " + ".join(parts) or "0"

    def __repr__(self) -> str:
        return f"Size({str(self)!r})"
