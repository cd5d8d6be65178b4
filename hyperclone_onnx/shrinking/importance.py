"""Scores the parts of a model on inputs: which indices of a dimension, and which layers, matter most.

* An index of a dimension: the mean magnitude of what weights read there (Minitron, arXiv 2407.14679), over all places
  where a weight reads the dimension. Each place counts alike. So a feed-forward unit is scored by its activation, a
  head by what it hands on, and a channel of the stream by what comes out of the norms.
* A layer: how far the outputs move without it. Outputs that number classes are compared by KL divergence, others by the
  size of the difference relative to that of the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import Analysis
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.layers.stacks import Stack
from hyperclone_onnx.plan.maps import Axis, ConcatOf, Indices, Maps, Named, ProductOf, SourceMap, source_size
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.shrinking.sampling import sample
from hyperclone_onnx.transforms.interface import original_names
from hyperclone_onnx.transforms.layers import step_without
from hyperclone_onnx.transforms.source import source_of
from hyperclone_onnx.validation.inputs.search import NoInputs, Wishes, find_inputs
from hyperclone_onnx.validation.outputs import compare, logits_outputs
from hyperclone_onnx.validation.sessions import Device, Runner

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Scores:
    """The scores of a model's parts. A part with a higher score matters more."""

    dims: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """The score of each index, by the name of a dimension."""
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """The score of each unit of a stack (a layer, or a group of layers that repeats), by the name of the stack."""

    def to_json(self) -> dict[str, Any]:
        """The scores as plain data."""
        return {
            "dimensions": {name: list(scores) for name, scores in self.dims.items()},
            "layers": {name: list(scores) for name, scores in self.layers.items()},
        }


def best(scores: Sequence[float], number: int) -> list[int]:
    """The places of the highest scores, in order. Of equal ones, the first are taken.

    >>> best([0.1, 0.5, 0.3, 0.5], 2)
    [1, 3]
    """
    return sorted(sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:number])


# -- dimensions -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    """A place where a weight reads a dimension: an activation, and the dimension's index at each index of its axis."""

    value: ir.Value
    axis: int
    dim: str
    index: Indices


def dimension_scores(
    analysis: Analysis, growth: Growth, wishes: Wishes, device: Device
) -> dict[str, tuple[float, ...]]:
    """The scores of each index of the dimensions that become smaller. A dimension that no weight reads has none.

    Raises:
        Refused: the model runs on no inputs.
    """
    sites = _sites(growth)
    sizes = {name: source_map.size for name, source_map in growth.maps.values()}
    totals = {name: np.zeros(size) for name, size in sizes.items()}
    by_value: dict[ir.Value, list[_Site]] = {}
    for site in sites:
        by_value.setdefault(site.value, []).append(site)
    for value, array in sample(analysis, list(by_value), wishes, device):
        for site in by_value[value]:
            axis = array.ndim + site.axis
            if axis < 0 or array.shape[axis] != len(site.index):
                continue
            others = tuple(other for other in range(array.ndim) if other != axis)
            magnitude = np.abs(array).mean(axis=others)
            counts = site.index >= 0
            size = sizes[site.dim]
            total = np.bincount(site.index[counts], magnitude[counts], size)
            scores = total / np.maximum(np.bincount(site.index[counts], minlength=size), 1)
            mean = scores.mean()
            if np.isfinite(mean) and mean > 0.0:
                totals[site.dim] += scores / mean
    return {name: tuple(map(float, total)) for name, total in totals.items() if total.any()}


