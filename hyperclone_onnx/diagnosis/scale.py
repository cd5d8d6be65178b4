"""What all pictures of a diagnosis have in common: the lines, the axis, and the distances that they are read by."""

from __future__ import annotations

import math

LOWEST = 1e-9
"""Where a distance of exactly 0 is drawn on the logarithmic axis."""

TICKS = ((LOWEST, "0"), (1e-7, "1e-7"), (1e-5, "1e-5"), (1e-3, "1e-3"), (0.1, "0.1"), (1.0, "1"))
"""The ticks of the axis."""

NOTHING_IN_COMMON = math.sqrt(0.5)
"""The distance of two clones that have nothing in common."""

LINES = (
    ("weights", "weights (best match)", "o", "#4c72b0"),
    ("forward", "forward", "^", "#3f9050"),
    ("backward", "backward", "v", "#8172b3"),
    ("activations", "activations", "s", "#c44e52"),
)
"""The distances of a layer: the field of `PartDiagnosis`, its name, its mark and its colour."""
