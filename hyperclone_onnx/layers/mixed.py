"""Finds layers that have other nodes than one another: with rotation and without, dense and of experts.

Such layers are told by what they have in common: their ends are nodes of the same operators, the stream goes through
all of them by sums, and one of their segments is the same in all of them. Which nodes and tensors belong together is
then a question of names alone: those that differ in one number, which runs with the layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import onnx_ir as ir

from hyperclone_onnx.graphs import MOVES_OR_CASTS, bodies_of, is_initializer
from hyperclone_onnx.layers.streams import Flow, Stream, is_carried, reads

KEEPS_STREAM = MOVES_OR_CASTS | {
    "Add",
    "Dropout",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "Sub",
}
"""Operators through which the residual stream may go from the beginning of a layer to its end."""

MOST_STEPS = 3
"""A weight may go through this number of nodes (Transpose, Cast) before an activation meets it."""

T = TypeVar("T", bound=Hashable)

_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class MixedUnit:
    """One of the layers. In each list, what all layers have comes first, in one order; then follows the rest."""

    nodes: tuple[ir.Node, ...]
    stored: tuple[ir.Value, ...]
    inputs: tuple[ir.Value, ...]
    enters: ir.Value
    leaves: ir.Value


@dataclass(frozen=True)
class MixedRun:
    """Layers of which each follows the one before it, and how many of their nodes, tensors and inputs all have."""

    units: tuple[MixedUnit, ...]
    aligned: tuple[int, int, int]


def mixed_run(stream: Stream, flow: Flow, signs: Sequence[int], taken: Sequence[bool], longest: int) -> MixedRun | None:
    """The most layers in a row that have one segment in common; None where there are none.

    Args:
        stream: the stream.
        flow: who reads what in the graph.
        signs: a number for each segment; equal numbers mean the same nodes on the stream.
        taken: the segments that belong to other stacks.
        longest: the most segments of a layer.
    """
    best: MixedRun | None = None
    score = (0, 0)
    free = [not segment for segment in taken]
    if sum(free) < 2:
        return None
    weights = [is_free and _has_weights(stream, segment) for segment, is_free in enumerate(free)]
    ends = [_end(stream, segment).op_type for segment in range(len(signs))]
    for period in range(1, min(longest, sum(free) // 2) + 1):
        for start in range(len(signs) - 2 * period + 1):
            if not all(free[start : start + 2 * period]):
                continue
            count = _count(signs, weights, ends, free, start, period)
            while count > 1 and not all(_keeps_stream(stream, start + n * period, period) for n in range(count)):
                count -= 1
            if count < 2 or count * period < score[0]:
                continue
            run = _run(stream, flow, start, period, count)
            if (count * period, sum(run.aligned)) > score and any(run.aligned):
                best, score = run, (count * period, sum(run.aligned))
    return best


def _count(
    signs: Sequence[int],
    weights: Sequence[bool],
    ends: Sequence[str],
    free: Sequence[bool],
    start: int,
    period: int,
) -> int:
    """The number of layers of a period, from a segment on, that have a segment with weights in common."""
    common = {place for place in range(period) if weights[start + place]}
    count = 0
    while start + (count + 1) * period <= len(signs):
        first = start + count * period
        common = {place for place in common if signs[first + place] == signs[start + place]}
        alike = ends[first : first + period] == ends[start : start + period]
        if not common or not alike or not all(free[first : first + period]):
            break
        count += 1
    return count


def _end(stream: Stream, segment: int) -> ir.Node:
    """The last node of a segment."""
    return stream.nodes[stream.cuts[segment + 1]]


def _core(stream: Stream, first: int, period: int) -> tuple[ir.Node, ...]:
    return stream.nodes[stream.cuts[first] + 1 : stream.cuts[first + period] + 1]


def _enters(stream: Stream, first: int) -> ir.Value:
    place = stream.cuts[first]
    return stream.start if place < 0 else stream.nodes[place].outputs[0]


def _has_weights(stream: Stream, segment: int) -> bool:
    """Whether a segment reads a stored matrix."""
    pending = [(value, 0) for node in _core(stream, segment, 1) for value in reads(node)]
    while pending:
        value, steps = pending.pop()
        if is_initializer(value):
            if value.const_value is not None and len(value.const_value.shape) > 1 and value.const_value.size > 1:
                return True
            continue
        producer = value.producer()
        if producer is not None and producer.op_type in MOVES_OR_CASTS | {"DequantizeLinear"} and steps < MOST_STEPS:
            pending += [(read, steps + 1) for read in producer.inputs if read is not None]
    return False


def _keeps_stream(stream: Stream, first: int, period: int) -> bool:
    """Whether sums lead from the beginning of a layer to its end."""
    inside = set(_core(stream, first, period))
    pending, seen = [_end(stream, first + period - 1).outputs[0]], set[ir.Value]()
    wanted = _enters(stream, first)
    while pending:
        value = pending.pop()
        if value is wanted:
            return True
        node = value.producer()
        if value in seen or node is None or node not in inside or node.op_type not in KEEPS_STREAM:
            continue
        seen.add(value)
        pending += [read for read in node.inputs if read is not None]
    return False


# -- what belongs to a layer ------------------------------------------------------------------------------


def _run(stream: Stream, flow: Flow, start: int, period: int, count: int) -> MixedRun:
    owner = _owners(stream, flow, start, period, count)
    nodes = [[node for node in flow.nodes if owner.get(node) == number] for number in range(count)]
    of_graph = set(filter(is_carried, flow.inputs))
    stored = [_private(unit, owner, number, is_initializer) for number, unit in enumerate(nodes)]
    inputs = [_private(unit, owner, number, of_graph.__contains__) for number, unit in enumerate(nodes)]
    alike = _aligned(nodes, _node_names, lambda node: (node.domain, node.op_type))
    alike_stored, alike_inputs = (_aligned(values, _value_names, _form) for values in (stored, inputs))
    units = tuple(
        MixedUnit(
            _ordered(nodes[number], alike[number]),
            _ordered(stored[number], alike_stored[number]),
            _ordered(inputs[number], alike_inputs[number]),
            _enters(stream, start + number * period),
            _end(stream, start + (number + 1) * period - 1).outputs[0],
        )
        for number in range(count)
    )
    return MixedRun(units, (len(alike[0]), len(alike_stored[0]), len(alike_inputs[0])))


def _owners(stream: Stream, flow: Flow, start: int, period: int, count: int) -> dict[ir.Node, int | None]:
    """The number of the layer that has a node; None for other nodes of the stream. All others are missing.

    A layer has its nodes of the stream; what only it reads and what follows from stored tensors and its own inputs,
    such as a weight that is transposed; and what leads from it to outputs of the graph.
    """
    owner: dict[ir.Node, int | None] = dict.fromkeys(stream.nodes)
    for number in range(count):
        core = _core(stream, start + number * period, period)
        owner.update(dict.fromkeys(core, number))
        inner = (node for outer in core for body in bodies_of(outer) for node in body.all_nodes())
        owner.update(dict.fromkeys(inner, number))
    fixed = _fixed(flow)
    for node in reversed(flow.nodes):
        if node in owner or node not in fixed:
            continue
        readers = {owner.get(use.node) for value in node.outputs for use in value.uses()}
        if len(readers) == 1 and None not in readers and not any(value.is_graph_output() for value in node.outputs):
            owner[node] = next(iter(readers))
    for node, carried in zip(flow.nodes, flow.carried, strict=True):
        if node in owner or not any(is_carried(value) for value in node.outputs):
            continue
        makers = {owner.get(producer) for value in carried if (producer := value.producer()) is not None}
        if len(makers) == 1 and None not in makers:
            owner[node] = next(iter(makers))
    return owner


def _fixed(flow: Flow) -> set[ir.Node]:
    """The nodes that depend on no input of the graph, but for inputs that one node alone reads (caches)."""
    moving = {value for value in flow.inputs if not (is_carried(value) and len(list(value.uses())) == 1)}
    fixed: set[ir.Node] = set()
    for node in flow.nodes:
        if any(value in moving for value in reads(node)):
            moving.update(node.outputs)
        else:
            fixed.add(node)
    return fixed


def _private(
    nodes: Sequence[ir.Node],
    owner: dict[ir.Node, int | None],
    number: int,
    fits: Callable[[ir.Value], bool],
) -> list[ir.Value]:
    """The values of a kind that a layer alone reads, without sizes."""
    values = dict.fromkeys(value for node in nodes for value in reads(node) if fits(value))
    return [
        value
        for value in values
        if not _is_size(value)
        and all(owner.get(use.node) == number or not any(map(is_carried, use.node.outputs)) for use in value.uses())
    ]


def _is_size(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and not tensor.dtype.is_floating_point() and tensor.dtype.bitwidth > 8


# -- what belongs together --------------------------------------------------------------------------------


def _aligned(
    units: Sequence[Sequence[T]], names_of: Callable[[T], Iterable[str]], form: Callable[[T], object]
) -> list[list[T]]:
    """For each layer what all layers have, in one order: of one form, with names that differ in one number."""
    tables = [{name: thing for thing in unit for name in names_of(thing)} for unit in units]
    rows: list[list[T]] = [[] for _ in units]
    seen: set[T] = set()
    for thing in units[0]:
        for names in (list(series) for name in names_of(thing) for series in _series(name, len(units))):
            row = [table.get(name) for table, name in zip(tables, names, strict=True)]
            if all(other is not None and other not in seen and form(other) == form(thing) for other in row):
                for number, other in enumerate(row):
                    assert other is not None
                    rows[number].append(other)
                    seen.add(other)
                break
    return rows


def _form(value: ir.Value) -> object:
    return value.dtype, None if value.shape is None else [str(size) for size in value.shape.dims if type(size) is int]


def _series(name: str, count: int) -> Iterator[list[str]]:
    """The names in all layers if one of the numbers in a name is that of the layer."""
    for digits in _DIGITS.finditer(name):
        base = int(digits.group())
        if str(base) == digits.group():
            yield [f"{name[: digits.start()]}{base + step}{name[digits.end() :]}" for step in range(count)]


def _node_names(node: ir.Node) -> list[str]:
    return [name for name in (node.name, *(value.name for value in node.outputs)) if name]


def _value_names(value: ir.Value) -> list[str]:
    return [value.name] if value.name else []


def _ordered(unit: Sequence[T], first: Sequence[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys([*first, *unit]))
