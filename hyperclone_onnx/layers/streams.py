"""The streams of a graph: the way from a source of floating-point numbers to an output, and where it is one node wide.

A *cut* is a node through which every path of a stream goes. Behind each layer of a transformer there is a cut: the Add
of the residual, or the norm that is fused with it. Sizes, positions and masks of true and false are no part of a
stream, so a mask that every layer reads makes no second path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from hyperclone_onnx.graphs import captured_values

_NOT_CARRIED = frozenset([ir.DataType.BOOL, ir.DataType.INT64, ir.DataType.STRING])


def is_carried(value: ir.Value) -> bool:
    """Whether a value can be part of a stream. Quantised numbers and their sums can; sizes and conditions cannot."""
    if value.dtype == ir.DataType.INT32:
        producer = value.producer()
        return producer is not None and any(
            read is not None and read.dtype is not None and read.dtype.bitwidth == 8 and read.dtype.is_integer()
            for read in producer.inputs
        )
    return value.dtype not in _NOT_CARRIED


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """The values that a node reads, also within its bodies."""
    yield from (value for value in node.inputs if value is not None)
    yield from captured_values(node)


@dataclass(frozen=True)
class Stream:
    """A stream: the nodes on the way, and the cuts among them, both in the order of the graph."""

    start: ir.Value
    nodes: tuple[ir.Node, ...]
    cuts: tuple[int, ...]
    """The positions of the cuts in `nodes`. The last node is a cut; -1 is the start, if it is an input of the graph."""


class Flow:
    """Who reads what in a graph, for values that streams can go through."""

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes = list(graph)
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.outputs = list(graph.outputs)
        self.inputs = list(graph.inputs)
        self.carried = [[value for value in reads(node) if is_carried(value)] for node in self.nodes]
        """For each node, the values that it reads and that can be carried."""

    def starts(self) -> list[ir.Value]:
        """Where streams begin: results of nodes that read no carried value but stored ones, and inputs of the graph.

        The inputs come last: most of them are caches.
        """
        moving: set[ir.Value] = set(self.inputs)
        values: list[ir.Value] = []
        for node, carried in zip(self.nodes, self.carried, strict=True):
            if not any(value in moving for value in reads(node)):
                continue
            moving.update(node.outputs)
            if not any(value in moving for value in carried):
                values += [value for value in node.outputs if is_carried(value)]
        return [*values, *filter(is_carried, self.inputs)]

    def stream(self, start: ir.Value) -> Stream | None:
        """The stream from a value to the last output of the graph that it reaches; None if it reaches none."""
        reached: set[ir.Value] = {start}
        forward: set[ir.Node] = set()
        producer = start.producer()
        for node, carried in zip(self.nodes, self.carried, strict=True):
            if node is producer:
                forward.add(node)  # its other results are other streams
            elif any(value in reached for value in carried):
                forward.add(node)
                reached.update(value for value in node.outputs if is_carried(value))
        producers = [value.producer() for value in self.outputs if value in reached]
        ends = [node for node in producers if node is not None]
        if not ends:
            return None
        end = max(ends, key=lambda node: self.place[node])
        needed: set[ir.Value] = set()
        inside: list[ir.Node] = []
        for number in range(self.place[end], -1, -1):
            node = self.nodes[number]
            if node in forward and (node is end or any(value in needed for value in node.outputs)):
                inside.append(node)
                needed.update(value for value in self.carried[number] if value in reached)
        inside.reverse()
        return Stream(start, tuple(inside), self._cuts(start, inside, reached))

    def _cuts(self, start: ir.Value, inside: list[ir.Node], reached: set[ir.Value]) -> tuple[int, ...]:
        position = {node: number for number, node in enumerate(inside)}
        furthest = [0] * len(inside)
        for number, node in enumerate(inside):
            for value in self.carried[self.place[node]]:
                producer = value.producer()
                if value in reached and producer is not None and producer in position:
                    furthest[position[producer]] = max(furthest[position[producer]], number)
        cuts: list[int] = []
        reach = 0
        if start.producer() not in position:
            # Several nodes may read an input of the graph: the first of them alone is no cut then.
            cuts.append(-1)
            reach = max((number for number, node in enumerate(inside) if start in reads(node)), default=0)
        for number in range(len(inside)):
            if reach <= number:
                cuts.append(number)
            reach = max(reach, furthest[number])
        return tuple(cuts)
