"""Searches for inputs on which a model runs: cheap ones first, and none that an earlier failure rules out."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Equation
from hyperclone_onnx.algebra.evaluation import evaluate
from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.analysis.walk import infer
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import weight_bytes
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.validation.inputs.cases import Array, Case
from hyperclone_onnx.validation.inputs.equations import Equations, Sizes, equations_of
from hyperclone_onnx.validation.inputs.sizes import MANY_WEIGHTS, USUAL_ROWS, Known, Row, fitting, rows
from hyperclone_onnx.validation.inputs.values import (
    CACHED_USUAL,
    MANY_CACHED_USUAL,
    MANY_USUAL,
    UNUSUAL,
    USUAL,
    Style,
    Values,
)

Outputs = dict[str, Array]
Run = Callable[[Mapping[str, Array]], Outputs]

WANTED = 3
"""The number of input sets that we want."""

MOST_SECONDS = 8.0
"""After this many seconds of failures, we try no more."""

WAYS_OUT = "give inputs with --inputs FILE.npz, or leave out running with --no-validate"

GUESSES = 4
"""The number of equations that we guess from one failure."""


@dataclass(frozen=True)
class Wishes:
    """The user's wishes for the inputs."""

    given: tuple[Case, ...] = ()
    """The user's own input sets. If there are any, no others are tried."""
    dims: Mapping[str, int] = field(default_factory=dict)
    """Numbers for symbols."""
    seed: int = 0


@dataclass(frozen=True)
class Accepted:
    """Inputs on which the model ran, and its outputs."""

    case: Case
    outputs: Outputs

    @property
    def outputs_without_numbers(self) -> frozenset[str]:
        """The outputs without a single finite number."""
        return frozenset(name for name, array in self.outputs.items() if _lacks_numbers(array))

    @property
    def has_numbers(self) -> bool:
        """Whether some output contains a finite number, or there are no outputs."""
        return not self.outputs or len(self.outputs_without_numbers) < len(self.outputs)


def _lacks_numbers(array: Array) -> bool:
    if array.dtype.kind in "iubSUO" or not array.size:
        return False
    with np.errstate(invalid="ignore"):
        return not bool(np.isfinite(np.asarray(array, dtype=np.float64)).any())


class NoInputs(Refused):
    """Raised if the model runs on none of the inputs that were made for it. The text says what was tried."""


def find_inputs(
    dimensions: Dimensions,
    run: Run,
    wishes: Wishes | None = None,
    wanted: int = WANTED,
    first: Sequence[Row] = (),
    others: bool = True,
) -> tuple[Accepted, ...]:
    """Input sets on which a model runs, of different sizes if the model accepts them.

    Args:
        dimensions: the dimensions of the model.
        run: runs the model.
        wishes: the user's wishes for the inputs.
        wanted: the number of sets to find. There may be fewer.
        first: rows that are tried before all others.
        others: whether other rows are tried.

    Raises:
        NoInputs: the model runs on none of them.
    """
    wishes = wishes or Wishes()
    if wishes.given:
        return tuple(_run_given(case, run) for case in wishes.given)
    search = _Search(run, wishes, wanted)
    for stage in _stages(dimensions, wishes):
        search.go_through(stage, (*first, *(stage.rows() if others else ())))
        if search.accepted or search.out_of_time:
            break
    if not search.accepted and not search.without_numbers:
        raise NoInputs(search.refusal(dimensions))
    return tuple(search.accepted or search.without_numbers)


def cases(dimensions: Dimensions, seed: int = 0, dims: Mapping[str, int] | None = None) -> Iterator[Case]:
    """Input sets in the order in which they are tried, for callers that run several models on them."""
    stage = next(_stages(dimensions, Wishes(dims=dims or {}, seed=seed)))
    for number, row in enumerate(stage.rows()):
        sizes = fitting(stage.equations, row, stage.values.caches, Known(), stage.dims)
        if sizes is not None:
            yield stage.case(sizes, stage.style(number), [seed, number])
        if not stage.equations.free:
            return


def _run_given(case: Case, run: Run) -> Accepted:
    try:
        return Accepted(case, run(case.feeds))
    except RuntimeError as problem:
        raise NoInputs(f"it does not run on the inputs of {case.label}: {problem}") from problem


