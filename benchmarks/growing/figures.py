"""Draws the curves of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from growing.network import BYTES
from growing.runs import Lab, Outcome
from hyperclone_onnx.forecasting.numbers import written


def draw(curves: Mapping[str, Outcome], baseline: Sequence[Outcome], target: float, lab: Lab, path: Path) -> None:
    """Draw the loss over bytes, over FLOPs, and over FLOPs including the source's.

    The baseline is black, and its final loss is a dotted line.
    """
    word = "byte" if baseline[0].run.shape.vocabulary == BYTES else "token"
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.4), sharey=True, layout="constrained")
    colours = plt.get_cmap("tab10")
    for axes, unit in zip(panels, ("read", "FLOPs", "FLOPs, those of the source included"), strict=True):
        for number, outcome in enumerate(baseline):
            axes.plot(
                *_curve(outcome, lab, unit), color="black", linewidth=1.2, label="" if number else "random weights"
            )
        for number, (name, outcome) in enumerate(curves.items()):
            axes.plot(*_curve(outcome, lab, unit), color=colours(number), linewidth=1.6, label=name)
        axes.axhline(target, color="black", linewidth=0.8, linestyle=":")
        axes.set(
            xlabel=f"{word}s read" if unit == "read" else unit, xlim=(0, None), ylim=(target - 0.12, target + 0.45)
        )
        axes.xaxis.set_major_formatter(lambda value, _: written(value))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"nats per {word}, on files not seen")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(outcome: Outcome, lab: Lab, unit: str) -> tuple[list[float], list[float]]:
    run = outcome.run
    steps, losses = zip(*((point.step, point.loss) for point in outcome.curve), strict=True)
    if unit == "read":
        return [lab.tokens(run, step) for step in steps], list(losses)
    before = outcome.flops_before if "source" in unit else 0.0
    return [before + lab.flops(run, step) for step in steps], list(losses)
