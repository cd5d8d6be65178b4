"""What the commands print: dimensions the way einops writes axes, what grew, what did not and why, how equal."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from hyperclone_onnx.algebra.dims import Dim, Product, Space, Term
from hyperclone_onnx.analysis.analysing import Analysis, count_parameters
from hyperclone_onnx.analysis.roles import NamedDim, explain
from hyperclone_onnx.errors import printable
from hyperclone_onnx.expansion import Expansion
from hyperclone_onnx.folders import FolderExpansion
from hyperclone_onnx.planning.training_recipe import RECIPE
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.validation.outputs import OutputReport
from hyperclone_onnx.validation.tolerance import DOUBLE_TOLERANCE
from hyperclone_onnx.validation.validating import Validation


class Table(RichTable):
    """A table whose cells may hold a model's names, which must not steer a terminal."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row of texts."""
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)


class TermWriter:
    """Writes terms with the names of their dimensions: ``(3 heads head_dim)``."""

    def __init__(self, space: Space, named: Sequence[NamedDim]) -> None:
        self.space = space
        self.names = {each.dim: each.name for each in named if each.role != "other"}

    def axis(self, term: Term) -> str:
        """One axis."""
        resolved = self.space.resolve(term)
        if isinstance(resolved, Dim):
            return self.names.get(resolved) or str(self.space.size(resolved))
        if resolved == Product(()):
            return "1"
        if isinstance(resolved, Product):
            return "(" + " ".join(self.axis(factor) for factor in resolved.factors) + ")"
        parts = [self.axis(part) for part in resolved.segments]
        return (
            "("
            + " + ".join(
                self._without_brackets(part, segment) for part, segment in zip(parts, resolved.segments, strict=True)
            )
            + ")"
        )

    def _without_brackets(self, text: str, term: Term) -> str:
        return text[1:-1] if isinstance(self.space.resolve(term), Product) and text.startswith("(") else text

    def axes(self, terms: Iterable[Term]) -> str:
        """All axes of a value."""
        return " ".join(self.axis(term) for term in terms)


def tensor_axes(analysis: Analysis) -> dict[str, list[str]]:
    """The axes of each stored tensor with at least one axis, one entry for each way in which it is used."""
    writer = TermWriter(analysis.dimensions.space, analysis.named)
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for value, _, axes in analysis.dimensions.initializer_uses():
        if axes and value.dtype is not None and value.dtype.is_floating_point():
            found[value.name or ""].setdefault(writer.axes(axes))
    return {name: list(ways) for name, ways in found.items()}


def inspection(analysis: Analysis) -> dict[str, Any]:
    """Everything `inspect` tells, as plain data."""
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
        "dimensions": [
            {
                "name": each.name,
                "role": each.role,
                "size": each.size,
                "growable": each.dim.growable,
                "reason": None if each.dim.pin is None else explain(dimensions, each.dim),
            }
            for each in analysis.named
            if each.role != "other"
        ],
        "inputs": interface(graph.inputs),
        "outputs": interface(graph.outputs),
        "tensors": tensor_axes(analysis),
        "operators_without_rule": {name: len(nodes) for name, nodes in sorted(dimensions.unruled.items())},
    }


def print_inspection(console: Console, analysis: Analysis) -> None:
    """Print the dimensions by role, and every kind of tensor with its axes."""
    data = inspection(analysis)
    console.print(f"{data['model']}: {data['parameters']:,} parameters, {data['nodes']} nodes, opset {data['opset']}")
    console.print(_dimension_table(analysis.dimensions, analysis.named))
    for side in ("inputs", "outputs"):
        for name, axes in data[side].items():
            console.print(f"{side[:-1]} {name}: {axes if axes is not None else 'of unknown rank'}", markup=False)
    console.print("\ntensors:")
    for line in grouped_tensors(data["tensors"]):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    if data["operators_without_rule"]:
        listed = ", ".join(f"{name} x{count}" for name, count in data["operators_without_rule"].items())
        console.print(f"\nno rule for (what they touch keeps its size): {listed}", markup=False)


def grouped_tensors(tensors: dict[str, list[str]]) -> list[str]:
    """A line for each kind of tensor: layers that are alike share one."""
    groups: dict[tuple[str, tuple[str, ...]], int] = defaultdict(int)
    for name, ways in tensors.items():
        kind = re.sub(r"\d+", "*", name)
        groups[kind, tuple(re.sub(r"([a-z_]+)\.\d+", r"\1", way) for way in ways)] += 1
    return [
        f"{kind}{f' x{count}' if count > 1 else ''}: {' and '.join(ways)}" for (kind, ways), count in groups.items()
    ]


def _dimension_table(dimensions: Dimensions, named: Sequence[NamedDim]) -> Table:
    table = Table("dimension", "size", "grows", "why not", box=None, pad_edge=False, header_style="bold")
    rows: dict[tuple[str, int, str], list[str]] = defaultdict(list)
    for each in named:
        if each.role != "other":
            why = "" if each.dim.pin is None else explain(dimensions, each.dim)
            rows[each.role, each.size, why].append(each.name)
    for (role, size, why), names in rows.items():
        label = names[0] if len(names) == 1 else f"{role} x{len(names)} ({names[0]} .. {names[-1]})"
        table.add_row(label, str(size), "no" if why else "yes", why)
    return table


