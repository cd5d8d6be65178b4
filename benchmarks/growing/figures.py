"""Draws the curves of runs. The title of a picture is its finding. Each curve has its name at its end."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from growing.network import BYTES
from growing.runs import Grown, Lab, Outcome
from growing.study import Row
from hyperclone_onnx.forecasting.numbers import written

BELOW, ABOVE = 0.08, 0.45
"""How far the picture goes below the lowest loss, and above the final loss of random weights, in nats."""
LABEL_HEIGHT = 0.045
"""The least distance between two labels, as a part of the picture's height."""
NOT_REACHED = 0.5
"""Where a run that did not reach the loss of random weights is drawn, in the picture of the sizes."""
COLOURS = plt.get_cmap("tab10")
MOST = 8
"""The largest number of variants in a picture: the cheapest ones, or those with the lowest loss."""


def draw(rows: Sequence[Row], baseline: Sequence[Outcome], target: float, lab: Lab, path: Path) -> None:
    """Draw the loss of the best run of each variant; of several seeds, the run that saves least.

    The left panel has the bytes or tokens that a run read, the right one its FLOPs, those of its source included. The
    baseline is black, and its final loss is a dotted line.
    """
    word = "byte" if baseline[0].run.shape.vocabulary == BYTES else "token"
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    rows = sorted(worst_seeds(rows), key=lambda row: (-(row.gain_total or 0.0), row.loss))[:MOST]
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
            axes.plot(costs, losses, color=COLOURS(number), linewidth=1.6)
            ends[name] = (costs[-1], losses[-1], COLOURS(number))
        _label(axes, ends, low, high)
        axes.axhline(target, color="black", linewidth=0.8, linestyle=":")
        axes.set(
            xlabel=f"{word}s read" if unit == "read" else "FLOPs, those of the source included",
            xlim=(0, 1.4 * axes.get_xlim()[1]),
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


def worst_seeds(rows: Sequence[Row]) -> list[Row]:
    """One row for each variant: of the rows that differ in their seed alone, the one that saves least."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        name, _, seed = row.variant.rpartition(", seed ")
        by_name.setdefault(name or seed, []).append(row)
    return [
        replace(min(own, key=lambda row: (row.gain_total or 0.0, -row.loss)), variant=name)
        for name, own in by_name.items()
    ]


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
    """Draw the gain of each grown run by its size. A run that did not reach random weights stands on the lowest line.

    Runs from decayed sources and those from sources whose rate had not decayed have colours of their own.
    """
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    points = series_points(rows)
    highest = max((gain for _, gain, _ in points if gain is not None), default=1.0)
    ends: dict[str, tuple[float, float, Any]] = {}
    for number, kind in enumerate(sorted({kind for _, _, kind in points})):
        own = [(size, NOT_REACHED if gain is None else gain) for size, gain, other in points if other == kind]
        # Points of the two kinds stand side by side, so that none hides another.
        own = [(size * (0.94 + 0.12 * number), gain) for size, gain in own]
        axes.plot(*zip(*own, strict=True), "o", color=COLOURS(number), markersize=6)
        size, gain = max(own)
        ends[kind] = (1.07 * size, gain, COLOURS(number))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: written(value))
    axes.set(
        xlabel="weights of the grown model",
        ylabel=f"gain in {word}s",
        ylim=(NOT_REACHED - 0.25, highest + 0.3),
        xlim=(axes.get_xlim()[0] / 1.2, 5.0 * axes.get_xlim()[1]),
    )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([NOT_REACHED, *range(1, math.floor(highest) + 1)])
    axes.yaxis.set_major_formatter(lambda value, _: "not reached" if value < 1.0 else f"{value:.0f}x")
    _label(axes, ends, *axes.get_ylim())
    axes.set_title(series_headline(rows, word), fontsize=10.5, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def series_points(rows: Sequence[Row]) -> list[tuple[int, float | None, str]]:
    """For each grown run its number of weights, its gain in bytes or tokens, and whether its source had decayed."""
    points: list[tuple[int, float | None, str]] = []
    for row in rows:
        run = row.runs[0].run
        if isinstance(run.start, Grown):
            kind = "source not decayed" if run.start.run.recipe.decay == "none" else "source decayed"
            points.append((run.shape.multiplied(), row.gain_tokens, kind))
    return points


def series_headline(rows: Sequence[Row], word: str) -> str:
    """The finding for each kind of source: at which sizes every seed reaches random weights, and how much sooner."""
    by_kind: dict[str, dict[int, list[float | None]]] = {}
    for size, gain, kind in series_points(rows):
        by_kind.setdefault(kind, {}).setdefault(size, []).append(gain)
    lines: list[str] = []
    for kind, sizes in sorted(by_kind.items()):
        reached = {size: [gain for gain in gains if gain is not None] for size, gains in sizes.items()}
        every = sorted(size for size, gains in reached.items() if len(gains) == len(sizes[size]))
        if not every:
            lines.append(f"{kind}: no size reaches random weights with every seed")
            continue
        gains = [gain for size in every for gain in reached[size]]
        least, most = f"{min(gains):.1f}x", f"{max(gains):.1f}x"
        saved = least if least == most else f"{least} to {most}"
        where = "all sizes" if len(every) == len(sizes) else " and ".join(written(size) for size in every) + " weights"
        lines.append(f"{kind}: with every seed at {where}, after {saved} fewer {word}s")
    return "Grown models reach the loss of random weights\n" + "\n".join(lines)


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
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
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
