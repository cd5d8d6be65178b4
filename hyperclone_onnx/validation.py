"""Is the grown model equal? Two independent checks, each with a tolerance that says where it comes from.

*Tensors*: the repeats of each grown tensor are added up and compared with the source tensor. One weight that is
off by a part in a thousand stands out here, however little it moves an output. *Outputs*: both models run on
random inputs in ONNX Runtime and every output is compared with the source's, repeated where it grew.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx import feeds as inputs
from hyperclone_onnx.errors import BadModel, Refused
from hyperclone_onnx.grown_tensor import GrownTensor
from hyperclone_onnx.inference import Dimensions
from hyperclone_onnx.maps import AxisIndex
from hyperclone_onnx.plan import Interface, Plan
from hyperclone_onnx.sessions import Device, Runner

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], dict[str, Array]]

SAFETY = 8.0
"""How many times the residue of the shared weights may show in an output."""

WALKS = 4.0
"""How many standard deviations of a random walk of rounding errors are still taken for rounding."""

DOUBLE_TOLERANCE = 1e-12
"""A right graph agrees to this in float64, in every strategy and factor."""


@dataclass
class OutputReport:
    """How one output compares, over all input sets."""

    name: str
    max_absolute: float = 0.0
    max_relative: float = 0.0
    top1_agreement: float | None = None
    kl_divergence: float | None = None
    problem: str = ""


@dataclass
class TensorReport:
    """How the grown tensors compare with their sources."""

    checked: int = 0
    residue: float = 0.0
    """Root mean square over tensors of: rms(sum of repeats - source) / rms(source). Rounding leaves it."""
    worst: str = ""
    worst_error: float = 0.0
    """The largest error in units of its rounding bound; above 1 the tensor is wrong."""
    wrong: list[str] = field(default_factory=list)


@dataclass
class Validation:
    """The outcome of a validation."""

    provider: str
    cases: list[str]
    outputs: list[OutputReport]
    tensors: TensorReport | None
    tolerance: float
    tolerance_reason: str
    double: list[OutputReport] | None = None
    double_by: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What differs, a line each; empty when the models are equal."""
        found = [f"tensor {text}" for text in (self.tensors.wrong if self.tensors else [])]
        for each in self.outputs:
            if each.problem:
                found.append(f"output {each.name}: {each.problem}")
            elif not each.max_relative <= self.tolerance:
                found.append(f"output {each.name}: relative error {each.max_relative:.1e} > {self.tolerance:.1e}")
        for each in self.double or []:
            if each.problem or not each.max_relative <= DOUBLE_TOLERANCE:
                why = each.problem or f"relative error {each.max_relative:.1e} > {DOUBLE_TOLERANCE:.0e}"
                found.append(f"output {each.name} in float64: {why}")
        return found

    @property
    def equal(self) -> bool:
        """Whether the models are equal."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain data."""
        return {"equal": self.equal, "problems": self.problems, **asdict(self)}


def validate(
    small: str | os.PathLike[str],
    big: str | os.PathLike[str],
    dimensions: Dimensions,
    grown: ir.Model,
    plan: Plan | None,
    *,
    device: Device = "auto",
    seed: int = 0,
) -> Validation:
    """Compare two model files.

    Args:
        small: the source's file.
        big: the grown model's file.
        dimensions: what inference found of the source.
        grown: the grown model as read from `big`.
        plan: how it was grown; without it tensors are not compared, and axes that changed size are taken for
            tiled.
        device: where to run.
        seed: of the random inputs.

    Raises:
        Refused: the source runs on none of the inputs that could be made for it.
        BadRequest: the device is not to be had.
    """
    tensors = check_tensors(dimensions.model, grown, plan) if plan is not None else None
    ran_on: list[str] = []

    def starter(path: str | os.PathLike[str]) -> Callable[[], Run]:
        def start() -> Run:
            runner = Runner(path, device)
            ran_on.append(runner.provider)
            return runner.run

        return start

    sides = _interfaces(dimensions, grown, plan)
    outputs, labels = _compare_runs(dimensions, starter(small), starter(big), plan, sides, seed)
    tolerance, reason = tolerance_of(dimensions, plan, tensors)
    return Validation(ran_on[-1], labels, outputs, tensors, tolerance, reason)


Sides = tuple[tuple[Interface, ...], tuple[Interface, ...], dict[str, Any]]


def _interfaces(dimensions: Dimensions, grown: ir.Model, plan: Plan | None) -> Sides:
    if plan is None:
        return (), (), {value.name or "": value.shape for value in grown.graph.inputs}
    if plan.keep_interface:
        return (), (), {}
    return plan.inputs, plan.outputs, {}


