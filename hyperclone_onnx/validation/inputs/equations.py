"""Collects equations between the sizes of a model's inputs, and solves them.

The walk over the graph has seen every relation between sizes: two axes that are added, a mask as wide as all keys, a
Reshape to sizes from elsewhere. Each relation is an equation over the symbols of the inputs. The names of the symbols
are only a hint: we assume that equal names are equal sizes, unless the model then does not run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Equation
from hyperclone_onnx.algebra.evaluation import divisors, evaluate, parse, value_of, variables_of
from hyperclone_onnx.algebra.shape_values import static_values
from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.graphs import MICROSOFT, describe
from hyperclone_onnx.rules.dimensions import Dimensions, Fact
from hyperclone_onnx.rules.op import declared_shape

Sizes = Mapping[str, int]
"""Numbers for symbols."""

SENTINEL = 1 << 24
"""Longer than any axis. A size from here on means "to the end", and gives no symbol a number."""


class Contradiction(Exception):
    """Raised if no numbers fit. The text says which equation fails."""


@dataclass(frozen=True)
class AtLeast:
    """The smallest length that a node accepts."""

    size: Size
    least: int
    place: str


@dataclass(frozen=True)
class Equations:
    """The sizes of a model's inputs, and the equations between them."""

    shapes: Mapping[str, tuple[Size, ...]]
    """The axes of every input whose rank is known."""
    free: tuple[str, ...]
    """The symbols of the inputs, in order of appearance."""
    equations: tuple[Equation, ...]
    least: tuple[AtLeast, ...]
    whole: frozenset[str] = frozenset()
    """Names that look like expressions of unknown symbols. Each of them is one symbol."""

    def having(self, *more: Equation) -> Equations:
        """These equations and more."""
        return replace(self, equations=(*self.equations, *more))

    def variables(self, size: Size) -> frozenset[str]:
        """The symbols in a size, also those inside functions."""
        names = (frozenset([s]) if s in self.whole else variables_of(s) for s in size.symbols)
        return frozenset(name for part in names for name in part)

    def shape(self, name: str, sizes: Sizes) -> tuple[int, ...] | None:
        """The shape of an input. None if a symbol has no number."""
        numbers = [_integer(evaluate(size, sizes)) for size in self.shapes[name]]
        return None if any(number is None for number in numbers) else tuple(number or 0 for number in numbers)

    def numbers(self, symbol: str) -> frozenset[int]:
        """The numbers by which the equations divide sizes with this symbol."""
        return self._numbers.get(symbol, frozenset())

    @functools.cached_property
    def _numbers(self) -> dict[str, frozenset[int]]:
        sizes = [size for shape in self.shapes.values() for size in shape]
        sizes += [side for equation in self.equations for side in (equation.left, equation.right)]
        sizes += [bound.size for bound in self.least]
        numbers: dict[str, frozenset[int]] = {}
        for size in sizes:
            for symbol in self.variables(size) if divisors(size) else ():
                numbers[symbol] = numbers.get(symbol, frozenset()) | divisors(size)
        return numbers

    def check(self, known: Sizes) -> None:
        """Check that every axis has a possible length, and is long enough.

        Raises:
            Contradiction: an axis has an impossible length, or is too short.
        """
        for bound in self.least:
            value = evaluate(bound.size, known)
            if value is not None and value < bound.least:
                raise Contradiction(f"{bound.place} needs {bound.size} to be at least {bound.least}")
        for shape in self.shapes.values():
            for size in shape:
                value = evaluate(size, known) if size.static is None else None
                if value is not None and (value < 0 or value != int(value) or value >= SENTINEL):
                    raise Contradiction(f"no axis has the length {value}")

    def solved(self, sizes: Sizes) -> Solved:
        """The given numbers, and those that follow from them.

        Raises:
            Contradiction: two numbers contradict each other.
        """
        return Solved(self, {}, self.equations).having(sizes)


