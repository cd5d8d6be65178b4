"""Finds the stacks of layers in a graph.

The cuts of a stream divide it into segments. A run of segments that repeats is a candidate: `attention, feed-forward,
attention, feed-forward` has the period two. The units of a run are then compared node by node. Where units are alike
only every second time (local attention alternating with global), the unit is the longer period. Where no period
repeats, layers of several kinds are units that are alike but for their kind, or that have a part alike (`mixed.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from hyperclone_onnx.graphs import is_initializer
from hyperclone_onnx.layers.matching import COMMUTATIVE, Match, Part, match
from hyperclone_onnx.layers.mixed import mixed_run
from hyperclone_onnx.layers.numbering import count_numbered
from hyperclone_onnx.layers.streams import Flow, Stream, is_carried, reads

LONGEST_PERIOD = 64
"""The most segments that a layer may have."""


@dataclass(frozen=True)
class Unit:
    """One layer, or one period of layers that are not all alike.

    Equal positions in two units match, as far as `Stack.aligned` says.
    """

    nodes: tuple[ir.Node, ...]
    stored: tuple[ir.Value, ...]
    """The stored tensors that it reads and that differ from layer to layer."""
    inputs: tuple[ir.Value, ...]
    """The inputs of the graph that it alone reads, such as its cache."""
    enters: tuple[ir.Value | None, ...]
    """The values of the stream that it reads."""
    leaves: tuple[ir.Value | None, ...]
    """The values of the stream that the next layer reads, in the same order."""


@dataclass(frozen=True)
class Stack:
    """Layers of which each follows the one before it."""

    name: str
    units: tuple[Unit, ...]
    period: int = 1
    """The number of layers in a unit."""
    aligned: tuple[int, int, int] | None = None
    """How many nodes, stored tensors and inputs match in all units: the first ones of each unit. None means all."""

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.units) * self.period


def find_stacks(graph: ir.Graph) -> list[Stack]:
    """Find the stacks of layers of a graph, in its order.

    Args:
        graph: a normalised graph without norms that are fused with an Add (see `unfusing`).
    """
    flow = Flow(graph)
    runs: list[_Run] = []
    inside: set[ir.Node] = set()
    for start in flow.starts():
        readers = [use.node for use in start.uses()]
        if readers and all(node in inside for node in readers):
            continue
        stream = flow.stream(start)
        if stream is not None:
            for run in _runs(stream, flow):
                runs.append(run)
                inside.update(run.nodes)
    first = {run: min(flow.place[node] for node in run.nodes) for run in runs}
    runs.sort(key=lambda run: (-len(run.nodes), first[run]))
    chosen: list[_Run] = []
    for run in runs:
        if all(run.nodes.isdisjoint(other.nodes) for other in chosen):
            chosen.append(run)
    chosen.sort(key=lambda run: first[run])
    if len(chosen) == 2 and _reads_across(chosen[1], chosen[0], flow):
        chosen.reverse()  # an encoder comes first, wherever its nodes stand
    names = _names(chosen, flow)
    return [Stack(name, run.units, run.period, run.aligned) for name, run in zip(names, chosen, strict=True)]


# -- runs of segments -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Run:
    units: tuple[Unit, ...]
    period: int
    nodes: frozenset[ir.Node]
    aligned: tuple[int, int, int] | None = None


def _runs(stream: Stream, flow: Flow) -> Iterator[_Run]:
    """The runs of layers on a stream that do not overlap, longest first."""
    signs = _signatures(stream)
    segments = len(signs)
    taken = [False] * segments
    for start, length, period in sorted(_repeats(signs), key=lambda repeat: (-repeat[1], repeat[2], repeat[0])):
        if any(taken[start : start + length]):
            continue
        best: _Run | None = None
        repeats = length // period
        for multiple in range(1, max(repeats // 2, 1) + 1):
            run = _best_rotation(stream, start, length, period, multiple)
            if run is not None and (best is None or len(run.nodes) > len(best.nodes)):
                best = run
            if run is not None and len(run.units) * multiple >= repeats:
                break
        if best is None or len(best.units) * best.period < repeats:  # layers of several kinds, in no whole groups
            run = _best_rotation(stream, start, length, period, 1, kinds=True)
            if run is not None and (best is None or len(run.nodes) > len(best.nodes)):
                best = run
        if best is not None:
            taken[start : start + length] = [True] * length
            yield best
    mixed = mixed_run(stream, flow, signs, taken, LONGEST_PERIOD)
    if mixed is not None:
        units = tuple(
            Unit(unit.nodes, unit.stored, unit.inputs, (unit.enters,), (unit.leaves,)) for unit in mixed.units
        )
        yield _Run(units, 1, frozenset(node for unit in units for node in unit.nodes), mixed.aligned)


def _signatures(stream: Stream) -> list[int]:
    """A number for each segment. Segments with the same nodes on the stream have the same number.

    Segment k ends with cut k + 1 and begins behind cut k. What joins from outside the stream is not compared here.
    """
    known: dict[object, int] = {}
    signs: list[int] = []
    for first, last in zip(stream.cuts, stream.cuts[1:], strict=False):
        entering = set(stream.nodes[first].outputs) if first >= 0 else {stream.start}
        codes: dict[ir.Node, int] = {}
        for node in stream.nodes[first + 1 : last + 1]:
            inputs: list[object] = []
            for value in node.inputs:
                producer = None if value is None else value.producer()
                if value is not None and value in entering:
                    inputs.append(("enters", value.index()))
                elif value is not None and producer is not None and producer in codes:
                    inputs.append((codes[producer], value.index()))
                elif value is not None and is_initializer(value) and value.const_value is not None:
                    inputs.append((value.const_value.dtype, tuple(value.const_value.shape.numpy())))
            if node.op_type in COMMUTATIVE:
                inputs.sort(key=repr)
            codes[node] = known.setdefault((node.op_type, node.domain, tuple(inputs)), len(known))
        signs.append(codes[stream.nodes[last]])
    return signs


def _repeats(signs: list[int]) -> Iterator[tuple[int, int, int]]:
    """Runs that repeat: (first segment, number of segments, period), of least periods."""
    seen: set[tuple[int, int]] = set()
    for period in range(1, min(LONGEST_PERIOD, len(signs) // 2) + 1):
        start: int | None = None
        for place in range(len(signs) - period + 1):
            same = place + period < len(signs) and signs[place] == signs[place + period]
            if same and start is None:
                start = place
            elif not same and start is not None:
                length = place - start + period
                if not any(a <= start and start + length <= b for a, b in seen):
                    seen.add((start, start + length))
                    yield start, length, period
                start = None


def _best_rotation(
    stream: Stream, start: int, length: int, period: int, multiple: int, *, kinds: bool = False
) -> _Run | None:
    """The layers of a run: of all places at which the first can begin, where the most are alike.

    Where several are equally good, the layers whose tensors are numbered decide: a number is made for what belongs
    together.
    """
    step = period * multiple
    best: _Run | None = None
    score = (0, 0)
    for offset in range(min(step, length - step + 1)):
        run = _longest(stream, start + offset, (length - offset) // step, step, multiple, kinds)
        if run is None or not _has_weights(run):
            continue
        own_score = (
            len(run.units),
            count_numbered([[value.name or "" for value in unit.stored] for unit in run.units], multiple),
        )
        if own_score > score:
            best, score = run, own_score
    return best


def _has_weights(run: _Run) -> bool:
    stored = [value.const_value for value in run.units[0].stored]
    stored += [value.const_value for node in run.units[0].nodes for value in node.inputs if value is not None]
    return any(tensor is not None and tensor.size > 1 and not _is_plain_integer(tensor) for tensor in stored)


def _is_plain_integer(tensor: ir.TensorProtocol) -> bool:
    return not tensor.dtype.is_floating_point() and tensor.dtype.bitwidth > 8


def _longest(stream: Stream, first: int, count: int, step: int, multiple: int, kinds: bool) -> _Run | None:
    """The most units in a row that are alike, from a segment on."""
    best: list[Match] = []
    begin = start = 0
    parts = [_part(stream, first + number * step, step) for number in range(count)]
    while count - start > len(best):
        # The first layer is a special one more often than the second, so the others are compared with the second.
        template = parts[min(start + 1, count - 1)]
        row: list[Match] = []
        for part in parts[start:]:
            pairs = Match() if part is template else match(template, part, kinds=kinds)
            if pairs is None:
                break
            row.append(pairs)
        if len(row) > len(best):
            best, begin = row, start
        start += max(len(row), 1)
    template = parts[min(begin + 1, count - 1)]
    earlier = _earlier_part(stream, first + begin * step)
    pairs = match(template, earlier, loose=True, kinds=kinds)
    ends = [part.end for part in parts[begin : begin + len(best)]]
    if pairs is not None and _stands_alone(pairs, earlier):
        return _run_of(stream, [earlier.end, *ends], [pairs, *best], multiple, pairs.enters)
    if len(best) < 2:
        return None
    return _run_of(stream, ends, best, multiple, _entering(stream, first + begin * step))


def _entering(stream: Stream, cut: int) -> dict[int, ir.Value]:
    """The values that leave a cut, by number."""
    place = stream.cuts[cut]
    return {0: stream.start} if place < 0 else {value.index() or 0: value for value in stream.nodes[place].outputs}


def _part(stream: Stream, segment: int, step: int) -> Part:
    first, last = stream.cuts[segment], stream.cuts[segment + step]
    enters = {value: number for number, value in _entering(stream, segment).items()}
    return Part(enters, frozenset(stream.nodes[first + 1 : last + 1]), stream.nodes[last])


def _earlier_part(stream: Stream, cut: int) -> Part:
    """All of a stream up to a cut."""
    nodes = stream.nodes[: stream.cuts[cut] + 1]
    return Part({}, frozenset(nodes), nodes[-1] if nodes else stream.nodes[0])


def _stands_alone(pairs: Match, part: Part) -> bool:
    """Whether nothing else on the stream before the end of a part reads what the matched nodes compute."""
    matched = set(pairs.nodes.values())
    if not part.core & matched:
        return False
    inner = {value for node in matched if node is not part.end for value in node.outputs if is_carried(value)}
    return not any(value in inner for node in part.core - matched for value in node.inputs)


def _run_of(
    stream: Stream, ends: list[ir.Node], matches: list[Match], multiple: int, enters: dict[int, ir.Value]
) -> _Run:
    """The units of parts that all match one of them, the template, whose own pairs are empty."""
    others = [pairs for pairs in matches if pairs.nodes]
    kept = [node for node in others[0].nodes if all(node in pairs.nodes for pairs in others)]
    read = {value for node in kept for value in reads(node)}
    stored = [value for value in dict.fromkeys(value for pairs in others for value in pairs.stored) if value in read]
    inputs = [value for value in others[0].inputs if all(value in pairs.inputs for pairs in others)]
    numbers = sorted({number for pairs in others for number in pairs.enters})
    units: list[Unit] = []
    for end, pairs in zip(ends, matches, strict=True):
        leaves = tuple(end.outputs[number] if number < len(end.outputs) else None for number in numbers)
        unit = Unit(
            tuple(pairs.nodes.get(node, node) for node in kept),
            tuple(pairs.stored.get(value, value) for value in stored),
            tuple(pairs.inputs.get(value, value) for value in inputs),
            units[-1].leaves if units else tuple(enters.get(number) for number in numbers),
            leaves,
        )
        units.append(unit)
    nodes = frozenset(node for unit in units for node in unit.nodes)
    return _Run(tuple(units), multiple, nodes)


# -- names ------------------------------------------------------------------------------------------------


def _names(runs: list[_Run], flow: Flow) -> list[str]:
    """What people call the stacks: encoder and decoder, where each layer of the one reads the last of the other."""
    if len(runs) == 1:
        return ["layers"]
    if len(runs) == 2 and _reads_across(runs[0], runs[1], flow):
        return ["encoder", "decoder"]
    return [f"stack{number}" for number in range(len(runs))]


def _reads_across(encoder: _Run, decoder: _Run, flow: Flow) -> bool:
    reached = {value for value in encoder.units[-1].leaves if value is not None}
    for node, carried in zip(flow.nodes, flow.carried, strict=True):
        if node not in encoder.nodes and any(value in reached for value in carried):
            reached.update(value for value in node.outputs if is_carried(value))
    first = decoder.units[0]
    beside = not any(value in reached for value in first.enters if value is not None)
    return beside and any(value in reached for node in first.nodes for value in node.inputs if value is not None)
