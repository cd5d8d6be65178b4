"""Stores sparse tensors as dense ones: a growth repeats rows and columns, which sparse tensors do not have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from hyperclone_onnx.errors import BadModel, Refused

LARGEST_DENSE = 1 << 30
"""The most bytes of a sparse tensor that is made dense. A file of some bytes can ask for more than there is."""


def make_dense(file: str, model: onnx.ModelProto) -> None:
    """Replace the sparse tensors of a model by dense ones.

    Raises:
        BadModel: a sparse tensor contradicts itself.
        Refused: a dense tensor would be too large.
    """
    for graph in _graphs(model):
        if isinstance(graph, onnx.GraphProto) and graph.sparse_initializer:
            graph.initializer.extend(_dense(file, sparse) for sparse in graph.sparse_initializer)
            graph.ClearField("sparse_initializer")
        for node in graph.node:
            for attribute in node.attribute:
                _make_attribute_dense(file, node, attribute)


def has_sparse(model: onnx.ModelProto) -> bool:
    """Whether a model has sparse tensors."""
    return any(
        (isinstance(graph, onnx.GraphProto) and graph.sparse_initializer)
        or any(_is_sparse(attribute) for node in graph.node for attribute in node.attribute)
        for graph in _graphs(model)
    )


def _is_sparse(attribute: onnx.AttributeProto) -> bool:
    return attribute.HasField("sparse_tensor") or bool(attribute.sparse_tensors)


def _make_attribute_dense(file: str, node: onnx.NodeProto, attribute: onnx.AttributeProto) -> None:
    if attribute.type == onnx.AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
        tensor = _dense(file, attribute.sparse_tensor)
        attribute.Clear()
        attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
        attribute.t.CopyFrom(tensor)
    elif _is_sparse(attribute):
        named = f"{node.op_type} {node.name!r}"
        raise Refused(f"{file}: {named} has a sparse tensor as an attribute, which does not grow: make it dense")


def _graphs(model: onnx.ModelProto) -> Iterator[Any]:
    """The graphs, the bodies of functions, and the bodies of nodes in them."""
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            if attribute.HasField("g"):
                waiting.append(attribute.g)
            waiting.extend(attribute.graphs)


def _dense(file: str, sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """The dense form of a sparse tensor, whose indices are positions in the flat tensor, or coordinates.

    Source: SparseTensorProto in onnx.proto.
    """
    name, shape = sparse.values.name, tuple(sparse.dims)
    if any(size < 0 for size in shape):
        raise BadModel(f"{file}: sparse tensor {name!r} has an impossible shape: {shape}")
    try:
        values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    except (TypeError, ValueError) as problem:
        raise BadModel(f"{file}: sparse tensor {name!r} cannot be read ({problem})") from problem
    size = math.prod(shape)
    if size * max(values.dtype.itemsize, 1) > LARGEST_DENSE:
        raise Refused(
            f"{file}: tensor {name!r} is sparse, and would have {size:.3g} elements as a dense one, which is too much"
        )
    indices = indices.astype(np.int64)
    if indices.shape == (len(values), len(shape)) and indices.ndim == 2:
        inside = bool(((indices >= 0) & (indices < np.array(shape))).all())
        places = np.ravel_multi_index(tuple(indices.T), shape) if inside and len(values) else indices[:, :0].ravel()
    else:
        inside = bool(((indices >= 0) & (indices < size)).all())
        places = indices
    if not inside or places.shape != values.shape or values.ndim != 1:
        raise BadModel(f"{file}: sparse tensor {name!r} has indices that do not fit its values or its shape")
    dense = np.zeros(size, dtype=values.dtype)
    dense[places] = values
    return numpy_helper.from_array(dense.reshape(shape), name)
