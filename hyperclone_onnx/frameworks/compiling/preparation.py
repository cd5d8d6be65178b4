"""Prepare a model for compiling: inline its functions, check its operators, fold constants, recognise patterns."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from hyperclone_onnx.errors import BadModel, BadRequest, HypercloneError, Refused
from hyperclone_onnx.frameworks.compiling import ops as _table  # noqa: F401 - importing it fills the table
from hyperclone_onnx.frameworks.compiling import registry
from hyperclone_onnx.frameworks.compiling.compiler import bound_attributes, registry_name
from hyperclone_onnx.frameworks.compiling.fusions import fuse, put_in_place
from hyperclone_onnx.frameworks.compiling.fusions.quantisation import train_codes
from hyperclone_onnx.frameworks.compiling.host_values import LARGEST
from hyperclone_onnx.frameworks.compiling.routers import give_router_logits
from hyperclone_onnx.graphs import FreshNames, is_initializer, opset_of
from hyperclone_onnx.reading import loading
from hyperclone_onnx.reading.checker import refuse_if_malformed
from hyperclone_onnx.reading.defaults import store_defaults
from hyperclone_onnx.reading.normalise import normalise
from hyperclone_onnx.reading.opsets import settle_opsets, take_over_versions
from hyperclone_onnx.reading.type_inference import infer_types

CONTROL = ("If", "Loop", "Scan")
"""Operators that hold graphs of their own."""
DEEPEST = 8
"""How many levels of function bodies we inline."""


def prepare(path: str | os.PathLike[str], *, router_logits: bool = False, values: Sequence[str] = ()) -> ir.Model:
    """Read a model and bring it into the form that `compiler.compile_program` takes.

    Args:
        path: the file.
        router_logits: also give the scores of the routers of mixtures of experts as outputs.
        values: names of values inside the graph that are also given as outputs.

    Raises:
        BadModel: the file is not a readable, complete ONNX model.
        BadRequest: the scores of routers were asked for, and there is none; or there is no such value.
        Refused: its opset is too old, or an operator is not covered.
    """
    file = Path(path)
    model = loading.load(file)
    try:
        return prepare_model(model, str(file), router_logits=router_logits, values=values)
    except (HypercloneError, MemoryError, OSError):
        raise
    except Exception as problem:
        refuse_if_malformed(file, str(file), problem)
        raise


def prepare_model(
    model: ir.Model, name: str = "model", *, router_logits: bool = False, values: Sequence[str] = ()
) -> ir.Model:
    """Prepare a model in memory. The model is changed in place and returned."""
    try:
        settle_opsets(model)
        passes.InlinePass()(model)
        for _ in range(DEEPEST):
            if not _inline_bodies(model):
                break
        normalise(model)
        store_defaults(model)
        _store_constant_outputs(model)
    except (BadModel, Refused) as problem:
        raise type(problem)(f"{name}: {problem}") from problem
    check(model, name)
    if router_logits:
        give_router_logits(model, name)
    _give(model, values, name)
    try:
        train_codes(model)
    except Refused as problem:
        raise Refused(f"{name}: {problem}") from problem
    _fold(model)
    fuse(model)
    passes.RemoveUnusedNodesPass()(model)
    return model


def _give(model: ir.Model, names: Sequence[str], file: str) -> None:
    """Add computed values to the outputs of a model. Outputs that have them already stay.

    Raises:
        BadRequest: there is no such value.
    """
    known = {value.name: value for node in model.graph for value in node.outputs}
    for name in dict.fromkeys(names):
        if name not in known:
            raise BadRequest(f"{file}: the graph computes no value {name!r}, which values= asks for")
        if not known[name].is_graph_output():
            model.graph.outputs.append(known[name])


def _store_constant_outputs(model: ir.Model) -> None:
    """Turn constants that are outputs of the graph into stored tensors too: `normalise` leaves these alone."""
    fresh = FreshNames(model.graph)
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Constant" and "value" in node.attributes:
            output = node.outputs[0]
            tensor = node.attributes["value"].as_tensor()
            name = fresh.value(f"{output.name}.value")
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=output.shape, const_value=tensor)
            model.graph.register_initializer(value)
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.name = value.type, node.name
            put_in_place(node, copy)


def _inline_bodies(model: ir.Model) -> bool:
    """Inline ONNX's function body of each operator that the table lacks. Return whether a body was inlined."""
    missing = [
        node
        for node in model.graph.all_nodes()
        if registry.operator(node.domain, node.op_type) is None and node.op_type not in (*CONTROL, "Constant")
    ]
    if not missing:
        return False
    if any(output.dtype is None for node in model.graph for output in node.outputs):
        infer_types(model)
    has_body = False
    for number, node in enumerate(missing):
        function = _function_body(node, model.graph, f"body{number}")
        if function is not None:
            node.overload = function.overload
            model.functions[function.identifier()] = function
            has_body = True
    if has_body:
        passes.InlinePass()(model)
    return has_body


