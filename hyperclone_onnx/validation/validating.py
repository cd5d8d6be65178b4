"""Is the grown model equal? Two independent checks, each with a tolerance that says where it comes from.

*Tensors* (`tensor_check.py`): the repeats of each grown tensor are added up and compared with the source tensor.
*Outputs*: both models run on random inputs in ONNX Runtime and every output is compared with the source's, repeated
where it grew. Where the model itself computes coarsely (in float16, or on activations rounded to 8 bits), both are
compared once more in float32 and without that rounding, so that nothing hides in it.

*How much* of it is a mode. `full` is both. `algebraic` runs nothing: it checks the tensors, and that the grown graph is
what the plan makes of the source's. That proves the weights and the file, in bounded memory; that the plan itself is
right (that an edit is not missing from it, that the rules are) only a run shows. `auto` is full where both models fit
in free memory, else algebraic and a run of the first layers (`first_blocks.py`).
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest, Refused
from hyperclone_onnx.graphs import weight_bytes
from hyperclone_onnx.plan.plans import Interface, Plan
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.system.memory import free_memory
from hyperclone_onnx.validation import feeds as inputs
from hyperclone_onnx.validation.first_blocks import Cut, cut_off, find_cut, repeated
from hyperclone_onnx.validation.graph_check import check_graph
from hyperclone_onnx.validation.sessions import Device, Runner
from hyperclone_onnx.validation.tensor_check import TensorReport, check_tensors
from hyperclone_onnx.validation.unrounded import Unsupported, rounds, unrounded
from hyperclone_onnx.validation.wide import save_wide
from hyperclone_onnx.writing import onnx_files as writer

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], dict[str, Array]]

Mode = Literal["auto", "full", "algebraic"]

ALGEBRAIC = "the tensors, and that the graph is what the plan makes of the source's; nothing was run"
"""What a validation that is only algebraic is of."""

FEWEST = 1 << 30
"""First layers may always take this many bytes of weights, however little memory is free."""

SAFETY = 8.0
"""How many times the residue of the shared weights may show in an output."""

WALKS = 4.0
"""How many standard deviations of a random walk of rounding errors are still taken for rounding."""

DOUBLE_TOLERANCE = 1e-12
"""A right graph agrees to this in float64, in every strategy and factor."""

WIDEST = 4 << 30
"""Coarse models with more bytes of weights than this are not compared in float32 besides."""

NOTHING_COMPARED = "nothing was compared"

HALVES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


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
class Validation:
    """The outcome of a validation."""

    provider: str
    cases: list[str]
    outputs: list[OutputReport]
    tensors: TensorReport | None
    tolerance: float
    tolerance_reason: str
    wide: list[OutputReport] | None = None
    """The outputs in float32, without the rounding of activations, where the model itself is coarser."""
    wide_tolerance: float = 0.0
    rounds: bool = False
    """Whether the model rounds activations to few bits: a last bit may then move an output by whole steps."""
    double: list[OutputReport] | None = None
    double_by: str = ""
    notes: list[str] = field(default_factory=list)
    mode: str = "full"
    """What was done: "full", "algebraic", or "first layers": algebraic, and the first layers run."""
    scope: str = ""
    """Why that, and what it covers."""
    graph: list[str] = field(default_factory=list)
    """Where the grown graph is not what the plan makes of the source's."""

    @property
    def problems(self) -> list[str]:
        """What differs, a line each; empty when the models are equal."""
        found = [f"tensor {text}" for text in (self.tensors.wrong if self.tensors else [])]
        found += [f"graph: {text}" for text in self.graph]
        steps = self.rounds and self.wide is not None
        found += _problems(self.outputs, math.inf if steps else self.tolerance, "")
        found += _problems(self.wide or [], self.wide_tolerance, " in float32")
        found += _problems(self.double or [], DOUBLE_TOLERANCE, " in float64")
        return found

    @property
    def equal(self) -> bool:
        """Whether the models are equal."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain data."""
        return {"equal": self.equal, "problems": self.problems, **asdict(self)}


