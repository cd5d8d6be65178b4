"""The report of `inspect`: dimensions by role, and the axes of every tensor in the notation of einops."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from hyperclone_onnx.algebra.dims import Dim, Product, Space, Term
from hyperclone_onnx.analysis.analysing import Analysis, count_parameters
from hyperclone_onnx.analysis.feed_forward import find_feed_forward
from hyperclone_onnx.analysis.quantities import Quantity, quantities
from hyperclone_onnx.analysis.roles import NamedDim, explain
from hyperclone_onnx.reports.roles import ROLES
from hyperclone_onnx.reports.tables import Table, counted, plain_table, print_line
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.transforms.layers import stacks_of


class TermWriter:
    """Writes terms with the names of their dimensions: ``(3 heads head_dim)``."""

    def __init__(self, space: Space, named: Sequence[NamedDim]) -> None:
        self.space = space
        self.names = {dimension.dim: dimension.called for dimension in named if dimension.role != "other"}

    def axis(self, term: Term) -> str:
        """One axis: the name of its dimension, or its size where it has no name."""
        resolved = self.space.resolve(term)
        if isinstance(resolved, Dim):
            return self.names.get(resolved) or str(self.space.size(resolved))
        if resolved == Product(()):
            return "1"
        if isinstance(resolved, Product):
            return "(" + " ".join(self.axis(factor) for factor in resolved.factors) + ")"
        return "(" + " + ".join(self._segment(segment) for segment in resolved.segments) + ")"

    def _segment(self, term: Term) -> str:
        """A segment of a concatenation. A product is written without brackets there."""
        text = self.axis(term)
        return text[1:-1] if isinstance(self.space.resolve(term), Product) and text.startswith("(") else text

    def axes(self, terms: Iterable[Term]) -> str:
        """All axes of a value, with spaces between them."""
        return " ".join(self.axis(term) for term in terms)


def tensor_axes(analysis: Analysis) -> dict[str, list[str]]:
    """The axes of every floating stored tensor that has at least one axis.

    A tensor that nodes use in several ways has an entry for each of them.
    """
    writer = TermWriter(analysis.dimensions.space, analysis.named)
    ways: dict[str, dict[str, None]] = defaultdict(dict)
    for value, _, axes in analysis.dimensions.initializer_uses():
        if axes and value.dtype is not None and value.dtype.is_floating_point():
            ways[value.name or ""].setdefault(writer.axes(axes))
    return {name: list(texts) for name, texts in ways.items()}


def inspection(analysis: Analysis) -> dict[str, Any]:
    """The whole report as a dict for JSON."""
    dimensions = analysis.dimensions
    writer = TermWriter(dimensions.space, analysis.named)
    graph = analysis.model.graph

    def interface(values: Iterable[Any]) -> dict[str, str | None]:
        return {
            value.name: None if dimensions.axes.get(value) is None else writer.axes(dimensions.axes[value] or ())
            for value in values
        }

    return {
        "model": str(analysis.path),
        "parameters": count_parameters(analysis.model),
        "nodes": len(graph),
        "opset": graph.opset_imports.get("", None),
        "layers": {stack.name: stack.layers for stack in stacks_of(analysis.model.clone())},
        "dimensions": [
            {
                "name": dimension.name,
                "role": dimension.role,
                "size": dimension.size,
                "growable": dimension.dim.growable,
                "reason": None if dimension.dim.pin is None else explain(dimensions, dimension.dim),
                **({"called": dimension.label} if dimension.label else {}),
            }
            for dimension in analysis.named
            if dimension.role != "other"
        ],
        "inputs": interface(graph.inputs),
        "outputs": interface(graph.outputs),
        "tensors": tensor_axes(analysis),
        "operators_without_rule": {name: len(nodes) for name, nodes in sorted(dimensions.without_rule.items())},
        "sizes": [
            {"role": quantity.role, "name": quantity.name, "size": quantity.size}
            for quantity in quantities(dimensions, analysis.named)
        ],
        "feed_forward_blocks": len(find_feed_forward(analysis).blocks),
    }


def print_inspection(console: Console, analysis: Analysis) -> None:
    """Print the dimensions by role, the inputs and outputs, and every kind of tensor with its axes."""
    data = inspection(analysis)
    console.print(f"{data['model']}: {data['parameters']:,} parameters, {data['nodes']} nodes, opset {data['opset']}")
    if data["layers"]:
        console.print(", ".join(f"{name}: {count}" for name, count in data["layers"].items()), markup=False)
    if data["feed_forward_blocks"]:
        console.print(f"feed-forward blocks that can become experts: {data['feed_forward_blocks']}", markup=False)
    rows = dimension_rows(analysis.dimensions, analysis.named)
    console.print(_dimension_table(rows))
    console.print()
    console.print(_legend(rows))
    console.print()
    for side in ("inputs", "outputs"):
        for line in collapsed_values(data[side]):
            print_line(console, f"{side[:-1]} {line}")
    console.print("\ntensors:")
    for line in grouped_tensors(data["tensors"]):
        print_line(console, f"  {line}")
    if data["operators_without_rule"]:
        listed = ", ".join(f"{name} x{count}" for name, count in data["operators_without_rule"].items())
        console.print(f"\noperators without a rule, whose inputs and outputs keep their sizes: {listed}", markup=False)


def grouped_tensors(tensors: dict[str, list[str]]) -> list[str]:
    """One line for each kind of tensor. Tensors of layers that are alike share a line."""
    groups: dict[tuple[str, tuple[str, ...]], int] = defaultdict(int)
    for name, ways in tensors.items():
        kind = re.sub(r"\d+", "*", name)
        groups[kind, tuple(re.sub(r"([a-z_]+)\.\d+", r"\1", way) for way in ways)] += 1
    return [f"{counted(kind, count)}: {' and '.join(ways)}" for (kind, ways), count in groups.items()]


def collapsed_values(values: Mapping[str, str | None]) -> list[str]:
    """One line for each input or output. Those that differ only in numbers, such as a layer's caches, share a line.

    >>> collapsed_values({"ids": "batch", "past.0.key": "batch heads.0", "past.1.key": "batch heads.1"})
    ['ids: batch', 'past.*.key x2: batch heads']
    """
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, axes in values.items():
        text = "of unknown rank" if axes is None else axes
        groups[re.sub(r"\d+", "*", name), re.sub(r"([a-z_]+)\.\d+", r"\1", text)].append(f"{name}: {text}")
    return [
        lines[0] if len(lines) == 1 else f"{counted(kind, len(lines))}: {axes}"
        for (kind, axes), lines in groups.items()
    ]


def _legend(rows: Sequence[DimensionRow]) -> Table:
    """The roles that the model has, in plain words."""
    table = plain_table("role", "what it is")
    for role in dict.fromkeys(row.role for row in rows):
        if role in ROLES:
            name, what = ROLES[role]
            table.add_row(role, f"{name}: {what}")
    return table


def _dimension_table(rows: Sequence[DimensionRow]) -> Table:
    """The rows of dimensions as a table."""
    table = plain_table("dimension", "size", "grows", "why not")
    for row in rows:
        table.add_row(row.label, str(row.size), "no" if row.why else "yes", row.why)
    return table


@dataclass(frozen=True)
class DimensionRow:
    """Dimensions that agree in role, size and reason: a row of the report."""

    role: str
    names: tuple[str, ...]
    size: int
    why: str
    """Why the size cannot grow; empty where it can."""

    @property
    def label(self) -> str:
        """The name of a single dimension; else the role, the count, and the first and the last name."""
        first, *others = self.names
        return first if not others else f"{self.role} x{len(self.names)} ({first} .. {others[-1]})"


def dimension_rows(dimensions: Dimensions, named: Sequence[NamedDim]) -> list[DimensionRow]:
    """A row for each role, size and reason; dimensions that agree in all three share a row.

    Query heads that are in groups are no dimension of their own. They have a row before those of their factors.
    """
    rows: dict[tuple[str, int, str], list[str]] = defaultdict(list)
    grouped: dict[Dim, list[Quantity]] = defaultdict(list)
    for quantity in quantities(dimensions, named):
        if quantity.role == "heads" and any(other.label for other in named if other.dim in quantity.dims):
            grouped[quantity.dims[0]].append(quantity)
    for dimension in named:
        if dimension.role != "other":
            why = "" if dimension.dim.pin is None else explain(dimensions, dimension.dim)
            for quantity in grouped[dimension.dim]:
                rows["heads", quantity.size, why].append(quantity.name)
            role = "kv_heads" if dimension.label else dimension.role
            rows[role, dimension.size, why].append(dimension.called)
    return [DimensionRow(role, tuple(names), size, why) for (role, size, why), names in rows.items()]


def size_rows(analysis: Analysis) -> list[DimensionRow]:
    """The sizes as people count them, whole heads for example: a row for each role, size and reason."""
    dimensions, named = analysis.dimensions, analysis.named
    counted_dims = quantities(dimensions, named)
    told = {dim for quantity in counted_dims for dim in quantity.dims}
    rows: dict[tuple[str, int, str], list[str]] = defaultdict(list)
    for dimension in named:
        if dimension.role != "other" and dimension.dim not in told:
            why = "" if dimension.dim.pin is None else explain(dimensions, dimension.dim)
            rows[dimension.role, dimension.size, why].append(dimension.called)
    for quantity in counted_dims:
        pinned = next((dim for dim in quantity.dims if dim.pin is not None), None)
        why = "" if pinned is None else explain(dimensions, pinned)
        rows[quantity.role, quantity.size, why].append(quantity.name)
    return [DimensionRow(role, tuple(names), size, why) for (role, size, why), names in rows.items()]
