"""The page of `expand` for a Hugging Face checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

from hyperclone_onnx.errors import in_bytes
from hyperclone_onnx.frameworks.hugging_face.expanding import CheckpointExpansion
from hyperclone_onnx.reports.handover import go_on
from hyperclone_onnx.reports.html.elements import joined
from hyperclone_onnx.reports.html.expansion import growth_sections, tensor_section
from hyperclone_onnx.reports.html.next_steps import next_steps
from hyperclone_onnx.reports.html.page import Page, Section, Verdict
from hyperclone_onnx.reports.html.tables import Step, bullets, data_table


def checkpoint_page(result: CheckpointExpansion, memory: int | None = None) -> Page:
    """The page of `expand CHECKPOINT`."""
    report = result.handover.hugging_face
    before = sum(model.parameters_before for model in result.models.values()) // max(len(result.models), 1)
    figures = [
        ("Parameters", f"{before:,} → {result.handover.parameters:,}"),
        ("Type of the weights", str(report["dtype"])),
        ("Weights", ", ".join(report["weights"])),
        *([("Peak memory", in_bytes(memory))] if memory else []),
    ]
    sections = [_checkpoint(result)]
    for number, (name, model) in enumerate(result.models.items()):
        several = len(result.models) > 1
        sections += growth_sections(model, f"model-{number}-", f"{name}: " if several else "")
    training = () if result.handover.training is None else result.handover.training.lines()
    load = Step("Load the grown checkpoint.", list(go_on(Path(result.source), result.handover)))
    sections.append(next_steps([load], training))
    for number, (name, model) in enumerate(result.models.items()):
        sections.append(tensor_section(model.plan, f"model-{number}-", f"{name}: " if len(result.models) > 1 else ""))
    title = f"{Path(result.source).name} → {Path(result.output).name}"
    return Page("expand", title, _verdict(result), figures, sections)


def _verdict(result: CheckpointExpansion) -> Verdict:
    report = result.handover.hugging_face
    to_file = ""
    if report["error_to_file"] is not None:
        to_file = f"{report['error_to_file']:.1e} from its ONNX file (tolerance {report['file_tolerance']:.1e})"
    if report["error_to_source"] is None:
        return Verdict("good", f"Equal: relative error {to_file}", "The checkpoint was run in transformers.")
    limit = f", tolerance {report['tolerance']:.1e}" if math.isfinite(report["tolerance"]) else ""
    return Verdict(
        "good",
        f"Equal: relative error {report['error_to_source']:.1e} from the source checkpoint{limit}",
        f"{report['tensors_checked']} tensors were read back from the files and added up. The grown checkpoint was run "
        "in transformers" + (f"; its outputs differ by {to_file}." if to_file else "."),
    )


def _checkpoint(result: CheckpointExpansion) -> Section:
    """What is in the folder, and what changed in the configuration."""
    report = result.handover.hugging_face
    rows = [[name, str(before), str(after)] for name, (before, after) in report["config"].items()]
    lines = [
        *(f"Compensated: {name}: {what}" for name, what in report["compensations"].items()),
        *(f"Repeated: {name}: {why}" for name, why in report["repeated"].items()),
        *(f"Note: {note}" for note in report["notes"]),
        *(f"Kept ONNX file: {name}" for name in result.kept),
    ]
    parts = [
        data_table("Fields of config.json that changed", ("config.json", "before", "after"), rows) if rows else "",
        bullets(lines) if lines else "",
    ]
    return Section("checkpoint", "The checkpoint", joined(parts), f"Written to {result.output}.")
