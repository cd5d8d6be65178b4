"""The report of `expand` for a folder: which models grew, and which files were copied."""

from __future__ import annotations

from rich.console import Console

from hyperclone_onnx.folders import FolderExpansion
from hyperclone_onnx.reports.expansion import print_expansion
from hyperclone_onnx.reports.tables import print_line


def print_folder(console: Console, result: FolderExpansion) -> None:
    """Print the report of each model, then the names of the other files."""
    for name, expansion in result.models.items():
        console.print(f"{name}", style="bold", markup=False)
        print_expansion(console, expansion)
        console.print()
    if result.unchanged:
        console.print(f"copied, for nothing in them can grow: {', '.join(result.unchanged)}", markup=False)
    if result.copied:
        print_line(
            console,
            f"copied as they are: {', '.join(result.copied)}",
        )
    for name, fields in result.changed.items():
        words = ", ".join(f"{key} {before} -> {after}" for key, (before, after) in fields.items())
        print_line(console, f"{name}: {words or 'as it was'}")
    for name, why in result.left_out.items():
        print_line(console, f"left out: {name}: {why}")
    validated = all(expansion.validation is not None for expansion in result.models.values())
    how = "equal and fitting together" if validated else "fitting together, but not validated"
    console.print(f"{len(result.models)} models grown, {how}: {result.output}", markup=False)