# -- assumptions ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    """The equations that we assume while we try rows."""

    equations: Equations
    values: Values
    dims: Sizes

    def rows(self) -> Iterator[Row]:
        """The rows that are tried, in order."""
        return rows(bool(self.values.caches), self.many)

    @cached_property
    def many(self) -> bool:
        """Whether the model has many weights."""
        return weight_bytes(self.values.dimensions.model) > MANY_WEIGHTS

    def style(self, number: int) -> Style:
        """The style for the row with this number."""
        cached = bool(self.values.caches)
        styles = (MANY_CACHED_USUAL if cached else MANY_USUAL) if self.many else (CACHED_USUAL if cached else USUAL)
        return styles[number % len(styles)]

    def case(self, sizes: Sizes, style: Style, seed: Sequence[int]) -> Case:
        """An input set."""
        style = replace(style, defaults=style.defaults and bool(self.values.defaults))
        text = ", ".join(part for part in (self.label(sizes), style.text(self.values.masked)) if part)
        return Case(text, self.values.make(sizes, style, np.random.default_rng(list(seed))))

    def label(self, sizes: Sizes) -> str:
        """The sizes in words."""
        named = {name: sizes[name] for name in self.equations.free if not name.startswith("?")}
        if len(named) == len(self.equations.free):
            return ", ".join(f"{name}={number}" for name, number in named.items()) or "fixed sizes"
        shapes = ((name, self.equations.shape(name, sizes) or ()) for name in self.equations.shapes)
        return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes)


def _stages(dimensions: Dimensions, wishes: Wishes) -> Iterator[_Stage]:
    """Weaker and weaker assumptions: all of the file; only the graph; no names of sizes; no equations at all."""
    unranked = any(value.shape is None for value in dimensions.model.graph.inputs)
    for rank in (2, 1, 0, 3, 4) if unranked else (2,):
        equations = _without_stretching(equations_of(dimensions, hints=True, rank=rank))
        yield _Stage(equations, Values(dimensions, equations), wishes.dims)
    equations = equations_of(dimensions, hints=False)
    yield _Stage(equations, Values(dimensions, equations), wishes.dims)
    nameless, dims = _without_names(dimensions, wishes.dims)
    equations = equations_of(nameless, hints=False)
    yield _Stage(equations, Values(nameless, equations), dims)
    equations = replace(equations, equations=(), least=())
    yield _Stage(equations, Values(nameless, equations), dims)


def _without_stretching(equations: Equations) -> Equations:
    """Assume that axes which are broadcast are equal, unless one of them is known to be 1."""
    sides = [(one, (one.left.static, one.right.static)) for one in equations.equations]
    return replace(
        equations,
        equations=tuple(replace(one, stretch=False) if one.stretch and 1 not in both else one for one, both in sides),
    )


def _without_names(dimensions: Dimensions, dims: Sizes) -> tuple[Dimensions, dict[str, int]]:
    """The dimensions of the model with a new symbol for every axis of its inputs, and the user's numbers for these."""
    model = dimensions.model.clone()
    numbers: dict[str, int] = {}
    count = itertools.count()
    for value in model.graph.inputs:
        if value.shape is None:
            continue
        axes: list[int | ir.SymbolicDim] = []
        for axis in value.shape.dims:
            name = f"?axis{next(count)}"
            axes.append(axis if isinstance(axis, int) else ir.SymbolicDim(name))
            if not isinstance(axis, int) and axis.value in dims:
                numbers[name] = dims[str(axis.value)]
        value.shape = ir.Shape(axes)
    return infer(model), numbers


# -- the search -------------------------------------------------------------------------------------------