def _sites(growth: Growth) -> list[_Site]:
    dimensions, terms = growth.dimensions, growth.terms
    sites: dict[tuple[ir.Value, int, str], _Site] = {}
    for summation in dimensions.sums:
        if not terms.grows(summation.term):
            continue
        slots = [summation.node.inputs[slot] for slot, _ in summation.sites]
        if not any(value in dimensions.constants for value in slots):
            continue
        for slot, axis in summation.sites:
            value = summation.node.inputs[slot]
            axes = dimensions.axes_of(summation.node, slot)
            if value is None or not value.name or value in dimensions.constants or axes is None:
                continue
            if value.producer() is not None and value.producer().graph is not dimensions.model.graph:  # type: ignore[union-attr]
                continue
            factors = terms.factors(axes[axis])
            if factors is None:
                continue
            whole = ProductOf(factors)
            from_end = axis - len(axes) if axis >= 0 else axis
            for leaf in terms.leaves(axes[axis]):
                name = terms.named[leaf][0]
                sites[value, from_end, name] = _Site(value, from_end, name, _index_of(whole, name, terms.maps))
    return list(sites.values())


def _index_of(axis: Axis, name: str, maps: Maps) -> Indices:
    """For each index of an axis of the source, the index of one of its dimensions; -1 where that has no part in it."""
    match axis:
        case Named(own):
            size = source_size(axis, maps)
            return np.arange(size, dtype=np.int64) if own == name else np.full(size, -1, dtype=np.int64)
        case ProductOf(parts):
            result = np.full(1, -1, dtype=np.int64)
            for part in parts:
                inner = _index_of(part, name, maps)
                result = np.where(inner[None, :] >= 0, inner[None, :], result[:, None]).reshape(-1)
            return result
        case ConcatOf(parts):
            return np.concatenate([_index_of(part, name, maps) for part in parts])
        case _:
            return np.full(source_size(axis, maps), -1, dtype=np.int64)


def with_best(growth: Growth, scores: Mapping[str, Sequence[float]]) -> list[str]:
    """Let each dimension keep its indices with the highest scores; the names of dimensions that have no scores."""
    without: list[str] = []
    for dim, (name, source_map) in list(growth.maps.items()):
        if source_map.pick is not None:
            continue  # the user has listed its indices
        if name not in scores:
            without.append(name)
            continue
        kept = best(scores[name], source_map.grown)
        growth.maps[dim] = (name, SourceMap(source_map.size, pick=tuple(kept)))
    return without


# -- layers -----------------------------------------------------------------------------------------------


def layer_scores(model: Path, analysis: Analysis, stack: Stack, wishes: Wishes, device: Device) -> tuple[float, ...]:
    """The score of each unit of a stack: how far the outputs move without it.

    Args:
        model: the model's file.
        analysis: its analysis.
        stack: the stack.
        wishes: what the user says of the inputs.
        device: the device on which the model runs.

    Raises:
        Refused: the model runs on no inputs.
    """
    plain = Runner(model, device, isolated=True, model=analysis.model)
    try:
        accepted = find_inputs(analysis.dimensions, plain.run, wishes)
    except NoInputs as problem:
        raise Refused(f"{model}: {problem}") from problem
    logits = logits_outputs(analysis.dimensions)
    scores: list[float] = []
    for left_out in range(len(stack.units)):
        units = [unit for unit in range(len(stack.units)) if unit != left_out]
        step = step_without(source_of(model).model, {stack.name: units})
        without = source_of(model, (step,)).model
        inputs, outputs = (original_names(side) for side in (without.graph.inputs, without.graph.outputs))
        message = ir.to_proto(without).SerializeToString()
        runner = Runner(model, device, graph=message, isolated=True, model=without)
        moved = 0.0
        for one in accepted:
            feeds = {new: one.case.feeds[old] for new, old in inputs.items() if old in one.case.feeds}
            got = runner.run(feeds)
            for new, old in outputs.items():
                if old is not None and old in one.outputs and one.outputs[old].dtype.kind == "f":
                    report = compare(new, one.outputs[old], got.get(new), logits=old in logits)
                    divergence = report.kl_divergence
                    moved += report.max_relative if divergence is None or not np.isfinite(divergence) else divergence
        scores.append(moved)
    return tuple(scores)
