"""The page of `inspect`: what can grow in a model, and what cannot and why."""

from __future__ import annotations

import math

from hyperclone_onnx.analysis.analysing import Analysis
from hyperclone_onnx.reports.expansion import size_label
from hyperclone_onnx.reports.html.diagram import Bar, Layers, diagram
from hyperclone_onnx.reports.html.elements import Markup, element, joined
from hyperclone_onnx.reports.html.next_steps import command, next_steps
from hyperclone_onnx.reports.html.page import Page, Section, Verdict
from hyperclone_onnx.reports.html.tables import Cell, Number, Step, bullets, data_table
from hyperclone_onnx.reports.html.wording import TIMES, shape_text
from hyperclone_onnx.reports.inspection import inspection, size_rows
from hyperclone_onnx.reports.roles import in_words


def inspection_page(analysis: Analysis) -> Page:
    """The page of `inspect MODEL`."""
    data = inspection(analysis)
    bars = [Bar(row.role, size_label(row.role, row.names), row.size, row.size, row.why) for row in size_rows(analysis)]
    stacks = [Layers(name, count, count) for name, count in data["layers"].items()]
    figures = [
        ("Parameters", f"{data['parameters']:,}"),
        ("Layers", _layers_text(data["layers"])),
        *([("Blocks that can become experts", str(blocks))] if (blocks := data["feed_forward_blocks"]) else []),
        ("Nodes", f"{data['nodes']:,}"),
        ("Opset", str(data["opset"])),
    ]
    lead = "Each bar is a size of the model. A grey one keeps its size, for the reason beside it."
    sections = [
        Section("sizes", "Layers and sizes", diagram(bars, stacks, grown=False), lead),
        _interface(data["inputs"], data["outputs"]),
    ]
    if data["operators_without_rule"]:
        lines = [f"{name} {TIMES} {count}" for name, count in data["operators_without_rule"].items()]
        sections.append(
            Section("operators", "Operators without a rule", bullets(lines), "What they read and write keeps its size.")
        )
    sections.append(_next(analysis, [bar.role for bar in bars if not bar.why], bool(data["layers"])))
    sections.append(_tensors(analysis, data["tensors"]))
    return Page("inspect", analysis.path.name, _verdict(bars), figures, sections)


def _layers_text(layers: dict[str, int]) -> str:
    named = (str(count) if name == "layers" else f"{name}: {count}" for name, count in layers.items())
    return ", ".join(named) or "none recognised"


def _verdict(bars: list[Bar]) -> Verdict:
    growing = list(dict.fromkeys(in_words(bar.role) for bar in bars if not bar.why))
    kept = list(dict.fromkeys(in_words(bar.role) for bar in bars if bar.why))
    stays = f"Keeps its size: {', '.join(kept)}. The reasons stand beside the sizes." if kept else ""
    if not growing:
        return Verdict("bad", "No size of this model can grow", stays)
    return Verdict("good", f"Can grow: {', '.join(growing)}", stays)


def _interface(inputs: dict[str, str | None], outputs: dict[str, str | None]) -> Section:
    rows: list[list[Cell]] = [
        [name, side, "of unknown rank" if axes is None else axes or "single"]
        for side, values in (("input", inputs), ("output", outputs))
        for name, axes in values.items()
    ]
    return Section("interface", "Inputs and outputs", data_table("Inputs and outputs", ("name", "side", "axes"), rows))


def _tensors(analysis: Analysis, tensors: dict[str, list[str]]) -> Section:
    stored = analysis.model.graph.initializers
    rows: list[list[Cell]] = []
    for name, ways in tensors.items():
        value = stored.get(name)
        tensor = None if value is None else value.const_value
        shape = () if tensor is None else tuple(int(size) for size in tensor.shape.numpy())
        rows.append(
            [
                name,
                Number(shape_text(shape), math.prod(shape)),
                " and ".join(ways),
                "" if tensor is None else tensor.dtype.name.lower(),
            ]
        )
    table: Markup = (
        data_table("Tensors", ("tensor", "shape", "axes", "type"), rows)
        if rows
        else element("p", "The model stores no floating-point tensor.")
    )
    lead = (
        "Axes are written as einops does: brackets hold the factors of one axis, outermost first; + joins segments. "
        "“and” separates the uses of a tensor that is stored once."
    )
    return Section("tensors", "Tensors", joined([table]), lead)


def _next(analysis: Analysis, growing: list[str], has_layers: bool) -> Section:
    path = str(analysis.path)
    report = ("--html", "report.html")
    entries = []
    if growing:
        entries.append(
            Step(
                "Make every width twice as large.",
                [command("expand", path, "--factor", "2", "-o", "big.onnx", *report)],
            )
        )
    if "ffn" in growing:
        entries.append(
            Step("Or only one role.", [command("expand", path, "--set", "ffn=2", "-o", "big.onnx", *report)])
        )
    if has_layers:
        entries.append(
            Step("Or give it more layers.", [command("expand", path, "--layers", "N", "-o", "deep.onnx", *report)])
        )
    entries.append(Step("See the same on a terminal, or as JSON.", [command("inspect", path, "--json")]))
    return next_steps(entries)