def print_expansion(console: Console, result: Expansion) -> None:
    """Print what grew, what did not and why, the sizes before and after, and how equal the models are."""
    rows: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for name, dim in result.plan.dims.items():
        rows[dim.role, dim.map.size, dim.map.grown].append(name)
    table = Table("grew", "from", "to", box=None, pad_edge=False, header_style="bold")
    for (role, before, after), names in rows.items():
        table.add_row(names[0] if len(names) == 1 else f"{role} x{len(names)}", str(before), str(after))
    console.print(table)
    _print_kept(console, result)
    if result.quantised and result.plan.strategy.name != "symmetric":
        console.print(
            f"{result.quantised} quantised tensors repeat their codes, their scales divided: their shares are equal, "
            "and without noise",
            soft_wrap=True,
        )
    for name, copies in result.separated.items():
        console.print(f"{name} is stored once in the source, and separately here: {', '.join(copies)}", markup=False)
    ratio = result.parameters_after / max(result.parameters_before, 1)
    console.print(f"parameters: {result.parameters_before:,} -> {result.parameters_after:,} (x{ratio:.2f})")
    if result.output is None:
        took = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
        console.print(f"planned, nothing written ({took})", markup=False)
        return
    if result.validation is None:
        console.print("not validated (--validate none)")
    else:
        print_validation(console, result.validation)
    took = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    console.print(f"wrote {result.output} ({took})", markup=False, soft_wrap=True)
    for line in RECIPE.lines():
        console.print(line, markup=False, soft_wrap=True)


def _print_kept(console: Console, result: Expansion) -> None:
    rows: dict[tuple[str, int, str], int] = defaultdict(int)
    for each in result.kept:
        rows[each.role, each.size, each.reason] += 1
    if not rows:
        return
    table = Table("kept", "size", "why", box=None, pad_edge=False, header_style="bold")
    for (role, size, reason), count in rows.items():
        table.add_row(role if count == 1 else f"{role} x{count}", str(size), reason)
    console.print(table)


def print_folder(console: Console, result: FolderExpansion) -> None:
    """Print what became of each file of a folder."""
    for name, each in result.models.items():
        console.print(f"{name}", style="bold", markup=False)
        print_expansion(console, each)
        console.print()
    if result.unchanged:
        console.print(f"copied, for nothing in them can grow: {', '.join(result.unchanged)}", markup=False)
    if result.copied:
        console.print(
            f"copied as they are: {', '.join(result.copied)} (a configuration that states sizes states the source's)",
            markup=False,
            soft_wrap=True,
        )
    validated = all(each.validation is not None for each in result.models.values())
    how = "equal and fitting together" if validated else "fitting together, but not validated"
    console.print(f"{len(result.models)} models grown, {how}: {result.output}", markup=False)


def print_validation(console: Console, validation: Validation) -> None:
    """Print the errors, the tolerance and where it comes from, and the verdict."""
    console.print(f"validation: {validation.mode} ({validation.scope})", markup=False, soft_wrap=True)
    if validation.cases:
        console.print(
            f"validated on {validation.provider} with {len(validation.cases)} input sets: "
            f"{'; '.join(validation.cases)}",
            markup=False,
            soft_wrap=True,
        )
        _print_outputs(console, validation.outputs, validation.tolerance)
        tolerance = f"tolerance {validation.tolerance:.1e} = {validation.tolerance_reason}"
        console.print(tolerance, markup=False, soft_wrap=True)
    if validation.tensors is not None:
        tensors = validation.tensors
        console.print(
            f"{tensors.checked} tensors checked, {len(tensors.wrong)} wrong; rounding residue of the shared weights "
            f"{tensors.residue:.1e}"
        )
    if validation.wide is not None:
        steps = " and without rounding activations" if validation.rounds else ""
        console.print(f"in float32{steps} (tolerance {validation.wide_tolerance:.1e}):")
        _print_outputs(console, validation.wide, validation.wide_tolerance)
    if validation.double is not None:
        console.print(f"in float64, by {validation.double_by}:")
        _print_outputs(console, validation.double, DOUBLE_TOLERANCE)
    for note in validation.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for problem in validation.problems:
        console.print(f"DIFFERS: {problem}", markup=False, soft_wrap=True)
    verdict = "equal" if validation.mode == "full" else "equal in what was compared"
    console.print(verdict if validation.equal else "NOT EQUAL")


def _print_outputs(console: Console, outputs: Sequence[OutputReport], tolerance: float) -> None:
    table = Table("output", "max abs", "max rel", "top-1", "KL", box=None, pad_edge=False, header_style="bold")
    for each in outputs:
        top1 = "" if each.top1_agreement is None else f"{each.top1_agreement:.1%}"
        divergence = "" if each.kl_divergence is None else f"{each.kl_divergence:.1e}"
        mark = "" if each.max_relative <= tolerance and not each.problem else " !"
        table.add_row(each.name, f"{each.max_absolute:.1e}", f"{each.max_relative:.1e}{mark}", top1, divergence)
    console.print(table)
