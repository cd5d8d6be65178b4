"""Sizes and plan expressions of axes under a growth."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from hyperclone_onnx.algebra.dims import Concat, Dim, Product, Space, Term
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.plan.maps import (
    Axis,
    ConcatOf,
    Kept,
    Named,
    ProductOf,
    SourceMap,
    canonical_axis,
    grown_size,
    index_axis,
)
from hyperclone_onnx.rules.dimensions import Axes


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

    def expression(self, term: Term) -> Axis | None:
        """The axis as plan data. A part that keeps its size is one number. None if a part is symbolic."""
        resolved = self.space.resolve(term)
        if not self.grows(resolved):
            size = self.space.static(resolved)
            return None if size is None else Kept(size)
        if isinstance(resolved, Dim):
            return Named(self.named[resolved][0])
        parts = resolved.factors if isinstance(resolved, Product) else resolved.segments
        expressions = tuple(self.expression(part) for part in parts)
        if any(expression is None for expression in expressions):
            return None
        kind = ProductOf if isinstance(resolved, Product) else ConcatOf
        return kind(expressions)  # type: ignore[arg-type]

    def factors(self, term: Term) -> tuple[Axis, ...] | None:
        """The factors of the axis, outermost first. None if a factor is symbolic."""
        expressions = tuple(self.expression(factor) for factor in self.space.factors(term))
        return None if None in expressions else expressions  # type: ignore[return-value]

    def recipe_axes(self, axes: Axes) -> tuple[tuple[Axis, ...], ...]:
        """The axes of a stored tensor as in a recipe: the factors, or one number for an axis that keeps its size."""
        recipe: list[tuple[Axis, ...]] = []
        for term in axes:
            factors = self.factors(term)
            assert factors is not None, "an initializer's axis is static"
            recipe.append(factors if self.grows(term) else (Kept(self.space.static(term) or 0),))
        return tuple(recipe)

    def canonical(self, axes: tuple[tuple[Axis, ...], ...]) -> tuple[object, ...]:
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
