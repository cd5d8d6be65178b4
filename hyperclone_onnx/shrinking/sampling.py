"""Runs a model and gives the values inside it, for scores and for the scales of norms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import Analysis
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.validation.inputs.search import NoInputs, Wishes, find_inputs
from hyperclone_onnx.validation.sessions import Device, Runner

Array = npt.NDArray[Any]

BUDGET = 256 << 20
"""The most bytes of values that one run returns."""


def sample(
    analysis: Analysis, values: Sequence[ir.Value], wishes: Wishes, device: Device
) -> Iterator[tuple[ir.Value, Array]]:
    """Run a model on inputs, and give the values inside it, each with its numbers.

    A value comes once for each input set. Only as many values as fit in `BUDGET` are in memory at a time.

    Args:
        analysis: the model.
        values: the values. Those inside bodies of operators cannot be given.
        wishes: what the user says of the inputs.
        device: the device on which the model runs.

    Raises:
        Refused: the model runs on none of the inputs.
    """
    plain = _runner(analysis, (), device)
    try:
        accepted = find_inputs(analysis.dimensions, plain.run, wishes)
    except NoInputs as problem:
        raise Refused(f"{analysis.path}: {problem}") from problem
    sets = [one.case.feeds for one in accepted]
    for batch in _batches(analysis, values, sets):
        runner = _runner(analysis, batch, device)
        for feeds in sets:
            got = runner.run(feeds)
            for value in batch:
                array = got.pop(value.name or "", None)
                if array is not None:
                    yield value, np.asarray(array, dtype=np.float64)


def _batches(
    analysis: Analysis, values: Sequence[ir.Value], sets: Sequence[Mapping[str, Array]]
) -> Iterator[list[ir.Value]]:
    tokens = max((array.size for feeds in sets for array in feeds.values() if array.dtype.kind in "iu"), default=1024)
    batch: list[ir.Value] = []
    used = 0
    for value in values:
        axes = analysis.dimensions.axes.get(value) or ()
        static = math.prod(analysis.dimensions.space.static(term) or 1 for term in axes)
        size = 8 * static * tokens
        if batch and used + size > BUDGET:
            yield batch
            batch, used = [], 0
        batch.append(value)
        used += size
    if batch:
        yield batch


def _runner(analysis: Analysis, values: Sequence[ir.Value], device: Device) -> Runner:
    """A session that returns the given values besides the model's outputs. It reads weights in files from there."""
    model = analysis.model
    outputs = list(model.graph.outputs)
    try:
        model.graph.outputs.extend(value for value in values if value not in outputs)
        message = ir.to_proto(model).SerializeToString()
    except ValueError as problem:  # a protobuf message has at most 2 GB
        raise Refused(f"{analysis.path}: its activations cannot be read ({problem})") from problem
    finally:
        model.graph.outputs[:] = outputs
    return Runner(analysis.path, device, graph=message, isolated=True, model=model)
