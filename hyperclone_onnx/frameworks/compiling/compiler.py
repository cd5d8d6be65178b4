"""Compile a prepared graph to a `Program`: each node becomes a call of an operator of the table."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.analysis.trainable import Role
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.compiling import registry
from hyperclone_onnx.frameworks.compiling.host_values import HostValues, always_goes_on
from hyperclone_onnx.frameworks.compiling.program import (
    Body,
    Call,
    Choice,
    Input,
    Lifted,
    Local,
    Number,
    Operand,
    Program,
    Repeat,
    Step,
    Stored,
    Walk,
    Weight,
)
from hyperclone_onnx.frameworks.compiling.registry import Operator
from hyperclone_onnx.graphs import is_initializer, opset_of


def identifier(name: str, taken: set[str]) -> str:
    """A Python variable for a name, different from all taken variables. It is added to them."""
    base = re.sub(r"\W", "_", name, flags=re.ASCII) or "value"
    if base[0].isdigit() or base.startswith("__") or keyword.iskeyword(base):
        base = f"v_{base}"
    variable, number = base, 0
    while variable in taken:
        number += 1
        variable = f"{base}_{number}"
    taken.add(variable)
    return variable


RESERVED = frozenset("branch device device_of host inf lift loop nan partial self walk weights xp".split())
"""Names that the generated functions use themselves, besides the names of operators."""


def compile_program(model: ir.Model, roles: Mapping[str, tuple[Role, str]], paths: Mapping[str, str]) -> Program:
    """Compile a prepared model (see `preparation.prepare`).

    Args:
        model: a model whose functions are inlined and whose operators are all in the table.
        roles: the role of stored tensors, and the reason. A tensor without a role is constant.
        paths: the path of each stored tensor.

    Raises:
        Refused: a size depends on data, or an operator is used in a form that the table does not describe.
    """
    return _Compiler(model, roles, paths).run()


class _Compiler:
    def __init__(self, model: ir.Model, roles: Mapping[str, tuple[Role, str]], paths: Mapping[str, str]) -> None:
        self.model = model
        self.roles = roles
        self.paths = paths
        self.hosts = HostValues(model)
        self.taken = {*RESERVED, *(op_type for _, op_type in registry.covered())}
        self.variables: dict[ir.Value, str] = {}
        self.used: dict[str, Weight] = {}

    def run(self) -> Program:
        graph = self.model.graph
        inputs = tuple(
            Input(
                value.name or "",
                self.variable(value),
                int(value.dtype or 1),
                value in self.hosts.host,
                isinstance(value.type, ir.OptionalType),
            )
            for value in graph.inputs
        )
        steps = self.steps(graph)
        outputs = tuple(self.operand(value) for value in graph.outputs)
        body = Body(tuple(entry.variable for entry in inputs), steps, outputs)
        return Program(inputs, tuple(v.name or "" for v in graph.outputs), body, tuple(self.used.values()))

    def variable(self, value: ir.Value) -> str:
        if value not in self.variables:
            self.variables[value] = identifier(value.name or "value", self.taken)
        return self.variables[value]

    # -- operands -----------------------------------------------------------------------------------------

    def operand(self, value: ir.Value) -> Operand:
        """The operand for a value that the operator takes as an array."""
        if is_initializer(value):
            return self.stored(value)
        if value in self.hosts.host:
            return Lifted(Local(self.variable(value)), int(value.dtype or ir.DataType.INT64))
        return Local(self.variable(value))

    def host_operand(self, value: ir.Value) -> Operand:
        """The operand for a value that the operator takes as Python numbers."""
        if is_initializer(value):
            return Number(numbers(value))
        return Local(self.variable(value))

    def stored(self, value: ir.Value) -> Stored:
        """The operand for a stored tensor, which becomes a weight of the program."""
        name = value.name or ""
        tensor = value.const_value
        assert tensor is not None
        role, reason = self.roles.get(name, ("constant", ""))
        path = self.paths[name]
        shape = tuple(int(size) for size in tensor.shape.numpy())
        self.used[path] = Weight(name, path, shape, int(tensor.dtype), role, reason)
        return Stored(path)

    # -- steps --------------------------------------------------------------------------------------------

    def steps(self, graph: ir.Graph) -> tuple[Step, ...]:
        return tuple(self.step(node) for node in graph)

    def step(self, node: ir.Node) -> Step:
        if not node.domain:
            match node.op_type:
                case "If":
                    return self.choice(node)
                case "Loop":
                    return self.repeat(node)
                case "Scan":
                    return self.walk(node)
        return self.call(node)

    def outputs(self, node: ir.Node) -> tuple[str | None, ...]:
        """A variable for each output of a node, or None for an output that nothing reads."""
        return tuple(
            self.variable(value) if value.uses() or value.is_graph_output() else None for value in node.outputs
        )

    def choice(self, node: ir.Node) -> Choice:
        condition = node.inputs[0]
        assert condition is not None
        operand = self.host_operand(condition) if condition in self.hosts.host else self.operand(condition)
        if is_initializer(condition):
            operand = Number(bool(numbers(condition)))
        bodies = [self.body(node.attributes[name].as_graph()) for name in ("then_branch", "else_branch")]
        return Choice(node.name or "", operand, bodies[0], bodies[1], self.outputs(node))

    def repeat(self, node: ir.Node) -> Repeat:
        trips, condition, *states = node.inputs
        graph = node.attributes["body"].as_graph()
        always = always_goes_on(node)
        body = self.body(graph, outputs=graph.outputs[1:] if always else graph.outputs)
        return Repeat(
            node.name or "",
            None if trips is None else self.known_or_array(trips),
            None if always or condition is None else self.operand(condition),
            tuple(self.as_state(value, entry) for value, entry in zip(states, graph.inputs[2:], strict=True)),
            body,
            self.outputs(node),
            any(value in self.hosts.host for value in graph.inputs),
        )

    def as_state(self, value: ir.Value | None, given: ir.Value) -> Operand:
        """The operand for a Loop's first state, as numbers or as an array like the body's input (`given`)."""
        assert value is not None
        return self.host_operand(value) if given in self.hosts.host else self.operand(value)

    def known_or_array(self, value: ir.Value) -> Operand:
        """The operand for a Loop's count of turns: a Python number if it is known on the host."""
        if not self.hosts.is_known(value):
            return self.operand(value)
        operand = self.host_operand(value)
        if isinstance(operand, Number) and isinstance(operand.value, tuple):
            return Number(operand.value[0])
        return operand

    def walk(self, node: ir.Node) -> Walk:
        if opset_of(self.model.graph) < 9:
            raise Refused(f"Scan (node {node.name!r}) is of opset 8, where a Scan has a batch axis: it has no handoff")
        graph = node.attributes["body"].as_graph()
        scanned = node.attributes["num_scan_inputs"].as_int()
        states = len(node.inputs) - scanned
        stacked = len(graph.outputs) - states

        def listed(name: str, length: int) -> list[int]:
            return list(node.attributes[name].as_ints()) if name in node.attributes else [0] * length

        operands = [self.operand(value) for value in node.inputs if value is not None]
        return Walk(
            node.name or "",
            tuple(operands[:states]),
            tuple(operands[states:]),
            self.body(graph),
            self.outputs(node),
            (*listed("scan_input_axes", scanned), *listed("scan_output_axes", stacked)),
            (*listed("scan_input_directions", scanned), *listed("scan_output_directions", stacked)),
        )

    def body(self, graph: ir.Graph, outputs: Sequence[ir.Value] | None = None) -> Body:
        inputs = tuple(self.variable(value) for value in graph.inputs)
        steps = self.steps(graph)
        return Body(
            inputs, steps, tuple(self.result(value) for value in (graph.outputs if outputs is None else outputs))
        )

    def result(self, value: ir.Value) -> Operand:
        """The operand for an output of a body. A state that the next turn takes as a number is left as a number."""
        return self.host_operand(value) if value in self.hosts.states else self.operand(value)

    def call(self, node: ir.Node) -> Call:
        host = self.hosts.runs_on_host(node)
        form = (registry.host_operator if host else registry.operator)(node.domain, node.op_type)
        assert form is not None, "checked when the model was prepared"
        inputs: list[Operand | None] = []
        scalars = form.scalars and self._has_array(node)
        for position, value in enumerate(node.inputs):
            if value is None:
                inputs.append(None)
            elif host or form.is_host(position):
                inputs.append(self.host_operand(value))
            elif scalars and self._is_scalar(value):
                inputs.append(Number(numbers(value)))
            else:
                inputs.append(self.operand(value))
        while inputs and inputs[-1] is None:
            inputs.pop()
        attributes = bound_attributes(node, form, self.model.graph.opset_imports)
        outputs = self.outputs(node)[: dict(attributes).get("outputs", len(node.outputs))]
        creates = "device" in form.keywords
        return Call(node.name or "", node.domain, node.op_type, tuple(inputs), outputs, attributes, host, creates)

    def _has_array(self, node: ir.Node) -> bool:
        """Whether an input is an array at run time, so that the result is one although others are Python numbers."""
        skip = 1 if node.op_type == "Where" else 0
        return any(value is not None and not is_initializer(value) for value in node.inputs[skip:])

    def _is_scalar(self, value: ir.Value) -> bool:
        tensor = value.const_value
        return is_initializer(value) and tensor is not None and len(tensor.shape) == 0 and value.name not in self.roles


