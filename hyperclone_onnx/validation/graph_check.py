"""Is the grown graph what the plan makes of the source's, node by node? Tensors are compared elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.graphs import describe
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.rewriting.rewriting import rewrite

MOST = 10
"""Differences beyond these are only counted."""


def check_graph(source: ir.Model, grown: ir.Model, plan: Plan) -> list[str]:
    """What differs between a grown model and `rewrite(source, plan)`, a line each; the weights are left out.

    Compared are the opsets, the interface with its types and shapes, every node with its inputs, outputs and
    attributes in order, and the type, the shape and, where the plan made it, the value of every stored tensor.
    """
    found = list(_differences(rewrite(source, plan), grown, source, plan))
    return found if len(found) <= MOST else [*found[:MOST], f"and {len(found) - MOST} more"]


def _differences(wanted: ir.Model, got: ir.Model, source: ir.Model, plan: Plan) -> Iterator[str]:
    if wanted.graph.opset_imports != got.graph.opset_imports:
        yield f"opsets {dict(got.graph.opset_imports)}, expected {dict(wanted.graph.opset_imports)}"
    for side in ("inputs", "outputs"):
        ours, theirs = ([_declared(value) for value in getattr(each.graph, side)] for each in (wanted, got))
        if ours != theirs:
            yield f"{side} {', '.join(theirs)}; expected {', '.join(ours)}"
    nodes, others = list(wanted.graph), list(got.graph)
    if len(nodes) != len(others):
        yield f"{len(others)} nodes, expected {len(nodes)}"
    for one, other in zip(nodes, others, strict=False):
        if _text(one) != _text(other):
            yield f"{describe(other)} is not what the plan makes of {describe(one)}"
    for name, value in wanted.graph.initializers.items():
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
        if name not in wanted.graph.initializers:
            yield f"tensor {name!r} is not one of the plan's"


def _declared(value: ir.Value) -> str:
    return f"{value.name}: {value.type} {value.shape}"


def _kind(tensor: ir.TensorProtocol) -> str:
    return f"{tensor.dtype.name.lower()}{list(tensor.shape.numpy())}"


def _text(node: ir.Node) -> bytes:
    text: bytes = ir.serde.serialize_node(node).SerializeToString(deterministic=True)
    return text
