"""Apply a plan to a graph: edit nodes, swap stored tensors for grown ones. The source model is not touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.graphs import FreshNames
from hyperclone_onnx.plan.maps import index_axis, presented
from hyperclone_onnx.plan.plans import (
    METADATA_KEY,
    DivideOutput,
    Edit,
    GatherOutput,
    Interface,
    Plan,
    ResizeVector,
    ScaleInput,
    SetAttribute,
    SetInput,
    TakeBranch,
)
from hyperclone_onnx.tensors.grown_tensor import GrownTensor

Array = npt.NDArray[Any]


def rewrite(source: ir.Model, plan: Plan, dtype: ir.DataType | None = None) -> ir.Model:
    """The grown model, its tensors lazy.

    Args:
        source: the normalised model that the plan was made from.
        plan: what to do.
        dtype: compute floating-point tensors in this type instead of their own.
    """
    model = source.clone()
    _Rewriter(source, model, plan, dtype).run()
    model.metadata_props[METADATA_KEY] = plan.dumps()
    return model


def check_fits(plan: Plan, source: ir.Model) -> None:
    """Whether a plan is for this (normalised) model: it has the tensors, of their sizes, and the nodes.

    Raises:
        BadRequest: it is for another model.
    """
    stored = source.graph.initializers
    for recipe in plan.tensors.values():
        tensor = stored[recipe.source].const_value if recipe.source in stored else None
        if tensor is None:
            raise BadRequest(f"the plan is for another model: this one has no tensor {recipe.source!r}")
        if recipe.bits is not None:
            continue
        wanted = recipe.source_shape(plan.maps)
        if wanted != tuple(tensor.shape.numpy()):
            shape = tuple(tensor.shape.numpy())
            raise BadRequest(f"the plan is for another model: {recipe.source!r} has the shape {shape}, not {wanted}")
    nodes = {node.name for node in source.graph.all_nodes()}
    for each in (*plan.feeds, *plan.edits):
        if each.node not in nodes:
            raise BadRequest(f"the plan is for another model: this one has no node {each.node!r}")


@dataclass(frozen=True)
class _Step:
    """One inserted node: the operator, its stored operands by position (the value takes the free one)."""

    op_type: str
    operands: tuple[tuple[int, ir.Value], ...]
    position: int = 0
    axis: int | None = None


class _Rewriter:
    def __init__(self, source: ir.Model, model: ir.Model, plan: Plan, dtype: ir.DataType | None) -> None:
        self.source = source
        self.graph = model.graph
        self.plan = plan
        self.maps = plan.maps
        self.dtype = dtype
        self.nodes = {node.name: node for node in self.graph.all_nodes()}
        self._fresh = FreshNames(self.graph, plan.tensors)

    def run(self) -> None:
        self._grow_tensors()
        for edit in sorted(self.plan.edits, key=lambda edit: isinstance(edit, TakeBranch)):
            self._apply(edit)
        interface = set(self.graph.outputs)
        for node in self.graph.all_nodes():
            for value in node.outputs:
                value.shape = value.shape if value in interface else None
        for value in (value for inner in self.graph.subgraphs() for value in inner.inputs if value.shape is not None):
            value.shape = ir.Shape([dim if dim == 1 else None for dim in value.shape.dims])  # type: ignore[union-attr]
        for side, values in ((self.plan.inputs, self.graph.inputs), (self.plan.outputs, self.graph.outputs)):
            named = {value.name: value for value in values}
            for each in side:
                self._set_interface(each, named[each.name])

    # -- tensors ------------------------------------------------------------------------------------------

    def _grow_tensors(self) -> None:
        stored = self.source.graph.initializers
        for name, recipe in self.plan.tensors.items():
            tensor = stored[recipe.source].const_value
            assert tensor is not None
            wide = self.dtype if tensor.dtype.is_floating_point() else None
            grown = GrownTensor(tensor, recipe, self.maps, self.plan.strategy, wide).as_lazy(name)
            if name in self.graph.initializers:
                value = self.graph.initializers[name]
                value.const_value, value.shape = grown, ir.Shape(grown.shape)
            else:
                self._store(name, grown)
        for feed in self.plan.feeds:
            self.nodes[feed.node].replace_input_with(feed.input, self.graph.initializers[feed.tensor])
        for name in {recipe.source for recipe in self.plan.tensors.values()}:
            value = self.graph.initializers[name]
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]

    def _store(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def _constant(self, hint: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        name = self._fresh.value(hint)
        return self._store(name, ir.Tensor(array, dtype=dtype, name=name))

    # -- edits --------------------------------------------------------------------------------------------

    def _apply(self, edit: Edit) -> None:
        node = self.nodes[edit.node]
        match edit:
            case SetAttribute(_, name, None):
                node.attributes.pop(name, None)
            case SetAttribute(_, name, value):
                given = list(value) if isinstance(value, tuple) else value
                node.attributes[name] = ir.convenience.convert_attribute(name, given)
            case SetInput(_, index, values, shape):
                if index >= len(node.inputs):
                    node.resize_inputs(index + 1)
                array = np.asarray(values, dtype=_integer_type(node.inputs[index])).reshape(shape)
                node.replace_input_with(index, self._constant(f"{node.name}.sizes", array))
            case ResizeVector():
                self._resize(node, edit)
            case ScaleInput():
                self._before(node, edit.input, self._scale_steps(node, edit))
            case TakeBranch(_, branch):
                self._take_branch(node, branch)
            case DivideOutput(_, slot, divisor):
                array = np.asarray(divisor, dtype=np.int32)
                self._after(node.outputs[slot], [_Step("Div", ((1, self._constant(f"{node.name}.repeats", array)),))])
            case GatherOutput(_, slot, axis, factors):
                source = index_axis([(factor, False) for factor in factors], self.maps).source
                self._after(node.outputs[slot], [self._gather(f"{node.name}.map", source, axis)])

    def _resize(self, node: ir.Node, edit: ResizeVector) -> None:
        """Where(static, literals, Where(vector == keep, vector, vector * numerators / denominators)), as needed."""
        value = (node.outputs if edit.output else node.inputs)[edit.slot]
        assert value is not None
        scalar = edit.output and node.op_type == "Size"
        dtype = _integer_type(value)

        def stored(items: Sequence[int | bool], kind: Any = dtype) -> ir.Value:
            return self._constant(f"{node.name}.sizes", np.asarray(items[0] if scalar else items, dtype=kind))

        steps: list[_Step] = []
        for op_type, position in (("Mul", 0), ("Div", 1)):
            numbers = [factor[position] for factor in edit.factors]
            if any(number != 1 for number in numbers):
                steps.append(_Step(op_type, ((1, stored(numbers)),)))
        if edit.keep is not None:
            kept = ir.node(
                "Equal", [value, stored([edit.keep] * len(edit.factors))], name=self._fresh.node(f"{value.name}.Equal")
            )
            kept.outputs[0].name, kept.outputs[0].type = (
                self._fresh.value(f"{value.name}.kept"),
                ir.TensorType(ir.DataType.BOOL),
            )
            _graph_of(node).insert_before(node, kept)
            steps.append(_Step("Where", ((0, kept.outputs[0]), (1, value)), position=2))
        if any(literal is not None for literal in edit.literals):
            chosen = stored([literal is not None for literal in edit.literals], np.bool_)
            literals = stored([literal or 0 for literal in edit.literals])
            steps.append(_Step("Where", ((0, chosen), (1, literals)), position=2))
        if edit.output:
            self._after(value, steps)
        else:
            self._before(node, edit.slot, steps)

    def _scale_steps(self, node: ir.Node, edit: ScaleInput) -> list[_Step]:
        value = node.inputs[edit.input]
        dtype = None if value is None else value.dtype
        own = self.dtype or dtype or ir.DataType.FLOAT
        steps: list[_Step] = []
        for axis, factors in edit.axes:
            counts = index_axis([(factor, True) for factor in factors], self.maps).count
            divisors = counts.astype(np.float64) ** edit.power
            # A third is off by 2e-3 in bfloat16, and off alike for every element: 3 is exact.
            divides = _fits(divisors, own) and not _fits(1 / divisors, own)
            op_type, array = ("Div", divisors) if divides else ("Mul", 1 / divisors)
            uniform = counts.min() == counts.max()
            array = array[0] if uniform else array.reshape(-1, *[1] * (-axis - 1))
            steps.append(_Step(op_type, ((1, self._constant(f"{node.name}.scale", _cast(array, own), own)),)))
        return steps

    def _gather(self, hint: str, index: Array, axis: int) -> _Step:
        return _Step("Gather", ((1, self._constant(hint, index)),), axis=axis)

    def _take_branch(self, node: ir.Node, name: str) -> None:
        """Put the nodes of one branch in the place of an If; other branches may use the same names."""
        branch, graph = node.attributes[name].as_graph(), _graph_of(node)
        results, moved = list(branch.outputs), list(branch)
        branch.outputs.clear()
        branch.remove(moved)
        for value in (value for inner in moved for value in inner.outputs):
            value.name = self._fresh.value(f"{node.name}.{value.name}")
        graph.insert_before(node, moved)
        for output, result in zip(node.outputs, results, strict=True):
            passed = ir.node("Identity", [result], name=self._fresh.node(f"{node.name}.Identity"))
            passed.outputs[0].name, passed.outputs[0].type = output.name, output.type
            output.name = self._fresh.value(f"{output.name}.branch")
            graph.insert_before(node, passed)
            output.replace_all_uses_with(passed.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)

    # -- inserting ----------------------------------------------------------------------------------------

    def _before(self, node: ir.Node, slot: int, steps: Sequence[_Step]) -> None:
        value = node.inputs[slot]
        assert value is not None
        made = self._chain(value, steps, None)
        _graph_of(node).insert_before(node, made)
        node.replace_input_with(slot, made[-1].outputs[0])

    def _after(self, value: ir.Value, steps: Sequence[_Step], leaving: bool = False) -> ir.Value:
        """Insert steps behind a value; the result takes over its name and its readers. Returns the result.

        With `leaving` only the graph's output reads the result; the graph's own nodes read the value as before.
        """
        result = ir.Value(name=value.name, type=value.type)
        producer = value.producer()
        if producer is None:  # a graph input keeps its name
            result.name = self._fresh.value(f"{value.name}.grown")
        if leaving:
            outputs = self.graph.outputs
            outputs[outputs.index(value)] = result
        else:
            value.replace_all_uses_with(result, replace_graph_outputs=True)
        if producer is not None:
            value.name = self._fresh.value(f"{value.name}.source")
        made = self._chain(value, steps, result)
        first = next(iter(self.graph), None)
        if producer is not None:
            _graph_of(producer).insert_after(producer, made)
        elif first is not None:
            self.graph.insert_before(first, made)
        return result

    def _chain(self, value: ir.Value, steps: Sequence[_Step], result: ir.Value | None) -> list[ir.Node]:
        made: list[ir.Node] = []
        for number, step in enumerate(steps):
            inputs: list[ir.Value] = [operand for _, operand in step.operands]
            inputs.insert(step.position, value)
            attributes = {} if step.axis is None else {"axis": step.axis}
            last = result is not None and number == len(steps) - 1
            node = ir.node(step.op_type, inputs, attributes, outputs=[result] if last and result else None)
            if not last:
                node.outputs[0].type = value.type
                node.outputs[0].name = self._fresh.value(f"{value.name}.{step.op_type.lower()}")
            node.name = self._fresh.node(f"{value.name}.{step.op_type}")
            made.append(node)
            value = node.outputs[0]
        return made

    # -- interface ----------------------------------------------------------------------------------------

    def _set_interface(self, interface: Interface, value: ir.Value) -> None:
        """Give a graph input or output its outer shape, and a Gather where its order inside is another."""
        entering = value.is_graph_input()
        outer: list[int | None] = []
        steps: list[_Step] = []
        for axis, factors in enumerate(interface.axes):
            if factors is None:
                outer.append(None)
                continue
            inside = index_axis([(factor, False) for factor in factors], self.maps).source
            outside = np.unique(inside) if self.plan.keep_interface else presented(factors, self.maps)
            outer.append(len(outside))
            if not np.array_equal(inside, outside):
                there, here = (outside, inside) if entering else (inside, outside)
                steps.append(self._gather(f"{interface.name}.map", _first_index(there)[here], axis))
        declared = list(value.shape.dims) if value.shape is not None else []
        if len(declared) != len(outer):  # nothing is declared, or something that is not so
            declared = [ir.SymbolicDim(None)] * len(outer)
        shape = [
            dim if size is None or not isinstance(dim, int) else size for dim, size in zip(declared, outer, strict=True)
        ]
        if steps:
            result = self._after(value, steps, leaving=not entering)
            if not entering:
                value.shape, value = None, result
        value.shape = ir.Shape(shape)


def _first_index(source: Array) -> Array:
    """For each source index, the first grown index that repeats it."""
    return np.asarray(np.unique(source, return_index=True)[1], dtype=np.int64)


def _graph_of(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph), "functions are inlined"
    return graph


def _integer_type(value: ir.Value | None) -> Any:
    return np.int32 if value is not None and value.dtype == ir.DataType.INT32 else np.int64


def _fits(array: Array, dtype: ir.DataType) -> bool:
    """Whether a type holds the numbers exactly."""
    return bool((_cast(array, dtype).astype(np.float64) == array).all())


def _cast(array: Any, dtype: ir.DataType) -> Array:
    return np.asarray(array, dtype=np.float64).astype(dtype.numpy())