@dataclass(frozen=True)
class Solved:
    """Numbers for some symbols, and the equations that are still open."""

    of: Equations
    numbers: Mapping[str, int]
    left: tuple[Equation, ...]

    def having(self, sizes: Sizes) -> Solved:
        """These numbers and more, and those that follow from them.

        Raises:
            Contradiction: two numbers contradict each other.
        """
        known = {**self.numbers, **sizes}
        left = self.left
        while True:
            still: list[Equation] = []
            before = len(known)
            for equation in left:
                values = _follow(equation, known, self.of.whole)
                if values is None:
                    still.append(equation)
                else:
                    known.update(values)
            left = tuple(still)
            if len(known) == before:
                break
        self.of.check(known)
        return Solved(self.of, known, left)


def _integer(value: Fraction | int | None) -> int | None:
    return None if value is None or value != int(value) else int(value)


def _follow(equation: Equation, known: Mapping[str, int], whole: frozenset[str]) -> dict[str, int] | None:
    """The numbers that follow from an equation: none if it holds, or one. None if several symbols have no number.

    Raises:
        Contradiction: the equation does not hold, or no length can fulfil it.
    """
    if equation.stretch:
        left, right = evaluate(equation.left, known), evaluate(equation.right, known)
        if left is not None and right is not None:
            if left != right and left != 1 and right != 1:
                raise Contradiction(f"{left} is broadcast with {right} (at {equation.place})")
            return {}
        return None
    linear = _linear(equation.left - equation.right, known, whole)
    if linear is None:
        return None
    constant, unknown = linear
    if not unknown:
        if constant != 0:
            raise Contradiction(f"{equation.left} is not {equation.right} (at {equation.place})")
        return {}
    ((name, factor),) = unknown.items()
    if factor == 0:
        return None
    value = Fraction(-constant) / factor
    if value.denominator != 1 or not 0 <= value < SENTINEL:
        raise Contradiction(f"no length makes {equation.left} equal to {equation.right} (at {equation.place})")
    return {name: int(value)}


def _linear(
    size: Size, known: Mapping[str, int], whole: frozenset[str]
) -> tuple[Fraction | int, dict[str, Fraction | int]] | None:
    """A size as a constant plus a multiple of one symbol without a number. None if it is not of this form."""
    constant: Fraction | int = 0
    unknown: dict[str, Fraction | int] = {}
    for monomial, coefficient in size.terms:
        factor: Fraction | int = coefficient
        names: list[str] = []
        for name in monomial:
            value = value_of(name, known)
            if value is not None:
                factor *= value
            elif name in whole or parse(name) is None:
                names.append(name)
            else:
                return None
        if len(names) > 1:
            return None
        if names:
            unknown[names[0]] = unknown.get(names[0], 0) + factor
        else:
            constant += factor
    return (constant, unknown) if len(unknown) < 2 else None


# -- the equations of a graph -----------------------------------------------------------------------------


def equations_of(dimensions: Dimensions, hints: bool = True, rank: int = 2) -> Equations:
    """The equations of a graph, from the relations that the walk over it has seen.

    Args:
        dimensions: the dimensions of the model.
        hints: whether to include equations that mostly hold, and the declared sizes of outputs.
        rank: the number of axes of inputs without a declared rank.
    """
    shapes = _input_shapes(dimensions, rank)
    whole = _whole_names(shapes)
    seen = [one for one in (*dimensions.space.equations, *_declared_outputs(dimensions)) if _may_hold(one)]
    seen = [equation for equation in seen if hints or not equation.hint]
    unique = dict.fromkeys(replace(equation, place="") for equation in seen)
    places: dict[Equation, str] = {}
    for equation in seen:
        places.setdefault(replace(equation, place=""), equation.place)
    equations = tuple(replace(equation, place=places[equation]) for equation in unique)
    least = dict.fromkeys(_least_lengths(dimensions))
    result = Equations(shapes, (), equations, tuple(least), whole)
    sizes = (size for shape in shapes.values() for size in shape)
    order = dict.fromkeys(name for size in sizes for name in sorted(result.variables(size)))
    return replace(result, free=tuple(order))


def _may_hold(equation: Equation) -> bool:
    """Whether any numbers can fulfil an equation. Inference may have misread a size."""
    lengths = all(side.static is None or 0 <= side.static < SENTINEL for side in (equation.left, equation.right))
    return lengths and (equation.left - equation.right).static in (None, 0)


