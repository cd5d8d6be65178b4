"""The pages of `expand`: for one model, for a folder of models, and for a Hugging Face checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from hyperclone_onnx.diagnosis.layers import numbered_names
from hyperclone_onnx.errors import in_bytes
from hyperclone_onnx.expansion.report import Expansion
from hyperclone_onnx.folders import FolderExpansion
from hyperclone_onnx.plan.maps import Axis, ConcatOf, FirstAndFurther, Kept, Named, ProductOf, grown_size
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.reports.expansion import grown_rows, growth_notes, kept_rows, mixture_lines
from hyperclone_onnx.reports.html.diagram import Bar, Layers, diagram
from hyperclone_onnx.reports.html.elements import Markup, element, joined
from hyperclone_onnx.reports.html.next_steps import after_growth, command, next_steps
from hyperclone_onnx.reports.html.page import Page, Section, Verdict, facts
from hyperclone_onnx.reports.html.tables import Cell, Number, Step, bullets, data_table
from hyperclone_onnx.reports.html.validation import validation_section, verdict_of
from hyperclone_onnx.reports.html.wording import TIMES, shape_text
from hyperclone_onnx.transforms.layers import deepened


def expansion_page(result: Expansion, memory: int | None = None) -> Page:
    """The page of `expand MODEL`.

    Args:
        result: the report.
        memory: the most bytes that the process has held, where they are known.
    """
    target = "" if result.output is None else f" → {Path(result.output).name}"
    sections = [*growth_sections(result), _cost(result, memory)]
    if result.output is None:
        again = Step(
            "Write the grown model: the same command with -o.", [command("expand", result.source, "...", "-o", "OUT")]
        )
        sections.append(next_steps([again]))
    else:
        unchecked = result.validation is None
        sections.append(after_growth(result.source, result.output, result.parameters_after, validate=unchecked))
    sections.append(tensor_section(result.plan))
    return Page("expand", f"{Path(result.source).name}{target}", _verdict(result), _figures(result), sections)


def folder_page(result: FolderExpansion, memory: int | None = None) -> Page:
    """The page of `expand FOLDER`."""
    models = result.models
    rows: list[list[Cell]] = [
        [
            name,
            Number(f"{model.parameters_before:,}", model.parameters_before),
            Number(f"{model.parameters_after:,}", model.parameters_after),
            _verdict(model).headline,
        ]
        for name, model in models.items()
    ]
    lines = [
        *(f"{name}: copied, for nothing in it can grow" for name in result.unchanged),
        *(f"{name}: copied as it is" for name in result.copied),
        *(f"{name}: {_changes(fields)}" for name, fields in result.changed.items()),
        *(f"{name}: left out, because {why}" for name, why in result.left_out.items()),
    ]
    table = data_table("Grown models", ("model", "parameters before", "after", "result"), rows)
    sections = [Section("files", "Files", joined([table, bullets(lines) if lines else ""]))]
    for number, (name, model) in enumerate(models.items()):
        sections += growth_sections(model, f"model-{number}-", f"{name}: ")
    if models:
        first = next(iter(models.values()))
        sections.append(after_growth(first.source, first.output or result.output))
    for number, (name, model) in enumerate(models.items()):
        sections.append(tensor_section(model.plan, f"model-{number}-", f"{name}: "))
    title = f"{Path(result.source).name} → {Path(result.output).name}"
    sizes = [("Peak memory", in_bytes(memory))] if memory else []
    return Page("expand", title, _verdict_of_all(models), [("Models grown", str(len(models))), *sizes], sections)


def _changes(fields: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{key} {before} → {after}" for key, (before, after) in fields.items()) or "as it was"


def _verdict_of_all(models: dict[str, Expansion]) -> Verdict:
    """The verdict on several models: that of the first one that is not good, else of the largest error."""
    verdicts = {name: _verdict(model) for name, model in models.items()}
    for name, verdict in verdicts.items():
        if verdict.tone != "good":
            return Verdict(verdict.tone, f"{name}: {verdict.headline}", verdict.detail)
    names = ", ".join(f"{name}: {verdict.headline}" for name, verdict in verdicts.items())
    return Verdict("good", f"{len(models)} models are equal to their sources and fit together", names)


# -- one growth -------------------------------------------------------------------------------------------


def growth_sections(result: Expansion, anchor: str = "", name: str = "") -> list[Section]:
    """The sections about what grew and how it was validated."""
    sections = [_sizes(result, f"{anchor}sizes", f"{name}Layers and sizes")]
    if result.validation is not None:
        sections.append(validation_section(result.validation, f"{anchor}validation", f"{name}Validation"))
    return sections


def _verdict(result: Expansion) -> Verdict:
    if result.validation is not None:
        return verdict_of(result.validation)
    if result.output is None:
        return Verdict("note", "Planned: nothing is written yet", "The sizes below are what the growth would give.")
    return Verdict(
        "note",
        "Not validated",
        "That was asked for. The section “Go on” has the command that does it.",
    )


def _figures(result: Expansion) -> list[tuple[str, str]]:
    ratio = result.parameters_after / max(result.parameters_before, 1)
    strategy = result.plan.strategy
    noise = f", noise at {strategy.snr_db:g} dB, seed {strategy.seed}" if strategy.law.name.startswith("noisy") else ""
    size = [("Size on disk", in_bytes(sum(result.files.values())))] if result.files else []
    return [
        ("Parameters", f"{result.parameters_before:,} → {result.parameters_after:,} ({TIMES}{ratio:.2f})"),
        *size,
        ("Time", f"{sum(result.seconds.values()):.1f} s"),
        ("Strategy", f"{strategy.law.name}{noise}"),
    ]


def _sizes(result: Expansion, anchor: str, heading: str) -> Section:
    bars = [
        *(Bar(row.role, row.label, row.before, row.after, _nearest(row.wanted)) for row in grown_rows(result)),
        *(Bar(row.role, row.label, row.before, row.after, row.why) for row in kept_rows(result)),
    ]
    unlike = [] if result.likeness is None else result.likeness.differences
    notes = [
        *mixture_lines(result),
        *result.notes,
        *growth_notes(result),
        *(f"not like the target: {difference}" for difference in unlike),
    ]
    body = [
        diagram(bars, _stacks(result.plan), grown=True),
        _compared(result),
        bullets(notes) if notes else "",
    ]
    lead = "Each bar is a size of the model: first the source's own part, then its clones."
    return Section(anchor, heading, joined(body), lead)


def _compared(result: Expansion) -> Markup:
    """The sizes of source, target and result side by side, where a target was named."""
    if result.likeness is None:
        return Markup("")
    rows: list[list[Cell]] = [
        [
            row.role,
            *("" if size is None else Number(f"{size:,}", size) for size in (row.source, row.target, row.result)),
        ]
        for row in result.compared
    ]
    heading = f"Compared with {result.likeness.path}"
    table = data_table(heading, ("size", "source", "target", "result"), rows)
    return joined([element("h3", heading), table])


def _nearest(wanted: float | None) -> str:
    return "" if wanted is None else f"the nearest to {wanted:g} that the graph can have"


def _stacks(plan: Plan) -> list[Layers]:
    """The stacks of layers: those that became deeper, else those whose numbers are in the names of the tensors."""
    counts = deepened(plan.transforms)
    if counts:
        return [Layers(name, before, after, _new_layers(plan, name)) for name, (before, after) in counts.items()]
    layers = set(numbered_names(plan.tensors).values())
    by_prefix = Counter(prefix for prefix, _ in layers)
    return [Layers(prefix, count, count) for prefix, count in by_prefix.items()]


def _new_layers(plan: Plan, name: str) -> frozenset[int]:
    """The places of new layers in the last step that made a stack deeper."""
    places: set[int] = set()
    for step in plan.transforms:
        for stack in step.options["stacks"] if step.name == "layers" else ():
            if stack["name"] == name:
                period, seen, places = stack["period"], set[int](), set()
                for place, source in enumerate(stack["sources"]):
                    if place in stack["identity"] or (source in seen and not stack["identity"]):
                        places.update(range(place * period, (place + 1) * period))
                    seen.add(source)
    return frozenset(places)


def tensor_section(plan: Plan, anchor: str = "", name: str = "") -> Section:
    """A row for each tensor that grew. It comes last on a page, because it is long."""
    heading = f"{name}Tensors that grew"
    rows: list[list[Cell]] = []
    maps = plan.maps
    for name, recipe in plan.tensors.items():
        if not recipe.grows:
            continue
        before = recipe.source_shape(maps)
        after = tuple(math.prod(grown_size(factor, maps) for factor in axis) for axis in recipe.axes)
        divided = {axis for axis, _ in recipe.shared}
        rows.append(
            [
                name,
                Number(shape_text(before), math.prod(before)),
                Number(shape_text(after), math.prod(after)),
                " ".join(_axes(axis) for axis in recipe.axes),
                "divided among clones" if divided else "copied to clones",
            ]
        )
    headings = ("tensor", "source", "grown", "axes", "weight is")
    table = data_table(heading, headings, rows) if rows else element("p", "No tensor grows.")
    lead = (
        "Axes are written as einops does: brackets hold the factors of one axis, and + joins segments. "
        "Where a sum runs over clones, they divide the weight among themselves."
    )
    return Section(f"{anchor}tensors", heading, table, lead)


def _axes(factors: tuple[Axis, ...]) -> str:
    texts = [_axis(factor) for factor in factors]
    return texts[0] if len(texts) == 1 else f"({' '.join(texts)})"


def _axis(axis: Axis) -> str:
    match axis:
        case Kept(size):
            return str(size)
        case Named(name) | FirstAndFurther(name):
            return name
        case ProductOf(parts):
            return f"({' '.join(map(_axis, parts))})"
        case ConcatOf(parts):
            texts = [_axis(part) for part in parts]
            plain = [
                text[1:-1] if isinstance(part, ProductOf) else text for part, text in zip(parts, texts, strict=True)
            ]
            return f"({' + '.join(plain)})"


def _cost(result: Expansion, memory: int | None) -> Section:
    rows = [(name, in_bytes(size)) for name, size in result.files.items()]
    rows += [(f"Time to {stage}", f"{seconds:.1f} s") for stage, seconds in result.seconds.items()]
    rows += [("Peak memory of the run", in_bytes(memory))] if memory else []
    return Section("cost", "Size and cost", facts(rows))
