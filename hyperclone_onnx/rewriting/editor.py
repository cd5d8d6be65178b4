"""Changes the graph that grows: the operations for edits, grown tensors and interfaces. It chooses all new names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.graphs import FreshNames, opset_of
from hyperclone_onnx.plan.edits import Step
from hyperclone_onnx.plan.maps import Maps
from hyperclone_onnx.rewriting.written_norms import NormWriter

Array = npt.NDArray[Any]


class GraphEditor:
    """Inserts nodes and constants into one graph, under new names.

    Args:
        graph: the graph to change.
        maps: the source map of each growing dimension.
        tensors: the names of grown tensors, which new values must not have.
        dtype: the type of floating-point constants, in the place of their own type.
    """

    def __init__(
        self, graph: ir.Graph, maps: Maps, tensors: Iterable[str] = (), dtype: ir.DataType | None = None
    ) -> None:
        self.graph, self.maps, self.dtype = graph, maps, dtype
        self.nodes = {node.name: node for node in graph.all_nodes()}
        self.fresh = FreshNames(graph, tensors)
        self.added: list[str] = []
        """The names of the constants that the editor stored."""

    # -- operations for edits (the protocol `plan.edits.Editor`) ----------------------------------------------

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
        """The numpy type of an integer input or output; int64 if it is absent."""
        values = self.nodes[node].outputs if output else self.nodes[node].inputs
        value = values[slot] if slot < len(values) else None
        return np.int32 if value is not None and value.dtype == ir.DataType.INT32 else np.int64

    def is_scalar_output(self, node: str) -> bool:
        """Whether the node's output is one number and no vector."""
        return self.nodes[node].op_type == "Size"

    def constant(self, hint: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        """Store an array under the name `hint`, or `hint.1`, `hint.2` and so on if the name is taken."""
        name = self.fresh.value(hint)
        self.added.append(name)
        return self.store(name, ir.Tensor(array, dtype=dtype, name=name))

    def factor(self, hint: str, node: str, slot: int, divisors: Array, output: bool = False) -> tuple[str, ir.Value]:
        """("Mul", the inverses) if the type of the input or output represents them exactly, else ("Div", the divisors).

        In bfloat16, for example, 1/3 has an error of 2e-3, in the same direction for every element, but 3 is exact.
        """
        value = self.nodes[node].outputs[slot] if output else self.nodes[node].inputs[slot]
        if output and (value is None or value.dtype is None):
            value = self.nodes[node].inputs[0]
        dtype = self.dtype or (None if value is None else value.dtype) or ir.DataType.FLOAT
        divides = _fits(divisors, dtype) and not _fits(1 / divisors, dtype)
        op_type, array = ("Div", divisors) if divides else ("Mul", 1 / divisors)
        return op_type, self.constant(hint, _cast(array, dtype), dtype)

    def equal_to(self, node: str, slot: int, output: bool, constant: ir.Value) -> ir.Value:
        """A new value that says for each element of an input or output whether it equals the constant's."""
        value = self.value(node, slot, output)
        test = ir.node("Equal", [value, constant], name=self.fresh.node(f"{value.name}.Equal"))
        result = test.outputs[0]
        result.name, result.type = self.fresh.value(f"{value.name}.kept"), ir.TensorType(ir.DataType.BOOL)
        graph_of(self.nodes[node]).insert_before(self.nodes[node], test)
        return result

    def replace_input(self, node: str, slot: int, operand: ir.Value) -> None:
        """Let an input read another value. The input may have been absent."""
        reader = self.nodes[node]
        if slot >= len(reader.inputs):
            reader.resize_inputs(slot + 1)
        reader.replace_input_with(slot, operand)

    def insert(self, node: str, slot: int, output: bool, steps: Sequence[Step]) -> None:
        """Insert nodes in front of an input, or behind an output."""
        value = self.value(node, slot, output)
        if output:
            self.insert_behind(value, steps)
            return
        nodes = self._chain(value, steps, None)
        graph_of(self.nodes[node]).insert_before(self.nodes[node], nodes)
        self.nodes[node].replace_input_with(slot, nodes[-1].outputs[0])

    def take_branch(self, node: str, branch: str) -> None:
        """Replace an If by the nodes of one of its branches.

        The values of the branch get new names, because the other branch may have values of the same names.
        """
        if_node = self.nodes[node]
        body, graph = if_node.attributes[branch].as_graph(), graph_of(if_node)
        results, moved = list(body.outputs), list(body)
        body.outputs.clear()
        body.remove(moved)
        for value in (value for inner in moved for value in inner.outputs):
            value.name = self.fresh.value(f"{node}.{value.name}")
        graph.insert_before(if_node, moved)
        for output, result in zip(if_node.outputs, results, strict=True):
            identity = ir.node("Identity", [result], name=self.fresh.node(f"{node}.Identity"))
            identity.outputs[0].name, identity.outputs[0].type = output.name, output.type
            output.name = self.fresh.value(f"{output.name}.branch")
            graph.insert_before(if_node, identity)
            output.replace_all_uses_with(identity.outputs[0], replace_graph_outputs=True)
        graph.remove(if_node, safe=True)

    def count_once(self, node: str, over: Sequence[int], shares: Mapping[int, Array]) -> None:
        """Let a node that averages count each index by its share. A fused norm is replaced by simple operators.

        Args:
            node: the node.
            over: the axes that it averages over, as negative numbers.
            shares: by axis, the share of each index. They add up to the size of the axis in the source.
        """
        opset = opset_of(self.graph)
        NormWriter(self.nodes[node], over, shares, self.constant, self.fresh, opset, self.dtype).write()

    # -- operations for grown tensors and interfaces ----------------------------------------------------------

    def store(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a stored tensor to the graph."""
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def gather(self, hint: str, index: Array, axis: int) -> Step:
        """The step that picks indices along an axis."""
        return Step("Gather", (self.constant(hint, index),), axis=axis)

    def multiply(self, value: ir.Value, axis: int, factors: Array) -> Step:
        """The step that multiplies an input or output of the graph along an axis, a negative number."""
        dtype = self.dtype or value.dtype or ir.DataType.FLOAT
        shaped = factors.reshape(-1, *[1] * (-axis - 1))
        return Step("Mul", (self.constant(f"{value.name}.scale", _cast(shaped, dtype), dtype),))

    def insert_behind(self, value: ir.Value, steps: Sequence[Step], leaving: bool = False) -> ir.Value:
        """Insert nodes behind a value. The result gets the name and the readers of the value.

        Args:
            value: a graph input, or an output of a node.
            steps: the nodes to insert.
            leaving: only the graph's output reads the result. The nodes of the graph still read the value.

        Returns:
            The result.
        """
        result = ir.Value(name=value.name, type=value.type)
        producer = value.producer()
        if producer is None:  # users of the model give a graph input by its name, so that the name must stay
            result.name = self.fresh.value(f"{value.name}.grown")
        if leaving:
            outputs = self.graph.outputs
            outputs[outputs.index(value)] = result
        else:
            value.replace_all_uses_with(result, replace_graph_outputs=True)
        if producer is not None:
            value.name = self.fresh.value(f"{value.name}.source")
        nodes = self._chain(value, steps, result)
        first = next(iter(self.graph), None)
        if producer is not None:
            graph_of(producer).insert_after(producer, nodes)
        elif first is not None:
            self.graph.insert_before(first, nodes)
        return result

    def _chain(self, value: ir.Value, steps: Sequence[Step], result: ir.Value | None) -> list[ir.Node]:
        """The nodes of the steps, each reading the output of the one before. The last output is `result`, if given."""
        nodes: list[ir.Node] = []
        for number, step in enumerate(steps):
            inputs: list[ir.Value] = list(step.operands)
            inputs.insert(step.position, value)
            attributes = {} if step.axis is None else {"axis": step.axis}
            last = result is not None and number == len(steps) - 1
            node = ir.node(step.op_type, inputs, attributes, outputs=[result] if last and result else None)
            if not last:
                node.outputs[0].type = value.type
                node.outputs[0].name = self.fresh.value(f"{value.name}.{step.op_type.lower()}")
            node.name = self.fresh.node(f"{value.name}.{step.op_type}")
            nodes.append(node)
            value = node.outputs[0]
        return nodes


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph to which a node belongs: the model's, or a body of another node."""
    graph = node.graph
    assert isinstance(graph, ir.Graph), "functions are inlined"
    return graph


def _fits(array: Array, dtype: ir.DataType) -> bool:
    """Whether a type represents the numbers exactly."""
    return bool((_cast(array, dtype).astype(np.float64) == array).all())


def _cast(array: Any, dtype: ir.DataType) -> Array:
    return np.asarray(array, dtype=np.float64).astype(dtype.numpy())
