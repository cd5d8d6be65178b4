"""The report of a validation: errors, tolerances with their reasons, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from hyperclone_onnx.reports.tables import plain_table, print_line
from hyperclone_onnx.validation.outputs import OutputReport
from hyperclone_onnx.validation.tolerance import DOUBLE_TOLERANCE
from hyperclone_onnx.validation.validating import Validation


def print_validation(console: Console, validation: Validation) -> None:
    """Print the whole report."""
    print_line(console, f"validation: {validation.mode} ({validation.scope})")
    if validation.cases:
        print_line(
            console,
            f"validated on {validation.provider} with {len(validation.cases)} input sets: "
            f"{'; '.join(validation.cases)}",
        )
    if validation.wide is not None:
        # Float32 decides, because the model's own types round away small differences.
        steps = " and without rounding activations" if validation.rounds else ""
        console.print(f"in float32{steps} (tolerance {validation.wide_tolerance:.1e}):")
        _print_outputs(console, validation.wide, validation.wide_tolerance)
    own = (*validation.outputs, *validation.before)
    if own:
        if validation.wide is not None:
            console.print("in the model's own types:")
        _print_outputs(console, own, validation.tolerance)
        print_line(console, f"tolerance {validation.tolerance:.1e} = {validation.tolerance_reason}")
    if validation.tensors is not None:
        tensors = validation.tensors
        console.print(
            f"{tensors.checked} tensors checked, {len(tensors.wrong)} wrong; rounding residue of the shared weights "
            f"{tensors.residue:.1e}"
        )
    if validation.double is not None:
        console.print(f"in float64, by {validation.double_by}:")
        _print_outputs(console, validation.double, DOUBLE_TOLERANCE)
    for report in (*own, *(validation.wide or ())):
        if report.note:
            print_line(console, f"note: output {report.name}: {report.note}")
    for note in validation.notes:
        print_line(console, f"note: {note}")
    for problem in validation.problems:
        print_line(console, f"DIFFERS: {problem}")
    if not validation.preserves:
        moved = f"outputs moved by up to {validation.largest_change:.1e} (relative)"
        print_line(
            console, f"the strategy changes the function: {moved}" if not validation.problems else "NOT AS PLANNED"
        )
        return
    verdict = "equal" if validation.mode == "full" else "equal in what was compared"
    console.print(verdict if validation.equal else "NOT EQUAL")


def _print_outputs(console: Console, outputs: Sequence[OutputReport], tolerance: float) -> None:
    """Print the table of outputs. An exclamation mark marks an output that differs."""
    table = plain_table("output", "max abs", "max rel", "top-1", "KL")
    for output in outputs:
        top1 = "" if output.top1_agreement is None else f"{output.top1_agreement:.1%}"
        divergence = "" if output.kl_divergence is None else f"{output.kl_divergence:.1e}"
        mark = " !" if output.problem_beyond(tolerance) else ""
        table.add_row(output.name, f"{output.max_absolute:.1e}", f"{output.max_relative:.1e}{mark}", top1, divergence)
    console.print(table)
