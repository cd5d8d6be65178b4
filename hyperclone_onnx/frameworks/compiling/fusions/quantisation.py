"""Let the gradient go through fake quantisation: its codes stay floating numbers between the two operators."""

from __future__ import annotations

import onnx_ir as ir

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.compiling.fusions.graphs import put_in_place
from hyperclone_onnx.frameworks.compiling.registry import INTERNAL
from hyperclone_onnx.graphs import MOVES_ELEMENTS


def train_codes(model: ir.Model) -> None:
    """Put `Codes` in the place of each QuantizeLinear whose codes are dequantised. Other codes may only be outputs.

    Raises:
        Refused: another operator computes with codes: they are integers, and no gradient would go through them.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type != "QuantizeLinear" or node.domain:
            continue
        readers = _readers(node.outputs[0])
        other = next((reader for reader in readers if reader.op_type != "DequantizeLinear" or reader.domain), None)
        if other is not None:
            raise Refused(
                f"no handoff for QuantizeLinear (node {node.name!r}): {other.op_type} (node {other.name!r}) reads its "
                "codes, and no gradient goes through integers; only DequantizeLinear may read them"
            )
        if readers and not _leaves(node.outputs[0]):
            attributes = list(node.attributes.values())
            put_in_place(node, ir.Node(INTERNAL, "Codes", list(node.inputs), attributes))
    model.graph.opset_imports.setdefault(INTERNAL, 1)


def _readers(codes: ir.Value) -> list[ir.Node]:
    """The nodes that read codes, behind operators that only move elements."""
    readers: list[ir.Node] = []
    for use in codes.uses():
        moves = use.idx == 0 and use.node.op_type in MOVES_ELEMENTS and not use.node.domain
        readers += _readers(use.node.outputs[0]) if moves else [use.node]
    return readers


def _leaves(codes: ir.Value) -> bool:
    """Whether codes are an output of the graph, perhaps in another layout."""
    moved = [use.node.outputs[0] for use in codes.uses() if use.node.op_type in MOVES_ELEMENTS and not use.node.domain]
    return codes.is_graph_output() or any(map(_leaves, moved))
