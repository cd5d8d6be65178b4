"""The names that the inputs and outputs of a transformed graph have in the file that it was made from."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

ORIGINAL = "hyperclone_onnx.original"
"""The key under which an input or output of a graph remembers its name in the file; None where it is new."""


def remember(graph: ir.Graph) -> None:
    """Let the inputs and outputs of a graph remember their names. Names that they remember already stay."""
    for value in (*graph.inputs, *graph.outputs):
        value.meta.setdefault(ORIGINAL, value.name)


def original_names(values: Iterable[ir.Value]) -> dict[str, str | None]:
    """For inputs or outputs of a transformed graph, by name, the name in the file; None for those that are new."""
    return {value.name or "": value.meta.get(ORIGINAL, value.name) for value in values}
