"""Gives each use of a stored tensor a tensor of its own.

Exporters merge tensors that are equal when a model is exported. Gains that are all ones and biases that are all zeros
become one tensor. In training each of them would become another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import onnx_ir as ir

from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.transforms.registry import transform


@transform("separate")
def separate(model: ir.Model, *, tensors: Sequence[str]) -> ir.Model:
    """Give each use of some stored tensors its own copy. The first use keeps the tensor.

    Args:
        model: the normalised graph, which is changed.
        tensors: the names of the tensors.

    Raises:
        BadModel: the graph does not have one of the tensors.
    """
    graph = model.graph
    taken = {value.name for node in graph.all_nodes() for value in node.outputs} | set(graph.initializers)
    taken |= {value.name for value in graph.inputs}
    places = {node: number for number, node in enumerate(graph.all_nodes())}
    for name in tensors:
        shared = graph.initializers.get(name)
        if shared is None or shared.const_value is None:
            raise BadModel(f"the plan makes several tensors of {name!r}, and this graph has no such tensor")
        uses = sorted(shared.uses(), key=lambda use: (places[use.node], use.idx))
        for number, use in enumerate(uses[1:], 1):
            new = next(text for text in (f"{name}.{number}{'_' * more}" for more in count()) if text not in taken)
            taken.add(new)
            copy = ir.Value(
                name=new,
                shape=shared.shape,
                type=shared.type,
                const_value=shared.const_value,
            )
            graph.register_initializer(copy)
            use.node.replace_input_with(use.idx, copy)
    return model
