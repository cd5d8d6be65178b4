"""Three models must agree: the grown checkpoint, its source, and the grown file in ONNX Runtime."""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from hyperclone_onnx.analysis.analysing import Analysis, analyse
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.hugging_face.checkpoint import to_numpy
from hyperclone_onnx.frameworks.hugging_face.recording import floating_outputs, run_model
from hyperclone_onnx.graphs import eps_of
from hyperclone_onnx.plan.maps import Indices, index_axis, presented
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.reading import loading
from hyperclone_onnx.validation.feeds import Case, cases
from hyperclone_onnx.validation.sessions import Runner
from hyperclone_onnx.validation.tolerance import HALVES, tolerance_of
from hyperclone_onnx.validation.wide import save_wide

Array = npt.NDArray[Any]
Outputs = dict[str, Array]

RESIDUE = 64.0
"""Roundings by which shares may miss their weight and still be the same weight."""


@dataclass(frozen=True)
class Feeding:
    """The input sets that a model in PyTorch and its file take alike."""

    analysis: Analysis
    cases: tuple[Case, ...]

    @property
    def tolerance(self) -> tuple[float, str]:
        """The relative error that rounding explains in float32, and how it is made up."""
        rounding, reason = tolerance_of(self.analysis.dimensions, None, None, ir.DataType.FLOAT)
        residue = RESIDUE * eps_of(ir.DataType.FLOAT) * math.sqrt(len(self.analysis.dimensions.sums) or 1)
        return rounding + residue, f"{reason} + {RESIDUE:.0f} x eps of the shares"


def feeding(big: Path, model: Any) -> Feeding:
    """Input sets for a file's inputs, as the model's forward takes them.

    Raises:
        Refused: an input of the file is none of the model's.
    """
    analysis = analyse(big)
    accepted = set(inspect.signature(model.forward).parameters)
    found: list[Case] = []
    for case in cases(analysis.dimensions):
        empty = [name for name, array in case.feeds.items() if name not in accepted and not array.size]
        unknown = [name for name in case.feeds if name not in accepted and name not in empty]
        if unknown:
            if any("past" in name or "cache" in name for name in unknown):
                continue
            raise Refused(
                f"{big}: its input {unknown[0]!r} is no argument of {type(model).__name__}: it cannot be compared"
            )
        found.append(case)
    return Feeding(analysis, tuple(found))


def torch_feeds(case: Case, model: Any) -> dict[str, Any]:
    """A case as the model takes it."""
    accepted = set(inspect.signature(model.forward).parameters)
    return {name: torch.from_numpy(array) for name, array in case.feeds.items() if name in accepted}


def outputs(model: Any, case: Case) -> Outputs:
    """The floating outputs of a model in float32."""
    result = run_model(model, torch_feeds(case, model))
    return {name: to_numpy(each) for name, each in floating_outputs(result).items()}


@dataclass(frozen=True)
class Error:
    """The largest difference of two outputs, relative to the largest element."""

    name: str
    relative: float

    @staticmethod
    def worst(errors: Sequence[Error]) -> Error:
        """The largest of some errors; not a number is larger than any."""
        return max(errors, key=lambda each: math.inf if math.isnan(each.relative) else each.relative)


def compare_with_source(
    got: Mapping[str, Array], want: Mapping[str, Array], orders: Mapping[tuple[int, int], Indices]
) -> list[Error]:
    """Compare a grown model's outputs with its source's; axes that grew are taken back by their repeats."""
    errors = []
    for name, expected in want.items():
        array = got.get(name)
        if array is None or array.ndim != expected.ndim:
            errors.append(Error(name, math.inf))
            continue
        for axis, (before, after) in enumerate(zip(expected.shape, array.shape, strict=True)):
            if before != after:
                order = orders.get((before, after))
                expected = expected if order is None else np.take(expected, order, axis=axis)
        errors.append(Error(name, relative_error(array, expected)))
    return errors


def relative_error(got: Array, want: Array) -> float:
    """The largest difference, relative to the largest element; infinite where shapes or infinities differ."""
    if got.shape != want.shape:
        return math.inf
    a, b = np.asarray(want, dtype=np.float64), np.asarray(got, dtype=np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return math.inf
    return float(np.abs(a - b)[finite].max(initial=0.0)) / (float(np.abs(a[finite]).max(initial=0.0)) or 1.0)


def _runner(big: Path) -> Runner:
    """A session on the file; on a copy in float32 where it computes in fewer bits, its weights widened exactly."""
    model = loading.load(big)
    stored = [each.const_value for each in model.graph.initializers.values() if each.const_value is not None]
    if not any(each.dtype in HALVES and each.size > 1 for each in stored):
        return Runner(big, "cpu")
    with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder:
        save_wide(model, Path(folder) / big.name, ir.DataType.FLOAT)
        return Runner(Path(folder) / big.name, "cpu")


def _is_half(array: Array) -> bool:
    return array.dtype.itemsize == 2 and array.dtype.kind not in "iub"


class FileRunner:
    """The grown file in ONNX Runtime, in float32; its outputs in the order that the model inside has."""

    def __init__(self, big: Path, plan: Plan) -> None:
        self.runner = _runner(big)
        self.plan = plan
        self.interfaces = {each.name: each for each in plan.outputs}

    def compare(self, case: Case, got: Mapping[str, Array]) -> list[Error]:
        """Compare a checkpoint's outputs with the file's.

        Raises:
            Refused: no output of the file is one of the model's.
            RuntimeError: the file does not run on these inputs.
        """
        errors = []
        feeds = {name: array.astype(np.float32) if _is_half(array) else array for name, array in case.feeds.items()}
        for name, expected in self.runner.run(feeds).items():
            if expected.dtype.kind in "iub":
                continue
            expected = np.asarray(expected, dtype=np.float32)
            named = [name] if name in got else [each for each, array in got.items() if array.ndim == expected.ndim]
            if not named or (name not in got and len(self.runner.outputs) > 1):
                continue
            errors.append(
                min((Error(each, self._error(name, expected, got[each])) for each in named), key=lambda e: e.relative)
            )
        if not errors:
            raise Refused("none of the file's outputs is one that the model in transformers has: it cannot be compared")
        return errors

    def _error(self, name: str, expected: Array, got: Array) -> float:
        interface = self.interfaces.get(name)
        if interface is not None:
            for axis, factors in enumerate(interface.axes):
                if factors is None:
                    continue
                inside = index_axis([(factor, False) for factor in factors], self.plan.maps).source
                got = np.take(got, np.unique(inside, return_index=True)[1], axis=axis)
                if not self.plan.keep_interface:
                    outside = presented(factors, self.plan.maps)
                    expected = np.take(expected, np.unique(outside, return_index=True)[1], axis=axis)
        return relative_error(got, expected)
