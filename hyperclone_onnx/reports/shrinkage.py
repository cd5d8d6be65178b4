"""The report of `shrink`: what became smaller, how far the clones had parted, and how far the outputs moved."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console

from hyperclone_onnx.errors import in_bytes
from hyperclone_onnx.reports.tables import counted, plain_table, print_line
from hyperclone_onnx.reports.validation import print_validation
from hyperclone_onnx.shrinking.shrinking import Shrinkage

MOST_RESIDUES = 10
"""The number of tensors that the table of residues lists, the largest first."""


def print_shrinkage(console: Console, result: Shrinkage) -> None:
    """Print the whole report."""
    _print_sizes(console, result)
    for name, (before, after) in result.layers.items():
        print_line(
            console, f"{name} {before} -> {after}" if name == "layers" else f"{name}: layers {before} -> {after}"
        )
    ratio = result.parameters_after / max(result.parameters_before, 1)
    console.print(f"parameters: {result.parameters_before:,} -> {result.parameters_after:,} (x{ratio:.2f})")
    if result.method == "collapse":
        _print_residues(console, result)
    _print_kept(console, result)
    for note in result.notes:
        print_line(console, f"note: {note}")
    if result.validation is not None:
        print_validation(console, result.validation)
    elif result.moved:
        _print_moved(console, result)
    took = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    files = ", ".join(
        in_bytes(size) if number == 0 else f"{name} {in_bytes(size)}"
        for number, (name, size) in enumerate(result.files.items())
    )
    print_line(console, f"wrote {result.output}: {files} ({took})")


def _print_sizes(console: Console, result: Shrinkage) -> None:
    """A row for each role and sizes of what became smaller."""
    rows: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for size in result.sizes:
        if size.before != size.after:
            rows[size.role, size.before, size.after].append(size.name)
    if not rows:
        return
    table = plain_table("shrank", "from", "to")
    for (role, before, after), names in rows.items():
        label = names[0] if len(names) == 1 and "+" not in names[0] else counted(role, len(names))
        table.add_row(label, str(before), str(after))
    console.print(table)


def _print_kept(console: Console, result: Shrinkage) -> None:
    """A row for each role, size and reason of what a selection left whole."""
    rows: dict[tuple[str, int, str], int] = defaultdict(int)
    for dimension in result.kept:
        rows[dimension.role, dimension.size, dimension.reason.replace("not asked to grow", "not asked to shrink")] += 1
    if not rows:
        return
    table = plain_table("kept", "size", "why")
    for (role, size, reason), count in rows.items():
        table.add_row(counted(role, count), str(size), reason)
    console.print(table)


def _print_residues(console: Console, result: Shrinkage) -> None:
    """The residue of the model, and of the tensors whose clones have parted most."""
    if result.is_tied:
        console.print(f"residue {result.residue:.1e}: all clones are tied, the rest is rounding")
        return
    parted = sorted((one for one in result.residues if not one.is_tied), key=lambda one: -one.residue)
    print_line(
        console,
        f"residue {result.residue:.1e}: the clones of {len(parted)} of {len(result.residues)} tensors have parted; the "
        "small model has their mean",
    )
    table = plain_table("tensor", "residue")
    for one in parted[:MOST_RESIDUES]:
        table.add_row(one.name, f"{one.residue:.1e}")
    console.print(table)
    if len(parted) > MOST_RESIDUES:
        console.print(f"and {len(parted) - MOST_RESIDUES} more")
    if result.apart:
        print_line(
            console,
            f"{', '.join(result.apart)}: one tensor with another in the source, and different now: both are kept",
        )


def _print_moved(console: Console, result: Shrinkage) -> None:
    """How far the outputs moved."""
    print_line(console, f"both models ran on {len(result.cases)} input sets: {'; '.join(result.cases)}")
    table = plain_table("output", "max abs", "max rel", "top-1", "KL")
    for report in result.moved:
        top1 = "" if report.top1_agreement is None else f"{report.top1_agreement:.1%}"
        divergence = "" if report.kl_divergence is None else f"{report.kl_divergence:.1e}"
        table.add_row(report.name, f"{report.max_absolute:.1e}", f"{report.max_relative:.1e}", top1, divergence)
    console.print(table)
    for report in result.moved:
        if report.problem:
            print_line(console, f"note: output {report.name} could not be measured: {report.problem}")
    console.print(result.verdict)
