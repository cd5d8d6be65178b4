"""Makes inputs whose values make sense for a model. Their sizes are already chosen.

| the graph does this with an input | its values |
|---|---|
| indexes a table | integers within the table; positions continue after a cache |
| takes its elements as true or false, adds them up, or hides scores with them | a mask; see `Style` |
| compares them with constants | these constants in turn, and numbers between them |
| searches for a constant in them | the constant, as often as another input has rows for it |
| takes them as lengths | lengths up to the size of the axis |
| takes them as sizes | small sizes: 1, 2, 3 |
| multiplies integers with weights | small counts |
| takes a logarithm or a root of floats, or divides by them | positive floats |
| convolves floats of four axes | numbers between 0 and 1 |
| anything else with floats | normally distributed floats |
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Product
from hyperclone_onnx.algebra.evaluation import evaluate
from hyperclone_onnx.reading.defaults import defaults_of
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.validation.inputs.cases import Array, Feeds
from hyperclone_onnx.validation.inputs.equations import Equations, Sizes
from hyperclone_onnx.validation.inputs.sizes import caches_of
from hyperclone_onnx.validation.inputs.uses import Uses, uses_of

Masks = Literal["ones", "padded", "half", "zeros", "zeros padded", "lower", "upper"]
Floats = Literal["usual", "positive", "unit", "large"]

SMALL = 10
"""Integers without another limit are less than this."""

LOWEST = -1e4
"""The number that a mask adds to scores that it hides."""

MASKED: dict[Masks, str] = {
    "half": "second half masked",
    "zeros": "masks of zeros",
    "zeros padded": "masks of zeros and then ones",
    "lower": "masks of ones up to the diagonal",
    "upper": "masks of ones above the diagonal",
}
"""What a report says of masks that are not the usual ones."""


@dataclass(frozen=True)
class Style:
    """A choice among values that all make sense."""

    masks: Masks = "ones"
    """ones; ones with padding at the end of the last row; ones in the first half; zeros; zeros with ones at the end of
    the last row; for a square mask ones up to the diagonal, or beyond it."""
    floats: Floats = "usual"
    turn: int = 0
    """The number of the constant to use, if the graph compares an input with several."""
    defaults: bool = False
    """Whether inputs that have a default keep it."""
    most: int | None = None
    """Integers are less than this, because an error of a run said so."""

    def text(self, masked: bool) -> str:
        """The unusual choices in words. `masked` says whether the model has a mask."""
        words = [MASKED[self.masks]] if masked and self.masks in MASKED else []
        words += [] if self.floats == "usual" else [f"{self.floats} floats"]
        words += [] if self.most is None else [f"integers below {self.most}"]
        words += ["inputs with defaults left out"] if self.defaults else []
        return ", ".join(words)


USUAL = (Style(), Style("padded", turn=1, defaults=True), Style("half", turn=2))
"""The styles that rows use in turn."""

CACHED_USUAL = (Style(), Style("padded", turn=1, defaults=True), Style("ones", turn=2))
"""The same for models with a cache. Kernels expect that a cache is full."""

MANY_USUAL = (Style("padded"), Style(turn=1, defaults=True), Style(turn=2))
"""The same for models with many weights: only their first set has several tokens, so that only it can be padded."""

MANY_CACHED_USUAL = (Style(), *MANY_USUAL[1:])
"""The same for models with many weights and a cache."""

UNUSUAL = (
    Style("zeros"),
    Style("zeros padded"),
    Style("lower"),
    Style("upper"),
    Style("half"),
    Style("half", "positive"),
    Style("ones", "positive"),
    Style("zeros", "positive"),
    Style("ones", "unit"),
    Style("ones", "large"),
)
"""The styles that are tried if an output contains no finite number."""


class Values:
    """Makes the inputs of one model."""

    def __init__(self, dimensions: Dimensions, equations: Equations) -> None:
        self.dimensions = dimensions
        self.equations = equations
        self.uses = uses_of(dimensions)
        self.caches = caches_of(dimensions, equations)
        self.defaults = frozenset(value.name or "" for value, _ in defaults_of(dimensions.model))
        """The inputs that may be left out."""

    @property
    def masked(self) -> bool:
        """Whether an input is, or may be, a mask."""
        inputs = self.dimensions.model.graph.inputs
        boolean = any(value.dtype == ir.DataType.BOOL for value in inputs)
        return boolean or any(uses.masks or uses.scored for uses in self.uses.values())

    @property
    def varied(self) -> bool:
        """Whether values can differ although the sizes are fixed: masks, flags, constants."""
        return bool(self.defaults) or any(uses.masks or uses.equals for uses in self.uses.values())

    def make(self, sizes: Sizes, style: Style, rng: np.random.Generator) -> Feeds:
        """Inputs of these sizes."""
        feeds: Feeds = {}
        for value in self.dimensions.model.graph.inputs:
            name = value.name or ""
            if style.defaults and name in self.defaults:
                continue
            shape = self.equations.shape(name, sizes) if name in self.equations.shapes else None
            if shape is not None and value.const_value is None:
                feeds[name] = np.asarray(self._fill(value, shape, sizes, style, rng))
        return feeds

    def _fill(
        self, value: ir.Value, shape: tuple[int, ...], sizes: Sizes, style: Style, rng: np.random.Generator
    ) -> Array:
        uses, dtype = self.uses[value.name or ""], value.dtype or ir.DataType.FLOAT
        if dtype == ir.DataType.STRING:
            return np.full(shape, "a", dtype=object)
        kind = dtype.numpy()
        if dtype.is_floating_point():
            return np.asarray(self._floats(uses, shape, style, rng)).astype(kind)
        if dtype not in _INTEGERS and dtype != ir.DataType.BOOL:
            return np.asarray(rng.standard_normal(shape) * 0.5).astype(kind)
        if dtype == ir.DataType.BOOL:
            return _mask(shape, style).astype(kind)
        return np.asarray(self._integers(value, uses, shape, sizes, style, rng)).astype(kind)

    def _floats(self, uses: Uses, shape: tuple[int, ...], style: Style, rng: np.random.Generator) -> Array:
        if uses.hides:
            return _mask(shape, style).astype(np.float64)
        if style.floats == "large":
            return rng.standard_normal(shape) * 5.0
        if uses.unitary:
            return rng.uniform(-0.9, 0.9, shape)
        if uses.positive or style.floats == "positive":
            return rng.uniform(0.1, 1.5, shape)
        if style.floats == "unit" or (uses.convolved and len(shape) == 4):
            return rng.uniform(0.0, 1.0, shape)
        usual = rng.standard_normal(shape) * 0.5
        if uses.scored and style.masks != "ones":
            return np.where(_mask(shape, style), usual, LOWEST)
        return usual

    def _integers(
        self,
        value: ir.Value,
        uses: Uses,
        shape: tuple[int, ...],
        sizes: Sizes,
        style: Style,
        rng: np.random.Generator,
    ) -> Array:
        low, high = self._range(uses, sizes, style)
        length = self._length(uses, sizes)
        if length is not None and not uses.indexes:
            return _lengths(length, shape, rng, exact=style.turn == 0)
        constants = [int(number) for number in uses.equals if float(number).is_integer() and number >= low]
        constants = [number for number in dict.fromkeys(constants) if high is None or number < high]
        past = self._past(sizes)
        if uses.indexes or (uses.ranges and past is not None) or (uses.measured and not uses.masks):
            drawn = self._positions(value, uses, shape, low, high, past, rng)
            return self._with_searched(drawn, uses, constants, sizes, style, rng)
        if constants and (uses.masks or math.prod(shape) == 1) and not set(constants) <= {0, 1}:
            choices = [*constants, *({0, 1} - set(constants))]
            return np.full(shape, choices[style.turn % len(choices)])
        if constants and not uses.masks:
            drawn = rng.integers(0, max(SMALL, max(constants) + 1), shape)
            return self._with_searched(drawn, uses, constants, sizes, style, rng)
        if uses.limits and not uses.masks:
            number = max(0, int(uses.limits[style.turn % len(uses.limits)]))
            return np.full(shape, number) if math.prod(shape) == 1 else rng.integers(0, number + 2, shape)
        if (value.dtype or ir.DataType.INT64).bitwidth == 8 and not uses.masks:
            return rng.integers(0, 100, shape)  # the bytes of an image
        if uses.sizes and not uses.masks:
            return np.full(shape, 1 + style.turn)
        mask = _mask(shape, style)
        return np.minimum(mask, style.most - 1) if style.most is not None else mask

    def _range(self, uses: Uses, sizes: Sizes, style: Style) -> tuple[int, int | None]:
        """The integers that all tables allow: from the first number to below the second."""
        low, high = 0, style.most
        for table in uses.tables if uses.indexes else ():
            size = evaluate(table.size, sizes)
            if size is None or not table.scale:
                continue
            for offset in {table.offset, table.offset + table.spread}:
                ends = sorted((end - offset) / table.scale for end in (0, int(size) - 1))
                low = max(low, math.ceil(ends[0]))
                high = min(math.floor(ends[1]) + 1, math.inf if high is None else high)  # type: ignore[assignment]
        return low, None if high is None else max(high, low + 1)

    def _length(self, uses: Uses, sizes: Sizes) -> int | None:
        """The largest length that the elements may be. None if they are no lengths."""
        limits: list[int] = []
        for value, axis, less in uses.lengths:
            axes = self.dimensions.axes.get(value) or ()
            size = evaluate(self.dimensions.space.size(axes[axis]), sizes) if -len(axes) <= axis < len(axes) else None
            if size is not None:
                limits.append(int(size) - less)
        return min(limits, default=None)

    def _past(self, sizes: Sizes) -> int | None:
        """The number of positions in the caches. None if there is no cache."""
        return max((sizes[name] for name in self.caches if name in sizes), default=None)

    def _positions(
        self,
        value: ir.Value,
        uses: Uses,
        shape: tuple[int, ...],
        low: int,
        high: int | None,
        past: int | None,
        rng: np.random.Generator,
    ) -> Array:
        """Positions in order, if the input is compared with positions or has such a name. Otherwise random ones."""
        named_so = "pos" in (value.name or "").lower() and not uses.equals
        count = shape[-1] if shape else 1
        start = (past or 0) + low
        fits = high is None or start + count <= high
        if (uses.ranges or named_so) and fits and count:
            return np.broadcast_to(np.arange(start, start + count).reshape(shape[-1:] or ()), shape)
        return rng.integers(low, SMALL + low if high is None else high, shape)

    def _with_searched(
        self, drawn: Array, uses: Uses, constants: list[int], sizes: Sizes, style: Style, rng: np.random.Generator
    ) -> Array:
        """Put each constant that the graph searches for into as many places as the graph expects."""
        drawn = np.array(drawn)
        if not constants or not drawn.size or not drawn.ndim:
            return drawn
        counts = {int(number): self._count(drawn.size, source, axis, sizes) for number, source, axis in uses.searched}
        other = next(number for number in range(len(constants) + 1) if number not in constants)
        drawn[np.isin(drawn, constants)] = other
        free = list(rng.permutation(drawn.size))
        for number, count in counts.items():
            places = [free.pop() for _ in range(min(count, len(free)))]
            drawn.reshape(-1)[places] = number
        others = [number for number in constants if number not in counts]
        if style.turn and drawn.shape[-1] > len(others) + 1:  # an end, or padding: at the end of every row
            for place, number in enumerate(others):
                drawn[..., -1 - place] = number
        return drawn

    def _count(self, size: int, source: ir.Value, width: Any, sizes: Sizes) -> int:
        """The number of places for a constant: from an equation, or else the number of rows of another input."""
        space = self.dimensions.space
        solved = self.equations.solved(sizes).numbers
        number = evaluate(space.size(width), solved)
        axes = self.dimensions.axes.get(source)
        whole = None if axes is None else evaluate(space.size(Product(axes)), solved)
        if number is not None and whole:
            return max(0, min(size, round(int(number) * size / int(whole))))
        return max(1, min([size, *self._rows_of_others(sizes)]))

    def _rows_of_others(self, sizes: Sizes) -> Iterator[int]:
        """The lengths of first axes of floating-point inputs that no integer input shares."""
        integer = {value.name or "" for value in self.dimensions.model.graph.inputs if value.dtype in _INTEGERS}
        shared = {size for name in integer & set(self.equations.shapes) for size in self.equations.shapes[name]}
        for name, shape in self.equations.shapes.items():
            if name not in integer and shape and shape[0].static is None and shape[0] not in shared:
                number = evaluate(shape[0], sizes)
                if number is not None:
                    yield int(number)


_INTEGERS = frozenset(
    dtype for dtype in ir.DataType if dtype.is_integer() and dtype != ir.DataType.BOOL and dtype.bitwidth >= 8
)


def _mask(shape: tuple[int, ...], style: Style) -> Array:
    """A mask or a flag in this style."""
    flag = math.prod(shape) == 1
    ones = not style.masks.startswith("zeros")
    mask = np.full(shape, ones)
    if flag:
        return np.logical_not(mask) if style.masks in ("padded", "zeros padded") else mask
    if not shape or shape[-1] < 2:
        return mask
    length = shape[-1]
    match style.masks:
        case "padded" | "zeros padded" if length > 2 and mask.size > length:
            mask[-1, ..., -2:] = not ones
        case "half":
            mask[..., (length + 1) // 2 :] = False
        case "lower" | "upper" if len(shape) > 1:
            rows, columns = np.ogrid[: shape[-2], :length]
            mask[...] = columns <= rows + length - shape[-2]
            return mask if style.masks == "lower" else np.logical_not(mask)
    return mask


def _lengths(longest: int, shape: tuple[int, ...], rng: np.random.Generator, exact: bool) -> Array:
    """Lengths along an axis: all the largest if `exact`, otherwise random."""
    return np.full(shape, longest) if exact else rng.integers(min(1, longest), longest + 1, shape)
