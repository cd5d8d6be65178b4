"""From distances to a verdict.

Clones are *tied* where they compute the same (activations, and the forward distance of every weight) and get the same
gradients (the backward distance), up to rounding: then every later step of training keeps them so, whatever the
optimizer, as long as it treats equal entries with equal gradients alike. They are *ready* where they compute the same
but get different gradients, as noisy clones do before the first step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.diagnosis.model import PartDiagnosis, TensorDiagnosis, ValueDiagnosis, Verdict

PARTED = 0.1
"""From this distance on clones have parted; those with nothing in common are 0.71 apart, if there are two."""

ROUNDINGS = 16.0
"""Weights that differ by so many roundings are the same."""


def weight_tolerance(dtype: ir.DataType) -> float:
    """How far apart rounding may leave clones that are stored in a type: `ROUNDINGS` times its eps."""
    if not dtype.is_floating_point():
        return 0.0
    eps = 2.0**-7 if dtype == ir.DataType.BFLOAT16 else float(np.finfo(dtype.numpy()).eps)
    return ROUNDINGS * eps


def read_alike(tensors: Sequence[TensorDiagnosis]) -> bool:
    """Whether clones are read alike everywhere, so that all of them get the same gradients."""
    return all((each.backward or 0.0) <= each.tolerance for each in tensors)


def part(
    name: str,
    tensors: Sequence[TensorDiagnosis],
    values: Sequence[ValueDiagnosis],
    tolerance: float,
    alike: bool,
) -> PartDiagnosis:
    """All tensors and values of a part together.

    Distances of weights are root mean squares over elements, those of activations over values.

    Args:
        name: of the part.
        tensors: that it has.
        values: that it makes.
        tolerance: of activations.
        alike: whether clones are read alike elsewhere in the model, for a part that itself reads none.
    """
    ranks = [each.rank for each in tensors if each.rank is not None]
    fractions = [rank.effective / (rank.source or rank.largest) for rank in ranks]
    activations = _mean_square([(each.distance, 1) for each in values])
    return PartDiagnosis(
        name,
        len(tensors),
        len(values),
        over_elements(tensors, "matched"),
        over_elements(tensors, "forward"),
        over_elements(tensors, "backward"),
        activations,
        float(np.mean(fractions)) if fractions else None,
        _verdict(tensors, values, activations, tolerance, alike),
    )


def over_elements(tensors: Sequence[TensorDiagnosis], which: str) -> float | None:
    """One of the distances of tensors, as the root mean square over their elements."""
    return _mean_square([(getattr(each, which), each.elements) for each in tensors])


def _mean_square(found: Sequence[tuple[float | None, int]]) -> float | None:
    known = [(distance, weight) for distance, weight in found if distance is not None]
    total = sum(weight for _, weight in known)
    return math.sqrt(sum(weight * distance**2 for distance, weight in known) / total) if total else None


def _verdict(
    tensors: Sequence[TensorDiagnosis],
    values: Sequence[ValueDiagnosis],
    activations: float | None,
    tolerance: float,
    alike: bool,
) -> Verdict:
    forward = [each for each in tensors if each.forward is not None]
    backward = [each for each in tensors if each.backward is not None]
    if not forward and not backward and activations is None:
        return "unknown"
    same = all((each.forward or 0.0) <= each.tolerance for each in forward)
    same = same and all((each.distance or 0.0) <= tolerance for each in values)
    if same:
        return "tied" if (read_alike(backward) if backward else alike) else "ready"
    apart = activations if activations is not None else over_elements(tensors, "forward") or 0.0
    return "parted" if apart >= PARTED else "parting"


def conclude(layers: Sequence[PartDiagnosis], strategy: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the model is stuck, and one line for the reader."""
    found = Counter(each.verdict for each in layers if each.verdict != "unknown")
    total = sum(found.values())
    if not total:
        return False, "nothing was compared: no tensor and no activation has clones"
    noisy = "noise of more than this" if str(strategy.get("name", "")).startswith("noisy") else "noise"
    if found["tied"] == total:
        return True, (
            f"stuck: the clones in {_all(total)} compute the same and get the same gradients; without dropout the "
            f"model can do no more than its source. Grow it with {noisy} (--strategy noisy-symmetric --snr-db 10), "
            "or train with dropout"
        )
    if found["ready"] and found["ready"] + found["tied"] == total:
        tied = f", those in {found['tied']} of {total} parts yet get the same gradients" if found["tied"] else ""
        return False, (
            "ready: the clones compute the same, as they do before training, and get different gradients: "
            f"they will part{tied}"
        )
    parts = [f"{found[each]} {each}" for each in ("parted", "parting", "ready", "tied") if found[each]]
    return False, f"the clones part: of {total} parts of the model {', '.join(parts)}"


def _all(total: int) -> str:
    return "the model" if total == 1 else f"all {total} parts of the model"
