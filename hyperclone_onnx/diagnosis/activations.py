"""How far the clones' activations are apart, on sample inputs.

What is measured are the results of contractions, what several nodes read (the residual stream), and outputs, where
they have clones; not what is computed inside the bodies of Loop and Scan. Every value is compared as `distance.py`
says, over all rows and places together, and dropped; so many values are had from one run as fit in `BUDGET`.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from hyperclone_onnx.errors import BadRequest, Refused
from hyperclone_onnx.plan.edits import TakeBranch
from hyperclone_onnx.plan.maps import grown_size, presented
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.rewriting.rewriting import rewrite
from hyperclone_onnx.validation import feeds as inputs
from hyperclone_onnx.validation.sessions import Device, Runner
from hyperclone_onnx.validation.unrounded import unrounded
from hyperclone_onnx.validation.wide import save_wide

BUDGET = 256 << 20
"""Bytes of activations that one run may give."""

DEFAULT_LENGTHS = (2, 32)
"""The batch and the length that are tried first."""

DEEPEST = 4
"""How deep in one another Ifs are looked into."""

_NOTHING = Plan({}, {}, (), (), (), (), Strategy())


@dataclass(frozen=True)
class ValueSpread:
    """The spread of the clones of one value of the graph."""

    value: ir.Value
    dims: tuple[str, ...]
    spread: Spread


def without_branches(analysis: Analysis) -> Analysis:
    """The model with the larger branch of every If in its place: what is in a body cannot be looked at."""
    model = analysis.model
    for _ in range(DEEPEST):
        taken = tuple(TakeBranch(node.name or "", _larger(node)) for node in model.graph if node.op_type == "If")
        if not taken:
            return analysis
        model = rewrite(model, replace(_NOTHING, edits=taken))
        dimensions = infer(model)
        pin_interface(dimensions)
        analysis = replace(analysis, model=model, dimensions=dimensions)
    return analysis


def _larger(node: ir.Node) -> str:
    return max(("else_branch", "then_branch"), key=lambda name: len(node.attributes[name].as_graph()))


def measured_values(analysis: Analysis, axes: ValueAxes) -> dict[ir.Value, list[list[Factor]]]:
    """The values that are measured, in graph order, with the factors of their axes."""
    dimensions, graph = analysis.dimensions, analysis.model.graph
    contractions = {each.node for each in dimensions.sums}
    found: dict[ir.Value, list[list[Factor]]] = {}
    for node in graph:
        for value in node.outputs:
            floating = value.dtype is None or value.dtype.is_floating_point()
            if not value.name or not floating or dimensions.is_weight(value):
                continue
            if node in contractions or len(value.uses()) > 1 or value.is_graph_output():
                factors = axes.factors(value)
                if factors is not None and all(sum(each.size is None for each in axis) < 2 for axis in factors):
                    found[value] = factors
    return found


def samples(
    analysis: Analysis,
    plan: Plan,
    seed: int = 0,
    lengths: tuple[int, int] | None = None,
) -> Iterator[inputs.Case]:
    """Inputs to try, in order: of the lengths asked for, otherwise of moderate and then of short ones.

    What grew on the interface holds clones that are alike.
    """
    cases = inputs.cases(analysis.dimensions, seed, lengths=[lengths or DEFAULT_LENGTHS])
    for case in cases if lengths else (*cases, *inputs.cases(analysis.dimensions, seed)):
        yield inputs.Case(case.label, alike(case.feeds, plan))


def alike(feeds: Mapping[str, Array], plan: Plan) -> dict[str, Array]:
    """The same inputs with the first clone of each unit in the place of all, where inputs grew."""
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


def given_inputs(path: str | os.PathLike[str], model: ir.Model) -> inputs.Case:
    """The inputs in an .npz file, by name.

    Raises:
        BadRequest: it cannot be read, or lacks an input of the model.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            feeds = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, AttributeError) as problem:
        raise BadRequest(
            f"--inputs {path}: not a readable .npz file ({type(problem).__name__}: {problem})"
        ) from problem
    wanted = {value.name or "": value for value in model.graph.inputs}
    missing = sorted(set(wanted) - set(feeds))
    if missing:
        raise BadRequest(
            f"--inputs {path}: it lacks {', '.join(map(repr, missing))}; the model's inputs are "
            f"{', '.join(map(repr, wanted))}"
        )
    made: dict[str, Array] = {}
    for name, value in wanted.items():
        array = feeds[name]
        made[name] = array if value.dtype is None else array.astype(value.dtype.numpy())
    return inputs.Case(f"{path}", made)


