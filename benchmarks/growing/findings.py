"""Writes the results of a study: a table for each question, and a CSV of all curves."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

from growing.runs import Lab, Outcome, Random
from growing.study import Findings, Row

TITLES = {
    "baseline": "Random weights: the baseline",
    "sources": "The sources",
    "rates": "The rates of grown models",
    "strategy": "Strategies, each at its best rate, for half of the baseline's bytes",
    "strategy_whole": "Strategies, for as many bytes as the baseline",
    "small": "The source trained on instead of grown",
    "unannealed": "A source whose rate was never decayed",
    "source": "How well the source is trained",
    "state": "The optimizer's state",
    "cheapest": "The cheapest, with everything counted",
    "recipe": "The best recipe found",
    "snr": "How much noise",
    "schedule": "Schedules of the rate",
    "factor": "Factor 2, factor 4, and factor 2 twice",
    "sharing": "Unequal shares",
    "what": "What grows",
    "dropout": "Dropout",
    "framework": "PyTorch and JAX",
    "ways": "Other ways to grow, from a source whose rate has not decayed",
    "stages": "In stages",
    "series": "Other sizes, each against its own baseline",
}
HEADER = (
    "variant",
    "peak rate",
    "steps",
    "loss at the start",
    "loss at the end",
    "gain, bytes",
    "gain, FLOPs",
    "with the source's",
)


def title(name: str, unit: str) -> str:
    """The title of a question. A unit is what the models read: byte or token."""
    return TITLES[name].replace("bytes", f"{unit}s")


def table(rows: Iterable[Row], unit: str) -> str:
    """A Markdown table. A unit is what the models read: byte or token."""
    lines = [
        tuple(heading.replace("bytes", f"{unit}s") for heading in HEADER),
        tuple("---" if number == 0 else "---:" for number in range(len(HEADER))),
    ]
    for row in rows:
        gains = [_gain(gain) for gain in (row.gain_tokens, row.gain_flops, row.gain_total)]
        lines.append(
            (row.variant, f"{row.recipe.rate:g}", str(row.steps), f"{row.start:.4f}", f"{row.loss:.4f}", *gains)
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _gain(value: float | None) -> str:
    if value is None:
        return "not reached"
    return "began there" if math.isinf(value) else f"{value:.2f}x"


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else value


def report(findings: Findings, lab: Lab) -> str:
    """All tables, below a paragraph that describes the study."""
    size = findings.size
    small, big = size.shape(size.width), size.shape(2 * size.width)
    first = findings.baseline[0]
    losses = [outcome.loss for outcome in findings.baseline]
    over = "bytes" if size.unit == "byte" else f"the tokens of a BPE of {size.vocabulary}"
    text = (
        f"A Llama over {over}, {size.layers} layers, width {size.width} ({small.multiplied():,} weights in "
        f"matrix products) grown to {2 * size.width} ({big.multiplied():,}); {size.length} {size.unit}s of context, "
        f"{size.batch} windows a step. Random weights are trained for {size.steps} steps = "
        f"{lab.tokens(first.run, size.steps):,.0f} {size.unit}s and reach "
        f"{findings.target:.4f} nats per {size.unit} (seeds: "
        f"{', '.join(f'{loss:.4f}' for loss in losses)}), measured on {size.examined} windows of files that no model "
        f"saw. A gain is the cost of random weights, divided by the cost of the variant, to reach that loss. "
        f"{_machine()}\n"
    )
    for name, rows in findings.tables.items():
        text += f"\n### {title(name, size.unit)}\n\n{table(rows, size.unit)}"
    return text


def _machine() -> str:
    return f"Measured with {os.cpu_count()} cores, {platform.machine()}, PyTorch {torch.__version__}."


def write_curves(outcomes: Iterable[Outcome], lab: Lab, path: Path) -> None:
    """Write the curves of all runs over steps, bytes, FLOPs, and FLOPs including those of earlier runs."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "step", "bytes", "flops", "flops_with_source", "loss"))
        for outcome in outcomes:
            for point in outcome.curve:
                flops = lab.flops(outcome.run, point.step)
                row = (
                    f"{lab.tokens(outcome.run, point.step):.0f}",
                    f"{flops:.4g}",
                    f"{flops + outcome.flops_before:.4g}",
                )
                writer.writerow((outcome.run.key, point.step, *row, f"{point.loss:.6f}"))


def write_random(outcomes: Iterable[Outcome], lab: Lab, path: Path) -> None:
    """Write the curves of the runs from random weights, as `hyperclone-onnx forecast` reads them."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "parameters", "tokens", "learning_rate", "loss"))
        for outcome in outcomes:
            run = outcome.run
            for point in outcome.curve if isinstance(run.start, Random) else ():
                rate = run.recipe.rate * run.recipe.share(point.step / run.steps)
                tokens = f"{lab.tokens(run, point.step):.0f}"
                writer.writerow((run.key, run.shape.multiplied(), tokens, f"{rate:.6g}", f"{point.loss:.6f}"))


def write_json(findings: Findings, path: Path) -> None:
    """The tables as data."""
    tables = {
        name: [
            {
                "variant": row.variant,
                "recipe": dict(vars(row.recipe)),
                "steps": row.steps,
                "start": row.start,
                "loss": row.loss,
                "gain": {
                    "bytes": _finite(row.gain_tokens),
                    "flops": _finite(row.gain_flops),
                    "with_source": _finite(row.gain_total),
                },
                "runs": [outcome.run.key for outcome in row.runs],
            }
            for row in rows
        ]
        for name, rows in findings.tables.items()
    }
    data = {"size": findings.size.name, "target": findings.target, "tables": tables}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
