"""The view of one node of the grown model that its edit rule gets."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Concat, Product, Term, product
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import describe
from hyperclone_onnx.plan.edits import Edit, GatherOutput, ResizeVector, ScaleInput, SetAttribute, SetInput
from hyperclone_onnx.rules.dimensions import Axes, Dimensions
from hyperclone_onnx.rules.grown_terms import GrownTerms
from hyperclone_onnx.rules.op import Op


def _walks_nothing(_dimensions: Dimensions, _graph: ir.Graph) -> None:
    """Do nothing: bodies are related before anything grows."""


class GrownOp(Op):
    """One node under a growth: all that `Op` has, the grown sizes, and the edits that the rule makes."""

    def __init__(self, dimensions: Dimensions, terms: GrownTerms, node: ir.Node, opset: int) -> None:
        super().__init__(dimensions, node, opset, _walks_nothing)
        self.terms = terms
        self.edits: list[Edit] = []
        self.name = node.name or ""

    def out_axes(self, index: int) -> Axes:
        """The axes of an output."""
        return self.dimensions.axes[self.node.outputs[index]] or ()

    def grows(self, term: Term) -> bool:
        """Whether any part of the axis grows."""
        return self.terms.grows(term)

    def grown(self, term: Term) -> int:
        """The length of a static axis in the grown model."""
        return self.terms.grown(term)

    def growth(self, term: Term) -> Fraction:
        """Grown length over source length."""
        return self.terms.growth(term)

    def offset(self, term: Term, at: int) -> int:
        """Where source boundary `at` lies in the grown axis."""
        return self.terms.offset(term, at)

    def position(self, term: Term, at: int) -> int:
        """The first index of the grown axis that repeats source index `at`."""
        return self.terms.position(term, at)

    def factored(self, term: Term, inner: int) -> tuple[Term, Term]:
        """Split an axis into (outer, inner) where inner has the source size `inner`.

        If the axis consists of segments, each is split, and the outer part joins their outer parts.

        Raises:
            Refused: the axis does not end in a part of that size.
        """
        resolved = self.space.resolve(term)
        if isinstance(resolved, Concat) and self.static(resolved) != inner:
            parts = [self.factored(segment, inner) for segment in resolved.segments]
            if len({within for _, within in parts}) == 1:
                return Concat(tuple(outer for outer, _ in parts)), parts[0][1]
        else:
            outer = list(self.space.factors(resolved))
            within: Term = Product(())
            while outer and (self.static(within) or 0) < inner:
                within = product(outer.pop(), *self.space.factors(within))
            if self.static(within) == inner:
                return Product(tuple(outer)), within
        raise self.refuse(f"an axis of {self.size(resolved)} does not end in one part of {inner}")

    def refuse(self, why: str) -> Refused:
        """The error for an edit that cannot be made."""
        return Refused(f"{describe(self.node)} cannot be edited: {why}")

    # -- edits --------------------------------------------------------------------------------------------

    def set_attribute(self, name: str, value: float | Sequence[int]) -> None:
        """Give an attribute another value."""
        self.edits.append(SetAttribute(self.name, name, value if isinstance(value, int | float) else tuple(value)))

    def divide_input(self, index: int, term: Term, power: float = 1.0) -> None:
        """Divide an input by (the number of repeats of each index of `term`) ** power, the same for all of them."""
        factors = self.terms.factors(term)
        assert factors is not None
        self.edits.append(ScaleInput(self.name, index, ((-1, factors),), power))

    def remove_attribute(self, name: str) -> None:
        """Drop an attribute, if the node has it."""
        if name in self.node.attributes:
            self.edits.append(SetAttribute(self.name, name, None))

    def set_input(self, index: int, values: Sequence[int], shape: Sequence[int] | None = None) -> None:
        """Give an integer input literal elements (a vector, unless `shape` says otherwise)."""
        dimensions = (len(values),) if shape is None else tuple(shape)
        self.edits.append(SetInput(self.name, index, tuple(values), dimensions))

    def replace_elements(self, index: int, elements: Sequence[int | None]) -> None:
        """Replace elements of an integer vector input. None keeps an element as it is."""
        self._resize(index, elements, [Fraction(1)] * len(elements))

    def scale_input(self, index: int, factors: Sequence[Fraction]) -> None:
        """Multiply the elements of an integer vector input."""
        self._resize(index, [None] * len(factors), factors)

    def resize_input(self, index: int, axes: Axes, keep: tuple[int, ...]) -> None:
        """Set the elements of a shape-like input to the sizes of grown axes.

        `axes` are aligned with the vector at the right. The size of a static axis is written as a literal. An element
        for a symbolic product (batch * heads) is multiplied when the model runs. An element whose value is in `keep`,
        such as -1, has a special meaning and stays, also if it is known only when running.
        """
        elements = self.known(index)
        length = self.static(self.axes(index)[0]) if elements is None else elements.size
        axes = axes[len(axes) - (length or 0) :]
        literals: list[int | None] = []
        factors: list[Fraction] = []
        spared: int | None = None
        for position, term in enumerate(axes):
            literal, factor = None, Fraction(1)
            element = None if elements is None else elements.ravel()[position]
            stays = element is not None and element.static in keep
            if self.grows(term) and not stays:
                if self.static(term) is not None:
                    literal = self.grown(term)
                else:
                    factor = self.growth(term)
                    if element is None:
                        spared = next((number for number in keep if number != 0), None)
            literals.append(literal)
            factors.append(factor)
        self._resize(index, literals, factors, spared)

    def resize_output(self, index: int, literals: Sequence[int | None], factors: Sequence[Fraction]) -> None:
        """Change elements of an integer vector output."""
        if any(literal is not None for literal in literals) or any(factor != 1 for factor in factors):
            self.edits.append(ResizeVector(self.name, index, True, tuple(literals), _pairs(factors)))

    def _resize(
        self, index: int, literals: Sequence[int | None], factors: Sequence[Fraction], keep: int | None = None
    ) -> None:
        if all(literal is None for literal in literals) and all(factor == 1 for factor in factors):
            return
        old = self.ints(index)
        if old is None:
            self.edits.append(ResizeVector(self.name, index, False, tuple(literals), _pairs(factors), keep))
            return
        new: list[int] = []
        for literal, value, factor in zip(literals, old, factors, strict=True):
            scaled = value * factor
            new.append(literal if literal is not None else scaled.numerator // scaled.denominator)
        self.set_input(index, new)

    def gather_output(self, index: int, axis: int) -> None:
        """Repeat an output along an axis. The node itself makes the axis in the source's size.

        Raises:
            Refused: a part of the length of the axis is known only when running.
        """
        term = self.out_axes(index)[axis]
        factors = self.terms.factors(term)
        if factors is None:
            raise self.refuse(
                f"its output would be repeated along an axis of size {self.size(term)}, and a part of that size is "
                f"known only when running ({self.terms.written(term)}); keep that dimension with --set"
            )
        self.edits.append(GatherOutput(self.name, index, axis, factors))

    def shape_of(self, index: int) -> tuple[int, ...]:
        """The static shape of a small known input."""
        elements = self.known(index)
        return () if elements is None else tuple(int(n) for n in np.shape(elements))


def _pairs(factors: Sequence[Fraction]) -> tuple[tuple[int, int], ...]:
    return tuple((factor.numerator, factor.denominator) for factor in factors)
