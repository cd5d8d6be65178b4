"""A small builder for graphs written by hand: an operator is a method, a parameter is a name, a shape and a spread."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from models import zoo_store
from models.zoo_store import Distribution

MICROSOFT = "com.microsoft"
DTYPES = {"float": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64, "bool": onnx.TensorProto.BOOL}
"""The element types that interfaces use, as ONNX's textual syntax calls them."""


class Graph:
    """A graph under construction: it collects nodes; a value is a name.

    `g.MatMul(x, w)` appends a node and returns the name of its output (a tuple of names for `outputs=2`
    and more). Python numbers and lists among the inputs become constants, None an input left out.
    """

    def __init__(self, outer: Graph | None = None):
        self.root: Graph = outer.root if outer else self
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        if outer is None:
            self.count = 0
            self.stored: dict[str, onnx.TensorProto] = {}
            self.random: dict[str, Distribution] = {}
            self.constants: dict[tuple[Any, ...], str] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        return functools.partial(self.add, op_type)

    def add(self, op_type: str, *inputs: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append a node and return its output, or its outputs."""
        names = [self.value(value) for value in inputs]
        results = [self.fresh(op_type) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, names, results, domain=domain, **attributes))
        return results[0] if outputs == 1 else tuple(results)

    def fresh(self, stem: str) -> str:
        """A name that is not used yet."""
        self.root.count += 1
        return f"{stem}_{self.root.count}"

    def value(self, value: Any) -> str:
        """The name of a value: names stand for themselves, numbers become constants."""
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else array.dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.root.constants:
            name = self.root.constants[key] = f"constant_{len(self.root.constants)}"
            self.root.stored[name] = onnx.numpy_helper.from_array(array, name)
        return self.root.constants[key]

    def parameter(self, name: str, shape: Sequence[int], mean: float = 0.0, std: float | None = None) -> str:
        """A stored tensor with random values. By default, a product with it keeps values of order one."""
        if name not in self.root.stored:
            std = (1 / math.sqrt(shape[-2]) if len(shape) > 1 else 0.2) if std is None else std
            self.root.stored[name] = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)
            self.root.random[name] = (mean, float(f"{std:.3g}"))
        return name

    def input(self, name: str, dtype: str, shape: Sequence[int | str] | None = None) -> str:
        """Declare an input of the graph."""
        self.inputs.append(helper.make_tensor_value_info(name, DTYPES[dtype], shape))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence[int | str] | None = None) -> None:
        """Declare a value to be an output of the graph under that name."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, DTYPES[dtype], shape))

    def body(self, name: str) -> onnx.GraphProto:
        """The collected nodes as the body of a Loop or a Scan, its interface named after the block it belongs to."""
        body = helper.make_graph(self.nodes, name, self.inputs, self.outputs)
        names = {value.name for value in (*body.input, *body.output)}
        for node in body.node:
            node.input[:] = [f"{name}.{value}" if value in names else value for value in node.input]
            node.output[:] = [f"{name}.{value}" if value in names else value for value in node.output]
        for value in (*body.input, *body.output):
            value.name = f"{name}.{value.name}"
        return body

    def model(self, opset: int, *domains: str) -> onnx.ModelProto:
        """The collected nodes as a stripped model."""
        graph = helper.make_graph(self.nodes, "main", self.inputs, self.outputs, list(self.stored.values()))
        opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        return zoo_store.strip(helper.make_model(graph, opset_imports=opsets, ir_version=11), self.random)
