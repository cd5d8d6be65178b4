"""What a transformed graph remembers of the file that it was made from: names of values, places of stored tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import onnx_ir as ir

ORIGINAL = "hyperclone_onnx.original"
"""The key under which a value of a graph remembers its name in the file; None where it is new."""

_PLACE = "hyperclone_onnx.place"
"""The key under which a stored tensor of a layer remembers its place."""

_NOTES = "hyperclone_onnx.notes"


@dataclass(frozen=True)
class Placed:
    """The place of a stored tensor in a deeper stack, and the tensor of the file that it is, or is a copy of."""

    source: str
    """The name in the file."""
    stack: str
    unit: int
    """The number of its unit in the deeper stack."""
    source_unit: int
    """The number of the file's unit that its unit is, or is a copy of."""
    is_new: bool
    """Whether it is none of the source's tensors."""
    adds_nothing: bool
    """Whether it is new and belongs to an identity block."""


def remember_place(value: ir.Value, source: ir.Value, placed: Placed) -> None:
    """Let a stored tensor remember its place.

    Args:
        value: the tensor.
        source: the tensor that it is, or is a copy of. What it remembers of an earlier transform counts for both.
        placed: the place as this transform knows it.
    """
    before: Placed | None = source.meta.get(_PLACE)
    if before is not None:
        placed = replace(
            placed,
            source=before.source,
            source_unit=before.source_unit,
            is_new=placed.is_new or before.is_new,
            adds_nothing=placed.adds_nothing or before.adds_nothing,
        )
    value.meta[_PLACE] = placed


def place_of(value: ir.Value) -> Placed | None:
    """The place of a stored tensor of a layer; None where the graph is as deep as its file."""
    placed: Placed | None = value.meta.get(_PLACE)
    return placed


def places_of(graph: ir.Graph) -> dict[str, Placed]:
    """The places of the stored tensors of a graph's layers, by name; none where the graph is as deep as its file."""
    places = {name: place_of(value) for name, value in graph.initializers.items()}
    return {name: placed for name, placed in places.items() if placed is not None}


def remember(graph: ir.Graph) -> None:
    """Let all values of a graph remember their names: inputs, outputs, stored and computed values. Known names stay."""
    computed = (output for node in graph for output in node.outputs)
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values(), *computed):
        value.meta.setdefault(ORIGINAL, value.name)


def original_names(values: Iterable[ir.Value]) -> dict[str, str | None]:
    """For inputs or outputs of a transformed graph, by name, the name in the file; None for those that are new."""
    return {value.name or "": value.meta.get(ORIGINAL, value.name) for value in values}


def name_in_file(value: ir.Value) -> str | None:
    """The name in the file of a value of a transformed graph. None if the file does not have the value."""
    name = value.meta.get(ORIGINAL)
    return None if name is None else str(name)


def note(graph: ir.Graph, text: str) -> None:
    """Let a transformed graph carry a line for the report."""
    graph.meta[_NOTES] = (*notes_of(graph), text)


def notes_of(graph: ir.Graph) -> tuple[str, ...]:
    """The lines for the report that a transformed graph carries."""
    return tuple(graph.meta.get(_NOTES, ()))
