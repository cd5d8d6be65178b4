"""Applies a plan to a copy of the source graph: edits nodes, and replaces stored tensors by grown ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.plan.edits import Step
from hyperclone_onnx.plan.maps import index_axis, presented
from hyperclone_onnx.plan.plans import METADATA_KEY, Interface, Plan
from hyperclone_onnx.reading.defaults import put_defaults_back
from hyperclone_onnx.rewriting.editor import GraphEditor
from hyperclone_onnx.tensors.assembled import assemble
from hyperclone_onnx.tensors.grown_tensor import GrownTensor

Array = npt.NDArray[Any]


def rewrite(source: ir.Model, plan: Plan, dtype: ir.DataType | None = None) -> ir.Model:
    """Build the grown model. Its tensors are computed when they are read. Its metadata contain the plan.

    Args:
        source: the source from which the plan was made, normalised and transformed (`transforms.source_of`). It is not
            changed.
        plan: the plan. It fits the source (see `check_fits`).
        dtype: the type of floating-point tensors, in the place of their own type.
    """
    model = source.clone()
    editor = GraphEditor(model.graph, plan.maps, plan.tensors, dtype)
    _grow_tensors(source, editor, plan)
    for edit in sorted(plan.edits, key=lambda edit: edit.comes_last):
        edit.apply(editor)
    _drop_source_shapes(model.graph)
    for side, values in ((plan.inputs, model.graph.inputs), (plan.outputs, model.graph.outputs)):
        named = {value.name: value for value in values}
        for interface in side:
            _set_interface(editor, plan, interface, named[interface.name])
    put_defaults_back(model, partial(_grown_default, plan))
    model.metadata_props[METADATA_KEY] = _with_added_names(plan, model, tuple(editor.added)).dumps()
    return model


def _with_added_names(plan: Plan, model: ir.Model, added: tuple[str, ...]) -> Plan:
    """The plan, with the names of the added constants if the forms of names alone would mistake another tensor."""
    floats = [
        name for name, value in model.graph.initializers.items() if value.dtype and value.dtype.is_floating_point()
    ]
    names = frozenset(added)
    if all(plan.brings_in(name) == (name in names) for name in floats):
        return plan
    return replace(plan, added=added)


def check_fits(plan: Plan, source: ir.Model) -> None:
    """Check that a plan is for this normalised model: that the model has the plan's tensors, their shapes, and nodes.

    Raises:
        BadRequest: the plan is for another model. The text names the first difference.
    """
    stored = source.graph.initializers
    for name, recipe in plan.tensors.items():
        for tensor in recipe.sources:
            if tensor not in stored or stored[tensor].const_value is None:
                raise BadRequest(f"the plan is for another model: this one has no tensor {tensor!r}")
        if recipe.bits is not None:
            continue
        expected = recipe.source_shape(plan.maps)
        try:
            shape = tuple(assemble(recipe.origin, source).shape.numpy())
        except ValueError as problem:
            raise BadRequest(f"the plan is for another model: {name!r} cannot be made ({problem})") from problem
        if expected != shape:
            tensor_name = recipe.noise_name
            raise BadRequest(f"the plan is for another model: {tensor_name!r} has the shape {shape}, not {expected}")
    nodes = {node.name for node in source.graph.all_nodes()}
    for node in (*(feed.node for feed in plan.feeds), *(edit.node for edit in plan.edits)):
        if node not in nodes:
            raise BadRequest(f"the plan is for another model: this one has no node {node!r}")


def _grow_tensors(source: ir.Model, editor: GraphEditor, plan: Plan) -> None:
    """Replace stored tensors by grown ones, and remove stored tensors that nothing reads any more."""
    graph = editor.graph
    for name, recipe in plan.tensors.items():
        tensor = assemble(recipe.origin, source)
        dtype = editor.dtype if tensor.dtype.is_floating_point() else None
        grown = GrownTensor(tensor, recipe, editor.maps, plan.strategy_of(name), dtype).as_lazy(name)
        if name in graph.initializers:
            value = graph.initializers[name]
            value.const_value, value.shape = grown, ir.Shape(grown.shape)
        else:
            editor.store(name, grown)
    for feed in plan.feeds:
        editor.replace_input(feed.node, feed.input, graph.initializers[feed.tensor])
    for name in {name for recipe in plan.tensors.values() for name in recipe.sources}:
        value = graph.initializers[name]
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _drop_source_shapes(graph: ir.Graph) -> None:
    """Remove the shapes that values had in the source. The inputs of bodies keep sizes of 1, which never grow."""
    interface = set(graph.outputs)
    for node in graph.all_nodes():
        for value in node.outputs:
            value.shape = value.shape if value in interface else None
    for value in (value for body in graph.subgraphs() for value in body.inputs if value.shape is not None):
        value.shape = ir.Shape([dim if dim == 1 else None for dim in value.shape.dims])  # type: ignore[union-attr]


def _set_interface(editor: GraphEditor, plan: Plan, interface: Interface, value: ir.Value) -> None:
    """Give a graph input or output its grown shape, and a Gather where the order inside the graph differs."""
    entering = value.is_graph_input()
    outer: list[int | None] = []
    steps: list[Step] = []
    numbered: set[int] = set()  # a caller must know the length of an input that grew, though the source only named it
    stretches: list[Step] = []
    for axis, factors in enumerate(interface.axes):
        if factors is None:
            outer.append(None)
            continue
        index = index_axis([(factor, False) for factor in factors], plan.maps)
        inside = index.source
        if index.stretch is not None:
            factor = index.stretch if entering else 1.0 / index.stretch
            stretches.append(editor.multiply(value, axis - len(interface.axes), factor))
        outside = presented(factors, plan.maps)
        if plan.keep_interface:
            outside = np.unique(outside)
        outer.append(len(outside))
        if entering and len(outside) > len(np.unique(inside)):
            numbered.add(axis)
        if not np.array_equal(inside, outside):
            before, after = (outside, inside) if entering else (inside, outside)
            steps.append(editor.gather(f"{interface.name}.map", _first_index(before)[after], axis))
    declared = list(value.shape.dims) if value.shape is not None else []
    if len(declared) != len(outer):  # the source declares no shape, or one of a wrong rank
        declared = [ir.SymbolicDim(None)] * len(outer)
    shape = [
        dim if size is None or not (isinstance(dim, int) or axis in numbered) else size
        for axis, (dim, size) in enumerate(zip(declared, outer, strict=True))
    ]
    # The order inside the graph is that of the stretches, so that they come first or last.
    steps = [*steps, *stretches] if entering else [*stretches, *steps]
    if steps:
        result = editor.insert_behind(value, steps, leaving=not entering)
        if not entering:
            value.shape, value = None, result
    value.shape = ir.Shape(shape)


def _grown_default(plan: Plan, value: ir.Value, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The default of an input, in the shape and the order in which callers give that input to the grown model."""
    interface = next((interface for interface in plan.inputs if interface.name == value.name), None)
    if interface is None or plan.keep_interface:
        return tensor
    indices = {
        axis: presented(factors, plan.maps)
        for axis, factors in enumerate(interface.axes)
        if factors is not None and tensor.shape[axis] != 0
    }

    def grown() -> ir.TensorProtocol:
        array = tensor.numpy()
        for axis, index in indices.items():
            array = np.take(array, index, axis=axis)
        return ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)

    sizes = [len(indices[axis]) if axis in indices else size for axis, size in enumerate(tensor.shape.numpy())]
    return ir.LazyTensor(grown, dtype=tensor.dtype, shape=ir.Shape(sizes), name=tensor.name)


def _first_index(source: Array) -> Array:
    """For each source index, the first grown index that repeats it."""
    return np.asarray(np.unique(source, return_index=True)[1], dtype=np.int64)
