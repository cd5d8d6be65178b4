"""Compare the grown checkpoint with its source's model, and with the grown file in ONNX Runtime."""

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
from hyperclone_onnx.plan.maps import Indices, index_axis, plain, presented
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.reading import loading
from hyperclone_onnx.validation.inputs.cases import Case
from hyperclone_onnx.validation.inputs.given import Inputs, wishes_of
from hyperclone_onnx.validation.inputs.search import cases
from hyperclone_onnx.validation.sessions import Runner
from hyperclone_onnx.validation.tolerance import HALVES, SAFETY, tolerance_of
from hyperclone_onnx.validation.wide import save_wide

Array = npt.NDArray[Any]
Outputs = dict[str, Array]

NATIVE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""The types of weights that ONNX Runtime takes as inputs of any graph."""

RESIDUE = 64.0
"""The number of roundings by which the sum of a weight's shares may differ from the weight.

A weight that is divided among repeats is rounded in each of them.
"""


@dataclass(frozen=True)
class Rounding:
    """The tensors that half precision rounds: for each of them the eps of its type."""

    source: tuple[float, ...]
    """Tensors of the grown checkpoint whose repeats do not add up exactly to the source's tensor."""
    file: tuple[float, ...]
    """Tensors of the grown checkpoint, and numbers of the file, that differ between the two."""


@dataclass(frozen=True)
class Feeding:
    """The input sets on which the models and the file are compared."""

    analysis: Analysis
    cases: tuple[Case, ...]

    def tolerance(self, rounded: Sequence[float] = ()) -> tuple[float, str]:
        """The relative error that rounding explains in float32, and the formula for the report.

        Args:
            rounded: for each tensor that half precision rounds, the eps of its type.
        """
        rounding, reason = tolerance_of(self.analysis.dimensions, None, None, ir.DataType.FLOAT)
        residue = RESIDUE * eps_of(ir.DataType.FLOAT) * math.sqrt(len(self.analysis.dimensions.sums) or 1)
        reason = f"{reason} + {RESIDUE:.0f} x eps of the shares"
        if rounded:
            reason += f" + {SAFETY:.0f} x half an eps {max(rounded):.1e} x sqrt({len(rounded)} rounded tensors)"
        return rounding + residue + SAFETY / 2 * math.sqrt(sum(eps**2 for eps in rounded)), reason


def feeding(
    big: Path | ir.Model, model: Any, inputs: Inputs | None = None, dims: Mapping[str, int] | None = None
) -> Feeding:
    """Input sets for a file's inputs that the model's ``forward`` accepts too.

    Sets with a filled cache are left out where the model has no argument for the cache.

    Args:
        big: the grown ONNX file, or the grown model in memory.
        model: the source's model in PyTorch.
        inputs: inputs to compare on, the file's or its source's (see `validation.inputs.given`); random by default.
        dims: numbers for symbolic sizes of random inputs, by name.

    Raises:
        Refused: the file has an input that is no argument of the model.
    """
    analysis = analyse(big)
    accepted = set(inspect.signature(model.forward).parameters)
    accepted_cases: list[Case] = []
    plan = Plan.carried_by((big if isinstance(big, ir.Model) else loading.load(big)).metadata_props)
    wishes = wishes_of(analysis.model, inputs, dims, plan=plan)
    for case in wishes.given or cases(analysis.dimensions, dims=wishes.dims):
        empty = [name for name, array in case.feeds.items() if name not in accepted and not array.size]
        unknown = [name for name in case.feeds if name not in accepted and name not in empty]
        if unknown:
            if any("past" in name or "cache" in name for name in unknown):
                continue
            raise Refused(
                f"{analysis.path}: its input {unknown[0]!r} is no argument of {type(model).__name__}, "
                "so they cannot be compared"
            )
        accepted_cases.append(case)
    return Feeding(analysis, tuple(accepted_cases))


def torch_feeds(case: Case, model: Any) -> dict[str, Any]:
    """The input set as tensors of PyTorch, without inputs that the model has no argument for."""
    accepted = set(inspect.signature(model.forward).parameters)
    return {name: torch.from_numpy(widened(array)) for name, array in case.feeds.items() if name in accepted}


def outputs(model: Any, case: Case) -> Outputs:
    """The floating outputs of a model by name, in float32 or float64."""
    result = run_model(model, torch_feeds(case, model))
    return {name: to_numpy(tensor) for name, tensor in floating_outputs(result).items()}


@dataclass(frozen=True)
class Error:
    """The largest difference between two arrays of one output, relative to the largest element."""

    name: str
    relative: float

    @staticmethod
    def worst(errors: Sequence[Error]) -> Error:
        """The largest of some errors. NaN counts as infinite."""
        return max(errors, key=lambda error: math.inf if math.isnan(error.relative) else error.relative)


def compare_with_source(
    got: Mapping[str, Array], want: Mapping[str, Array], orders: Mapping[tuple[int, int], Indices]
) -> list[Error]:
    """Compare a grown model's outputs with its source's.

    Args:
        got: the grown model's outputs by name.
        want: the source's outputs by name.
        orders: for sizes before and after, the source index of each index. Axes of `want` that differ in size are
            repeated in this order before they are compared. Indices that are no copies are not compared.

    Returns:
        One error for each output of the source. It is infinite where shapes do not fit.
    """
    errors = []
    for name, expected in want.items():
        array = got.get(name)
        if array is None or array.ndim != expected.ndim:
            errors.append(Error(name, math.inf))
            continue
        for axis, (before, after) in enumerate(zip(expected.shape, array.shape, strict=True)):
            order = orders.get((before, after))
            if before != after and order is not None:
                copies = np.flatnonzero(order < before)
                expected = np.take(expected, order[copies], axis=axis)
                array = np.take(array, copies, axis=axis)
        errors.append(Error(name, relative_error(array, expected)))
    return errors