def _tile_to(array: Array, shape: Any) -> Array:
    """Tile an array to a declared shape; axes that are not a multiple stay."""
    if shape is None or len(shape) != array.ndim:
        return array
    repeats = [
        d // s if isinstance(d, int) and s and d % s == 0 else 1 for s, d in zip(array.shape, shape, strict=True)
    ]
    return np.tile(array, repeats)


def _compare_runs(
    dimensions: Dimensions,
    start_source: Callable[[], Run],
    start_target: Callable[[], Run],
    plan: Plan | None,
    sides: Sides,
    seed: int,
) -> tuple[list[OutputReport], list[str]]:
    """Run the source on some cases, then the target; never both in memory at once."""
    ran = _run_source(dimensions, start_source(), seed)
    target = start_target()
    reports: dict[str, OutputReport] = {}
    logits = logits_outputs(dimensions)
    maps = plan.maps if plan is not None else {}
    for case, expected in ran:
        fed = inputs.grown(case.feeds, sides[0], maps)
        fed = {name: _tile_to(array, sides[2].get(name)) for name, array in fed.items()}
        wanted = inputs.grown(expected, sides[1], maps)
        try:
            got = target(fed)
        except RuntimeError as problem:
            for name in expected:
                reports.setdefault(name, OutputReport(name)).problem = f"the grown model does not run: {problem}"
            break
        for name, want in wanted.items():
            report = reports.setdefault(name, OutputReport(name))
            _compare(report, want, got.get(name), name in logits, tile=plan is None)
    return list(reports.values()), [case.label for case, _ in ran]


def _run_source(dimensions: Dimensions, source: Run, seed: int) -> list[tuple[inputs.Case, dict[str, Array]]]:
    ran: list[tuple[inputs.Case, dict[str, Array]]] = []
    refusal = "no inputs could be made"
    for case in inputs.cases(dimensions, seed):
        try:
            ran.append((case, source(case.feeds)))
        except RuntimeError as problem:
            refusal = f"{case.label}: {problem}"
        if len(ran) == 3:
            break
    if not ran:
        raise Refused(f"the source runs on none of the inputs made for it ({refusal}); --no-validate skips this")
    return ran


def _compare(report: OutputReport, want: Array, got: Array | None, logits: bool, tile: bool) -> None:
    if got is None:
        report.problem = "the grown model has no such output"
        return
    if tile:
        want = _tile_to(want, got.shape)
    if want.shape != got.shape:
        report.problem = f"shape {got.shape}, expected {want.shape}"
        return
    if want.dtype.kind in "iub" and want.dtype == got.dtype:
        if not np.array_equal(want, got):
            report.problem = "values that must be identical differ"
        return
    a, b = np.asarray(want, dtype=np.float64), np.asarray(got, dtype=np.float64)
    finite = np.isfinite(a)
    if not (np.array_equal(finite, np.isfinite(b)) and np.array_equal(a[~finite], b[~finite], equal_nan=True)):
        report.problem = "infinite, or not a number, in other places than the source's"
        return
    error = np.abs(a[finite] - b[finite])
    if error.size == 0:
        if a.size:
            report.problem = "nothing was compared: the source gives no finite value"
        return
    largest = float(np.abs(a[finite]).max())
    report.max_absolute = max(report.max_absolute, float(error.max()))
    report.max_relative = max(report.max_relative, float(error.max()) / (largest or 1.0))
    if logits:
        agreement = float(np.mean(a.argmax(-1) == b.argmax(-1)))
        divergence = _kl_divergence(a, b)
        report.top1_agreement = min(agreement, 1.0 if report.top1_agreement is None else report.top1_agreement)
        report.kl_divergence = max(divergence, report.kl_divergence or 0.0)


def _kl_divergence(a: Array, b: Array) -> float:
    """The largest KL(softmax a || softmax b) over the last axis, in nats."""

    def log_softmax(x: Array) -> Array:
        shifted = x - x.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))

    with np.errstate(invalid="ignore"):  # a word that cannot come adds nothing: 0 log 0
        p, q = log_softmax(a), log_softmax(b)
        return float(np.maximum(np.where(np.exp(p) > 0.0, np.exp(p) * (p - q), 0.0).sum(-1), 0.0).max())