def _input_shapes(dimensions: Dimensions, rank: int) -> dict[str, tuple[Size, ...]]:
    """The declared shapes of the inputs. An axis without a name gets a new symbol."""
    shapes: dict[str, tuple[Size, ...]] = {}
    for value in dimensions.model.graph.inputs:
        axes, declared = dimensions.axes.get(value), declared_shape(value)
        if axes is None or declared is None:
            if isinstance(value.type, ir.TensorType):
                own = (Size.symbol(f"?{value.name} axis {axis}") for axis in range(rank))
                shapes[value.name or ""] = tuple(own)
            continue
        shapes[value.name or ""] = tuple(
            size if size is not None else getattr(term, "size", None) or dimensions.space.size(term)
            for term, size in zip(axes, declared, strict=True)
        )
    return shapes


def _whole_names(shapes: Mapping[str, Iterable[Size]]) -> frozenset[str]:
    """Names like ``batch-size``, which look like expressions but contain symbols that no axis has."""
    names = {name for shape in shapes.values() for size in shape for name in size.symbols}
    plain = {name for name in names if parse(name) is None}
    return frozenset(name for name in names - plain if not variables_of(name) <= plain)


def _declared_outputs(dimensions: Dimensions) -> Iterator[Equation]:
    """Equations between declared sizes of outputs and those from inference."""
    for value in dimensions.model.graph.outputs:
        axes, declared = dimensions.axes.get(value), declared_shape(value)
        for term, size in zip(axes or (), declared or (), strict=False):
            own = dimensions.space.size(term)
            if size is not None and size != own and size.static is None and size.symbols:
                yield Equation(own, size, f"output {value.name!r}", hint=True)


def _least_lengths(dimensions: Dimensions) -> Iterator[AtLeast]:
    """The smallest lengths: a window needs one place, and a reflecting Pad more places than it pads."""
    space = dimensions.space
    for term, node in dimensions.facts[Fact.SPATIAL]:
        size = space.size(term)
        if size.static is None:
            yield AtLeast(size, 1, describe(node))
    for node in dimensions.walked:
        if (node.domain, node.op_type) == (MICROSOFT, "GroupQueryAttention"):
            yield from _sliding_cache(dimensions, node)
        if node.domain or node.op_type not in _LEAST:
            continue
        for axis, least in _LEAST[node.op_type](dimensions, node):
            axes = dimensions.axes_of(node, 0) or ()
            if axis < len(axes) and space.static(axes[axis]) is None:
                yield AtLeast(space.size(axes[axis]), least, describe(node))


def _sliding_cache(dimensions: Dimensions, node: ir.Node) -> Iterator[AtLeast]:
    """A cache of fixed size that slides must hold a whole window."""
    flag, window = (node.attributes.get(name) for name in ("sliding_window_cache", "local_window_size"))
    axes = dimensions.axes_of(node, 3) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    if flag is not None and flag.as_int() == 1 and window is not None and axes is not None and len(axes) == 4:
        size = dimensions.space.size(axes[2])
        if size.static is None:
            yield AtLeast(size, window.as_int(), describe(node))


def _reflecting_pad(dimensions: Dimensions, node: ir.Node) -> Iterator[tuple[int, int]]:
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    pads = _integers(dimensions, node, "pads", 1)
    listed = _integers(dimensions, node, "axes", 3)
    if mode not in ("reflect", "wrap") or pads is None:
        return
    rank = len(dimensions.axes_of(node, 0) or ())
    axes = [axis % rank for axis in listed] if listed is not None and rank else range(len(pads) // 2)
    more = 1 if mode == "reflect" else 0
    for position, axis in enumerate(axes):
        yield axis, max(pads[position], pads[position + len(pads) // 2]) + more


def _short_time_fourier_transform(dimensions: Dimensions, node: ir.Node) -> Iterator[tuple[int, int]]:
    length = _integers(dimensions, node, "frame_length", 3)
    window = dimensions.axes_of(node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    least = length[0] if length else dimensions.space.static(window[0]) if window else None
    if least is not None:
        yield 1, least


_LEAST = {"Pad": _reflecting_pad, "STFT": _short_time_fourier_transform}


def _integers(dimensions: Dimensions, node: ir.Node, attribute: str, index: int) -> list[int] | None:
    """Integers from an attribute, or from an input. None if they are not known."""
    if attribute in node.attributes:
        return list(node.attributes[attribute].as_ints())
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else static_values(dimensions.known.get(value))
