"""A graph under growth: what edits and interfaces ask of it. The names that growth puts into a graph are made here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.graphs import FreshNames
from hyperclone_onnx.plan.edits import Step
from hyperclone_onnx.plan.maps import Maps

Array = npt.NDArray[Any]


class GraphEditor:
    """Inserts nodes and constants into one graph, under fresh names.

    Args:
        graph: the graph to change.
        maps: the source map of each growing dimension.
        tensors: names that grown tensors will have.
        dtype: compute floating-point constants in this type instead of their own.
    """

    def __init__(
        self, graph: ir.Graph, maps: Maps, tensors: Iterable[str] = (), dtype: ir.DataType | None = None
    ) -> None:
        self.graph, self.maps, self.dtype = graph, maps, dtype
        self.nodes = {node.name: node for node in graph.all_nodes()}
        self._fresh = FreshNames(graph, tensors)
        self.added: list[str] = []
        """The names of the constants that were stored."""

    # -- what edits ask for (`plan.edits.Editor`) -----------------------------------------------------------

    def set_attribute(self, node: str, name: str, value: Any) -> None:
        """Set an attribute; None removes it."""
        if value is None:
            self.nodes[node].attributes.pop(name, None)
        else:
            self.nodes[node].attributes[name] = ir.convenience.convert_attribute(name, value)

    def value(self, node: str, slot: int, output: bool = False) -> ir.Value:
        """An input or an output of a node."""
        values = self.nodes[node].outputs if output else self.nodes[node].inputs
        value = values[slot]
        assert value is not None
        return value

    def integers(self, node: str, slot: int, output: bool = False) -> Any:
        """The numpy type of an integer input or output; int64 where it is absent."""
        values = self.nodes[node].outputs if output else self.nodes[node].inputs
        value = values[slot] if slot < len(values) else None
        return np.int32 if value is not None and value.dtype == ir.DataType.INT32 else np.int64

    def is_scalar_output(self, node: str) -> bool:
        """Whether the node's output is one number, where others have a vector."""
        return self.nodes[node].op_type == "Size"

    def constant(self, hint: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        """Store an array under `hint`, or under `hint.1` and so on where that name is taken."""
        name = self._fresh.value(hint)
        self.added.append(name)
        return self.store(name, ir.Tensor(array, dtype=dtype, name=name))

    def factor(self, hint: str, node: str, slot: int, divisors: Array) -> tuple[str, ir.Value]:
        """("Mul", the inverses) or ("Div", the divisors), whichever the input's type holds exactly.

        A third is off by 2e-3 in bfloat16, and off alike for every element; three is exact.
        """
        value = self.nodes[node].inputs[slot]
        own = self.dtype or (None if value is None else value.dtype) or ir.DataType.FLOAT
        divides = _fits(divisors, own) and not _fits(1 / divisors, own)
        op_type, array = ("Div", divisors) if divides else ("Mul", 1 / divisors)
        return op_type, self.constant(hint, _cast(array, own), own)

    def equal_to(self, node: str, slot: int, output: bool, constant: ir.Value) -> ir.Value:
        """A new value: whether the elements of an input or output equal the constant's."""
        value = self.value(node, slot, output)
        test = ir.node("Equal", [value, constant], name=self._fresh.node(f"{value.name}.Equal"))
        result = test.outputs[0]
        result.name, result.type = self._fresh.value(f"{value.name}.kept"), ir.TensorType(ir.DataType.BOOL)
        graph_of(self.nodes[node]).insert_before(self.nodes[node], test)
        return result

    def replace_input(self, node: str, slot: int, operand: ir.Value) -> None:
        """Let an input read another value; the input may be absent so far."""
        reader = self.nodes[node]
        if slot >= len(reader.inputs):
            reader.resize_inputs(slot + 1)
        reader.replace_input_with(slot, operand)

    def insert(self, node: str, slot: int, output: bool, steps: Sequence[Step]) -> None:
        """Insert steps in front of an input, or behind an output."""
        value = self.value(node, slot, output)
        if output:
            self.insert_behind(value, steps)
            return
        made = self._chain(value, steps, None)
        graph_of(self.nodes[node]).insert_before(self.nodes[node], made)
        self.nodes[node].replace_input_with(slot, made[-1].outputs[0])

    def take_branch(self, node: str, branch: str) -> None:
        """Put the nodes of one branch in the place of an If; other branches may use the same names."""
        chooser = self.nodes[node]
        body, graph = chooser.attributes[branch].as_graph(), graph_of(chooser)
        results, moved = list(body.outputs), list(body)
        body.outputs.clear()
        body.remove(moved)
        for value in (value for inner in moved for value in inner.outputs):
            value.name = self._fresh.value(f"{node}.{value.name}")
        graph.insert_before(chooser, moved)
        for output, result in zip(chooser.outputs, results, strict=True):
            passed = ir.node("Identity", [result], name=self._fresh.node(f"{node}.Identity"))
            passed.outputs[0].name, passed.outputs[0].type = output.name, output.type
            output.name = self._fresh.value(f"{output.name}.branch")
            graph.insert_before(chooser, passed)
            output.replace_all_uses_with(passed.outputs[0], replace_graph_outputs=True)
        graph.remove(chooser, safe=True)

    # -- what growing tensors and interfaces ask for ----------------------------------------------------------

    def store(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A new stored tensor of the graph."""
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def gather(self, hint: str, index: Array, axis: int) -> Step:
        """The step that picks indices along an axis."""
        return Step("Gather", (self.constant(hint, index),), axis=axis)

    def insert_behind(self, value: ir.Value, steps: Sequence[Step], leaving: bool = False) -> ir.Value:
        """Insert steps behind a value; the result takes over its name and its readers. Returns the result.

        With `leaving` only the graph's output reads the result; the graph's own nodes read the value as before.
        """
        result = ir.Value(name=value.name, type=value.type)
        producer = value.producer()
        if producer is None:  # a graph input keeps its name
            result.name = self._fresh.value(f"{value.name}.grown")
        if leaving:
            outputs = self.graph.outputs
            outputs[outputs.index(value)] = result
        else:
            value.replace_all_uses_with(result, replace_graph_outputs=True)
        if producer is not None:
            value.name = self._fresh.value(f"{value.name}.source")
        made = self._chain(value, steps, result)
        first = next(iter(self.graph), None)
        if producer is not None:
            graph_of(producer).insert_after(producer, made)
        elif first is not None:
            self.graph.insert_before(first, made)
        return result

    def _chain(self, value: ir.Value, steps: Sequence[Step], result: ir.Value | None) -> list[ir.Node]:
        """The nodes of some steps, each reading the one before it; the last one makes `result` where it is given."""
        made: list[ir.Node] = []
        for number, step in enumerate(steps):
            inputs: list[ir.Value] = list(step.operands)
            inputs.insert(step.position, value)
            attributes = {} if step.axis is None else {"axis": step.axis}
            last = result is not None and number == len(steps) - 1
            node = ir.node(step.op_type, inputs, attributes, outputs=[result] if last and result else None)
            if not last:
                node.outputs[0].type = value.type
                node.outputs[0].name = self._fresh.value(f"{value.name}.{step.op_type.lower()}")
            node.name = self._fresh.node(f"{value.name}.{step.op_type}")
            made.append(node)
            value = node.outputs[0]
        return made


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that holds a node."""
    graph = node.graph
    assert isinstance(graph, ir.Graph), "functions are inlined"
    return graph


def _fits(array: Array, dtype: ir.DataType) -> bool:
    """Whether a type holds the numbers exactly."""
    return bool((_cast(array, dtype).astype(np.float64) == array).all())


def _cast(array: Any, dtype: ir.DataType) -> Array:
    return np.asarray(array, dtype=np.float64).astype(dtype.numpy())