def measure(
    analysis: Analysis,
    values: Mapping[ir.Value, list[list[Factor]]],
    cases: Iterable[inputs.Case],
    device: Device = "auto",
    widened: bool = False,
) -> tuple[list[ValueSpread], str]:
    """Run the model on the first inputs on which it runs, and compare the clones in each of the values.

    Args:
        analysis: of the grown model.
        values: to compare, with the factors of their axes.
        cases: inputs to try.
        device: where to run.
        widened: whether to run it in float32 and without rounding activations to codes, from a temporary file.

    Returns:
        What was found of each value, and what ran on which inputs.

    Raises:
        Refused: it runs on none of the inputs.
        BadRequest: the device is not to be had.
    """
    refusal = "no inputs could be made for it"
    for case in cases:
        found: list[ValueSpread] = []
        provider = ""
        try:
            for batch in _batches(values, case):
                with _runner(analysis, batch, device, widened) as runner:
                    provider = runner.provider
                    got = runner.run(inputs.in_float32(case.feeds) if widened else case.feeds)
                for value in batch:
                    made = spread_of(got.pop(value.name or ""), values[value])
                    if made is not None:
                        dims = (name for axis in values[value] for each in axis for name in each.dims)
                        found.append(ValueSpread(value, tuple(dict.fromkeys(dims)), made))
            return found, f"{provider}{' in float32' if widened else ''}, {case.label}"
        except RuntimeError as problem:
            refusal = f"{case.label}: {problem}"
    raise Refused(
        f"{analysis.path}: it runs on none of the inputs made for it ({refusal}); give some with --inputs FILE.npz, or "
        "leave out activations with --no-activations"
    )


def spread_of(array: Array, factors: list[list[Factor]]) -> Spread | None:
    """The spread of an activation's clones; None where its shape is not what its axes say."""
    if array.ndim != len(factors) or array.dtype.kind in "iub":
        return None
    shape: list[int] = []
    flat: list[Factor] = []
    for size, axis in zip(array.shape, factors, strict=True):
        known = math.prod(each.size for each in axis if each.size is not None)
        unknown = any(each.size is None for each in axis)
        if known == 0 or size % known or (not unknown and size != known):
            return None
        shape += [size // known if each.size is None else each.size for each in axis]
        flat += axis
    grown = [i for i, each in enumerate(flat) if each.source is not None]
    others = [i for i in range(len(flat)) if i not in grown]
    units = joint([source for i in grown if (source := flat[i].source) is not None])
    turned = array.reshape(shape).transpose(*others, *grown)
    return spread_along(turned.reshape(-1, len(units)), units)


def _batches(values: Mapping[ir.Value, Any], case: inputs.Case) -> list[list[ir.Value]]:
    """The values in as many lots as keep each under the budget, by their sizes at a guess."""
    tokens = max((array.size for array in case.feeds.values() if array.dtype.kind in "iu"), default=1024)
    batches: list[list[ir.Value]] = [[]]
    used = 0
    for value, factors in values.items():
        unknown = sum(each.size is None for axis in factors for each in axis)
        static = math.prod(each.size for axis in factors for each in axis if each.size is not None)
        size = 4 * static * tokens * (tokens if unknown > 2 else 1)
        if used and used + size > BUDGET:
            batches.append([])
            used = 0
        batches[-1].append(value)
        used += size
    return batches


@contextmanager
def _runner(analysis: Analysis, wanted: Sequence[ir.Value], device: Device, widened: bool) -> Iterator[Runner]:
    """A session that gives some values besides the model's outputs, its weights where they lie."""
    model = analysis.model
    outputs = list(model.graph.outputs)
    try:
        model.graph.outputs.extend(value for value in wanted if value not in outputs)
        if widened:
            with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder:
                path = Path(folder) / "widened.onnx"
                save_wide(unrounded(model), path, ir.DataType.FLOAT)
                yield Runner(path, device)
            return
        message = ir.to_proto(model).SerializeToString()
    except ValueError as problem:  # a protobuf ends at 2 GB
        raise Refused(f"{analysis.path}: its activations cannot be had ({problem}); use --no-activations") from problem
    finally:
        model.graph.outputs[:] = outputs
    yield Runner(analysis.path, device, graph=message)
