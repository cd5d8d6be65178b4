"""Compares the grown graph, node by node, with the graph that the plan makes from the source.

`tensor_check` compares the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.graphs import describe
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.rewriting.rewriting import rewrite

MOST = 10
"""The number of differences that we list. The others are only counted."""


def check_graph(source: ir.Model, grown: ir.Model, plan: Plan) -> list[str]:
    """The differences between a grown model and `rewrite(source, plan)`, one line for each.

    We compare the opsets, the inputs and outputs with their types and shapes, and all nodes in order with their inputs,
    outputs and attributes. Of stored tensors we compare types and shapes, and the values of those that the plan adds.
    """
    lines = list(_differences(rewrite(source, plan), grown, source, plan))
    return lines if len(lines) <= MOST else [*lines[:MOST], f"and {len(lines) - MOST} more"]


def _differences(expected: ir.Model, got: ir.Model, source: ir.Model, plan: Plan) -> Iterator[str]:
    if expected.graph.opset_imports != got.graph.opset_imports:
        yield f"opsets {dict(got.graph.opset_imports)}, expected {dict(expected.graph.opset_imports)}"
    for side in ("inputs", "outputs"):
        ours, theirs = ([_declared(value) for value in getattr(model.graph, side)] for model in (expected, got))
        if ours != theirs:
            yield f"{side} {', '.join(theirs)}; expected {', '.join(ours)}"
    nodes, others = list(expected.graph), list(got.graph)
    if len(nodes) != len(others):
        yield f"{len(others)} nodes, expected {len(nodes)}"
    for one, other in zip(nodes, others, strict=False):
        if _text(one) != _text(other):
            yield f"{describe(other)} differs from the node that the plan makes of {describe(one)}"
    for name, value in expected.graph.initializers.items():
        own = value.const_value
        tensor = got.graph.initializers[name].const_value if name in got.graph.initializers else None
        if own is None:
            continue
        if tensor is None:
            yield f"tensor {name!r} is missing"
        elif tensor.dtype != own.dtype or tuple(tensor.shape.numpy()) != tuple(own.shape.numpy()):
            yield f"tensor {name!r} is {_kind(tensor)}, expected {_kind(own)}"
        elif name in plan.tensors or name in source.graph.initializers:
            continue
        elif not np.array_equal(tensor.numpy(), own.numpy()):
            yield f"tensor {name!r}, which holds sizes or scales, has other values"
    for name in got.graph.initializers:
        if name not in expected.graph.initializers:
            yield f"tensor {name!r} is not in the plan"


def _declared(value: ir.Value) -> str:
    return f"{value.name}: {value.type} {value.shape}"


def _kind(tensor: ir.TensorProtocol) -> str:
    return f"{tensor.dtype.name.lower()}{list(tensor.shape.numpy())}"


def _text(node: ir.Node) -> bytes:
    text: bytes = ir.serde.serialize_node(node).SerializeToString(deterministic=True)
    return text
