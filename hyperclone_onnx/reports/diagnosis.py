"""The report of `diagnose`: how far the clones are apart, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from hyperclone_onnx.diagnosis.model import Diagnosis, PartDiagnosis
from hyperclone_onnx.reports.tables import Table, print_line


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """Print the distances by layer and by role, what they were measured on, and the conclusion."""
    against = "source" if diagnosis.source is not None else "largest"
    console.print(_table("layer", diagnosis.layers, against))
    console.print(_table("clones of", diagnosis.roles, against))
    print_line(
        console,
        "distances of clones: 0 means equal, 0.71 means that two clones have nothing in common. weights: under the "
        "best matching; forward: in what they compute; backward: in how they are read; activations: on sample inputs",
    )
    if diagnosis.residue is not None:
        print_line(
            console,
            f"residue {written(diagnosis.residue)}: the part of the weights that `shrink` leaves out when it collapses "
            "the model; growth begins with rounding",
        )
    if diagnosis.ran_on:
        limit = f"{diagnosis.tolerance:.1e}"
        print_line(console, f"ran on {diagnosis.ran_on}; distances up to {limit} are rounding")
    for note in diagnosis.notes:
        print_line(console, f"note: {note}")
    print_line(console, diagnosis.conclusion)


def _table(what: str, parts: Sequence[PartDiagnosis], against: str) -> Table:
    """A row of distances for each part; `what` is the heading of the parts' names."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(what, overflow="fold")
    for heading in ("tensors", "weights", "forward", "backward", "activations"):
        table.add_column(heading, justify="right")
    ranked = any(part.rank is not None for part in parts)
    if ranked:
        table.add_column(f"rank / {against}", justify="right")
    table.add_column("verdict")
    for part in parts:
        rank = ["" if part.rank is None else f"{part.rank:.2f}"] if ranked else []
        distances = (part.weights, part.forward, part.backward, part.activations)
        table.add_row(part.name, str(part.tensors), *map(written, distances), *rank, part.verdict)
    return table


def written(distance: float | None) -> str:
    """A distance as text: ``-`` where there is none, ``0`` only for an exact zero, otherwise with few digits.

    >>> written(None), written(0.0), written(0.25), written(2e-5)
    ('-', '0', '0.250', '2.0e-05')
    """
    if distance is None:
        return "-"
    if distance == 0.0:
        return "0"
    return f"{distance:.3f}" if distance >= 0.001 else f"{distance:.1e}"