def _function_body(node: ir.Node, graph: ir.Graph, overload: str) -> ir.Function | None:
    """The body that ONNX defines for an operator; None if there is none, or none for the model's opset."""
    opset = opset_of(graph, node.domain)
    try:
        # Any, because onnx's type stubs lack the function bodies.
        schema: Any = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return None
    for name, attribute in schema.attributes.items():
        if name not in node.attributes and attribute.default_value.type:
            node.attributes[name] = ir.serde.deserialize_attribute(attribute.default_value)
    body = None
    if schema.has_function:
        body = schema.function_body
    elif schema.has_context_dependent_function:
        types = [ir.serde.serialize_value(v).type.SerializeToString() if v is not None else b"" for v in node.inputs]
        text = schema.get_context_dependent_function(ir.serde.serialize_node(node).SerializeToString(), types)
        body = onnx.FunctionProto.FromString(text) if text else None
    if body is None:
        return None
    proto = onnx.FunctionProto()
    proto.CopyFrom(body)
    proto.overload = overload
    proto.domain = node.domain
    if not proto.opset_import:
        proto.opset_import.add(domain=node.domain, version=opset)
    try:
        function = ir.serde.deserialize_function(proto)
        take_over_versions(function, graph.opset_imports)
    except (Refused, ir.serde.SerdeError):
        return None
    return function


def check(model: ir.Model, name: str) -> None:
    """Refuse a model with an operator, an attribute, an input or a type that the table does not cover.

    Raises:
        Refused: the model has one. For operators the message names all that are missing, with a node for each.
    """
    missing: Counter[str] = Counter()
    nodes: dict[str, str] = {}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        _check_type(name, value, "")
    for node in model.graph.all_nodes():
        for output in node.outputs:
            _check_type(name, output, f" (node {node.name!r})")
        if node.op_type in CONTROL and not node.domain:
            continue
        operator = registry.operator(node.domain, node.op_type)
        if operator is None:
            missing[registry_name(node)] += 1
            nodes.setdefault(registry_name(node), node.name or "")
            continue
        bound_attributes(node, operator, model.graph.opset_imports)
        count = len(node.inputs)
        if not operator.variadic and count > len(operator.inputs):
            extra = [value for value in node.inputs[len(operator.inputs) :] if value is not None]
            if extra:
                where = f"{registry_name(node)} (node {node.name!r})"
                raise Refused(f"{name}: {where} has no handoff with its input {extra[0].name!r}")
    if missing:
        listed = ", ".join(
            f"{op} (node {nodes[op]!r}{f' and {n - 1} more' if n > 1 else ''})" for op, n in missing.items()
        )
        raise Refused(f"{name}: no handoff for {listed}")


TYPES = frozenset(
    getattr(ir.DataType, name)
    for name in "BOOL INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 FLOAT16 BFLOAT16 FLOAT DOUBLE".split()
)


def _check_type(name: str, value: ir.Value, where: str) -> None:
    if value.dtype is not None and value.dtype not in TYPES:
        raise Refused(f"{name}: {value.name!r}{where} is of the type {value.dtype.name.lower()}, which has no handoff")


def _fold(model: ir.Model) -> None:
    """Fold shapes of stored tensors, and integers computed from stored integers. Floats stay: they may be weights."""
    from hyperclone_onnx.frameworks.compiling.namespaces import numpy as xp

    for node in list(model.graph):
        operator = registry.operator(node.domain, node.op_type)
        outputs = [value for value in node.outputs if value.uses()]
        if len(node.outputs) != 1 or not outputs or outputs[0].is_graph_output():
            continue
        if node.op_type == "Shape" and node.inputs[0] is not None and is_initializer(node.inputs[0]):
            window = slice(*(node.attributes[n].as_int() if n in node.attributes else None for n in ("start", "end")))
            tensor = node.inputs[0].const_value
            assert tensor is not None
            _store(model, node, np.asarray([int(size) for size in tensor.shape.numpy()][window], np.int64))
            continue
        if operator is None or not node.inputs or not all(v is not None and _is_whole(v) for v in node.inputs):
            continue
        form = registry.operator(node.domain, node.op_type)
        assert form is not None
        if form.keywords & {"device", "outputs"} or form.host - {"axes", "shape", "starts", "ends", "steps"}:
            continue
        arrays = [v.const_value.numpy() for v in node.inputs if v is not None and v.const_value is not None]
        arguments = [tuple(a.tolist()) if form.is_host(i) else a for i, a in enumerate(arrays)]
        attributes = dict(bound_attributes(node, form, model.graph.opset_imports))
        result = np.asarray(form.function(xp, *arguments, **attributes))
        if result.dtype.kind in "biu" and result.size <= LARGEST:
            _store(model, node, result)


def _is_whole(value: ir.Value) -> bool:
    tensor = value.const_value
    return is_initializer(value) and tensor is not None and tensor.size <= LARGEST and tensor.dtype.is_integer()


def _store(model: ir.Model, node: ir.Node, array: npt.NDArray[Any]) -> None:
    """Put a stored tensor, under the name of the node's output, in the place of the node."""
    output = node.outputs[0]
    tensor = ir.Tensor(array, name=output.name)
    value = ir.Value(
        name=output.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    output.replace_all_uses_with(value)
    output.name = f"{output.name}.folded"
    model.graph.remove(node, safe=True)
    model.graph.register_initializer(value)