class _Search:
    """Tries input sets, and keeps those on which the model ran."""

    def __init__(self, run: Run, wishes: Wishes, wanted: int) -> None:
        self.run, self.wishes, self.wanted = run, wishes, wanted
        self.accepted: list[Accepted] = []
        self.without_numbers: list[Accepted] = []
        """Sets on which the model ran, but without a finite number in its outputs."""
        self.tried: list[tuple[str, str]] = []
        """The labels of sets that failed, and the errors."""
        self.seconds_of_failures = 0.0
        self._seen: set[tuple[object, ...]] = set()
        self._guessed: set[Equation] = set()

    @property
    def out_of_time(self) -> bool:
        """Whether failures have taken too long."""
        return self.seconds_of_failures > MOST_SECONDS

    def go_through(self, stage: _Stage, wishes: Sequence[Row]) -> None:
        """Try rows until enough sets are accepted."""
        known = Known()
        for number, row in enumerate(wishes):
            usual = row in USUAL_ROWS
            if len(self.accepted) >= self.wanted or (self.out_of_time and not usual):
                break
            if not usual and len(self.accepted) > 1:
                break
            if self.accepted and not stage.equations.free and not (usual and stage.values.varied):
                break
            self._try_row(stage, row, stage.style(number), known, number)
        self._search_missing_numbers(stage)

    def _try_row(self, stage: _Stage, row: Row, style: Style, known: Known, number: int) -> None:
        """Try one row. If it fails, guess equations from the error, assume them, and try again."""
        open_stages = [stage]
        for _ in range(1 + GUESSES):
            if not open_stages:
                return
            assumed = open_stages.pop(0)
            sizes = fitting(assumed.equations, row, assumed.values.caches, known, assumed.dims)
            if sizes is None:
                continue
            problem = self._try(assumed, sizes, style, number)
            if problem is None:
                known.works(sizes)
                return
            lesson = _learn(problem, assumed, sizes)
            known.ruled_out.append(lesson.ruled_out)
            if lesson.most is not None:
                style = replace(style, most=lesson.most)
                problem = self._try(assumed, sizes, style, number)
                if problem is None:
                    return
            if self.out_of_time:
                return
            for guess in lesson.guesses:
                if guess not in self._guessed:
                    self._guessed.add(guess)
                    open_stages.append(replace(assumed, equations=assumed.equations.having(guess)))

    def _try(self, stage: _Stage, sizes: Sizes, style: Style, number: int) -> str | None:
        """Run one set. Returns the error if the model does not run."""
        case = stage.case(sizes, style, [self.wishes.seed, number])
        key = (*((name, array.shape) for name, array in case.feeds.items()), style)
        if key in self._seen:
            return None
        self._seen.add(key)
        began = time.monotonic()
        try:
            result = Accepted(case, self.run(case.feeds))
        except RuntimeError as problem:
            self.seconds_of_failures += time.monotonic() - began
            self.tried.append((case.label, str(problem)))
            if stage.values.defaults and not style.defaults:
                return self._try(stage, sizes, replace(style, defaults=True), number)
            return str(problem)
        if result.has_numbers:
            self.accepted.append(result)
        else:
            self.without_numbers.append(result)
            self._try_unusual(stage, sizes, number, frozenset())
        return None

    def _try_unusual(self, stage: _Stage, sizes: Sizes, number: int, wanted: frozenset[str]) -> None:
        """Try other values of these sizes until one of the `wanted` outputs (or any) has a finite number."""
        for style in UNUSUAL:
            if self.out_of_time:
                return
            began = time.monotonic()
            case = stage.case(sizes, style, [self.wishes.seed, number])
            try:
                result = Accepted(case, self.run(case.feeds))
            except RuntimeError as problem:
                self.tried.append((case.label, str(problem)))
                result = None
            if result is not None and result.has_numbers and (not wanted or wanted - result.outputs_without_numbers):
                self.accepted.append(result)
                return
            self.seconds_of_failures += time.monotonic() - began

    def _search_missing_numbers(self, stage: _Stage) -> None:
        """If an output has no finite number in all accepted sets, search for values that give one."""
        if not self.accepted:
            return
        missing = frozenset.intersection(*(one.outputs_without_numbers for one in self.accepted))
        if missing:
            known = Known()
            sizes = fitting(stage.equations, next(stage.rows()), stage.values.caches, known, stage.dims)
            if sizes is not None:
                self._try_unusual(stage, sizes, 0, missing)

    def refusal(self, dimensions: Dimensions) -> str:
        """What was tried, in one line."""
        names = [name for name in equations_of(dimensions).free if not name.startswith("?")]
        sizes = f", or sizes with --dim NAME=N ({', '.join(names)})" if names else ""
        tried = (
            f"{len(self.tried)} sets were tried" if self.tried else "no sizes were found that its own equations allow"
        )
        last = f"; on {self.tried[0][0]}: {self.tried[0][1]}" if self.tried else ""
        return (
            f"it runs on none of the inputs made for it: {tried}{last}. Give inputs with --inputs FILE.npz{sizes}, or "
            "leave out running with --no-validate"
        )


