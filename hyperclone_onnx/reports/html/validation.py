"""The page of `validate`, and the part about validation of other pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from hyperclone_onnx.reports.html.elements import Markup, element, joined
from hyperclone_onnx.reports.html.next_steps import after_growth
from hyperclone_onnx.reports.html.page import Page, Section, Verdict
from hyperclone_onnx.reports.html.tables import Cell, Number, bullets, data_table
from hyperclone_onnx.reports.html.wording import sentence
from hyperclone_onnx.validation.outputs import OutputReport
from hyperclone_onnx.validation.tolerance import DOUBLE_TOLERANCE
from hyperclone_onnx.validation.validating import Validation


def validation_page(small: Path, big: Path, validation: Validation) -> Page:
    """The page of `validate SMALL BIG`."""
    facts = [
        ("Source", str(small)),
        ("Grown model", str(big)),
        ("Validation", validation.mode),
        ("Ran on", validation.provider or "nothing was run"),
    ]
    sections = [validation_section(validation)]
    if validation.equal:
        sections.append(after_growth(small, big))
    return Page("validate", f"{small.name} and {big.name}", verdict_of(validation), facts, sections)


def verdict_of(validation: Validation) -> Verdict:
    """The answer: equal or not, and by how much."""
    if not validation.preserves:
        if validation.problems:
            return Verdict("bad", "Not as planned", "; ".join(validation.problems[:3]))
        moved = f"Outputs moved by up to {validation.largest_change:.1e}, relatively."
        return Verdict("note", "The strategy changes what the model computes", moved)
    if not validation.equal:
        first, *others = validation.differences
        more = f" {len(others)} more differences are listed below." if others else ""
        return Verdict("bad", f"Not equal: {first}", more.strip())
    outputs, tolerance = _decisive(validation)
    compared = [output for output in outputs if not output.not_compared]
    error = max((output.max_relative for output in compared), default=None)
    if error is None:
        return Verdict("good", "Equal in what was compared", _covered(validation))
    within = f"relative error {error:.1e}" + (f", tolerance {tolerance:.1e}" if math.isfinite(tolerance) else "")
    if validation.mode == "full":
        return Verdict("good", f"Equal: {within}", _covered(validation))
    return Verdict("good", f"Equal in what was compared: {within}", _covered(validation))


def _decisive(validation: Validation) -> tuple[Sequence[OutputReport], float]:
    """The outputs that decide, and their tolerance: in float32 where the model's own type is coarser."""
    if validation.wide is not None:
        return validation.wide, validation.wide_tolerance
    return (*validation.outputs, *validation.before), validation.tolerance


def _covered(validation: Validation) -> str:
    tensors = "" if validation.tensors is None else f"{validation.tensors.checked} tensors were added up and compared. "
    cases = f"Every output was compared on {len(validation.cases)} input sets. " if validation.cases else ""
    return f"{tensors}{cases}{sentence(validation.scope)}"


def validation_section(validation: Validation, anchor: str = "validation", heading: str = "Validation") -> Section:
    """What was compared, with what result, and where the tolerances come from."""
    own = (*validation.outputs, *validation.before)
    parts: list[Markup] = []
    if validation.wide is not None:
        name = "In float32, without rounding activations" if validation.rounds else "In float32"
        parts += _outputs(f"{name} (this decides)", validation.wide, validation.wide_tolerance)
    if own:
        steps = validation.rounds and validation.wide is not None
        heading_own = "Each output" if validation.wide is None else "In the model's own types"
        parts += _outputs(heading_own, own, math.inf if steps else validation.tolerance)
        parts.append(
            element("p", f"Tolerance {validation.tolerance:.1e} = {validation.tolerance_reason}", class_="lead")
        )
    if validation.double is not None:
        parts += _outputs(f"In float64, by {validation.double_by}", validation.double, DOUBLE_TOLERANCE)
    lines = []
    if validation.tensors is not None:
        tensors = validation.tensors
        lines.append(
            f"{tensors.checked} tensors: the clones of each weight were added up and compared with the source; "
            f"{len(tensors.wrong)} are wrong. Sharing weights left a rounding residue of {tensors.residue:.1e}."
        )
    if validation.cases:
        lines.append(f"Ran on {validation.provider} with the input sets {'; '.join(validation.cases)}.")
    reports = (*own, *(validation.wide or ()))
    lines += [f"Output {report.name}: {report.note}" for report in reports if report.note]
    lines += [f"Note: {note}" for note in validation.notes]
    lines += [f"Differs: {problem}" for problem in validation.problems]
    parts.append(bullets(lines))
    return Section(anchor, heading, joined(parts), f"Mode: {validation.mode} ({validation.scope}).")


def _outputs(heading: str, outputs: Sequence[OutputReport], tolerance: float) -> list[Markup]:
    """A row for each output. One that differs is marked."""
    classes = any(output.top1_agreement is not None for output in outputs)
    headings = [
        "output",
        "largest difference",
        "relative error",
        *(["same best class", "KL"] if classes else []),
        "result",
    ]
    problems = [output.problem_beyond(tolerance) for output in outputs]
    rows = [
        _row(output, problem, classes, reported=not math.isfinite(tolerance))
        for output, problem in zip(outputs, problems, strict=True)
    ]
    marked = [place for place, problem in enumerate(problems) if problem]
    return [element("h3", heading), data_table(heading, headings, rows, marked)]


def _row(output: OutputReport, problem: str, classes: bool, *, reported: bool) -> list[Cell]:
    agreement, divergence = output.top1_agreement, output.kl_divergence
    of_classes: list[Cell] = [
        "" if agreement is None else Number(f"{agreement:.1%}", agreement),
        "" if divergence is None else Number(f"{divergence:.1e}", divergence),
    ]
    result = problem or ("not compared" if output.not_compared else "for information" if reported else "equal")
    return [
        output.name,
        Number(f"{output.max_absolute:.1e}", output.max_absolute),
        Number(f"{output.max_relative:.1e}", output.max_relative),
        *(of_classes if classes else []),
        result,
    ]
