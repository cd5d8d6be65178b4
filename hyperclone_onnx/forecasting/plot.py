"""Draws a forecast as a picture."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.forecasting.answers import Forecast, grown_loss
from hyperclone_onnx.forecasting.numbers import written
from hyperclone_onnx.publishing.publication import publication

RANDOM, GROWN, DATA = "#4c72b0", "#c44e52", "0.45"


def require_matplotlib() -> None:
    """Check that matplotlib is installed, before the forecast is computed.

    Raises:
        BadRequest: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BadRequest("--plot needs matplotlib: pip install 'hyperclone-onnx[plot]', or leave it out")


def save_plot(forecast: Forecast, path: Path) -> None:
    """Draw the measured losses, and the target's curves from random weights and grown, as a PNG file.

    Raises:
        BadRequest: matplotlib is not installed.
        CannotWrite: the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_losses(axes, forecast)
    _draw_curves(axes, forecast)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: written(value))
    axes.minorticks_off()
    axes.set_xlabel("tokens read by this model")
    axes.set_ylabel("loss at the end of a run of this length")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.3)
    axes.set_title(headline(forecast), fontsize=11, loc="left")
    with publication(path) as file:
        figure.savefig(file, format="png", dpi=120)


def headline(forecast: Forecast) -> str:
    """The finding in one sentence."""
    size, grown = written(forecast.target.size), forecast.grown
    if grown is None or not math.isfinite(forecast.tokens.value):
        return f"{size} weights should reach {forecast.loss.value:.3f} after {written(forecast.target.tokens)} tokens"
    if grown.tokens.value <= 0.0:
        return f"The source is at {forecast.goal:.3f} already: growing needs no more tokens"
    gain = forecast.tokens.value / grown.tokens.value
    return f"Grown, {size} weights should reach {forecast.goal:.3f} after {gain:.1f}x fewer tokens"


def _draw_losses(axes: Any, forecast: Forecast) -> None:
    """The measured losses of each size, joined and named at their end."""
    by_size: dict[float, list[tuple[float, float]]] = {}
    for one in forecast.fit.observations:
        by_size.setdefault(one.size, []).append((one.tokens, one.loss))
    for size, points in sorted(by_size.items()):
        tokens, losses = zip(*sorted(points), strict=True)
        axes.plot(tokens, losses, "o", color=DATA, markersize=4)
        line = np.geomspace(tokens[0], tokens[-1], 50)
        axes.plot(line, [forecast.fit.law.loss(size, at) for at in line], color=DATA, linewidth=0.8)
        axes.annotate(f" {written(size)}, measured", (tokens[-1], losses[-1]), fontsize=8, color=DATA, va="center")


def _draw_curves(axes: Any, forecast: Forecast) -> None:
    """The target's curves with their ranges, named at their end."""
    size, law = forecast.target.size, forecast.fit.law
    first = min(one.tokens for one in forecast.fit.observations)
    line = np.geomspace(min(first, forecast.target.tokens / 10.0), forecast.target.tokens, 80)
    samples = forecast.fit.samples
    random = np.array([[sample.loss(size, at) for at in line] for sample in samples])
    _curve(
        axes, line, [law.loss(size, at) for at in line], random, RANDOM, f" {written(size)}, random weights", "bottom"
    )
    if forecast.grown is not None:
        source = forecast.grown.source
        grown = np.array([[grown_loss(one, size, source.loss_by(one), at) for at in line] for one in samples])
        values = [grown_loss(law, size, source.loss_by(law), at) for at in line]
        _curve(axes, line, values, grown, GROWN, f" {written(size)}, grown from {written(source.size)}", "top")
    axes.set_xlim(line[0] / 1.2, max(line[-1], max(one.tokens for one in forecast.fit.observations)) * 2.5)


def _curve(axes: Any, line: Any, values: Any, samples: Any, colour: str, label: str, side: str) -> None:
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    axes.fill_between(line, low, high, color=colour, alpha=0.2, linewidth=0.0)
    axes.plot(line, values, color=colour, linewidth=1.8)
    axes.annotate(label, (line[-1], values[-1]), color=colour, fontsize=9, va=side)
