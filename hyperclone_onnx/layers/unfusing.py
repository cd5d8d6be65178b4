"""Takes the Add out of norms that are fused with the Add before them.

ONNX Runtime's SkipLayerNormalization ends one layer and begins the next: the sum belongs to the layer before it, the
gain to the layer behind it. Apart, each layer has its own gain, and the first and the last layer are like the others.

Exporters also store equal tensors once, and let some layers read them through an Identity. Such nodes are left out.
"""

from __future__ import annotations

import onnx_ir as ir

from hyperclone_onnx.graphs import MICROSOFT, FreshNames, is_initializer

NORM_OF = {
    "SkipLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
}
EPSILON = ir.AttrFloat32("epsilon", 1e-12)
"""What the fused norms of ONNX Runtime add where they do not state it. The plain norms would add 1e-5."""
_INPUT, _SKIP, _GAIN = 0, 1, 2
_SUM = 3


def unfuse(graph: ir.Graph) -> None:
    """Replace every fused norm of the main graph by Adds and a norm. The graph is changed."""
    _read_directly(graph)
    fresh = FreshNames(graph)
    for node in list(graph):
        if node.domain == MICROSOFT and node.op_type in NORM_OF and not _has_moments(node):
            _unfuse(graph, node, fresh)


def _read_directly(graph: ir.Graph) -> None:
    """Let nodes that read a stored tensor through an Identity read it directly."""
    for node in list(graph):
        if node.op_type != "Identity" or node.domain or node.inputs[0] is None or not is_initializer(node.inputs[0]):
            continue
        result = node.outputs[0]
        if not result.is_graph_output():
            result.replace_all_uses_with(node.inputs[0])
            graph.remove(node, safe=True)


def _has_moments(node: ir.Node) -> bool:
    """Whether something reads the mean or the deviation that the norm gives besides."""
    return any(value.uses() or value.is_graph_output() for value in node.outputs[1:_SUM])


def _unfuse(graph: ir.Graph, node: ir.Node, fresh: FreshNames) -> None:
    inputs = [*node.inputs, None, None]
    is_simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    beta, bias = (None, inputs[3]) if is_simplified else (inputs[3], inputs[4])
    result = node.outputs[0]
    total = inputs[_INPUT]
    added: list[ir.Node] = []
    for number, operand in enumerate((bias, inputs[_SKIP]) if bias is not None else (inputs[_SKIP],)):
        add = ir.node("Add", [total, operand], name=fresh.node(f"{node.name}.sum{number or ''}"))
        total = add.outputs[0]
        total.name, total.type = fresh.value(f"{result.name}.sum{number or ''}"), result.type
        added.append(add)
    assert total is not None
    total.shape = result.shape
    norm = ir.Node(
        "",
        NORM_OF[node.op_type],
        [total, inputs[_GAIN], *([] if beta is None else [beta])],
        [ir.AttrInt64("axis", -1), *({"epsilon": EPSILON} | dict(node.attributes)).values()],
        num_outputs=1,
        name=node.name,
    )
    graph.insert_before(node, [*added, norm])
    new = norm.outputs[0]
    name = result.name
    new.type, new.shape = result.type, result.shape
    result.name = None
    new.name = name
    result.replace_all_uses_with(new, replace_graph_outputs=True)
    if len(node.outputs) > _SUM:
        old = node.outputs[_SUM]
        if old.type is not None:
            total.type, total.shape = old.type, old.shape
        name, old.name = old.name, None
        if name:
            total.name = name
        old.replace_all_uses_with(total, replace_graph_outputs=True)
    graph.remove(node, safe=True)