def logits_outputs(dimensions: Dimensions) -> set[str]:
    """Outputs whose last axis numbers classes or a vocabulary: it only leaves the graph, or is indexed too."""
    found: set[str] = set()
    space = dimensions.space
    for value in dimensions.model.graph.outputs:
        axes = dimensions.axes.get(value)
        if axes and value.dtype is not None and value.dtype.is_floating_point():
            atoms = list(space.atoms(axes[-1]))
            if len(atoms) == 1 and atoms[0].pin is not None and space.static(axes[-1]) is not None:
                found.add(value.name or "")
    return found


# -- tolerance --------------------------------------------------------------------------------------------


def tolerance_of(dimensions: Dimensions, plan: Plan | None, tensors: TensorReport | None) -> tuple[float, str]:
    """The relative error that rounding explains, and how it is made up.

    Each contraction of length K rounds like a random walk of K steps, so that a model's contractions together
    leave about eps * sqrt(sum of K), of which `WALKS` are allowed;
    the grown weights differ from exact shares by their residue.
    """
    dtype = _coarsest_type(dimensions.model)
    eps = 2.0**-7 if dtype == ir.DataType.BFLOAT16 else float(np.finfo(dtype.numpy()).eps)
    growth = max([1.0, *(dim.map.grown / dim.map.size for dim in (plan.dims.values() if plan else ()))])
    lengths = [(dimensions.space.static(each.term) or 64) * growth for each in dimensions.sums if each.power == 1.0]
    rounding = WALKS * eps * math.sqrt(max(sum(lengths), 64.0))
    residue = tensors.residue * math.sqrt(len(dimensions.sums) or 1) if tensors is not None else 0.0
    text = f"{WALKS:.0f} x {dtype.name.lower()} eps {eps:.1e} x sqrt({sum(lengths):.0f} summands)"
    if tensors is not None:
        text += f" + {SAFETY:.0f} x residue {residue:.1e}"
    return rounding + SAFETY * residue, text


def _coarsest_type(model: ir.Model) -> ir.DataType:
    types = {
        value.const_value.dtype
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.size > 1
    }
    for dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT):
        if dtype in types:
            return dtype
    return ir.DataType.DOUBLE if ir.DataType.DOUBLE in types else ir.DataType.FLOAT


# -- tensors ----------------------------------------------------------------------------------------------


def check_tensors(source: ir.Model, grown: ir.Model, plan: Plan) -> TensorReport:
    """Add up the repeats of every grown tensor and compare with the source; other tensors must be unchanged.

    Raises:
        BadModel: a tensor that the plan names is missing.
    """
    report = TensorReport()
    squares: list[float] = []
    for name, recipe in plan.tensors.items():
        made = GrownTensor(_stored(source, recipe.source), recipe, plan.maps, plan.strategy)
        error, bound, relative = _tensor_error(made, _stored(grown, name))
        report.checked += 1
        if made.is_shared:
            squares.append(relative**2)
        excess = error / bound if bound else (math.inf if error else 0.0)
        if not excess <= report.worst_error:
            report.worst, report.worst_error = name, excess
        if not excess <= 1.0:
            report.wrong.append(f"{name}: the repeats differ from the source by {error:.1e} (rounding: {bound:.1e})")
    report.residue = math.sqrt(sum(squares) / len(squares)) if squares else 0.0
    for name, value in source.graph.initializers.items():
        if name in plan.tensors or name not in grown.graph.initializers or value.const_value is None:
            continue
        report.checked += 1
        if not _identical(value.const_value, _stored(grown, name)):
            report.wrong.append(f"{name}: it should be the source's own and differs")
    return report


def _stored(model: ir.Model, name: str) -> ir.TensorProtocol:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise BadModel(f"the model has no tensor {name!r}, which the plan names: it was not grown by this plan")
    return value.const_value


