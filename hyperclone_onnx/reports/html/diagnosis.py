"""The page of `diagnose`: how far the clones have parted, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from hyperclone_onnx.diagnosis.model import Diagnosis, PartDiagnosis
from hyperclone_onnx.reports.diagnosis import written
from hyperclone_onnx.reports.html.chart import distance_chart
from hyperclone_onnx.reports.html.elements import Markup, element, joined
from hyperclone_onnx.reports.html.next_steps import command, next_steps
from hyperclone_onnx.reports.html.page import Page, Section, Verdict
from hyperclone_onnx.reports.html.tables import Cell, Number, Step, bullets, data_table
from hyperclone_onnx.reports.html.wording import NO_NUMBER, sentence, shape_text

VERDICTS = {
    "tied": "they compute the same, and always will",
    "ready": "they compute the same now; training will part them",
    "parting": "they differ by less than a tenth",
    "parted": "they differ by more",
    "unknown": "nothing could be compared",
}
"""The verdicts on clones in plain words."""


def diagnosis_page(diagnosis: Diagnosis) -> Page:
    """The page of `diagnose MODEL`."""
    figures = [
        ("Strategy of the growth", str(diagnosis.strategy.get("name", "unknown"))),
        ("Distance of weights", written(_finite(diagnosis.weights))),
        ("Distance of activations", written(_finite(diagnosis.activations))),
        ("Compared with", "the source's own ranks" if diagnosis.source is not None else "the largest possible ranks"),
    ]
    used = dict.fromkeys(part.verdict for part in (*diagnosis.layers, *diagnosis.roles))
    key = bullets([f"{name}: {VERDICTS[name]}" for name in used])
    layers = [
        element("div", distance_chart(diagnosis), class_="wide", tabindex="0", role="group", aria_label="Picture"),
        element("h3", "By layer"),
        _parts("layer", diagnosis.layers, diagnosis),
        key,
    ]
    if diagnosis.residue is not None:
        figures.append(("Residue, left out by a collapse", written(diagnosis.residue)))
    notes = [f"Ran on {diagnosis.ran_on}."] if diagnosis.ran_on else []
    notes += [f"Note: {note}" for note in diagnosis.notes]
    sections = [
        Section(
            "layers", "Layers", joined(layers), "0: the clones are equal. 0.71: two clones have nothing in common."
        ),
        Section("roles", "By role", joined([_parts("clones of", diagnosis.roles, diagnosis), bullets(notes)])),
        _next(diagnosis),
        _tensors(diagnosis),
    ]
    return Page("diagnose", Path(diagnosis.model).name, _verdict(diagnosis), figures, sections)


def _verdict(diagnosis: Diagnosis) -> Verdict:
    first, _, rest = diagnosis.conclusion.partition(":")
    return Verdict("bad" if diagnosis.stuck else "good", sentence(first).rstrip("."), sentence(rest.strip()))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _parts(what: str, parts: Sequence[PartDiagnosis], diagnosis: Diagnosis) -> Markup:
    ranked = any(part.rank is not None for part in parts)
    rank = "rank ÷ source's" if diagnosis.source is not None else "rank ÷ largest"
    headings = (
        what,
        "tensors",
        "weights",
        "forward",
        "backward",
        "activations",
        *([rank] if ranked else []),
        "verdict",
    )
    rows: list[list[Cell]] = [
        [
            part.name,
            Number(str(part.tensors), part.tensors),
            *(_distance(number) for number in (part.weights, part.forward, part.backward, part.activations)),
            *([_distance(part.rank)] if ranked else []),
            part.verdict,
        ]
        for part in parts
    ]
    return data_table(f"Distances by {what}", headings, rows)


def _distance(number: float | None) -> Cell:
    return NO_NUMBER if number is None else Number(written(number), number)


def _tensors(diagnosis: Diagnosis) -> Section:
    rows: list[list[Cell]] = [
        [
            tensor.name,
            tensor.layer,
            Number(shape_text(tensor.shape), tensor.elements),
            *(_distance(number) for number in (tensor.matched, tensor.forward, tensor.backward)),
            NO_NUMBER
            if tensor.rank is None
            else Number(f"{tensor.rank.effective:.0f} of {tensor.rank.largest}", tensor.rank.effective),
        ]
        for tensor in diagnosis.tensors
    ]
    headings = ("tensor", "layer", "shape", "weights", "forward", "backward", "effective rank")
    lead = "Distances of the clones within each stored tensor."
    return Section("tensors", "Tensors", data_table("Tensors", headings, rows), lead)


def _next(diagnosis: Diagnosis) -> Section:
    source = diagnosis.source or "SOURCE"
    if diagnosis.stuck:
        entries = [
            Step(
                "Grow the source again with noise, so that the clones can part.",
                [command("expand", source, "--factor", "2", "--strategy", "noisy-diagonal", "-o", "big.onnx")],
            )
        ]
    else:
        entries = [
            Step(
                "Train on, and look again.",
                [command("diagnose", diagnosis.model, "--source", source, "--html", "later.html")],
            )
        ]
    return next_steps(entries)
