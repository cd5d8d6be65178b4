"""Decide which values of a graph are sizes. A program computes sizes on the host, as Python numbers, not arrays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.compiling import registry
from hyperclone_onnx.graphs import bodies_of, is_initializer

_WHOLE = frozenset(
    [
        ir.DataType.BOOL,
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
    ]
)
LARGEST = 1024
"""A stored tensor with more elements holds data, not sizes."""


class HostValues:
    """The values of a model that the program computes on the host.

    There are two kinds. First, an operator *needs* a value as Python numbers, such as the shape of a Reshape. Then all
    values from which this one is computed are on the host too. Second, a value holds integers that are computed from
    shapes alone.

    Raises:
        Refused: a size depends on data.
    """

    def __init__(self, model: ir.Model) -> None:
        self.host: set[ir.Value] = set()
        self.states: set[ir.Value] = set()
        """The outputs of Loop bodies that are passed to the next turn as Python numbers."""
        self._loops: dict[ir.Value, tuple[ir.Node, int]] = {}
        self._demand(model.graph)
        self._follow(model.graph)

    def is_known(self, value: ir.Value | None) -> bool:
        """Whether the program has the elements of a value as Python numbers."""
        return value is not None and (value in self.host or is_initializer(value))

    def runs_on_host(self, node: ir.Node) -> bool:
        """Whether a node computes with Python numbers alone. The Shape of an array does not: it reads the array."""
        if not any(output in self.host for output in node.outputs):
            return False
        return node.op_type not in ("Shape", "Size") or self.is_known(node.inputs[0])

    # -- backwards: values that operators need --------------------------------------------------------------

    def _demand(self, graph: ir.Graph) -> None:
        for node in reversed(list(graph)):
            for inner in bodies_of(node):
                self._loops |= {value: (node, place) for place, value in enumerate(inner.inputs)}
                known = -1
                while known != len(self.host):  # if one state is needed, other states can become needed
                    known = len(self.host)
                    self._demand(inner)
            if any(output in self.host for output in node.outputs):
                self._needed_for_host(node)
                continue
            operator = registry.operator(node.domain, node.op_type)
            for position, value in enumerate(node.inputs):
                if operator is not None and value is not None and operator.is_host(position):
                    self._need(value, node)

    def _needed_for_host(self, node: ir.Node) -> None:
        if node.op_type in ("Shape", "Size"):
            return
        for value in node.inputs:
            if value is not None:
                self._need(value, node)

    def _need(self, value: ir.Value, reader: ir.Node) -> None:
        if is_initializer(value) or value in self.host:
            return
        if value in self._loops:
            self._need_in_turns(value, reader)
            return
        producer = value.producer()
        if producer is not None and not _has_host_form(producer):
            raise Refused(
                f"{reader.op_type} (node {reader.name!r}) takes a size that {producer.op_type} (node "
                f"{producer.name!r}) computes from data: it has no handoff"
            )
        if producer is None and value.shape is not None and len(value.shape) > 1:
            raise Refused(
                f"{reader.op_type} (node {reader.name!r}) takes sizes from the input {value.name!r}, which has more "
                "than one axis: it has no handoff"
            )
        self.host.add(value)

    def _need_in_turns(self, value: ir.Value, reader: ir.Node) -> None:
        """Put a Loop's turn number or state on the host. A state is then a number before and after every turn."""
        node, place = self._loops[value]
        if node.op_type != "Loop" or place == 1:
            raise Refused(
                f"{reader.op_type} (node {reader.name!r}) takes a size from a value that {node.op_type} (node "
                f"{node.name!r}) passes to its body: it has no handoff"
            )
        self.host.add(value)
        if place == 0:
            return
        after = node.attributes["body"].as_graph().outputs[place - 1]
        self.states.add(after)
        self.host.add(node.outputs[place - 2])
        for state in (node.inputs[place], after):
            assert state is not None
            self._need(state, reader)

    # -- forwards: values computed from shapes alone --------------------------------------------------------

    def _follow(self, graph: ir.Graph) -> None:
        for node in graph:
            for inner in bodies_of(node):
                self._follow(inner)
            if self._stays_on_host(node):
                self.host.update(node.outputs)

    def _stays_on_host(self, node: ir.Node) -> bool:
        if node.domain:
            return False
        if node.op_type in ("Shape", "Size"):
            return True
        if not _has_host_form(node) or any(output.dtype not in _WHOLE for output in node.outputs):
            return False
        if any(output.shape is not None and len(output.shape) > 1 for output in node.outputs):
            return False
        if node.op_type in ("Range", "ConstantOfShape", "Expand", "Tile"):
            return False  # these make arrays, unless a reader needs their results as numbers
        inputs = [value for value in node.inputs if value is not None]
        return any(value in self.host for value in inputs) and all(
            value in self.host or (is_initializer(value) and _is_small(value)) for value in inputs
        )


def always_goes_on(node: ir.Node) -> bool:
    """Whether a Loop's condition holds before and after every turn."""
    graph = node.attributes["body"].as_graph()
    start = node.inputs[1] if len(node.inputs) > 1 else None
    if start is not None and not (is_initializer(start) and bool(np.asarray(start.const_value).all())):
        return False
    value: ir.Value | None = graph.outputs[0]
    while value is not None and value is not graph.inputs[1]:
        producer = value.producer()
        if producer is None:
            return is_initializer(value) and bool(np.asarray(value.const_value).all())
        value = producer.inputs[0] if producer.op_type == "Identity" else None
    return value is not None


def _is_small(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.size <= LARGEST and len(tensor.shape) <= 1


def _has_host_form(node: ir.Node) -> bool:
    """Whether the table can compute a node with Python numbers."""
    return node.op_type in ("Shape", "Size") or registry.host_operator(node.domain, node.op_type) is not None
