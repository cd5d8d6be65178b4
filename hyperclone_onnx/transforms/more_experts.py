"""Multiplies the experts of mixtures, and how many of them are chosen.

Each expert is there f times, and so is its row in the router. The copies of an expert have one score. So the f k best
are all copies of the k best, and a softmax over the chosen ones gives each copy 1 / f of the expert's gate. A softmax
over all experts does the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.graphs import FreshNames
from hyperclone_onnx.plan.origins import Joined
from hyperclone_onnx.tensors.assembled import JoinedTensor
from hyperclone_onnx.transforms.interface import ORIGINAL, remember
from hyperclone_onnx.transforms.registry import transform


@transform("more_experts")
def more_experts(model: ir.Model, *, factor: int, mixtures: Sequence[Mapping[str, Any]]) -> ir.Model:
    """Multiply the experts of mixtures of a graph.

    Args:
        model: the normalised graph, which is changed.
        factor: how often each expert is there afterwards, and by what the number of chosen ones is multiplied.
        mixtures: for each mixture `choice`, the first output of the node that chooses; `experts` and `chosen`, their
            numbers; and `tensors`, the stored tensors with an axis of experts, each with the number of that axis.

    Raises:
        BadModel: the graph does not have these mixtures.
    """
    graph = model.graph
    remember(graph)
    fresh = FreshNames(graph)
    choices = {node.outputs[0].name: node for node in graph.all_nodes() if node.outputs}
    done: set[str] = set()
    for mixture in mixtures:
        node = choices.get(mixture["choice"])
        if node is None:
            raise BadModel(
                f"the plan multiplies experts that {mixture['choice']!r} chooses; this graph has no such value"
            )
        _choose(graph, node, mixture["chosen"] * factor, fresh)
        for name, axis in mixture["tensors"]:
            if name not in done:
                done.add(name)
                _repeat(graph, name, axis, factor, mixture["experts"])
    sizes = {number for mixture in mixtures for number in (mixture["experts"], mixture["chosen"])}
    for node in graph.all_nodes():  # shapes in the file may state the numbers of before
        for value in node.outputs:
            if value.shape is not None and not sizes.isdisjoint(value.shape.dims):
                value.shape = None
    return model


def _choose(graph: ir.Graph, node: ir.Node, chosen: int, fresh: FreshNames) -> None:
    """Let a node choose another number of experts."""
    if node.op_type != "TopK":
        node.attributes["k"] = ir.AttrInt64("k", chosen)
        return
    before = node.inputs[1]
    assert before is not None
    value = ir.Value(name=fresh.value(f"{before.name}.chosen"), type=before.type, shape=ir.Shape([1]))
    value.const_value = ir.Tensor(np.array([chosen], dtype=np.int64), name=value.name)
    value.meta[ORIGINAL] = None
    graph.register_initializer(value)
    node.replace_input_with(1, value)
    if not before.uses():
        graph.initializers.pop(before.name or "", None)


def _repeat(graph: ir.Graph, name: str, axis: int, factor: int, experts: int) -> None:
    """Put a stored tensor several times side by side along its axis of experts."""
    value = graph.initializers.get(name)
    tensor = None if value is None else value.const_value
    if value is None or tensor is None or len(tensor.shape) <= axis or tensor.shape[axis] != experts:
        raise BadModel(f"the plan takes axis {axis} of {name!r} for {experts} experts, and it is none")
    value.const_value = JoinedTensor(Joined((name,) * factor, axis), [tensor] * factor)
    value.shape = ir.Shape(value.const_value.shape.numpy())