def relative_error(got: Array, want: Array) -> float:
    """The largest difference, relative to the largest finite element of `want`.

    It is infinite where the shapes differ, or where one array has a finite element and the other has none.
    """
    if got.shape != want.shape:
        return math.inf
    a, b = np.asarray(want, dtype=np.float64), np.asarray(got, dtype=np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return math.inf
    return float(np.abs(a - b)[finite].max(initial=0.0)) / (float(np.abs(a[finite]).max(initial=0.0)) or 1.0)


LARGE = 1 << 16
"""Weights of more bytes than this are mapped from their file while ONNX Runtime uses them."""


class MappedRunner:
    """Runs a file in ONNX Runtime, with its weights mapped from the disk.

    ONNX Runtime copies stored weights into memory. So the graph that it gets has them as inputs, and each run is fed
    the pages of the file, which the system can take back. If the graph does not run so, the file is loaded as it is.

    Args:
        path: the file.

    Raises:
        Refused: ONNX Runtime cannot load the file.
    """

    def __init__(self, path: Path) -> None:
        model = loading.load(path)
        self.weights: dict[str, Array] = {}
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes > LARGE and tensor.dtype in NATIVE:
                place, shape = Path(tensor.path), tuple(int(size) for size in tensor.shape.numpy())
                self.weights[name] = np.memmap(place, tensor.dtype.numpy(), "r", tensor.offset or 0, shape)
                if not value.is_graph_input():
                    model.graph.inputs.append(value)
                del model.graph.initializers[name]
                value.const_value, value.shape, value.type = None, tensor.shape, ir.TensorType(tensor.dtype)
        try:
            self.runner = Runner(path, "cpu", ir.to_proto(model).SerializeToString(), frugal=True)
        except Refused:
            self.weights = {}
            self.runner = Runner(path, "cpu")
        self.outputs = self.runner.outputs

    def run(self, feeds: Mapping[str, Array]) -> Outputs:
        """Run the model.

        Raises:
            RuntimeError: it does not run on these inputs.
        """
        return self.runner.run({**self.weights, **feeds})


def _runner(big: Path) -> MappedRunner:
    """A session of ONNX Runtime for the file.

    If the file computes in half precision, the session runs a copy in float32 whose weights are widened exactly.
    """
    model = loading.load(big)
    stored = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if not any(tensor.dtype in HALVES and tensor.size > 1 for tensor in stored):
        return MappedRunner(big)
    # The weights stay mapped from the files after these have no name any more. Windows cannot remove such files yet.
    with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.", ignore_cleanup_errors=True) as folder:
        save_wide(model, Path(folder) / big.name, ir.DataType.FLOAT)
        return MappedRunner(Path(folder) / big.name)


def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether a type is float16 or bfloat16."""
    return dtype.itemsize == 2 and dtype.kind not in "iub"


def widened(array: Array) -> Array:
    """The array in float32 if it is in half precision."""
    return array.astype(np.float32) if is_half(array.dtype) else array


class FileRunner:
    """Runs the grown file in ONNX Runtime in float32, and compares its outputs with a model's.

    Args:
        big: the grown ONNX file.
        plan: the plan that the file carries.
    """

    def __init__(self, big: Path, plan: Plan) -> None:
        self.runner = _runner(big)
        self.plan = plan
        self.interfaces = {interface.name: interface for interface in plan.outputs}

    def compare(self, case: Case, got: Mapping[str, Array]) -> list[Error]:
        """Compare a checkpoint's outputs with the file's.

        An output of the file is compared with the model's output of the same name. If the file has a single output
        and no output of the model has its name, the nearest of the model's outputs with as many axes counts.

        Raises:
            Refused: no output of the file can be paired with one of the model's.
            RuntimeError: the file does not run on these inputs.
        """
        errors = []
        feeds = {name: widened(array) for name, array in case.feeds.items()}
        for name, expected in self.runner.run(feeds).items():
            if expected.dtype.kind in "iub":
                continue
            expected = np.asarray(expected, dtype=np.float32)
            named = [name] if name in got else [other for other, array in got.items() if array.ndim == expected.ndim]
            if not named or (name not in got and len(self.runner.outputs) > 1):
                continue
            errors.append(
                min(
                    (Error(candidate, self._error(name, expected, got[candidate])) for candidate in named),
                    key=lambda error: error.relative,
                )
            )
        if not errors:
            raise Refused("no output of the file is an output of the model in transformers: they cannot be compared")
        return errors

    def _error(self, name: str, expected: Array, got: Array) -> float:
        """The relative error of one output, from the first repeat of each index of the axes that grew.

        The file may present an axis in another order than the model inside has, or at its source's size.
        """
        interface = self.interfaces.get(name)
        if interface is not None:
            for axis, factors in enumerate(interface.axes):
                if factors is None:
                    continue
                inside = index_axis([(plain(factor), False) for factor in factors], self.plan.maps).source
                got = np.take(got, np.unique(inside, return_index=True)[1], axis=axis)
                if not self.plan.keep_interface:
                    outside = presented(factors, self.plan.maps)
                    expected = np.take(expected, np.unique(outside, return_index=True)[1], axis=axis)
        return relative_error(got, expected)
