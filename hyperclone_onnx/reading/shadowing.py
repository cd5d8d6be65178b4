"""Renames values in the bodies of nodes that have the name of an outer value.

Runtimes accept such names and read the inner value. ONNX's specification forbids them, and a pass that moves values of
a body into the outer graph would mix them up.
"""

from __future__ import annotations

import onnx_ir as ir

from hyperclone_onnx.graphs import FreshNames, bodies_of


def rename_shadowing(graph: ir.Graph) -> None:
    """Give values in bodies fresh names where an outer value that they could read has the same name."""
    fresh: FreshNames | None = None
    waiting: list[tuple[ir.Graph, frozenset[str | None]]] = [(graph, frozenset())]
    while waiting:
        inner, outer = waiting.pop()
        own = [*inner.inputs, *inner.initializers.values(), *(value for node in inner for value in node.outputs)]
        for value in dict.fromkeys(own):
            if value.name and value.name in outer:
                fresh = fresh or FreshNames(graph)
                value.name = fresh.value(value.name)
        before = {value.name for value in (*inner.inputs, *inner.initializers.values())}
        for node in inner:
            waiting.extend((body, outer | before) for body in bodies_of(node))
            before.update(value.name for value in node.outputs)
