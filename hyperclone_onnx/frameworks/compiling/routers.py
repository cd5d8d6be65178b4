"""Finds the routers of mixtures of experts in a graph, and gives their scores as outputs.

A loss that balances the load of the experts needs the scores.
"""

from __future__ import annotations

import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.graphs import MICROSOFT, MOVES_OR_CASTS, is_initializer

_BEFORE_CHOICE = MOVES_OR_CASTS | {"Softmax"}
"""Operators that may stand between the scores and the choice."""

_MIXTURES = {"MoE": 1, "QMoE": 1}
"""ONNX Runtime's operators for a mixture, each with the input that has the scores."""


def router_logits(graph: ir.Graph) -> list[ir.Value]:
    """The scores of each router of a graph, in the order of the graph: the product that a choice of the best reads.

    A router chooses with TopK, and a softmax stands before the choice or behind it.
    """
    scores: dict[ir.Value, None] = {}
    for node in graph:
        if node.domain == MICROSOFT and node.op_type in _MIXTURES:
            value = node.inputs[_MIXTURES[node.op_type]]
        elif node.op_type == "TopK" and not node.domain and _chooses(node):
            value = node.inputs[0]
        else:
            continue
        product = _product(value)
        if product is not None:
            scores.setdefault(product)
    return list(scores)


def give_router_logits(model: ir.Model, name: str) -> None:
    """Add the scores of all routers to the outputs of a model. Outputs that have them already stay.

    Args:
        model: a normalised model, which is changed.
        name: its name in messages.

    Raises:
        BadRequest: it has no router.
    """
    scores = router_logits(model.graph)
    if not scores:
        raise BadRequest(f"{name}: router_logits asks for the scores of routers, and this model has no router")
    model.graph.outputs.extend(value for value in scores if not value.is_graph_output())


def _chooses(choice: ir.Node) -> bool:
    """Whether a softmax stands before a TopK or behind it."""
    after = any(use.node.op_type == "Softmax" for value in choice.outputs[:1] for use in value.uses())
    value, before = choice.inputs[0], False
    while value is not None and (node := value.producer()) is not None and node.op_type in _BEFORE_CHOICE:
        before |= node.op_type == "Softmax"
        value = node.inputs[0]
    return after or before


def _product(value: ir.Value | None) -> ir.Value | None:
    """The product with a stored weight, with its bias, of which a value is only another form; None for others."""
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if node.op_type in ("MatMul", "Gemm"):
            weight = node.inputs[1]
            while weight is not None and (moved := weight.producer()) is not None and moved.op_type in MOVES_OR_CASTS:
                weight = moved.inputs[0]
            return node.outputs[0] if weight is not None and is_initializer(weight) else None
        if node.op_type == "Add" and any(operand is not None and is_initializer(operand) for operand in node.inputs):
            inner = next((operand for operand in node.inputs if operand and not is_initializer(operand)), None)
            return value if _product(inner) is not None else None
        if node.op_type not in _BEFORE_CHOICE:
            return None
        value = node.inputs[0]
    return None
