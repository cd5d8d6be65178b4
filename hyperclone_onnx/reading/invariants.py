"""Lets the bodies of loops read weights that loops only carry along.

TensorFlow's loops carry every weight as a variable, which the body returns unchanged. For the analysis such a variable
would be an activation. So the body reads the outer value instead, as it may, and the loop no longer carries it.
"""

from __future__ import annotations

import onnx_ir as ir

from hyperclone_onnx.graphs import bodies_of


def read_invariants_directly(graph: ir.Graph) -> None:
    """Replace the variables of Loop and Scan nodes that never change by their first values, also inside bodies."""
    for node in list(graph):
        if not node.domain and node.op_type in ("Loop", "Scan"):
            _replace(node)
    for node in graph:
        for body in bodies_of(node):
            read_invariants_directly(body)


def _replace(node: ir.Node) -> None:
    body = next(bodies_of(node), None)
    if body is None:
        return
    # The places of the first variable: in the inputs of the node and the body, and in the outputs of the body.
    if node.op_type == "Loop":
        first, returned, count = 2, 1, len(body.inputs) - 2
    else:
        scanned = node.attributes["num_scan_inputs"].as_int() if "num_scan_inputs" in node.attributes else None
        if scanned is None or len(node.inputs) != len(body.inputs):
            return  # malformed, or a Scan of opset 8, whose first input is no variable
        first, returned, count = 0, 0, len(body.inputs) - scanned
    fits = len(body.outputs) >= returned + count and len(node.inputs) >= first + count and len(node.outputs) >= count
    invariant = [place for place in range(count) if _is_invariant(node, body, place, first, returned)] if fits else []
    if not invariant:
        return
    for place in reversed(invariant):
        variable, outer = body.inputs[first + place], node.inputs[first + place]
        assert outer is not None
        body.outputs.pop(returned + place)
        ir.convenience.replace_all_uses_with(variable, outer)
        ir.convenience.replace_all_uses_with(node.outputs[place], outer)
        body.inputs.pop(first + place)
    _replace_node(node, first, frozenset(invariant))


def _is_invariant(node: ir.Node, body: ir.Graph, place: int, first: int, returned: int) -> bool:
    """Whether the body returns a variable unchanged."""
    variable, value, outer = body.inputs[first + place], body.outputs[returned + place], node.inputs[first + place]
    if outer is None or node.outputs[place].is_graph_output():
        return False
    others = [output for number, output in enumerate(body.outputs) if number != returned + place]
    while (producer := value.producer()) is not None and producer.op_type == "Identity" and not producer.domain:
        inner = producer.inputs[0]
        if inner is None:
            return False
        value = inner
    return value is variable and variable not in others


def _replace_node(node: ir.Node, first: int, gone: frozenset[int]) -> None:
    """Put a node without some variables in the place of a loop."""
    inputs = [value for number, value in enumerate(node.inputs) if number - first not in gone]
    kept = [value for number, value in enumerate(node.outputs) if number not in gone]
    graph = node.graph
    assert graph is not None
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        num_outputs=len(kept),
        name=node.name,
        version=node.version,
    )
    for old, new in zip(kept, copy.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    graph.insert_before(node, copy)
    ir.convenience.replace_all_uses_with(kept, copy.outputs)
    for position, value in enumerate(graph.outputs):
        if value in kept:
            graph.outputs[position] = copy.outputs[kept.index(value)]
    graph.remove(node, safe=True)