def _identical(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(_bytes(a), _bytes(b))


def _bytes(tensor: ir.TensorProtocol) -> Array:
    array = np.ascontiguousarray(tensor.numpy())
    return array.reshape(-1).view(np.uint8)


def _tensor_error(made: GrownTensor, stored: ir.TensorProtocol) -> tuple[float, float, float]:
    """(largest error of a sum of repeats, its rounding bound, rms error relative to the source's rms)."""
    if tuple(stored.shape.numpy()) != made.stored_shape or stored.dtype != made.dtype:
        return math.inf, 0.0, math.inf
    array = stored.numpy()
    if not made.dtype.is_floating_point():
        return (0.0 if np.array_equal(array, made.stored()) else math.inf), 0.0, 0.0
    eps = 2.0**-7 if made.dtype == ir.DataType.BFLOAT16 else float(np.finfo(made.dtype.numpy()).eps)
    if not made.is_shared:
        return _copy_error(made, array, eps)
    worst, largest, total, power, count = 0.0, 0.0, 0.0, 0.0, 0
    for got, want, peak in _collapsed(made, array):
        error = np.abs(got - want)
        worst, largest = max(worst, _largest(error)), max(largest, peak)
        total, power, count = total + float((error**2).sum()), power + float((want**2).sum()), count + error.size
    repeats = max(int(np.prod([axis.count.max() for axis in made.axes])), 1)
    relative = math.sqrt(total / power) if power else 0.0
    return worst, repeats * eps * largest, relative


def _largest(error: Array) -> float:
    """The largest error; infinite where one is not a number."""
    return float(np.nan_to_num(error, nan=math.inf).max()) if error.size else 0.0


def _copy_error(made: GrownTensor, array: Array, eps: float) -> tuple[float, float, float]:
    worst = 0.0
    for rows in _rows(made):
        want = np.asarray(made[rows], dtype=np.float64)
        got = np.asarray(array[rows], dtype=np.float64)
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        if not same.all():
            worst = max(worst, float(np.nan_to_num(np.abs(got - want), nan=math.inf).max()))
    return worst, 0.0, 0.0


def _rows(made: GrownTensor) -> Iterator[tuple[slice, ...]]:
    if not made.shape:
        yield ()
        return
    step = max(1, (1 << 20) // max(1, math.prod(made.shape[1:])))
    for start in range(0, made.shape[0], step):
        yield (slice(start, start + step),)


def _collapsed(made: GrownTensor, array: Array) -> Iterator[tuple[Array, Array, float]]:
    """(sum of repeats, source, largest stored magnitude), over blocks of the collapsed tensor's first axis."""
    first = made.axes[0]
    order = np.argsort(first.collapsed, kind="stable")
    sorted_rows = first.collapsed[order]
    source = made.source.numpy()
    step = max(1, (1 << 20) // max(1, math.prod(made.shape[1:])))
    for low in range(0, first.collapsed_size, step):
        high = min(low + step, first.collapsed_size)
        start, end = np.searchsorted(sorted_rows, [low, high])
        rows = order[start:end]
        block = np.asarray(array[rows], dtype=np.float64)
        peak = float(np.abs(block).max()) if block.size else 0.0
        total = np.zeros((high - low, *block.shape[1:]))
        np.add.at(total, first.collapsed[rows] - low, block)
        for axis, index in enumerate(made.axes[1:], 1):
            total = _add_up(total, axis, index)
        want = np.asarray(source[_sources(first)[low:high]], dtype=np.float64)
        for axis, index in enumerate(made.axes[1:], 1):
            want = np.take(want, _sources(index), axis=axis)
        yield total, want * made.recipe.scale, peak


def _add_up(array: Array, axis: int, index: AxisIndex) -> Array:
    if index.collapsed_size == index.grown:
        return array
    moved = np.moveaxis(array, axis, 0)
    total = np.zeros((index.collapsed_size, *moved.shape[1:]))
    np.add.at(total, index.collapsed, moved)
    return np.moveaxis(total, 0, axis)


def _sources(index: AxisIndex) -> Array:
    """The source index of each collapsed index."""
    source = np.empty(index.collapsed_size, dtype=np.int64)
    source[index.collapsed] = index.source
    return source


# -- float64 ----------------------------------------------------------------------------------------------


def validate_double(
    dimensions: Dimensions, grown: ir.Model, plan: Plan, folder: Path, seed: int = 0
) -> tuple[list[OutputReport], str]:
    """Run both models in float64 and compare; the grown one's tensors are built in float64.

    Args:
        dimensions: what inference found of the source.
        grown: the grown model with its tensors computed in float64.
        plan: how it was grown.
        folder: where the two temporary models may be written.
        seed: of the random inputs.

    Returns:
        The outputs' reports, and what ran them.
    """
    from hyperclone_onnx.double import double_runner, to_double

    ran_by: list[str] = []

    def starter(model: ir.Model, name: str) -> Callable[[], Run]:
        def start() -> Run:
            run, by = double_runner(to_double(model), folder / name)
            ran_by.append(by)
            return lambda fed: run({k: a.astype(np.float64) if a.dtype.kind == "f" else a for k, a in fed.items()})

        return start

    source = starter(dimensions.model.clone(), "source.onnx")
    sides = _interfaces(dimensions, grown, plan)
    reports, _ = _compare_runs(dimensions, source, starter(grown, "grown.onnx"), plan, sides, seed)
    return reports, ", ".join(dict.fromkeys(ran_by))