def numbers(value: ir.Value) -> Any:
    """The elements of a stored tensor as Python numbers."""
    assert value.const_value is not None
    return nested(value.const_value.numpy())


def nested(array: Any) -> Any:
    """The elements of an array as nested tuples of Python numbers, without rounding."""
    if array.dtype.kind not in "biuf":
        array = array.astype(np.float32)
    items = array.tolist()
    return _tuples(items)


def _tuples(items: Any) -> Any:
    return tuple(_tuples(item) for item in items) if isinstance(items, list) else items


def attribute_value(attribute: ir.Attr) -> Any:
    """The value of an attribute as plain data. A tensor becomes (element type, flat tuple of its numbers)."""
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return int(tensor.dtype), nested(tensor.numpy().ravel())
    if attribute.type == ir.AttributeType.STRING:
        return attribute.as_string()
    if attribute.type == ir.AttributeType.TYPE_PROTO:  # the type of an optional value that is absent
        return None
    value = attribute.value
    return tuple(value) if isinstance(value, list | tuple) else value


def bound_attributes(node: ir.Node, form: Operator, opsets: Mapping[str, int]) -> tuple[tuple[str, Any], ...]:
    """The keyword arguments of a call.

    Raises:
        Refused: the node has an attribute that the operator's implementation does not take.
    """
    keywords: dict[str, Any] = dict(form.floats)
    for name, attribute in node.attributes.items():
        if name in form.keywords or name in form.inputs[len(node.inputs) :]:
            keywords[name] = attribute_value(attribute)
        elif not _is_default(node, attribute, opsets):
            raise Refused(f"{registry_name(node)} (node {node.name!r}) has no handoff with its attribute {name!r}")
    if "opset" in form.keywords:
        keywords["opset"] = opsets.get(node.domain, 1)
    if "outputs" in form.keywords:
        used = [i for i, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
        keywords["outputs"] = len(node.outputs) if node.op_type == "Split" else max(used, default=0) + 1
    if "element_type" in form.keywords and node.inputs[0] is not None:
        keywords["element_type"] = int(node.inputs[0].dtype or ir.DataType.INT64)
    return tuple(keywords.items())


def _is_default(node: ir.Node, attribute: ir.Attr, opsets: Mapping[str, int]) -> bool:
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
        default = onnx.helper.get_attribute_value(schema.attributes[attribute.name].default_value)
    except (onnx.defs.SchemaError, KeyError, ValueError):
        return False
    default = default.decode() if isinstance(default, bytes) else default
    return bool(attribute_value(attribute) == (tuple(default) if isinstance(default, list) else default))


def registry_name(node: ir.Node) -> str:
    """An operator's name with its domain."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type
