"""Turns distances into a verdict.

The clones of a dimension are *tied* if they compute the same and will do so for ever. They get the same gradients, up
to rounding, as long as their inputs and their readers are tied too. And weights that are equal and have equal gradients
stay equal under all usual optimizers. `lasting` computes the dimensions that stay tied. It is the stable colouring of a
graph, applied to the model. Clones that compute the same but are not tied are *ready*: the first steps of training will
make them differ. Noise has this effect.
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
"""Clones with at least this distance have parted. Two orthogonal clones have the distance 0.71."""

NEARLY = 0.01
"""If all distances are smaller than this, forward and backward, only rounding can be their cause."""

ROUNDINGS = 16.0
"""The number of rounding errors that training may leave in a weight, in units of its precision."""


def weight_tolerance(dtype: ir.DataType, clones: int) -> float:
    """The largest distance of clones that rounding can explain: eps * n * sqrt(n) / 2, and the rounding of training.

    In half precision, shares are multiples of the weight's unit in the last place, which is n times as coarse as the
    share's own unit. The last share takes the rounding errors of the others. Training in float32 (in float64 for
    weights of that type) adds up to `ROUNDINGS` rounding errors.

    Args:
        dtype: the type of the stored weights. For integer codes the result is 0.
        clones: n, the number of clones.
    """
    if not dtype.is_floating_point():
        return 0.0
    trained = eps_of(ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT)
    return eps_of(dtype) * clones * math.sqrt(clones) / 2.0 + ROUNDINGS * trained


def lasting(tensors: Sequence[TensorDiagnosis]) -> frozenset[str]:
    """The dimensions whose clones are tied: they compute the same and get the same gradients for ever.

    The search begins with all dimensions and removes those whose clones part. Clones on one side of a weight are
    compared by their weights towards the other side: by the sums over the other side's clones if those are tied, and by
    the single weights otherwise. The clones part if they differ by more than rounding. The search repeats until nothing
    changes.
    """
    tied = {dim for tensor in tensors for dim in tensor.dims}
    while True:
        parting: set[str] = set()
        for tensor in tensors:
            inputs_tied, others_tied = tied.issuperset(tensor.inputs), tied.issuperset(tensor.others)
            forward = tensor.forward if inputs_tied else tensor.plain_forward
            backward = tensor.backward if others_tied else tensor.plain_backward
            parting |= set(tensor.others) if (forward or 0.0) > tensor.tolerance else set()
            parting |= set(tensor.inputs) if (backward or 0.0) > tensor.tolerance else set()
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
    """Summarise all tensors and values of one part of the model.

    A distance of weights is the root mean square over elements. A distance of activations is that over values.

    Args:
        name: the name of the part.
        tensors: the tensors of the part.
        values: the values that the part computes.
        tolerance: the largest distance of activations that rounding can explain.
        tied: whether all dimensions of the part are tied (see `lasting`).
    """
    ranks = [tensor.rank for tensor in tensors if tensor.rank is not None]
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
    """The root mean square of the distances of values; None where there is no distance."""
    return _root_mean_square([(value.distance, 1) for value in values])


def over_elements(tensors: Sequence[TensorDiagnosis], which: str) -> float | None:
    """The root mean square of one kind of distance of tensors, over their elements; None where there is no distance.

    Args:
        tensors: the tensors.
        which: the name of the distance, a field of `TensorDiagnosis`.
    """
    return _root_mean_square([(getattr(tensor, which), tensor.elements) for tensor in tensors])


def _root_mean_square(weighted: Sequence[tuple[float | None, int]]) -> float | None:
    known = [(distance, weight) for distance, weight in weighted if distance is not None]
    total = sum(weight for _, weight in known)
    return math.sqrt(sum(weight * distance**2 for distance, weight in known) / total) if total else None


def _verdict(
    tensors: Sequence[TensorDiagnosis], values: Sequence[ValueDiagnosis], tolerance: float, tied: bool
) -> Verdict:
    forward = [tensor for tensor in tensors if tensor.forward is not None]
    activations = over_values(values)
    if not any(tensor.forward is not None or tensor.backward is not None for tensor in tensors) and activations is None:
        return "unknown"
    same = all((tensor.forward or 0.0) <= tensor.tolerance for tensor in forward)
    same = same and all((value.distance or 0.0) <= tolerance for value in values)
    if same:
        return "tied" if tied else "ready"
    distance = activations if activations is not None else over_elements(tensors, "forward") or 0.0
    return "parted" if distance >= PARTED else "parting"


def conclude(
    layers: Sequence[PartDiagnosis],
    roles: Sequence[PartDiagnosis],
    strategy: Mapping[str, Any],
    apart: float,
    quantised: bool,
) -> tuple[bool, str]:
    """Whether the model is stuck, and the conclusion in one line of text.

    Args:
        layers: the diagnosis of each layer.
        roles: the diagnosis of each role.
        strategy: the strategy of the plan, as plain data.
        apart: the largest of the model's distances.
        quantised: whether any weights are integer codes, to which noise cannot be added.
    """
    verdicts = Counter(layer.verdict for layer in layers if layer.verdict != "unknown")
    total = sum(verdicts.values())
    if not total:
        return False, "nothing was compared: no tensor and no activation has clones"
    inner = [layer for layer in layers if layer.name not in (BEFORE, AFTER, WHOLE) and layer.verdict != "unknown"]
    where = f"{len(inner)} of {len(inner)} layers" if inner else "the model"
    noisy, diagonal = (text in str(strategy.get("name", "")) for text in ("noisy", "diagonal"))
    advice = "Grow it with more noise (a lower --snr-db)" if noisy else "Grow it with noise (--strategy noisy-diagonal)"
    advice = "Grow it before it is quantised: codes take no noise" if quantised else f"{advice}, or train with dropout"
    if verdicts["tied"] == total:
        rounding = " (only rounding errors part diagonal clones)" if diagonal else ""
        return True, (
            f"stuck: the clones in {where} compute the same and get the same gradients{rounding}; without dropout the "
            f"model can do no more than its source. {advice}"
        )
    if apart < NEARLY:
        return False, (
            f"nearly stuck: the clones in {where} differ by {apart:.1e} in what they compute and in their "
            f"gradients, which rounding can explain; the model can do little more than its source. {advice}"
        )
    tied_roles = [role.name for role in roles if role.verdict == "tied"]
    except_tied = (
        f"; those of {' and '.join(tied_roles)} stay tied and will compute the same for ever" if tied_roles else ""
    )
    if verdicts["ready"] + verdicts["tied"] == total:
        return False, (
            f"ready: the clones in {where} compute the same, and get different gradients: training will part them"
            f"{except_tied}"
        )
    counted = Counter(layer.verdict for layer in inner or layers)
    listed = [f"{counted[verdict]} {verdict}" for verdict in ("parted", "parting", "ready", "tied") if counted[verdict]]
    parts = "layers" if inner else "parts of the model"
    return False, f"the clones part: of {sum(counted.values())} {parts} {', '.join(listed)}{except_tied}"