# -- what follows from a failure --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lesson:
    """What follows from a failed run: numbers that fail together, equations that may hold, a bound for integers."""

    ruled_out: Mapping[str, int]
    guesses: tuple[Equation, ...] = ()
    most: int | None = None


_NODE = re.compile(r"\b\w+ '([^']*)':")
_RANGE = re.compile(r"(?:range|bounds) ?\[(-?\d+), ?(\d+)\]")


def _learn(problem: str, stage: _Stage, sizes: Sizes) -> _Lesson:
    """Read an error: the node that it names, and the numbers in it."""
    match = _NODE.search(problem)
    node = _named(stage.values.dimensions.model, match[1]) if match else None
    involved = _symbols_at(node, stage) if node is not None else frozenset()
    ruled_out = {name: sizes[name] for name in stage.equations.free if name in sizes}
    if involved:
        ruled_out = {name: number for name, number in ruled_out.items() if name in involved}
    bounds = _RANGE.search(problem)
    if bounds is not None:
        # The values may be wrong, and the sizes right. So rule out these sizes only.
        full = {name: sizes[name] for name in stage.equations.free if name in sizes}
        return _Lesson(full, most=int(bounds[2]) + 1)
    said = _NODE.sub("", problem)
    guesses = [*(_guesses_at(node, stage, sizes) if node is not None else ()), *_guesses_of_numbers(said, stage, sizes)]
    return _Lesson(ruled_out, tuple(dict.fromkeys(guesses))[:GUESSES])


def _named(model: ir.Model, name: str) -> ir.Node | None:
    return next((node for node in model.graph.all_nodes() if node.name == name), None) if name else None


def _axes_at(node: ir.Node, stage: _Stage) -> list[tuple[Size, ...]]:
    """The sizes of a node's inputs."""
    dimensions = stage.values.dimensions
    operands = (dimensions.axes_of(node, index) for index, value in enumerate(node.inputs) if value is not None)
    return [tuple(dimensions.space.size(term) for term in axes) for axes in operands if axes is not None]


def _symbols_at(node: ir.Node, stage: _Stage) -> frozenset[str]:
    symbols = (stage.equations.variables(size) for axes in _axes_at(node, stage) for size in axes)
    return frozenset(name for part in symbols for name in part) & frozenset(stage.equations.free)


def _guesses_at(node: ir.Node, stage: _Stage, sizes: Sizes) -> Iterator[Equation]:
    """Equations between axes of a node's inputs, aligned at the right, whose sizes differed in the failed run."""
    for one, other in itertools.combinations(_axes_at(node, stage), 2):
        pairs = list(zip(reversed(one), reversed(other), strict=False))
        if node.op_type in ("MatMul", "Gemm") and len(one) > 1 and len(other) > 1:
            pairs = [(one[-1], other[-2])]
        for left, right in pairs:
            numbers = evaluate(left, sizes), evaluate(right, sizes)
            if None not in numbers and numbers[0] != numbers[1] and 1 not in numbers:
                yield Equation(left, right, "a failed run")


def _guesses_of_numbers(problem: str, stage: _Stage, sizes: Sizes) -> Iterator[Equation]:
    """Equations between two numbers in an error. The numbers are read as sizes or as sums of two sizes."""
    numbers = list(dict.fromkeys(int(text) for text in re.findall(r"(?<![\w.])\d{1,7}(?![\w.])", problem)))
    symbols = [Size.symbol(name) for name in stage.equations.free if name in sizes]
    sums = [one + other for one, other in itertools.combinations(symbols, 2)]
    readings: dict[int, list[Size]] = {}
    for size in (*symbols, *sums):
        value = evaluate(size, sizes)
        if value is not None and int(value) in numbers:
            readings.setdefault(int(value), []).append(size)
    for first, second in itertools.combinations(numbers, 2):
        for left in readings.get(first, ())[:2]:
            for right in readings.get(second, [Size.of(second)] if second > 1 else [])[:2]:
                yield Equation(left, right, "a failed run")
        if first not in readings and first > 1:
            for right in readings.get(second, ())[:1]:
                yield Equation(right, Size.of(first), "a failed run")