def _problems(outputs: list[OutputReport], tolerance: float, where: str) -> list[str]:
    found = []
    for each in outputs:
        if each.problem or not each.max_relative <= tolerance:
            why = each.problem or f"relative error {each.max_relative:.1e} > {tolerance:.1e}"
            found.append(f"output {each.name}{where}: {why}")
    return found


def validate(
    small: str | os.PathLike[str],
    big: str | os.PathLike[str],
    dimensions: Dimensions,
    grown: ir.Model,
    plan: Plan | None,
    *,
    device: Device = "auto",
    seed: int = 0,
    mode: Mode = "auto",
    workers: int | None = None,
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
        mode: how much is done.
        workers: processes that compare tensors; see `parallel.workers_for`.

    Raises:
        Refused: the source runs on none of the inputs that could be made for it.
        BadRequest: the device is not to be had, or the mode is algebraic and there is no plan.
    """
    if plan is None and mode == "algebraic":
        raise BadRequest(f"{big} carries no plan, without which only outputs can be compared: --validate full")
    tensors = check_tensors(dimensions.model, grown, plan, workers) if plan is not None else None
    tolerance, reason = tolerance_of(dimensions, plan, tensors)
    result = Validation("", [], [], tensors, tolerance, reason, rounds=rounds(dimensions.model))
    fits, result.scope = _fits(dimensions.model, grown)
    if plan is not None and (mode == "algebraic" or (mode == "auto" and not fits)):
        result.mode, result.graph = "algebraic", check_graph(dimensions.model, grown, plan)
        if mode == "algebraic":
            result.scope = ALGEBRAIC
        elif not result.problems:
            _validate_first_layers(result, dimensions, grown, plan, Path(big).parent, device, seed)
        return result
    if mode == "full":
        result.scope = "as asked"
    ran_on: list[str] = []

    weights = weight_bytes(grown)  # the larger ones

    def starter(path: str | os.PathLike[str]) -> Callable[[], Run]:
        def start() -> Run:
            runner = Runner(path, device, isolated=True, weights=weights)
            ran_on.append(runner.provider)
            return runner.run

        return start

    sides = _interfaces(dimensions, grown, plan)
    narrow = computed_type(dimensions) in HALVES
    try:
        result.outputs, result.cases = _compare_runs(dimensions, starter(small), starter(big), plan, sides, seed)
        result.provider = ran_on[-1]
    except Refused as problem:
        if not narrow:
            raise
        result.notes.append(f"compared in float32 only: {problem}")
    off = any(not each.max_relative <= tolerance for each in result.outputs)
    if narrow or (result.rounds and off):
        _validate_wide(result, dimensions, grown, plan, device, seed)
    if result.rounds and off and result.wide is not None:
        result.notes.append("activations are rounded to few bits, so that a last bit may move an output by whole steps")
    return result


def _fits(source: ir.Model, grown: ir.Model) -> tuple[bool, str]:
    """Whether both models fit in free memory, and the figures."""
    free, needed = free_memory(), weight_bytes(source) + weight_bytes(grown)
    if free is None:
        return True, f"{needed / 1e9:.1f} GB of weights; this system does not say how much memory is free"
    fits = needed <= free
    how = "fit" if fits else "do not fit"
    return fits, f"both models {how} in free memory: {needed / 1e9:.1f} of {free / 1e9:.1f} GB"


def _validate_first_layers(
    result: Validation,
    dimensions: Dimensions,
    grown: ir.Model,
    plan: Plan,
    folder: Path,
    device: Device,
    seed: int,
) -> None:
    """Run both models up to a value in their first layers and compare it, as the outputs of whole models are."""
    budget = max(FEWEST, (free_memory() or 0) // 2)
    cut = find_cut(dimensions, grown, plan, budget)
    if cut is None:
        result.notes.append(f"no layer was run: its weights would take more than {budget / 1e9:.1f} GB")
        return
    every = len(dimensions.model.graph)
    with tempfile.TemporaryDirectory(prefix=".first-layers.", dir=folder) as scratch:

        def starter(model: ir.Model, name: str) -> Callable[[], Run]:
            def start() -> Run:
                writer.save(cut_off(model, cut.name), Path(scratch) / name, external=True)
                runner = Runner(Path(scratch) / name, device, isolated=True, weights=weight_bytes(model))
                result.provider = runner.provider
                return runner.run

            return start

        starters = starter(dimensions.model, "source.onnx"), starter(grown, "grown.onnx")
        sides = _interfaces(dimensions, grown, plan)
        result.outputs, result.cases = _compare_runs(dimensions, *starters, plan, sides, seed, cut)
    result.mode = "first layers"
    result.scope += (
        f". Compared: every tensor; that the graph is what the plan makes of the source's; and {cut.name!r}, "
        f"which the first {cut.nodes} of {every} nodes make. The nodes behind it were not run"
    )


def _validate_wide(
    result: Validation, dimensions: Dimensions, grown: ir.Model, plan: Plan | None, device: Device, seed: int
) -> None:
    """Compare both models in float32 and without the rounding of activations."""
    if weight_bytes(grown) > WIDEST:
        result.notes.append("too large to be compared in float32 besides")
        return
    try:
        models = [unrounded(dimensions.model), unrounded(grown)]
    except Unsupported as problem:
        result.notes.append(f"not compared without the rounding of activations: {problem}")
        return
    with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder:

        def starter(model: ir.Model, name: str) -> Callable[[], Run]:
            def start() -> Run:
                save_wide(model, Path(folder) / name, ir.DataType.FLOAT)
                runner = Runner(Path(folder) / name, device, isolated=True, weights=2 * weight_bytes(model))
                result.provider = result.provider or runner.provider
                return lambda fed: runner.run(inputs.in_float32(fed))

            return start

        starters = starter(models[0], "source.onnx"), starter(models[1], "grown.onnx")
        result.wide, cases = _compare_runs(dimensions, *starters, plan, _interfaces(dimensions, grown, plan), seed)
    result.cases = result.cases or cases
    result.wide_tolerance, _ = tolerance_of(dimensions, plan, result.tensors, ir.DataType.FLOAT)


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
    cut: Cut | None = None,
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
        if cut is None:
            wanted = inputs.grown(expected, sides[1], maps)
        else:
            wanted = {name: repeated(array, cut, maps) for name, array in expected.items()}
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
        if np.isnan(a).any():
            report.problem = f"{NOTHING_COMPARED}: the source gives no number"
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


def tolerance_of(
    dimensions: Dimensions, plan: Plan | None, tensors: TensorReport | None, dtype: ir.DataType | None = None
) -> tuple[float, str]:
    """The relative error that rounding explains when running in `dtype` (the model's own), and how it is made up.

    Each contraction of length K rounds like a random walk of K steps, so that a model's contractions together
    leave about eps * sqrt(sum of K), of which `WALKS` are allowed;
    the grown weights differ from exact shares by their residue.
    """
    dtype = dtype or computed_type(dimensions)
    eps = 2.0**-7 if dtype == ir.DataType.BFLOAT16 else float(np.finfo(dtype.numpy()).eps)
    growth = max([1.0, *(dim.map.grown / dim.map.size for dim in (plan.dims.values() if plan else ()))])
    lengths = [(dimensions.space.static(each.term) or 64) * growth for each in dimensions.sums if each.power == 1.0]
    rounding = WALKS * eps * math.sqrt(max(sum(lengths), 64.0))
    residue = tensors.residue * math.sqrt(len(dimensions.sums) or 1) if tensors is not None else 0.0
    text = f"{WALKS:.0f} x {dtype.name.lower()} eps {eps:.1e} x sqrt({sum(lengths):.0f} summands)"
    if tensors is not None:
        text += f" + {SAFETY:.0f} x residue {residue:.1e}"
    return rounding + SAFETY * residue, text


def computed_type(dimensions: Dimensions) -> ir.DataType:
    """The coarsest floating-point type that a contraction of the model computes in.

    A type that weights are merely stored in shows in the residue of their shares instead.
    """
    types = {each.node.outputs[0].dtype for each in dimensions.sums}
    for dtype in (*HALVES, ir.DataType.FLOAT):
        if dtype in types:
            return dtype
    return ir.DataType.DOUBLE if ir.DataType.DOUBLE in types else ir.DataType.FLOAT


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
    from hyperclone_onnx.validation.wide import double_runner, to_double

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
