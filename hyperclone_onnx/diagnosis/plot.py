"""Draws a diagnosis as a picture."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from hyperclone_onnx.diagnosis.model import Diagnosis, PartDiagnosis
from hyperclone_onnx.diagnosis.scale import LINES, LOWEST, NOTHING_IN_COMMON, TICKS
from hyperclone_onnx.diagnosis.verdict import PARTED
from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.publishing.publication import publication


def check_plot(path: Path) -> None:
    """Check that matplotlib is installed and writes files of this kind, before the diagnosis is computed.

    Raises:
        BadRequest: matplotlib is not installed, or the suffix of the file is no format that it writes.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BadRequest("--plot needs matplotlib: pip install 'hyperclone-onnx[plot]', or leave it out")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        ending = repr(path.suffix) if path.suffix else "no suffix"
        raise BadRequest(f"--plot {path}: {ending}, and the suffix says the format; it may be .{', .'.join(formats)}")


def save_plot(diagnosis: Diagnosis, path: Path) -> None:
    """Draw the distances and the effective ranks of each layer. The suffix of the path says the format.

    Raises:
        BadRequest: matplotlib is not installed, or does not write this format.
        CannotWrite: the file cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = diagnosis.layers
    ranked = any(tensor.rank is not None for tensor in diagnosis.tensors)
    height = max(3.4, 0.28 * len(parts) + 2.0)
    figure = Figure(figsize=(11 if ranked else 7, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if ranked else 1, sharey=True, squeeze=False)[0]
    _draw_distances(axes[0], diagnosis, height)
    if ranked:
        _draw_ranks(axes[1], diagnosis, height)
    figure.suptitle(f"{Path(diagnosis.model).name}: {_headline(diagnosis)}", fontsize=11)
    with publication(path) as written:
        figure.savefig(written, format=path.suffix[1:].lower(), dpi=120)


def _headline(diagnosis: Diagnosis) -> str:
    name = diagnosis.strategy.get("name", "")
    return f"{name}, {'stuck: no clones part' if diagnosis.stuck else diagnosis.conclusion.partition(':')[0]}"


def _draw_distances(axes: Any, diagnosis: Diagnosis, height: float) -> None:
    places = range(len(diagnosis.layers))
    for name, label, marker, colour in LINES:
        points = [(_position(getattr(part, name)), place) for place, part in zip(places, diagnosis.layers, strict=True)]
        known = [(x, y) for x, y in points if x is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker=marker, color=colour, label=label, linewidth=0.8, markersize=5)
    axes.set_xscale("log")
    axes.set_xlim(LOWEST / 3, 3.0)
    axes.set_xticks([place for place, _ in TICKS], [text for _, text in TICKS])
    axes.set_yticks(list(places), [_short(part) for part in diagnosis.layers], fontsize=8)
    axes.set_ylim(len(diagnosis.layers) - 0.5, -0.5)
    axes.set_xlabel("distance of clones")
    axes.minorticks_off()
    axes.grid(axis="x", linewidth=0.3)
    if math.isfinite(diagnosis.tolerance):
        axes.axvspan(LOWEST / 3, diagnosis.tolerance, color="0.92", zorder=0, label="rounding, of activations")
    for place, text, side in ((PARTED, "clones parted", "right"), (NOTHING_IN_COMMON, "nothing in common", "left")):
        axes.axvline(place, color="black", linewidth=0.9, linestyle="--", zorder=1)
        shift = 4 if side == "right" else -8
        axes.annotate(text, (place, 1.0), (shift, 3), ("data", "axes fraction"), "offset points", ha=side, fontsize=7)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.6 / height), ncols=3, frameon=False)


def _position(distance: float | None) -> float | None:
    return None if distance is None else max(distance, LOWEST)


def _short(part: PartDiagnosis) -> str:
    name = part.name if len(part.name) <= 24 else f"…{part.name[-23:]}"
    return f"{name} ({part.verdict})"


def _draw_ranks(axes: Any, diagnosis: Diagnosis, height: float) -> None:
    places = {part.name: place for place, part in enumerate(diagnosis.layers)}
    points = [
        (tensor.rank.effective / (tensor.rank.source or tensor.rank.largest), places[tensor.layer])
        for tensor in diagnosis.tensors
        if tensor.rank is not None and tensor.rank.effective > 0.0
    ]
    axes.plot(*zip(*points, strict=True), "o", color="#4c72b0", alpha=0.5, markersize=4, label="a matrix")
    means = [(part.rank, place) for place, part in enumerate(diagnosis.layers) if part.rank is not None]
    axes.plot(*zip(*means, strict=True), "|", color="black", markersize=12, label="mean")
    divisor = "the source's" if diagnosis.source is not None else "the largest possible"
    axes.set_xlabel(f"effective rank / {divisor}")
    axes.set_xlim(left=0.0)
    axes.grid(axis="x", linewidth=0.3)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.6 / height), ncols=2, frameon=False)
