"""Sizes and plan expressions of axes under a growth."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np

from hyperclone_onnx.algebra.dims import Concat, Dim, Product, Space, Term
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.plan.maps import (
    Axis,
    ConcatOf,
    Fill,
    Kept,
    Named,
    ProductOf,
    SourceMap,
    canonical_axis,
    grown_size,
    index_axis,
)
from hyperclone_onnx.rules.dimensions import Axes

Factors = tuple[Axis, ...]
"""The factors of one axis, outermost first."""

Power = float | tuple[float, Fill]
"""The power of the stretch of a growing part of an axis, and its fill if it has one (see `plan.maps.Named`)."""

NO_POWERS: Iterator[Power] = itertools.repeat(0)


class GrownTerms:
    """Gives the sizes of terms in the grown model, and terms as plan expressions.

    Args:
        space: the dimensions of the source graph.
        maps: the name and the source map of each dimension that grows.
    """

    def __init__(self, space: Space, maps: Mapping[Dim, tuple[str, SourceMap]]) -> None:
        self.space = space
        self.named = maps
        self.maps = dict(maps.values())

    def grows(self, term: Term) -> bool:
        """Whether any atom of the axis grows."""
        return any(atom in self.named for atom in self.space.atoms(term))

    def leaves(self, term: Term) -> list[Dim]:
        """The growing dimensions of an axis, in order. One dimension may come several times."""
        return [atom for atom in self.space.atoms(term) if atom in self.named]

    def expression(self, term: Term, powers: Iterator[Power] = NO_POWERS) -> Axis | None:
        """The axis as plan data. A part that keeps its size is one number. None if a part is symbolic.

        Args:
            term: the axis.
            powers: the power of the stretch of each of its `leaves`.
        """
        resolved = self.space.resolve(term)
        if not self.grows(resolved):
            size = self.space.static(resolved)
            return None if size is None else Kept(size)
        if isinstance(resolved, Dim):
            power = next(powers)
            return Named(self.named[resolved][0], *(power if isinstance(power, tuple) else (power,)))
        parts = resolved.factors if isinstance(resolved, Product) else resolved.segments
        expressions = tuple(self.expression(part, powers) for part in parts)
        if any(expression is None for expression in expressions):
            return None
        kind = ProductOf if isinstance(resolved, Product) else ConcatOf
        return kind(expressions)  # type: ignore[arg-type]

    def factors(self, term: Term, powers: Sequence[Power] | None = None) -> tuple[Axis, ...] | None:
        """The factors of the axis, outermost first. None if a factor is symbolic.

        Args:
            term: the axis.
            powers: the power of the stretch of each of its `leaves`; by default 0 for all.
        """
        given = NO_POWERS if powers is None else iter(powers)
        expressions = tuple(self.expression(factor, given) for factor in self.space.factors(term))
        return None if None in expressions else expressions  # type: ignore[return-value]

    def recipe_axes(self, axes: Axes, powers: Mapping[int, Sequence[Power]] | None = None) -> tuple[Factors, ...]:
        """The axes of a stored tensor as in a recipe: the factors, or one number for an axis that keeps its size.

        Args:
            axes: the axes.
            powers: by the number of an axis, the power of the stretch of each of its `leaves`.
        """
        recipe: list[Factors] = []
        for number, term in enumerate(axes):
            factors = self.factors(term, (powers or {}).get(number))
            assert factors is not None, "an initializer's axis is static"
            recipe.append(factors if self.grows(term) else (Kept(self.space.static(term) or 0),))
        return tuple(recipe)

    def canonical(self, axes: tuple[Factors, ...]) -> tuple[object, ...]:
        """Recipe axes with maps instead of the names of dimensions. Equal results mean equal grown tensors."""
        return tuple(canonical_axis(factor, self.maps) for axis in axes for factor in (*axis, Kept(0)))

    def written(self, term: Term) -> str:
        """The parts of an axis and their factors, for messages."""
        resolved = self.space.resolve(term)
        if isinstance(resolved, Dim):
            return f"{self.named[resolved][0]} x{self.growth(resolved)}" if resolved in self.named else str(resolved)
        parts = resolved.factors if isinstance(resolved, Product) else resolved.segments
        return ", ".join(map(self.written, parts)) or "a part of size 1"

    def grown(self, term: Term) -> int:
        """The length of a static axis in the grown model."""
        expression = self.expression(term)
        if expression is None:
            raise Refused(f"an axis of size {self.space.size(term)} cannot grow: its size must be known before running")
        return grown_size(expression, self.maps)

    def growth(self, term: Term) -> Fraction:
        """Grown length over source length. Symbolic factors of an axis do not count."""
        ratio = Fraction(1)
        for factor in self.space.factors(term):
            size = self.space.static(factor)
            if self.grows(factor) and size:
                ratio *= Fraction(self.grown(factor), size)
        return ratio

    def grow_alike(self, term: Term) -> bool:
        """Whether all segments of an axis grow by the same factor."""
        resolved = self.space.resolve(term)
        if isinstance(resolved, Dim):
            return True
        parts = resolved.segments if isinstance(resolved, Concat) else resolved.factors
        alike = not isinstance(resolved, Concat) or len({self.growth(part) for part in parts}) == 1
        return alike and all(map(self.grow_alike, parts))

    def position(self, term: Term, at: int) -> int:
        """The first index of the grown axis that repeats source index `at` of a static axis."""
        factors = self.factors(term)
        assert factors is not None, "the axis is static"
        return int(np.argmax(index_axis([(factor, False) for factor in factors], self.maps).source == at))

    def offset(self, term: Term, at: int) -> int:
        """The place in the grown axis of the boundary before source index `at`.

        Raises:
            Refused: no part of the axis begins there.
        """
        resolved = self.space.resolve(term)
        if at == 0:
            return 0
        if at == self.space.static(resolved):
            return self.grown(resolved)
        if not self.grows(resolved):
            return at
        if isinstance(resolved, Product):
            inner = Product(resolved.factors[1:])
            unit = self.space.static(inner) or 1
            if at % unit == 0:
                return self.offset(resolved.factors[0], at // unit) * self.grown(inner)
        if isinstance(resolved, Concat):
            moved = 0
            for segment in resolved.segments:
                size = self.space.static(segment) or 0
                if at < size:
                    return moved + self.offset(segment, at)
                at -= size
                moved += self.grown(segment)
                if at == 0:
                    return moved
        raise Refused(f"index {at} of an axis of size {self.space.size(resolved)} is not a boundary of its parts")
