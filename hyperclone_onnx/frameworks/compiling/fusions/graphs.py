"""Read patterns in a graph, and put one node in the place of a pattern."""

from __future__ import annotations

import onnx_ir as ir

from hyperclone_onnx.graphs import is_initializer


def number(value: ir.Value | None) -> float | None:
    """The number in a stored tensor without axes; None for any other value."""
    if value is None or not is_initializer(value) or value.const_value is None or len(value.const_value.shape):
        return None
    return float(value.const_value.numpy())


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes a value, if its operator is one of these."""
    node = None if value is None else value.producer()
    return node if node is not None and not node.domain and node.op_type in op_types else None


def only(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The same node as `made_by`, if the value is read once and is not an output of the graph."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return made_by(value, *op_types)


def with_number(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, n) for x * n or n * x, and (x, 1 / n) for x / n."""
    left, right = node.inputs[:2]
    if node.op_type == "Mul" and right is not None and number(left) is not None:
        return right, number(left) or 0.0
    n = number(right)
    if left is None or n is None or (node.op_type == "Div" and n == 0):
        return None
    return left, 1 / n if node.op_type == "Div" else n


def put_in_place(node: ir.Node, new: ir.Node) -> None:
    """Put a new node in the place of another. It takes over the names of the node and of its output."""
    graph = node.graph
    assert graph is not None
    old, result = node.outputs[0], new.outputs[0]
    graph.insert_before(node, new)
    name, result.type, result.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    old.name, result.name, new.name = f"{name}.replaced", name, node.name
    graph.remove(node, safe=True)
