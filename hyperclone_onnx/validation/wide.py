"""Converts models to wider types, so that rounding cannot hide a mistake in the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import FreshNames, opset_of, stem
from hyperclone_onnx.validation.sessions import Runner
from hyperclone_onnx.writing import onnx_files as writer

Array = npt.NDArray[Any]
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_REFUSED_WHEN_RUN = ("GRU", "LSTM")
"""ONNX Runtime loads these operators in double, but has no kernel for them and fails when it runs them."""
_FLOAT_UNLESS_SAID = {
    "RandomNormal": "dtype",
    "RandomUniform": "dtype",
    "SequenceEmpty": "dtype",
    "HannWindow": "output_datatype",
    "HammingWindow": "output_datatype",
    "BlackmanWindow": "output_datatype",
}
"""Operators without a floating-point input, and the attribute that states their output's type. Its default is FLOAT."""
_NARROW = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def to_double(model: ir.Model) -> ir.Model:
    """Change every floating-point value and tensor of the model to float64, in place, and return the model."""
    _widen(model, ir.DataType.DOUBLE)
    fresh = FreshNames(model.graph)
    for node in list(model.graph.all_nodes()):
        if not node.domain and node.op_type in _NORMS:
            _write_out_norm(model, node, fresh)
    return model


def save_wide(model: ir.Model, path: Path, dtype: ir.DataType) -> None:
    """Write the model with every narrower floating-point value and tensor in `dtype`. This changes the model."""
    _widen(model, dtype)
    # Tensors that are not converted may be in a data file of another folder.
    writer.save(model, path, external=True)


def _widen(model: ir.Model, dtype: ir.DataType) -> None:
    narrow = [kind for kind in _NARROW if kind != dtype]
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype in narrow:
                value.const_value = _widened(value.const_value, dtype)
                value.type = ir.TensorType(dtype)
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            if value.dtype in narrow:
                value.type = ir.TensorType(dtype)
    for node in model.graph.all_nodes():
        if not node.domain:
            _state_type(node)
        for name in ("to", "dtype", "output_dtype", "output_datatype", "softmax_precision"):
            attribute = node.attributes.get(name)
            if attribute is not None and attribute.as_int() in [int(kind) for kind in narrow]:
                node.attributes[name] = ir.AttrInt64(name, int(dtype))
        tensor = node.attributes.get("value")
        if (
            tensor is not None
            and node.op_type in ("Constant", "ConstantOfShape")
            and tensor.as_tensor().dtype in narrow
        ):
            node.attributes["value"] = ir.AttrTensor("value", _widened(tensor.as_tensor(), dtype))


def _state_type(node: ir.Node) -> None:
    """Write the type of a node's output as an attribute, where the node relies on the default of its operator."""
    name = _FLOAT_UNLESS_SAID.get(node.op_type)
    if name is not None and name not in node.attributes:
        node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    if node.op_type == "ConstantOfShape" and "value" not in node.attributes:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.zeros(1, dtype=np.float32)))


def _write_out_norm(model: ir.Model, node: ir.Node, fresh: FreshNames) -> None:
    """Replace a normalisation by simple operators, because the fused kernels average in float32 even for float64."""
    graph = node.graph
    x, scale = node.inputs[0], node.inputs[1]
    if not isinstance(graph, ir.Graph) or x is None or scale is None:
        return
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return
    attributes = node.attributes
    axis = attributes["axis"].as_int() if "axis" in attributes else -1
    epsilon = attributes["epsilon"].as_float() if "epsilon" in attributes else 1e-5
    made: list[ir.Node] = []

    def step(op_type: str, *inputs: ir.Value | None, **attributes: int | Sequence[int]) -> ir.Value:
        hint = f"{stem(node)}.{len(made) + 1}"
        made.append(ir.node(op_type, list(inputs), attributes, name=fresh.node(hint)))
        result = made[-1].outputs[0]
        result.name, result.type = fresh.value(hint), ir.TensorType(ir.DataType.DOUBLE)
        return result

    def stored(hint: str, array: Array) -> ir.Value:
        tensor = ir.tensor(array, name=fresh.value(f"{stem(node)}.{hint}"))
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.register_initializer(value)
        return value

    if axis >= 0:
        rank = None if x.shape is None else len(x.shape)
        if rank is None:
            return
        axis -= rank
    axes = np.arange(axis, 0, dtype=np.int64)
    opset = opset_of(model.graph)

    def mean(value: ir.Value) -> ir.Value:
        if opset >= 18:
            return step("ReduceMean", value, stored(f"axes.{len(made)}", axes), keepdims=1)
        return step("ReduceMean", value, axes=axes.tolist(), keepdims=1)

    centred = step("Sub", x, mean(x)) if node.op_type == "LayerNormalization" else x
    variance = step("Add", mean(step("Mul", centred, centred)), stored("epsilon", np.float64(epsilon).reshape(1)))
    result = step("Mul", step("Div", centred, step("Sqrt", variance)), scale)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        result = step("Add", result, node.inputs[2])
    graph.insert_before(node, made)
    name = node.outputs[0].name
    node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = name


def _widened(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype(dtype.numpy()), name=tensor.name),
        dtype=dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def double_runner(model: ir.Model, path: Path) -> tuple[Callable[[Mapping[str, Array]], dict[str, Array]], str]:
    """A function that runs a float64 model, and the name of the runtime.

    The runtime is ONNX Runtime if it has a kernel for every node, and otherwise ONNX's reference evaluator.

    Raises:
        Refused: neither can run the model.
    """
    # Tensors that are not converted may be in a data file of another folder.
    writer.save(model, path, external=True)
    if not any(not node.domain and node.op_type in _REFUSED_WHEN_RUN for node in model.graph.all_nodes()):
        try:
            return Runner(path, "cpu", isolated=True, overrides=True, model=model).run, "ONNX Runtime"
        except Refused:
            pass
    import onnx.reference

    try:
        evaluator = onnx.reference.ReferenceEvaluator(str(path), new_ops=_exact_operators())
    except Exception as problem:
        raise Refused(f"neither ONNX Runtime nor the reference evaluator runs it in float64 ({problem})") from problem
    names = list(evaluator.input_names)

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            values = evaluator.run(None, {name: feeds[name] for name in names if name in feeds})
        except Exception as problem:
            raise RuntimeError(str(problem).splitlines()[0] if str(problem) else repr(problem)) from problem
        return {name: np.asarray(value) for name, value in zip(evaluator.output_names, values, strict=True)}

    return run, "the ONNX reference evaluator"


def _exact_operators() -> list[Any]:
    """Full versions of operators that the reference evaluator rounds to float32, or has only for short axes."""
    from onnx.reference.op_run import OpRun

    erf = np.vectorize(math.erf, otypes=[np.float64])

    class Erf(OpRun):
        def _run(self, x: Array) -> tuple[Array]:
            return (erf(x).astype(x.dtype) if x.size else x,)

    class Gelu(OpRun):
        op_domain = ""

        def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:
            if approximate == "tanh":
                inner = np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))
            else:
                inner = erf(x * math.sqrt(0.5)) if x.size else x
            return (np.asarray(0.5 * x * (1.0 + inner), dtype=x.dtype),)

    class GatherElements(OpRun):
        def _run(self, data: Array, indices: Array, axis: int = 0) -> tuple[Array]:
            window = [slice(None) if i == axis % data.ndim else slice(0, n) for i, n in enumerate(indices.shape)]
            return (np.take_along_axis(data[tuple(window)], indices, axis=axis),)

    return [Erf, Gelu, GatherElements]
