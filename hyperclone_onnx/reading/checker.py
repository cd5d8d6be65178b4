"""Asks ONNX's own checker whether a model is malformed. If it is not, a pass that failed on it has a defect.

The checker runs in a separate process, because a malformed graph can crash it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, first_line
from hyperclone_onnx.reading.in_memory import GivenModel
from hyperclone_onnx.reading.type_inference import without_bulk
from hyperclone_onnx.system.isolation import POSSIBLE, BrokenDown, Isolated

PATIENCE = 120.0
"""Seconds. Graphs of 20,000 nodes take a few."""


def refuse_if_malformed(given: GivenModel, name: str, problem: Exception) -> None:
    """Blame a model for an exception in one of our passes, if ONNX's own checker rejects the model.

    If the checker accepts it, the exception is a defect of ours, and the caller raises it again.

    Args:
        given: the model as it was given.
        name: the path of the model, or what messages call it.
        problem: the exception.

    Raises:
        BadModel: the checker rejects the model.
    """
    reason = rejection(given)
    if reason:
        raise BadModel(f"{name}: a malformed graph ({reason})") from problem


def rejection(given: GivenModel) -> str:
    """The reason why ONNX's own checker rejects a model. Empty if it accepts the model."""
    try:
        model = _message(given)
        for body in _bodies(model):
            _leave_out_data(body)
        text = model.SerializeToString()
    except Exception as problem:
        return f"it cannot be written as a message: {first_line(problem)}"
    try:
        return str(Isolated(lambda: _check, PATIENCE)(text)) if POSSIBLE else _check(text)
    except BrokenDown as broken:
        return f"ONNX's own checker breaks down on it: {broken}"


def _message(given: GivenModel) -> onnx.ModelProto:
    """A message of the model that may be changed."""
    if isinstance(given, ir.Model):
        return without_bulk(given.clone())
    if isinstance(given, onnx.ModelProto):
        message = onnx.ModelProto()
        message.CopyFrom(given)
        return message
    return onnx.load(Path(given).resolve(), format="protobuf", load_external_data=False)


def _check(text: bytes) -> str:
    try:
        onnx.checker.check_model(text)
    except Exception as problem:
        return first_line(problem)
    return ""


def _bodies(model: onnx.ModelProto) -> Iterator[Any]:
    """The graph, the functions, and the bodies of nodes in them."""
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        body = waiting.pop()
        yield body
        for attribute in (attribute for node in body.node for attribute in node.attribute):
            waiting.extend((attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs)


def _leave_out_data(body: Any) -> None:
    """Turn tensors in other files into inputs. The checker would look for these files in the working folder."""
    for attribute in (attribute for node in body.node for attribute in node.attribute):
        for tensor in (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                kind = tensor.data_type
                tensor.Clear()
                tensor.data_type, tensor.raw_data = kind, b""
                tensor.dims.append(0)
    if not isinstance(body, onnx.GraphProto):
        return
    outside = [tensor for tensor in body.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    inside = [tensor for tensor in body.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    known = {value.name for value in body.input}
    body.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in outside
        if tensor.name not in known
    )
    del body.initializer[:]
    body.initializer.extend(inside)
