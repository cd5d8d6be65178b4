"""Draws the curves of runs. A title says what they show, and each curve is named at its end."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from growing.network import BYTES
from growing.runs import Lab, Outcome
from growing.study import Row
from hyperclone_onnx.forecasting.numbers import written

BELOW, ABOVE = 0.08, 0.45
"""How far the picture goes below the lowest loss, and above the final loss of random weights, in nats."""
LABEL_HEIGHT = 0.045
"""The least distance between two labels, as a part of the picture's height."""
MOST = 6
"""The largest number of variants in a picture: the cheapest ones, or those with the lowest loss."""


def draw(rows: Sequence[Row], baseline: Sequence[Outcome], target: float, lab: Lab, path: Path) -> None:
    """Draw the loss over what was read and over FLOPs including the source's, for the best run of each variant.

    The baseline is black, and its final loss is a dotted line.
    """
    word = "byte" if baseline[0].run.shape.vocabulary == BYTES else "token"
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    colours = plt.get_cmap("tab10")
    rows = sorted(rows, key=lambda row: (-(row.gain_total or 0.0), row.loss))[:MOST]
    curves = {row.variant: row.runs[0] for row in rows}
    low, high = min(target, *(outcome.loss for outcome in curves.values())) - BELOW, target + ABOVE
    for axes, unit in zip(panels, ("read", "FLOPs"), strict=True):
        ends: dict[str, tuple[float, float, Any]] = {}
        for number, outcome in enumerate(baseline):
            costs, losses = _curve(outcome, lab, unit)
            axes.plot(costs, losses, color="black", linewidth=1.2)
            if number == 0:
                at = next(index for index, loss in enumerate(losses) if loss <= target + 0.8 * ABOVE)
                axes.annotate(" random weights", (costs[at], losses[at]), fontsize=9, va="bottom")
        for number, (name, outcome) in enumerate(curves.items()):
            costs, losses = _curve(outcome, lab, unit)
            axes.plot(costs, losses, color=colours(number % 10), linewidth=1.6)
            ends[name] = (costs[-1], losses[-1], colours(number % 10))
        _label(axes, ends, low, high)
        axes.axhline(target, color="black", linewidth=0.8, linestyle=":")
        axes.set(
            xlabel=f"{word}s read" if unit == "read" else "FLOPs, those of the source included",
            xlim=(0, 1.25 * axes.get_xlim()[1]),
            ylim=(low, high),
        )
        axes.xaxis.set_major_formatter(lambda value, _: written(value))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"loss on files not seen, nats per {word}")
    title = "\n".join(line for part in headline(rows, word).split("\n") for line in textwrap.wrap(part, 120))
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def headline(rows: Sequence[Row], word: str) -> str:
    """The finding in one sentence: how much the best variant saves."""
    reached = [row for row in rows if row.gain_tokens is not None]
    if not reached:
        return "No variant reached the final loss of random weights"
    sooner = max(reached, key=lambda row: row.gain_tokens or 0.0)
    cheaper = max(reached, key=lambda row: row.gain_total or 0.0)
    assert sooner.gain_tokens is not None and cheaper.gain_total is not None
    if math.isinf(sooner.gain_tokens):
        lowest = min(rows, key=lambda row: row.loss)
        return f"Growth begins below the final loss of random weights; “{lowest.variant}” ends lowest"
    text = f"“{sooner.variant}” reaches the loss of random weights after {sooner.gain_tokens:.1f}x fewer {word}s"
    if cheaper is sooner:
        return f"{text} and, with its source, {_cheaper(cheaper.gain_total)}"
    return f"{text};\n“{cheaper.variant}” takes, with its source, {_cheaper(cheaper.gain_total)}"


def _cheaper(gain: float) -> str:
    return f"{gain:.2f}x fewer FLOPs" if gain >= 1.0 else f"{1.0 / gain:.2f}x more FLOPs"


def draw_series(rows: Sequence[Row], word: str, path: Path) -> None:
    """Draw how far the final loss of each grown run is from the mean of random weights of its size.

    A grown run reads half of what random weights read. Its gain is written beside its point.
    """
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    points = series_points(rows)
    axes.axhline(0.0, color="black", linewidth=0.8)
    for size, difference, row in points:
        gain = f"{row.gain_tokens:.2f}x" if row.gain_tokens is not None else "not reached"
        axes.plot(size, difference, "o", color="#c44e52" if difference > 0.0 else "#4c72b0", markersize=6)
        axes.annotate(f"  {gain}", (size, difference), fontsize=8.5, va="center")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: written(value))
    axes.set_xlim(axes.get_xlim()[0] / 1.3, 2.0 * axes.get_xlim()[1])
    axes.set(xlabel="weights", ylabel=f"grown minus random weights, nats per {word}")
    axes.set_title(series_headline(rows, word), fontsize=10.5, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def series_points(rows: Sequence[Row]) -> list[tuple[int, float, Row]]:
    """The weights of each grown run, and its final loss minus the mean of random weights of this size."""
    random: dict[int, list[float]] = {}
    for row in rows:
        if not row.runs[0].flops_before:
            random.setdefault(row.runs[0].run.shape.multiplied(), []).append(row.loss)
    sizes = [(row.runs[0].run.shape.multiplied(), row) for row in rows if row.runs[0].flops_before]
    return [(size, row.loss - sum(random[size]) / len(random[size]), row) for size, row in sizes]


def series_headline(rows: Sequence[Row], word: str) -> str:
    """The finding in one sentence: at which sizes growth is ahead after half of the tokens or bytes."""
    differences: dict[int, list[float]] = {}
    for size, difference, _ in series_points(rows):
        differences.setdefault(size, []).append(difference)
    ahead = [size for size in sorted(differences) if max(differences[size]) < 0.0]
    if not ahead:
        return f"After half of the {word}s, no size is ahead of random weights with every seed"
    sizes = " and ".join(written(size) for size in ahead)
    return f"Grown to {sizes} weights, a model is ahead of random weights after half of the {word}s, with every seed"


def _label(axes: Any, ends: Mapping[str, tuple[float, float, Any]], low: float, high: float) -> None:
    """Name each curve at its end. Labels that would overlap are moved apart, and none goes below the picture."""
    space = LABEL_HEIGHT * (high - low)
    ordered = sorted(ends.items(), key=lambda item: -item[1][1])
    height = math.inf
    for number, (name, (cost, loss, colour)) in enumerate(ordered):
        height = max(min(height - space, loss), low + space * (len(ordered) - number - 0.5))
        axes.annotate(
            name,
            (cost, loss),
            xytext=(max(end[0] for end in ends.values()) * 1.03, height),
            textcoords="data",
            fontsize=8.5,
            color=colour,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0.0, 0.5),
                "color": colour,
                "linewidth": 0.5,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )


def _curve(outcome: Outcome, lab: Lab, unit: str) -> tuple[list[float], list[float]]:
    run = outcome.run
    steps, losses = zip(*((point.step, point.loss) for point in outcome.curve), strict=True)
    if unit == "read":
        return [lab.tokens(run, step) for step in steps], list(losses)
    return [outcome.flops_before + lab.flops(run, step) for step in steps], list(losses)
