"""Models in float64, so that rounding cannot hide a wrong graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx import storage
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.sessions import Runner

Array = npt.NDArray[Any]
_NARROW = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def to_double(model: ir.Model) -> ir.Model:
    """The model with every floating-point value and tensor in float64, changed in place and returned."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in _NARROW:
            value.const_value = _widened(value.const_value)
            value.type = ir.TensorType(ir.DataType.DOUBLE)
    for value in (*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)):
        if value.dtype in _NARROW:
            value.type = ir.TensorType(ir.DataType.DOUBLE)
    for node in model.graph.all_nodes():
        for name in ("to", "dtype", "output_dtype"):
            attribute = node.attributes.get(name)
            if attribute is not None and attribute.as_int() in [int(each) for each in _NARROW]:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.DOUBLE))
        tensor = node.attributes.get("value")
        if tensor is not None and node.op_type == "ConstantOfShape" and tensor.as_tensor().dtype in _NARROW:
            node.attributes["value"] = ir.AttrTensor("value", _widened(tensor.as_tensor()))
    return model


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype(np.float64), name=tensor.name),
        dtype=ir.DataType.DOUBLE,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def double_runner(model: ir.Model, path: Path) -> tuple[Callable[[Mapping[str, Array]], dict[str, Array]], str]:
    """Something that runs a float64 model, and its name.

    ONNX Runtime, where it has a kernel for every node; otherwise ONNX's reference evaluator.

    Raises:
        Refused: neither can run it.
    """
    storage.save(model, path, external=storage.needs_data_file(model))
    try:
        return Runner(path, "cpu").run, "ONNX Runtime"
    except Refused:
        pass
    import onnx.reference

    try:
        evaluator = onnx.reference.ReferenceEvaluator(str(path))
    except Exception as problem:
        raise Refused(f"neither ONNX Runtime nor the reference evaluator runs it in float64 ({problem})") from problem
    names = list(evaluator.input_names)

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            values = evaluator.run(None, {name: feeds[name] for name in names})
        except Exception as problem:
            raise RuntimeError(str(problem).splitlines()[0] if str(problem) else repr(problem)) from problem
        return {name: np.asarray(value) for name, value in zip(evaluator.output_names, values, strict=True)}

    return run, "the ONNX reference evaluator"
