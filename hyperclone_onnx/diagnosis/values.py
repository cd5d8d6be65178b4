"""The activations of a model: which are compared on which inputs, in which precision."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

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
from hyperclone_onnx.validation.sessions import Device
from hyperclone_onnx.validation.tolerance import HALVES, computed_type, tolerance_of
from hyperclone_onnx.validation.unrounded import Unsupported, rounds, unrounded
from hyperclone_onnx.validation.validating import WIDEST

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Sampling:
    """On which inputs a model runs, and where."""

    inputs: PathLike | None = None
    """An .npz file; random inputs otherwise."""
    lengths: tuple[int, int] | None = None
    """The batch and the length of random inputs."""
    seed: int = 0
    device: Device = "auto"


@dataclass(frozen=True)
class Measured:
    """How far the clones in each activation are apart, what rounding explains of it, and what ran on which inputs."""

    values: tuple[ValueDiagnosis, ...] = ()
    tolerance: float = math.nan
    ran_on: str = ""
    notes: tuple[str, ...] = ()


def compare_values(
    analysis: Analysis, plan: Plan, layers: Layers, sampling: Sampling, planned: Activations | None = None
) -> Measured:
    """Run a grown model and compare the clones in its activations.

    `planned` has the axes of its values, where the source was at hand.

    Raises:
        BadRequest: the inputs do not fit, or the device is not to be had.
        Refused: the model does not run on the inputs, or on the device, that were asked for.
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
        notes.append("of each If the larger branch was run, in its place")
    wanted = runs.measured_values(flat, value_axes(flat.dimensions, plan, planned))
    if not wanted:
        notes.append("no activation was compared: what has clones is computed inside the bodies of Loop or Scan")
        return Measured(notes=tuple(notes))
    given = None if sampling.inputs is None else runs.given_inputs(sampling.inputs, flat.model)
    cases = [given] if given is not None else list(runs.samples(flat, plan, sampling.seed, sampling.lengths))
    if given is not None:
        same = runs.alike(given.feeds, plan)
        parted = [name for name, array in given.feeds.items() if not np.array_equal(array, same[name], equal_nan=True)]
        if parted:
            notes.append(
                f"the clones in {', '.join(map(repr, parted))} differ in {sampling.inputs}: activations differ for that"
            )
    widened, notes_on_width = _widened(flat)
    try:
        found, ran_on = runs.measure(flat, wanted, cases, sampling.device, widened)
    except Refused as problem:
        if not widened:
            raise
        widened, notes_on_width = False, [f"activations are rounded as the model rounds them: {problem}"]
        found, ran_on = runs.measure(flat, wanted, cases, sampling.device)
    notes += notes_on_width
    tolerance, _ = tolerance_of(flat.dimensions, None, None, ir.DataType.FLOAT if widened else None)
    values = []
    for each in found:
        layer = layers.of_value(each.value.name or "")
        values.append(ValueDiagnosis(each.value.name or "", layer, each.dims, each.spread.distance))
    return Measured(tuple(values), tolerance, ran_on, tuple(notes))


def _widened(analysis: Analysis) -> tuple[bool, list[str]]:
    """Whether to run a model in float32, for it computes coarsely itself; and what to say of it."""
    model = analysis.model
    coarse = computed_type(analysis.dimensions) in HALVES
    if not coarse and not rounds(model):
        return False, []
    size = weight_bytes(model)
    if size > WIDEST:
        return False, ["too large to be run in float32: what it rounds itself hides small distances of activations"]
    try:
        unrounded(model)
    except Unsupported as problem:
        return False, [f"activations are rounded as the model rounds them: {problem}"]
    return True, []
