"""Chooses numbers for the symbols of a model's inputs: which are tried, in which order, and what a failure rules out.

A `Row` is a wish: odd lengths that all differ, an empty cache, multiples of 32. The equations say what must hold.
`fitting` gives the numbers nearest to the row that fulfil all equations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.validation.inputs.equations import Contradiction, Equations, Sizes, Solved

LARGEST = 1 << 24
"""The most elements that all inputs of a set may have together."""

STEPS = 4000
"""The number of partial assignments that are tried for one row."""

LENGTHS: tuple[int, ...] = (
    *range(1, 17),
    *(18, 20, 21, 24, 25, 28, 30, 32, 35, 36, 40, 42, 48, 49, 50, 56, 60, 64, 72, 77, 80, 84, 96, 100, 112, 128, 144),
    *(160, 192, 196, 200, 224, 240, 256, 288, 320, 336, 384, 400, 448, 480, 512, 560, 600, 640, 768, 800, 896, 960),
    *(1000, 1024, 1200, 1280, 1500, 1600, 2000, 2048, 2400, 3000, 3200, 4000, 4096, 4800, 5000, 6000, 8000, 8192),
    *(10000, 12000, 16000, 16384, 24000, 32000, 48000),
)
"""The lengths that are tried. Those nearest to the wish of a row come first."""

ROOMY = 3
"""If the lengths of a row do not fit, we prefer lengths in which a window has this many places."""

MULTIPLES = 16
"""The number of multiples of a divisor that are tried too."""


@dataclass(frozen=True)
class Row:
    """A wish for the numbers of the free symbols in order of appearance. The first is mostly the batch size."""

    numbers: tuple[int, ...]
    empty_cache: bool = False

    def wish(self, index: int) -> int:
        """The number for the symbol at this place. Symbols beyond the row get odd numbers."""
        last = len(self.numbers) - 1
        return self.numbers[min(index, last)] + 2 * max(0, index - last)


PLAIN = (Row((2, 7, 3, 5)), Row((1, 5, 2, 9)), Row((3, 11, 1, 13)))
"""Odd lengths that all differ."""

CACHED = (Row((2, 7, 3, 5)), Row((3, 11, 4, 13), empty_cache=True), Row((2, 1, 6, 7)), Row((1, 5, 2, 9)))
"""The rows for models with a cache: a prompt after a filled cache, a prompt with an empty cache, one new token for each
of several sequences, and several new tokens for one sequence (on the CPU, some kernels accept only these)."""

MANY_WEIGHTS = 1 << 28
"""More bytes of weights than this are many. For each set with several tokens, ONNX Runtime rearranges all matrices
again, which takes longer than all else. A set with a single token takes a sixth of that time."""

MANY_PLAIN = (Row((2, 5, 3, 7)), Row((1, 1, 2, 9)))
"""The rows of a model with many weights: several tokens for each of two sequences, and a single token."""

MANY_CACHED = (Row((2, 3, 4, 5)), Row((1, 1, 4, 13), empty_cache=True), Row((1, 1, 6, 7)))
"""The same if it has a cache: the single token comes before and after a cache."""

USUAL_ROWS = frozenset((*PLAIN, *CACHED, *MANY_PLAIN, *MANY_CACHED))
"""The rows that are tried first, of any model."""

FURTHER = (
    Row((2, 8, 8, 8)),
    Row((1, 1, 6, 7)),
    Row((2, 32, 32, 32)),
    Row((1, 64, 64, 64)),
    Row((1, 7, 3, 5), empty_cache=True),
    Row((1, 16, 16, 16)),
    Row((4, 4, 4, 4)),
    Row((1, 224, 224, 224)),
    Row((1, 400, 400, 400)),
    Row((2, 1000, 100, 100)),
    Row((1, 4000, 100, 100)),
    Row((1, 16000, 100, 100)),
)
"""The rows that are tried if none before works: equal lengths, round lengths, images, sound."""


def rows(cached: bool, many: bool = False) -> Iterator[Row]:
    """The rows that are tried, in order.

    Args:
        cached: whether the model has a cache.
        many: whether it has many weights.
    """
    if many:
        yield from MANY_CACHED if cached else MANY_PLAIN
    else:
        yield from CACHED if cached else PLAIN
    yield from FURTHER


@dataclass
class Known:
    """What earlier runs have shown."""

    ruled_out: list[Mapping[str, int]] = field(default_factory=list)
    """Numbers that fail together, for any numbers of the other symbols."""
    used: dict[str, set[int]] = field(default_factory=dict)
    """Numbers with which the model ran. Other numbers come first, so that the sets differ."""

    def works(self, sizes: Sizes) -> None:
        """Note numbers with which the model ran."""
        for name, number in sizes.items():
            self.used.setdefault(name, set()).add(number)

    def rules_out(self, sizes: Sizes) -> bool:
        """Whether numbers are known to fail."""
        return any(all(sizes.get(name) == number for name, number in ruled_out.items()) for ruled_out in self.ruled_out)


def fitting(equations: Equations, row: Row, caches: Sequence[str], known: Known, given: Sizes) -> dict[str, int] | None:
    """Numbers for all symbols, near the wishes of a row, that fulfil all equations. None if there are none.

    Args:
        equations: the equations and the smallest lengths.
        row: the wishes.
        caches: the symbols that are lengths of caches.
        known: what earlier runs have shown.
        given: numbers that the user has chosen.
    """
    sizes = _fitting(equations, row, caches, known, given)
    if sizes is None or all(sizes[name] in (*row.numbers, 0) for name in equations.free):
        return sizes
    # The row's own numbers are too small for a window. Prefer numbers that give several windows.
    roomy = tuple(replace(bound, least=max(bound.least, ROOMY)) for bound in equations.least)
    more = _fitting(replace(equations, least=roomy), row, caches, known, given) if roomy else None
    return more or sizes


def _fitting(
    equations: Equations, row: Row, caches: Sequence[str], known: Known, given: Sizes
) -> dict[str, int] | None:
    wished: set[str] = set()
    steps = itertools.count()

    def wish(name: str, numbers: Sizes) -> int:
        if row.empty_cache and name in caches:
            return 0
        # A symbol that follows from others uses no number of the row.
        before = equations.free[: equations.free.index(name)]
        place = sum(other in wished or other not in numbers for other in before)
        wished.add(name)
        return row.wish(place)

    def assign(solved: Solved, order: Sequence[str]) -> dict[str, int] | None:
        left = [name for name in order if name not in solved.numbers]
        if not left:
            sizes = dict(solved.numbers)
            return sizes if _acceptable(equations, sizes, caches) and not known.rules_out(sizes) else None
        name = left[0]
        wanted, used = wish(name, solved.numbers), known.used.get(name, set())
        for number in candidates(equations, name, wanted, used, may_be_empty=name in caches):
            if next(steps) > STEPS:
                return None
            try:
                result = assign(solved.having({name: number}), left[1:])
            except Contradiction:
                continue
            if result is not None:
                return result
        return None

    try:
        start = equations.solved({name: given[name] for name in equations.free if name in given})
    except Contradiction:
        return None
    return assign(start, _in_order(equations, caches))


def _in_order(equations: Equations, caches: Sequence[str]) -> list[str]:
    """The free symbols in the order in which they get numbers.

    First come symbols inside functions, since a function cannot be solved for its symbol. Then come the caches, since
    totals follow from them.
    """
    inside = {name for name in equations.free if equations.numbers(name)}
    several = len(inside) > 1
    return sorted(equations.free, key=lambda name: (several and name not in inside, name not in caches))


def candidates(
    equations: Equations, name: str, wanted: int, used: Collection[int] = (), may_be_empty: bool = False
) -> Iterator[int]:
    """Numbers for one symbol: the wish, multiples of its divisors, then numbers near the wish."""
    divisors = equations.numbers(name)
    near = {divisor * times for divisor in divisors for times in range(1, MULTIPLES + 1)}
    whole = max(divisors, default=0)
    groups = [[wanted], [whole * times for times in range(1, MULTIPLES + 1)] if whole else []]
    groups.append([*LENGTHS, *near, *([0] if may_be_empty else [])])
    seen: set[int] = set()

    def order(number: int) -> tuple[bool, float, int]:
        return number in used, abs(math.log((number or 0.5) / (wanted or 0.5))), number

    for group in groups:
        for number in sorted(group, key=order):
            if number not in seen:
                seen.add(number)
                yield number


def _acceptable(equations: Equations, sizes: Sizes, caches: Sequence[str]) -> bool:
    """Whether inputs of these sizes are small enough, and only caches are empty."""
    total = 0
    for name, axes in equations.shapes.items():
        shape = equations.shape(name, sizes) or ()
        total += math.prod(shape)
        for size, length in zip(axes, shape, strict=False):
            if length == 0 and size.static is None and not equations.variables(size).intersection(caches):
                return False
    return total <= LARGEST


def caches_of(dimensions: Dimensions, equations: Equations) -> tuple[str, ...]:
    """The symbols of caches: they are on several inputs, all of them floating-point with three axes or more."""
    floating = {
        value.name or "": value.dtype is not None and value.dtype.is_floating_point()
        for value in dimensions.model.graph.inputs
    }
    on: dict[str, list[bool]] = {}
    for name, shape in equations.shapes.items():
        for size in shape:
            symbol = size.lone_symbol
            if symbol is not None:
                on.setdefault(symbol, []).append(len(shape) >= 3 and floating[name])
    batch = {shape[0].lone_symbol for shape in equations.shapes.values() if shape}
    return tuple(
        symbol
        for symbol, seen in on.items()
        if all(seen) and len(seen) > 1 and symbol in equations.free and symbol not in batch
    )
