"""Runs ONNX's own type and shape inference in a separate process, because a malformed graph can crash it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.system.isolation import POSSIBLE, BrokenDown, Isolated

BULK = 1024
"""Larger tensors (in bytes) are left out: no shape is computed from them."""

PATIENCE = 120.0
"""Seconds. Graphs of 20,000 nodes take a few."""


def infer_types(model: ir.Model) -> None:
    """Fill in element types and shapes that the file does not declare, where ONNX can infer them.

    Raises:
        BadModel: the inference crashes, or takes too long.
    """
    try:
        graph = without_bulk(model)
        text = graph.SerializeToString()
    except Exception:  # a graph that cannot be serialised: nothing is inferred
        return
    made = _isolated(text) if POSSIBLE else _infer(text)
    if made:
        _merge(model, onnx.ModelProto.FromString(made))


def without_bulk(model: ir.Model) -> onnx.ModelProto:
    """The model with its large tensors as inputs. Inference needs only their types and shapes."""
    stored = dict(model.graph.initializers)
    large = [value for value in stored.values() if value.const_value is not None and value.const_value.nbytes > BULK]
    own = list(model.graph.inputs)
    try:
        for value in large:
            del model.graph.initializers[value.name or ""]
            if value not in own:
                model.graph.inputs.append(value)
        return ir.to_proto(model)
    finally:
        model.graph.inputs[:] = own
        model.graph.initializers.clear()
        model.graph.initializers.update(stored)


def _infer(text: bytes) -> bytes:
    try:
        model = onnx.ModelProto.FromString(text)
        made = onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False, data_prop=False)
        return bytes(made.SerializeToString())
    except Exception:  # raised for graphs that it does not understand: nothing is inferred
        return b""


def _merge(model: ir.Model, inferred: onnx.ModelProto) -> None:
    """Copy inferred types and shapes into the model. We read only these from the message, to save memory."""
    for own, graph in zip(model.graphs(), _graphs(inferred.graph), strict=False):
        infos = {info.name: info for info in (*graph.value_info, *graph.output)}
        for value in (value for node in own for value in node.outputs):
            info = infos.get(value.name or "")
            if info is not None:
                inferred_value = ir.serde.deserialize_value_info_proto(info, None)
                value.shape = value.shape if inferred_value.shape is None else inferred_value.shape
                # Compare types, not element types: a sequence has a type of its own.
                if inferred_value.type is not None and value.type != inferred_value.type:
                    value.type = inferred_value.type


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the bodies within it, in the order of `ir.Model.graphs`."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(body)


def _isolated(text: bytes) -> bytes:
    try:
        return bytes(Isolated(lambda: _infer, PATIENCE)(text))
    except BrokenDown as problem:
        raise BadModel(f"a malformed graph: ONNX's own type inference breaks down on it ({problem})") from problem
