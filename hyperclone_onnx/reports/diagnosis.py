"""A diagnosis as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from hyperclone_onnx.diagnosis.model import Diagnosis, PartDiagnosis
from hyperclone_onnx.reports.tables import Table


def print_diagnosis(console: Console, found: Diagnosis) -> None:
    """Print the distances layer by layer and by role, where they come from, and the conclusion."""
    against = "source" if found.source is not None else "largest"
    console.print(_table("layer", found.layers, against))
    console.print(_table("clones of", found.roles, against))
    console.print(
        "distance of clones: 0 the same, 0.71 nothing in common (of two). weights: under the best matching; forward: "
        "in what they compute; backward: in how they are read; activations: on sample inputs",
        soft_wrap=True,
    )
    if found.ran_on:
        console.print(f"ran on {found.ran_on}; up to {found.tolerance:.1e} is rounding", markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(found.conclusion, markup=False, soft_wrap=True)


def _table(what: str, parts: Sequence[PartDiagnosis], against: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(what, overflow="fold")
    for heading in ("tensors", "weights", "forward", "backward", "activations"):
        table.add_column(heading, justify="right")
    ranked = any(each.rank is not None for each in parts)
    if ranked:
        table.add_column(f"rank / {against}", justify="right")
    table.add_column("verdict")
    for each in parts:
        rank = ["" if each.rank is None else f"{each.rank:.2f}"] if ranked else []
        distances = (each.weights, each.forward, each.backward, each.activations)
        table.add_row(each.name, str(each.tensors), *map(written, distances), *rank, each.verdict)
    return table


def written(distance: float | None) -> str:
    """A distance for people: three figures, and an exact 0 as such."""
    if distance is None:
        return "-"
    if distance == 0.0:
        return "0"
    return f"{distance:.3f}" if distance >= 0.001 else f"{distance:.1e}"
