"""Changes a node in ways that the specification of its operator forbids, or hardly allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, helper, numpy_helper

Rng = np.random.Generator
INTEGERS = (0, -1, 1, 2, 3, 7, -9, 2**31 - 1, -(2**31), 2**40, -(2**62))


def choose(rng: Rng, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def no_input(model: ModelProto, node: NodeProto, rng: Rng) -> None:
    node.input[int(rng.integers(len(node.input)))] = ""


def fewer_inputs(model: ModelProto, node: NodeProto, rng: Rng) -> None:
    del node.input[int(rng.integers(len(node.input))) :]


def one_more_input(model: ModelProto, node: NodeProto, rng: Rng) -> None:
    node.input.append(choose(rng, [value.name for value in (*model.graph.input, *model.graph.initializer)]))


def another_rank(model: ModelProto, node: NodeProto, rng: Rng) -> None:
    name = choose(rng, node.input)
    producer = next((node for node in model.graph.node if name in node.output), None)
    if producer is not None and producer.op_type == "Identity":
        name = producer.input[0]
    change = int(rng.integers(5))
    for tensor in model.graph.initializer:
        if tensor.name == name:
            array = numpy_helper.to_array(tensor)
            array = [
                lambda a: a[..., None],
                lambda a: a[..., 0] if a.ndim and a.shape[-1] else a[None],
                lambda a: a.ravel()[0].reshape(()) if a.size else a[None],
                lambda a: a[:0] if a.ndim else a,
                lambda a: np.concatenate([a, a], -1) if a.ndim else a[None],
            ][change](array)
            tensor.CopyFrom(numpy_helper.from_array(np.array(array), name))
    for value in model.graph.input:
        if value.name == name:
            sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            sizes = [[*sizes, 2], sizes[:-1], [], [0, *sizes[1:]], [3, *sizes]][change]
            value.CopyFrom(helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, sizes))


def other_elements(model: ModelProto, node: NodeProto, rng: Rng) -> None:
    """Change an operand of integers: indices, sizes, axes."""
    for tensor in model.graph.initializer:
        if tensor.name in node.input and tensor.data_type in (onnx.TensorProto.INT32, onnx.TensorProto.INT64):
            array = numpy_helper.to_array(tensor).copy()
            if array.size:
                array.reshape(-1)[int(rng.integers(array.size))] = choose(rng, [n for n in INTEGERS if abs(n) <= 2**31])
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def no_attribute(model: ModelProto, node: NodeProto, rng: Rng) -> None:
    del node.attribute[int(rng.integers(len(node.attribute)))]


def attribute_of_another_kind(model: ModelProto, node: NodeProto, rng: Rng) -> None:
    attribute = choose(rng, node.attribute)
    value = choose(rng, (7, -3, 0.5, "text", [1, 2], [0.5]))
    attribute.CopyFrom(helper.make_attribute(attribute.name, value))


def another_attribute(model: ModelProto, node: NodeProto, rng: Rng) -> None:
    attribute = choose(rng, node.attribute)
    if attribute.type == AttributeProto.INT:
        attribute.i = choose(rng, INTEGERS)
    elif attribute.type == AttributeProto.INTS:
        listed = list(attribute.ints)
        changed = [listed[:-1], [*listed, 1], [choose(rng, INTEGERS), *listed[1:]], []]
        attribute.ClearField("ints")
        attribute.ints.extend(choose(rng, changed))
    elif attribute.type == AttributeProto.STRING:
        attribute.s = b"nonsense"
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = choose(rng, (0.0, -1.0, np.inf, np.nan))


Change = Callable[[ModelProto, NodeProto, Rng], None]
OF_INPUTS: list[Change] = [no_input, fewer_inputs, one_more_input, another_rank, another_rank, other_elements]
OF_ATTRIBUTES: list[Change] = [no_attribute, attribute_of_another_kind, another_attribute]


def spoil(model: ModelProto, op_type: str, rng: Rng) -> None:
    """Change one node of an operator, once or twice."""
    node = choose(rng, [node for node in model.graph.node if node.op_type == op_type])
    for _ in range(int(rng.integers(1, 3))):
        changes = [*(OF_INPUTS if node.input else []), *(OF_ATTRIBUTES if node.attribute else [])]
        if changes:
            choose(rng, changes)(model, node, rng)
