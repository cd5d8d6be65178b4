"""Measures how far the activations of clones differ, on sample inputs.

Three kinds of values are measured if they have clones: the results of contractions, values that several nodes read (the
residual stream), and outputs of the model. Values inside the bodies of Loop and Scan are not measured. The distance of
a value is that of `distance.py`, over all its rows and places together. A run returns only as many values as fit in
`BUDGET`, so that several runs may be needed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import Analysis
from hyperclone_onnx.analysis.walk import infer, pin_interface
from hyperclone_onnx.diagnosis.distance import Array, Spread, joint, spread_along
from hyperclone_onnx.diagnosis.value_axes import Factor, ValueAxes
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.plan.edits import TakeBranch
from hyperclone_onnx.plan.maps import grown_size, presented
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.rewriting.rewriting import rewrite
from hyperclone_onnx.validation.inputs.cases import in_float32
from hyperclone_onnx.validation.inputs.search import NoInputs, Outputs, Wishes, find_inputs
from hyperclone_onnx.validation.inputs.sizes import Row
from hyperclone_onnx.validation.sessions import Device, Runner
from hyperclone_onnx.validation.unrounded import unrounded
from hyperclone_onnx.validation.wide import save_wide

BUDGET = 256 << 20
"""The most bytes of activations that one run returns."""

DEFAULT_LENGTHS = (2, 32)
"""The first batch size and sequence length to try."""

DEEPEST = 4
"""The depth to which nested Ifs are replaced by their branches."""

_EMPTY_PLAN = Plan({}, {}, (), (), (), (), Strategy())


@dataclass(frozen=True)
class ValueSpread:
    """The spread of the clones of one value of the graph."""

    value: ir.Value
    dims: tuple[str, ...]
    spread: Spread


def without_branches(analysis: Analysis) -> Analysis:
    """The model with every If replaced by its larger branch, because values in a body cannot be outputs of a run."""
    model = analysis.model
    for _ in range(DEEPEST):
        edits = tuple(TakeBranch(node.name or "", _larger(node)) for node in model.graph if node.op_type == "If")
        if not edits:
            return analysis
        model = rewrite(model, replace(_EMPTY_PLAN, edits=edits))
        dimensions = infer(model)
        pin_interface(dimensions)
        analysis = replace(analysis, model=model, dimensions=dimensions)
    return analysis


def _larger(node: ir.Node) -> str:
    return max(("else_branch", "then_branch"), key=lambda name: len(node.attributes[name].as_graph()))


def measured_values(analysis: Analysis, axes: ValueAxes) -> dict[ir.Value, list[list[Factor]]]:
    """The values to measure, in the order of the graph, with the factors of each of their axes."""
    dimensions, graph = analysis.dimensions, analysis.model.graph
    contractions = {summation.node for summation in dimensions.sums}
    measured: dict[ir.Value, list[list[Factor]]] = {}
    for node in graph:
        for value in node.outputs:
            floating = value.dtype is None or value.dtype.is_floating_point()
            if not value.name or not floating or dimensions.is_weight(value):
                continue
            if node in contractions or len(value.uses()) > 1 or value.is_graph_output():
                factors = axes.factors(value)
                if factors is not None and all(sum(factor.size is None for factor in axis) < 2 for axis in factors):
                    measured[value] = factors
    return measured


def alike(feeds: Mapping[str, Array], plan: Plan) -> dict[str, Array]:
    """The inputs with equal clones: where an input grew, all clones of a unit get the values of its first clone."""
    result = dict(feeds)
    for interface in () if plan.keep_interface else plan.inputs:
        for axis, factors in enumerate(interface.axes):
            array = result.get(interface.name)
            if array is None or factors is None or axis >= array.ndim:
                continue
            if array.shape[axis] == math.prod(grown_size(factor, plan.maps) for factor in factors):
                source = presented(factors, plan.maps)
                _, first = np.unique(source, return_index=True)
                result[interface.name] = np.take(array, first[source], axis=axis)
    return result


def measure(
    analysis: Analysis,
    plan: Plan,
    values: Mapping[ir.Value, list[list[Factor]]],
    wishes: Wishes,
    lengths: tuple[int, int] | None = None,
    device: Device = "auto",
    widened: bool = False,
) -> tuple[list[ValueSpread], str]:
    """Run the model on the first inputs on which it can run, and compare the clones in each value.

    Where inputs are made, what grew on the interface holds clones that are alike.

    Args:
        analysis: the analysis of the grown model.
        plan: its plan.
        values: the values to compare, with the factors of their axes.
        wishes: what the user says of the inputs.
        lengths: the batch size and the sequence length. By default moderate lengths are tried first, then short ones.
        device: the device on which the model runs.
        widened: run the model in float32, and without rounding activations to codes, from a temporary file.

    Returns:
        The spread of the clones of each value, and a text that names the provider and the inputs.

    Raises:
        Refused: the model runs on none of the inputs.
        BadRequest: the device is not available.
    """
    spreads: list[ValueSpread] = []
    providers: list[str] = []

    def run(feeds: Mapping[str, Array]) -> Outputs:
        made = dict(feeds) if wishes.given else alike(feeds, plan)
        spreads.clear()
        for batch in _batches(values, made):
            with _runner(analysis, batch, device, widened) as runner:
                providers.append(runner.provider)
                got = runner.run(in_float32(made) if widened else made)
            for value in batch:
                spread = spread_of(got.pop(value.name or ""), values[value])
                if spread is not None:
                    dims = (name for axis in values[value] for factor in axis for name in factor.dims)
                    spreads.append(ValueSpread(value, tuple(dict.fromkeys(dims)), spread))
        return {}

    first = [Row((batch, *[length] * 8), empty_cache=True) for batch, length in [lengths or DEFAULT_LENGTHS]]
    try:
        (accepted,) = find_inputs(analysis.dimensions, run, wishes, 1, first, others=lengths is None)
    except NoInputs as problem:
        raise Refused(f"{analysis.path}: {problem}; or leave out activations with --no-activations") from problem
    return spreads, f"{providers[-1]}{' in float32' if widened else ''}, {accepted.case.label}"


def spread_of(array: Array, factors: list[list[Factor]]) -> Spread | None:
    """The spread of the clones of an activation; None for integers, and where its shape contradicts its axes."""
    if array.ndim != len(factors) or array.dtype.kind in "iub":
        return None
    shape: list[int] = []
    flat: list[Factor] = []
    for size, axis in zip(array.shape, factors, strict=True):
        known = math.prod(factor.size for factor in axis if factor.size is not None)
        unknown = any(factor.size is None for factor in axis)
        if known == 0 or size % known or (not unknown and size != known):
            return None
        shape += [size // known if factor.size is None else factor.size for factor in axis]
        flat += axis
    grown = [place for place, factor in enumerate(flat) if factor.source is not None]
    kept = [place for place in range(len(flat)) if place not in grown]
    units = joint([source for place in grown if (source := flat[place].source) is not None])
    grown_last = array.reshape(shape).transpose(*kept, *grown)
    return spread_along(grown_last.reshape(-1, len(units)), units)


def _batches(values: Mapping[ir.Value, Any], feeds: Mapping[str, Array]) -> list[list[ir.Value]]:
    """Divide the values into batches whose estimated sizes are within the budget."""
    tokens = max((array.size for array in feeds.values() if array.dtype.kind in "iu"), default=1024)
    batches: list[list[ir.Value]] = [[]]
    used = 0
    for value, factors in values.items():
        unknown = sum(factor.size is None for axis in factors for factor in axis)
        static = math.prod(factor.size for axis in factors for factor in axis if factor.size is not None)
        size = 4 * static * tokens * (tokens if unknown > 2 else 1)
        if used and used + size > BUDGET:
            batches.append([])
            used = 0
        batches[-1].append(value)
        used += size
    return batches


@contextmanager
def _runner(analysis: Analysis, values: Sequence[ir.Value], device: Device, widened: bool) -> Iterator[Runner]:
    """A session that returns the given values besides the model's outputs. It reads the weights from their files."""
    model = analysis.model
    outputs = list(model.graph.outputs)
    try:
        model.graph.outputs.extend(value for value in values if value not in outputs)
        if widened:
            with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder:
                path = Path(folder) / "widened.onnx"
                save_wide(unrounded(model), path, ir.DataType.FLOAT)
                yield Runner(path, device)
            return
        message = ir.to_proto(model).SerializeToString()
    except ValueError as problem:  # a protobuf message has at most 2 GB
        raise Refused(f"{analysis.path}: its activations cannot be read ({problem}); use --no-activations") from problem
    finally:
        model.graph.outputs[:] = outputs
    yield Runner(analysis.path, device, graph=message)
