"""Compares the clones in the activations of a model: chooses the values, the inputs and the precision."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import Analysis
from hyperclone_onnx.diagnosis import activations as runs
from hyperclone_onnx.diagnosis.layers import Layers
from hyperclone_onnx.diagnosis.model import ValueDiagnosis
from hyperclone_onnx.diagnosis.value_axes import value_axes
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import weight_bytes
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.activations import Activations
from hyperclone_onnx.validation.inputs.given import Inputs, wishes_of
from hyperclone_onnx.validation.judging import WIDEST
from hyperclone_onnx.validation.sessions import Device
from hyperclone_onnx.validation.tolerance import HALVES, computed_type, tolerance_of
from hyperclone_onnx.validation.unrounded import Unsupported, rounds, unrounded

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Sampling:
    """The inputs and the device of a run."""

    inputs: Inputs | None = None
    """Inputs of the user's own, or a path that holds them; None for random inputs."""
    lengths: tuple[int, int] | None = None
    """The batch size and the sequence length of random inputs."""
    seed: int = 0
    device: Device = "auto"
    dims: Mapping[str, int] | None = None
    """Numbers for symbolic sizes of random inputs, by name."""


@dataclass(frozen=True)
class Measured:
    """The result of a comparison of activations."""

    values: tuple[ValueDiagnosis, ...] = ()
    tolerance: float = math.nan
    """The largest distance that rounding can explain."""
    ran_on: str = ""
    """The provider that ran the model, and the inputs."""
    notes: tuple[str, ...] = ()


def compare_values(
    analysis: Analysis, plan: Plan, layers: Layers, sampling: Sampling, planned: Activations | None = None
) -> Measured:
    """Run a grown model and compare the clones in its activations.

    Args:
        analysis: the analysis of the grown model.
        plan: its plan.
        layers: the layer of each value.
        sampling: the inputs and the device.
        planned: the axes of the model's values, if the source is given.

    Returns:
        The comparison. It has no values, and a note with the reason, if the model does not run on random inputs.

    Raises:
        BadRequest: the inputs do not fit the model, or the device is not available.
        Refused: the model does not run on the inputs, or on the device, that the user asked for.
    """
    try:
        return _compare_values(analysis, plan, layers, sampling, planned)
    except Refused as problem:
        if sampling.inputs is not None or sampling.lengths is not None or sampling.device == "cuda":
            raise
        return Measured(notes=(f"no activation was compared, weights alone were judged: {problem}",))


def _compare_values(
    analysis: Analysis, plan: Plan, layers: Layers, sampling: Sampling, planned: Activations | None
) -> Measured:
    notes: list[str] = []
    flat = runs.without_branches(analysis)
    if flat is not analysis:
        notes.append("each If was replaced by its larger branch, and only that branch was run")
    measured = runs.measured_values(flat, value_axes(flat.dimensions, plan, planned))
    if not measured:
        notes.append("no activation was compared: all values that have clones are inside the bodies of Loop or Scan")
        return Measured(notes=tuple(notes))
    wishes = wishes_of(flat.model, sampling.inputs, sampling.dims, sampling.seed, plan)
    wishes = replace(wishes, given=wishes.given[:1])
    for given in wishes.given:
        equal = runs.alike(given.feeds, plan)
        differing = [
            name for name, array in given.feeds.items() if not np.array_equal(array, equal[name], equal_nan=True)
        ]
        if differing:
            notes.append(
                f"the clones in {', '.join(map(repr, differing))} differ in {sampling.inputs}: activations differ "
                "for this reason too"
            )
    widened, notes_on_width = _widened(flat)
    try:
        spreads, ran_on = runs.measure(flat, plan, measured, wishes, sampling.lengths, sampling.device, widened)
    except Refused as problem:
        if not widened:
            raise
        widened, notes_on_width = False, [f"activations are compared with the rounding of the model itself: {problem}"]
        spreads, ran_on = runs.measure(flat, plan, measured, wishes, sampling.lengths, sampling.device)
    notes += notes_on_width
    tolerance, _ = tolerance_of(flat.dimensions, None, None, ir.DataType.FLOAT if widened else None)
    values = []
    for spread in spreads:
        layer = layers.of_value(spread.value.name or "")
        values.append(ValueDiagnosis(spread.value.name or "", layer, spread.dims, spread.spread.distance))
    return Measured(tuple(values), tolerance, ran_on, tuple(notes))


def _widened(analysis: Analysis) -> tuple[bool, list[str]]:
    """Whether to run a model in float32, because the model itself computes with few bits; and notes on that."""
    model = analysis.model
    coarse = computed_type(analysis.dimensions) in HALVES
    if not coarse and not rounds(model):
        return False, []
    size = weight_bytes(model)
    if size > WIDEST:
        return False, [
            "the model is too large to run in float32: its own rounding hides small distances of activations"
        ]
    try:
        unrounded(model)
    except Unsupported as problem:
        return False, [f"activations are compared with the rounding of the model itself: {problem}"]
    return True, []
