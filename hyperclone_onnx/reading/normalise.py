"""Brings a model into the form that the analysis reads: one flat main graph, stored constants, and named nodes."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes

from hyperclone_onnx.graphs import MOVES_OR_CASTS, FreshNames, bodies_of, is_initializer
from hyperclone_onnx.reading.defaults import FIRST_WITH_DEFAULTS, set_defaults_aside
from hyperclone_onnx.reading.invariants import read_invariants_directly
from hyperclone_onnx.reading.opsets import settle_opsets
from hyperclone_onnx.reading.reblock import reblock
from hyperclone_onnx.reading.shadowing import rename_shadowing
from hyperclone_onnx.reading.type_inference import infer_types


def normalise(model: ir.Model) -> ir.Model:
    """Inline functions, store constants, name nodes, and give each user of a transposed weight its own copy.

    The model is changed in place and returned; what it computes stays the same.

    Raises:
        BadModel: the graphs or the opset imports contradict themselves.
        Refused: see `settle_opsets`.
    """
    settle_opsets(model)
    set_defaults_aside(model)
    fresh = FreshNames(model.graph)
    for graph in (model.graph, *model.graph.subgraphs()):
        _compute_stored_outputs(graph, fresh)
    passes.InlinePass()(model)
    rename_shadowing(model.graph)
    ir.passes.Sequential(
        passes.RemoveInitializersFromInputsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
    )(model)
    # Older versions demand that each weight is an input too, and now none is.
    model.ir_version = max(model.ir_version, FIRST_WITH_DEFAULTS)
    read_invariants_directly(model.graph)
    reblock(model.graph)
    _drop_unused(model.graph)
    passes.TopologicalSortPass()(model)
    _name_nodes(model.graph)
    _unshare_moved_weights(model.graph)
    _fill_types(model)
    return model


def _compute_stored_outputs(graph: ir.Graph, fresh: FreshNames) -> None:
    """Put an Identity before each output of a graph that is itself a stored tensor or the output of a Constant."""
    for position, value in enumerate(graph.outputs):
        producer = value.producer()
        if not is_initializer(value) and (producer is None or producer.op_type != "Constant"):
            continue
        name, value.name = value.name, fresh.value(f"{value.name}.stored")
        node = ir.node("Identity", [value])
        result = node.outputs[0]
        tensor = value.const_value if producer is None else _constant_tensor(producer)
        # The type and the shape are those of the tensor, whatever the file declares.
        kind = value.type if tensor is None else ir.TensorType(tensor.dtype)
        shape = value.shape if tensor is None else ir.Shape(tensor.shape.numpy())
        result.name, result.type, result.shape = name, kind, shape
        graph.append(node)
        graph.outputs[position] = result


def _constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    value = node.attributes.get("value")
    return None if value is None else value.as_tensor()


def _name_nodes(graph: ir.Graph) -> None:
    taken: set[str] = set()
    for number, node in enumerate(graph.all_nodes()):
        name = node.name or f"{node.op_type}_{number}"
        while name in taken:
            name = f"{name}_{number}"
        node.name = name
        taken.add(name)


def _unshare_moved_weights(graph: ir.Graph) -> None:
    """Copy a Transpose (or the like) of a stored tensor for each of its users.

    The users may contract different axes of it, or none.
    """
    fresh = FreshNames(graph)
    moved = _moved_from_storage(graph)
    for node in reversed(list(graph)):
        if node.domain or node.op_type not in MOVES_OR_CASTS or not node.inputs or len(node.outputs) != 1:
            continue
        output = node.outputs[0]
        if output not in moved or output.is_graph_output():
            continue
        for number, use in enumerate(list(output.uses())[1:], 1):
            if use.node.graph is not graph:
                continue
            copy = ir.Node(
                node.domain,
                node.op_type,
                node.inputs,
                list(node.attributes.values()),
                num_outputs=1,
                name=fresh.node(f"{node.name}.{number}"),
            )
            copy.outputs[0].name = fresh.value(f"{output.name}.{number}")
            copy.outputs[0].type, copy.outputs[0].shape = output.type, output.shape
            graph.insert_before(node, copy)
            use.node.replace_input_with(use.idx, copy.outputs[0])


def _moved_from_storage(graph: ir.Graph) -> set[ir.Value]:
    """The values that Transposes and the like make of one stored tensor alone."""
    moved: set[ir.Value] = set()
    for node in graph:
        if node.domain or node.op_type not in MOVES_OR_CASTS or not node.inputs:
            continue
        value = node.inputs[0]
        if value is not None and (is_initializer(value) or value in moved):
            moved.update(node.outputs)
    return moved


def _drop_unused(graph: ir.Graph) -> None:
    """Remove the nodes and the stored tensors that nothing reads.

    All outputs of a node that is kept stay too: ONNX Runtime's Attention accepts a past only if it has the output
    for the present.
    """
    kept = {*graph.outputs, *graph.inputs}
    for node in reversed(list(graph)):
        if not any(output in kept or output.uses() for output in node.outputs):
            graph.remove(node, safe=True)
            continue
        for body in bodies_of(node):
            _drop_unused(body)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in kept:
            del graph.initializers[name]


def _fill_types(model: ir.Model) -> None:
    """Let ONNX's own shape inference fill in element types (and shapes) that the file does not declare."""
    if any(value.dtype is None for node in model.graph for value in node.outputs):
        infer_types(model)
