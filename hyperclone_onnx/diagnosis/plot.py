"""A diagnosis as a picture."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from hyperclone_onnx.diagnosis.model import Diagnosis, PartDiagnosis
from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.publishing.publication import publication

LOWEST = 1e-9
"""Where a distance of exactly 0 is drawn on the logarithmic axis."""

_LINES = (
    ("weights", "weights (best matching)", "o", "#4c72b0"),
    ("forward", "forward", "^", "#55a868"),
    ("backward", "backward", "v", "#8172b3"),
    ("activations", "activations", "s", "#c44e52"),
)


def require_matplotlib() -> None:
    """Say so before anything is computed.

    Raises:
        BadRequest: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BadRequest("--plot needs matplotlib: pip install hyperclone-onnx[plot], or leave it out")


def save_plot(found: Diagnosis, path: Path) -> None:
    """Draw the distances and the effective ranks of each layer as a PNG.

    Raises:
        BadRequest: matplotlib is not installed.
        CannotWrite: the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = found.layers
    ranked = any(each.rank is not None for each in found.tensors)
    height = max(3.4, 0.28 * len(parts) + 2.0)
    figure = Figure(figsize=(11 if ranked else 7, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if ranked else 1, sharey=True, squeeze=False)[0]
    _draw_distances(axes[0], found, height)
    if ranked:
        _draw_ranks(axes[1], found, height)
    figure.suptitle(f"{Path(found.model).name}: {_headline(found)}", fontsize=11)
    with publication(path) as written:
        figure.savefig(written, format="png", dpi=120)


def _headline(found: Diagnosis) -> str:
    name = found.strategy.get("name", "")
    return f"{name}, {'stuck: no clones part' if found.stuck else found.conclusion.partition(':')[0]}"


def _draw_distances(axes: Any, found: Diagnosis, height: float) -> None:
    places = range(len(found.layers))
    for name, label, marker, colour in _LINES:
        drawn = [(_drawn(getattr(part, name)), place) for place, part in zip(places, found.layers, strict=True)]
        known = [(x, y) for x, y in drawn if x is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker=marker, color=colour, label=label, linewidth=0.8, markersize=5)
    axes.set_xscale("log")
    axes.set_xlim(LOWEST / 3, 3.0)
    ticks = [LOWEST, 1e-7, 1e-5, 1e-3, 0.1, 1.0]
    axes.set_xticks(ticks, ["0", "1e-7", "1e-5", "1e-3", "0.1", "1"])
    axes.set_yticks(list(places), [_short(part) for part in found.layers], fontsize=8)
    axes.set_ylim(len(found.layers) - 0.5, -0.5)
    axes.set_xlabel("distance of clones")
    axes.minorticks_off()
    axes.grid(axis="x", linewidth=0.3)
    if math.isfinite(found.tolerance):
        axes.axvspan(LOWEST / 3, found.tolerance, color="0.92", zorder=0, label="rounding, of activations")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.6 / height), ncols=3, frameon=False)


def _drawn(distance: float | None) -> float | None:
    return None if distance is None else max(distance, LOWEST)


def _short(part: PartDiagnosis) -> str:
    name = part.name if len(part.name) <= 24 else f"…{part.name[-23:]}"
    return f"{name} ({part.verdict})"


def _draw_ranks(axes: Any, found: Diagnosis, height: float) -> None:
    places = {part.name: place for place, part in enumerate(found.layers)}
    points = [
        (each.rank.effective / (each.rank.source or each.rank.largest), places[each.layer])
        for each in found.tensors
        if each.rank is not None and each.rank.effective > 0.0
    ]
    axes.plot(*zip(*points, strict=True), "o", color="#4c72b0", alpha=0.5, markersize=4, label="a matrix")
    means = [(part.rank, place) for place, part in enumerate(found.layers) if part.rank is not None]
    axes.plot(*zip(*means, strict=True), "|", color="black", markersize=12, label="mean")
    against = "the source's" if found.source is not None else "the largest possible"
    axes.set_xlabel(f"effective rank / {against}")
    axes.set_xlim(left=0.0)
    axes.grid(axis="x", linewidth=0.3)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.6 / height), ncols=2, frameon=False)
