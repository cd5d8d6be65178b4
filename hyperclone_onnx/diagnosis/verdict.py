"""From distances to a verdict.

The clones of a dimension are *tied* where they compute the same and always will: they get the same gradients, up to
rounding, as long as their inputs and their readers stay tied too, and equal entries with equal gradients stay equal
under any usual optimizer. Which dimensions stay tied is the stable colouring of the model (`lasting`). Where clones
compute the same, but are not tied in this sense, they are *ready*: the first steps of training part them, as noise
makes them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.diagnosis.layers import AFTER, BEFORE, WHOLE
from hyperclone_onnx.diagnosis.model import PartDiagnosis, TensorDiagnosis, ValueDiagnosis, Verdict
from hyperclone_onnx.graphs import eps_of

PARTED = 0.1
"""From this distance on clones have parted; those with nothing in common are 0.71 apart, if there are two."""

NEARLY = 0.01
"""Below this distance, in all that they compute and get back, nothing but rounding can have parted clones."""

ROUNDINGS = 16.0
"""How many roundings training may leave in a weight, in units of its precision."""


def weight_tolerance(dtype: ir.DataType, clones: int) -> float:
    """How far apart rounding may leave clones that are stored in a type: eps * n * sqrt(n) / 2, of n clones, and more.

    In half precision shares are whole units in the last place of the weight, n times as coarse as the share's own, and
    the last of them takes what rounding leaves of the others. Training in float32 (or float64, for such weights) adds
    roundings of its own: `ROUNDINGS` of them.
    """
    if not dtype.is_floating_point():
        return 0.0
    trained = eps_of(ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT)
    return eps_of(dtype) * clones * math.sqrt(clones) / 2.0 + ROUNDINGS * trained


def lasting(tensors: Sequence[TensorDiagnosis]) -> frozenset[str]:
    """The dimensions whose clones get the same and give the same for ever.

    Begin with all of them. Clones on one side of a weight part where they are not alike towards the other side: its
    clones' sums while those are tied, each clone by itself otherwise. Repeat until nothing changes.
    """
    tied = {dim for each in tensors for dim in each.dims}
    while True:
        parting: set[str] = set()
        for each in tensors:
            inputs_tied, others_tied = tied.issuperset(each.inputs), tied.issuperset(each.others)
            forward = each.forward if inputs_tied else each.plain_forward
            backward = each.backward if others_tied else each.plain_backward
            parting |= set(each.others) if (forward or 0.0) > each.tolerance else set()
            parting |= set(each.inputs) if (backward or 0.0) > each.tolerance else set()
        if not parting & tied:
            return frozenset(tied)
        tied -= parting


def part(
    name: str,
    tensors: Sequence[TensorDiagnosis],
    values: Sequence[ValueDiagnosis],
    tolerance: float,
    tied: bool,
) -> PartDiagnosis:
    """All tensors and values of a part together.

    Distances of weights are root mean squares over elements, those of activations over values.

    Args:
        name: of the part.
        tensors: that it has.
        values: that it makes.
        tolerance: of activations.
        tied: whether all its dimensions are lasting.
    """
    ranks = [each.rank for each in tensors if each.rank is not None]
    fractions = [rank.effective / (rank.source or rank.largest) for rank in ranks]
    activations = over_values(values)
    return PartDiagnosis(
        name,
        len(tensors),
        len(values),
        over_elements(tensors, "matched"),
        over_elements(tensors, "forward"),
        over_elements(tensors, "backward"),
        activations,
        float(np.mean(fractions)) if fractions else None,
        _verdict(tensors, values, tolerance, tied),
    )


def over_values(values: Sequence[ValueDiagnosis]) -> float | None:
    """The distances of values, as their root mean square."""
    return _mean_square([(each.distance, 1) for each in values])


def over_elements(tensors: Sequence[TensorDiagnosis], which: str) -> float | None:
    """One of the distances of tensors, as the root mean square over their elements."""
    return _mean_square([(getattr(each, which), each.elements) for each in tensors])


def _mean_square(found: Sequence[tuple[float | None, int]]) -> float | None:
    known = [(distance, weight) for distance, weight in found if distance is not None]
    total = sum(weight for _, weight in known)
    return math.sqrt(sum(weight * distance**2 for distance, weight in known) / total) if total else None


def _verdict(
    tensors: Sequence[TensorDiagnosis], values: Sequence[ValueDiagnosis], tolerance: float, tied: bool
) -> Verdict:
    forward = [each for each in tensors if each.forward is not None]
    activations = over_values(values)
    if not any(each.forward is not None or each.backward is not None for each in tensors) and activations is None:
        return "unknown"
    same = all((each.forward or 0.0) <= each.tolerance for each in forward)
    same = same and all((each.distance or 0.0) <= tolerance for each in values)
    if same:
        return "tied" if tied else "ready"
    apart = activations if activations is not None else over_elements(tensors, "forward") or 0.0
    return "parted" if apart >= PARTED else "parting"


def conclude(
    layers: Sequence[PartDiagnosis],
    roles: Sequence[PartDiagnosis],
    strategy: Mapping[str, Any],
    apart: float,
    quantised: bool,
) -> tuple[bool, str]:
    """Whether the model is stuck, and one line for the reader.

    Args:
        layers: all parts of the model.
        roles: the same by role.
        strategy: of the plan.
        apart: the largest of the model's distances.
        quantised: whether weights are codes, which take no noise.
    """
    found = Counter(each.verdict for each in layers if each.verdict != "unknown")
    total = sum(found.values())
    if not total:
        return False, "nothing was compared: no tensor and no activation has clones"
    inner = [each for each in layers if each.name not in (BEFORE, AFTER, WHOLE) and each.verdict != "unknown"]
    where = f"{len(inner)} of {len(inner)} layers" if inner else "the model"
    noisy, diagonal = (text in str(strategy.get("name", "")) for text in ("noisy", "diagonal"))
    advice = "Grow it with more noise (a lower --snr-db)" if noisy else "Grow it with noise (--strategy noisy-diagonal)"
    advice = "Grow it before it is quantised: codes take no noise" if quantised else f"{advice}, or train with dropout"
    if found["tied"] == total:
        rounding = " (only rounding errors part diagonal clones)" if diagonal else ""
        return True, (
            f"stuck: the clones in {where} compute the same and get the same gradients{rounding}; without dropout the "
            f"model can do no more than its source. {advice}"
        )
    if apart < NEARLY:
        return False, (
            f"nearly stuck: the clones in {where} differ by {apart:.1e} in what they compute and what they get back, "
            f"which is what rounding leaves; the model can do little more than its source. {advice}"
        )
    still = [each.name for each in roles if each.verdict == "tied"]
    but = f"; those of {' and '.join(still)} stay tied, computing the same for ever" if still else ""
    if found["ready"] + found["tied"] == total:
        return False, (
            f"ready: the clones in {where} compute the same, and get different gradients: training will part them{but}"
        )
    counted = Counter(each.verdict for each in inner or layers)
    listed = [f"{counted[each]} {each}" for each in ("parted", "parting", "ready", "tied") if counted[each]]
    what = "layers" if inner else "parts of the model"
    return False, f"the clones part: of {sum(counted.values())} {what} {', '.join(listed)}{but}"
