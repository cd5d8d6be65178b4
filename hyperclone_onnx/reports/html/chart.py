"""The picture of a diagnosis: the distances of clones in each layer, and the lines that they are read by."""

from __future__ import annotations

import math

from hyperclone_onnx.diagnosis.model import Diagnosis
from hyperclone_onnx.diagnosis.scale import LINES, LOWEST, NOTHING_IN_COMMON, TICKS
from hyperclone_onnx.diagnosis.verdict import PARTED
from hyperclone_onnx.reports.html.elements import Markup, element

WIDTH, LEFT, RIGHT, ROW, TOP = 760, 190, 20, 22, 46


def distance_chart(diagnosis: Diagnosis) -> Markup:
    """A row for each layer, and a mark for each distance on a logarithmic axis."""
    bottom = TOP + ROW * len(diagnosis.layers)
    marks = [
        _mark(shape, colour, _place(distance), TOP + ROW * (place + 0.5), f"{part.name}: {label} {distance:.2g}")
        for place, part in enumerate(diagnosis.layers)
        for name, label, shape, colour in LINES
        if (distance := getattr(part, name)) is not None
    ]
    names = [
        element("text", _short(part.name), x=LEFT - 10, y=TOP + ROW * (place + 0.5) + 4, text_anchor="end")
        for place, part in enumerate(diagnosis.layers)
    ]
    return element(
        "svg",
        _rounding(diagnosis, bottom),
        *(_tick(at, text, bottom) for at, text in TICKS),
        *names,
        _limit(PARTED, "clones parted", bottom, "end"),
        _limit(NOTHING_IN_COMMON, "nothing in common", bottom, "end", above=18),
        *marks,
        *_legend(bottom + 44),
        class_="chart",
        viewBox=f"0 0 {WIDTH} {bottom + 56}",
        role="img",
        aria_label="Distances of clones by layer; the table below has the numbers",
    )


def _place(distance: float) -> float:
    """The horizontal place of a distance."""
    low, high = math.log10(LOWEST), math.log10(2.0)
    share = (math.log10(max(distance, LOWEST)) - low) / (high - low)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _mark(shape: str, colour: str, x: float, y: float, text: str) -> Markup:
    points = {
        "^": [(0, -5), (5, 4), (-5, 4)],
        "v": [(0, 5), (5, -4), (-5, -4)],
        "s": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
    }
    title = element("title", text)
    if shape not in points:
        return element("circle", title, cx=f"{x:.1f}", cy=f"{y:.1f}", r=4.5, fill=colour)
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in points[shape])
    return element("polygon", title, points=corners, fill=colour)


def _tick(at: float, text: str, bottom: int) -> Markup:
    x = f"{_place(at):.1f}"
    line = element("line", x1=x, x2=x, y1=TOP, y2=bottom, class_="axis")
    return element("g", line, element("text", text, x=x, y=bottom + 18, text_anchor="middle", class_="quiet"))


def _limit(at: float, text: str, bottom: int, anchor: str, above: int = 0) -> Markup:
    x = _place(at)
    line = element("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=TOP - 6 - above, y2=bottom, class_="limit")
    return element("g", line, element("text", text, x=f"{x - 5:.1f}", y=TOP - 8 - above, text_anchor=anchor))


def _rounding(diagnosis: Diagnosis, bottom: int) -> Markup:
    if not math.isfinite(diagnosis.tolerance):
        return Markup("")
    title = element("title", f"Up to {diagnosis.tolerance:.1e}, distances of activations are rounding")
    width = max(_place(diagnosis.tolerance) - LEFT, 0.0)
    return element("rect", title, x=LEFT, y=TOP, width=f"{width:.1f}", height=bottom - TOP, class_="rounding")


def _legend(y: int) -> list[Markup]:
    entries = []
    for number, (_, label, shape, colour) in enumerate(LINES):
        x = LEFT + 150 * number
        entries += [_mark(shape, colour, x, y, label), element("text", label, x=x + 10, y=y + 4)]
    return entries


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"…{name[-27:]}"
