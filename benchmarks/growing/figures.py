"""The curves, as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from growing.runs import Lab, Outcome


def draw(curves: Mapping[str, Outcome], baseline: Sequence[Outcome], target: float, lab: Lab, path: Path) -> None:
    """Loss by bytes, by FLOPs, and by FLOPs with the source's; the baseline in black, its final loss dashed."""
    figure, every = plt.subplots(1, 3, figsize=(13, 4.4), sharey=True, layout="constrained")
    colours = plt.get_cmap("tab10")
    for axes, what in zip(every, ("bytes read", "FLOPs", "FLOPs, those of the source included"), strict=True):
        for number, outcome in enumerate(baseline):
            axes.plot(
                *_curve(outcome, lab, what), color="black", linewidth=1.2, label="" if number else "random weights"
            )
        for number, (name, outcome) in enumerate(curves.items()):
            axes.plot(*_curve(outcome, lab, what), color=colours(number), linewidth=1.6, label=name)
        axes.axhline(target, color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel=what, xlim=(0, None), ylim=(target - 0.12, target + 0.45))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    every[0].set_ylabel("nats per byte, on files not seen")
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(outcome: Outcome, lab: Lab, what: str) -> tuple[list[float], list[float]]:
    run = outcome.run
    steps, losses = zip(*((point.step, point.loss) for point in outcome.curve), strict=True)
    if what == "bytes read":
        return [lab.tokens(run, step) for step in steps], list(losses)
    before = outcome.flops_before if "source" in what else 0.0
    return [before + lab.flops(run, step) for step in steps], list(losses)
