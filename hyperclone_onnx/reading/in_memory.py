"""Takes models that are in memory: ``onnx.ModelProto`` and ``onnx_ir.Model``. The given model is never changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, BadRequest, first_line
from hyperclone_onnx.reading import external_data
from hyperclone_onnx.reading.loading import from_message, tensors
from hyperclone_onnx.reading.sparse import has_sparse
from hyperclone_onnx.reading.structure import check_structure

GivenModel: TypeAlias = str | os.PathLike[str] | onnx.ModelProto | ir.Model
"""A model as people give it: the path of a file, or a model in memory."""

NAME = "the model"
"""A model in memory has no path. Messages call it so."""


IN_MEMORY = (onnx.ModelProto, ir.Model)
"""The types of models in memory."""


def path_of(given: str | os.PathLike[str], what: str = "model") -> Path:
    """The path of a model that is no model in memory.

    Raises:
        BadRequest: what was given is no path.
    """
    if not isinstance(given, str | os.PathLike):
        raise BadRequest(f"the {what} is a {type(given).__name__}: give a path, an onnx.ModelProto or an onnx_ir.Model")
    return Path(given)


def taken(model: onnx.ModelProto | ir.Model) -> ir.Model:
    """A model in memory as a graph of our own. It shares the tensors of the given one.

    Raises:
        BadModel: the model is malformed.
        BadRequest: weights of a ModelProto lie in a data file. It does not say in which folder that is.
    """
    if isinstance(model, ir.Model):
        copy = _cloned(model)
        _check_graph(copy)
        for tensor in tensors(copy):
            if isinstance(tensor, ir.ExternalTensor):
                _check_data(tensor)
        return copy
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise BadRequest(
            "the weights of the model lie in a data file, and a ModelProto does not say in which folder: give the "
            "path of the model, or what onnx.load(path) gives"
        )
    if not model.graph.node and not model.graph.output:
        raise BadModel(f"{NAME} has no graph")
    if not model.opset_import:
        raise BadModel(f"{NAME} names no opset")
    if has_sparse(model):
        model = _copied(model)  # sparse tensors are replaced in the message itself
    return from_message(Path(NAME), model)


def _cloned(model: ir.Model) -> ir.Model:
    """A copy of a graph that shares the tensors.

    Raises:
        BadModel: the graph is malformed.
    """
    try:
        return model.clone()
    except Exception as problem:  # whatever a malformed graph makes it raise
        check_structure(NAME, ir.to_proto(model))
        raise BadModel(f"{NAME}: a malformed graph ({first_line(problem)})") from problem


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _check_graph(model: ir.Model) -> None:
    """Check names and structure as for a file. Weights are left out of the message that is checked."""
    bare = model.clone()
    for graph in bare.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None:
                value.const_value = ir.ExternalTensor(
                    "-", 0, 0, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name or ""
                )
    try:
        message = ir.to_proto(bare)
    except Exception as problem:  # whatever a malformed graph makes it raise
        raise BadModel(f"{NAME}: a malformed graph ({first_line(problem)})") from problem
    check_structure(NAME, message)


def _check_data(tensor: ir.ExternalTensor) -> None:
    """Check that a data file has the bytes of a tensor, as for a model file in the same folder."""
    external_data.place(Path(tensor.base_dir or ".") / "model.onnx", tensor)
