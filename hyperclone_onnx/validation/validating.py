"""Is the grown model equal? Two independent checks, each with a tolerance that says where it comes from.

*Tensors* (`tensor_check.py`): the repeats of each grown tensor are added up and compared with the source tensor.
*Outputs*: both models run on random inputs in ONNX Runtime and every output is compared with the source's, repeated
where it grew. Where the model itself computes coarsely (in float16, or on activations rounded to 8 bits), both are
compared once more in float32 and without that rounding, so that nothing hides in it.

The mode says how much of it is done. `full` is both. `algebraic` runs nothing: it checks the tensors, and that the
grown graph is what the plan makes of the source's. That proves the weights and the file, in bounded memory. Only a run
shows that the plan itself is right (that no edit is missing from it, and that the rules are right). `auto` is full
where both models fit in free memory; otherwise it is algebraic, and runs the first layers (`first_blocks.py`).
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest, Refused
from hyperclone_onnx.graphs import weight_bytes
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.system.memory import free_memory
from hyperclone_onnx.validation import feeds as inputs
from hyperclone_onnx.validation.first_blocks import cut_off, find_cut
from hyperclone_onnx.validation.graph_check import check_graph
from hyperclone_onnx.validation.outputs import OutputReport
from hyperclone_onnx.validation.running import Pair, Ran, Start, Started, compare_runs, in_float64
from hyperclone_onnx.validation.sessions import Device, Runner
from hyperclone_onnx.validation.tensor_check import TensorReport, check_tensors
from hyperclone_onnx.validation.tolerance import DOUBLE_TOLERANCE, HALVES, computed_type, tolerance_of
from hyperclone_onnx.validation.unrounded import Unsupported, rounds, unrounded
from hyperclone_onnx.validation.wide import save_wide
from hyperclone_onnx.writing import onnx_files as writer

Mode = Literal["auto", "full", "algebraic"]

ALGEBRAIC = "the tensors, and that the graph is what the plan makes of the source's; nothing was run"
"""What an algebraic validation compares."""

FEWEST = 1 << 30
"""First layers may always take this many bytes of weights, however little memory is free."""

WIDEST = 4 << 30
"""Coarse models with more bytes of weights than this are not compared in float32 as well."""


@dataclass(frozen=True)
class Validation:
    """The outcome of a validation."""

    provider: str
    cases: tuple[str, ...]
    outputs: tuple[OutputReport, ...]
    tensors: TensorReport | None
    tolerance: float
    tolerance_reason: str
    wide: tuple[OutputReport, ...] | None = None
    """The outputs in float32, without the rounding of activations, where the model itself is coarser."""
    wide_tolerance: float = 0.0
    rounds: bool = False
    """Whether the model rounds activations to few bits: a last bit may then move an output by whole steps."""
    double: tuple[OutputReport, ...] | None = None
    double_by: str = ""
    notes: tuple[str, ...] = ()
    mode: str = "full"
    """What was done: "full", "algebraic", or "first layers": algebraic, and the first layers run."""
    scope: str = ""
    """Why that mode, and what it covers."""
    graph: tuple[str, ...] = ()
    """Where the grown graph is not what the plan makes of the source's."""
    preserves: bool = True
    """Whether the growth was to preserve the function. Where it was not, differences of numbers are only reported."""

    @property
    def problems(self) -> list[str]:
        """What is not as it should be, a line for each; empty where the grown model may be published."""
        if self.preserves:
            return self.differences
        reports = (*self.outputs, *(self.wide or ()), *(self.double or ()))
        broken = [f"output {report.name}: {report.problem}" for report in reports if report.problem]
        return [*(f"graph: {text}" for text in self.graph), *broken]

    @property
    def differences(self) -> list[str]:
        """What differs, a line for each; empty when the models are equal."""
        steps = self.rounds and self.wide is not None
        return [
            *(f"tensor {text}" for text in (self.tensors.wrong if self.tensors else ())),
            *(f"graph: {text}" for text in self.graph),
            *_problems(self.outputs, math.inf if steps else self.tolerance, ""),
            *_problems(self.wide or (), self.wide_tolerance, " in float32"),
            *_problems(self.double or (), DOUBLE_TOLERANCE, " in float64"),
        ]

    @property
    def equal(self) -> bool:
        """Whether the models are equal."""
        return not self.differences

    @property
    def largest_change(self) -> float:
        """The largest relative error of an output."""
        return max((report.max_relative for report in self.outputs), default=0.0)

    def with_notes(self, *notes: str) -> Validation:
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain data."""
        data = asdict(self)
        if self.preserves:
            del data["preserves"]
        return {"equal": self.equal, "problems": self.problems, **data}


def _problems(outputs: Sequence[OutputReport], tolerance: float, where: str) -> list[str]:
    problems = ((report.name, report.problem_beyond(tolerance)) for report in outputs)
    return [f"output {name}{where}: {problem}" for name, problem in problems if problem]


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
    pair = Pair(dimensions, grown, plan, device, seed)
    tensors = check_tensors(pair.source, grown, plan, workers) if plan is not None else None
    tolerance, reason = tolerance_of(dimensions, plan, tensors)
    preserves = plan is None or plan.strategy.law.preserves
    begun = Validation("", (), (), tensors, tolerance, reason, rounds=rounds(pair.source), preserves=preserves)
    fits, figures = _fits(pair)
    if plan is None or mode == "full" or (mode == "auto" and fits):
        return _full(replace(begun, scope="as asked" if mode == "full" else figures), pair, small, big)
    checked = replace(begun, mode="algebraic", graph=tuple(check_graph(pair.source, grown, plan)))
    if mode == "algebraic":
        return replace(checked, scope=ALGEBRAIC)
    checked = replace(checked, scope=figures)
    return checked if checked.problems else _with_first_layers(checked, pair, plan, Path(big).parent)


def _fits(pair: Pair) -> tuple[bool, str]:
    """Whether both models fit in free memory, and the figures."""
    free, needed = free_memory(), pair.weight_bytes
    if free is None:
        return True, f"{needed / 1e9:.1f} GB of weights; this system does not say how much memory is free"
    fits = needed <= free
    how = "fit" if fits else "do not fit"
    return fits, f"both models {how} in free memory: {needed / 1e9:.1f} of {free / 1e9:.1f} GB"


# -- whole models -----------------------------------------------------------------------------------------


def _full(begun: Validation, pair: Pair, small: str | os.PathLike[str], big: str | os.PathLike[str]) -> Validation:
    """Run both files; where they compute coarsely, compare them in float32 as well."""
    weights = weight_bytes(pair.grown)  # the larger ones

    def starter(path: str | os.PathLike[str]) -> Start:
        def start() -> Started:
            runner = Runner(path, pair.device, isolated=True, weights=weights)
            return Started(runner.run, runner.provider)

        return start

    narrow = computed_type(pair.dimensions) in HALVES
    result = begun
    try:
        ran = compare_runs(pair, starter(small), starter(big))
        result = replace(result, outputs=ran.outputs, cases=ran.cases, provider=ran.by[-1])
    except Refused as problem:
        if not narrow:
            raise
        result = result.with_notes(f"compared in float32 only: {problem}")
    off = any(not report.max_relative <= result.tolerance for report in result.outputs)
    if narrow or (result.rounds and off):
        result = _with_float32(result, pair)
    if result.rounds and off and result.wide is not None:
        note = "activations are rounded to few bits, so that a last bit may move an output by whole steps"
        result = result.with_notes(note)
    return result


def _with_float32(result: Validation, pair: Pair) -> Validation:
    """The same, with both models compared in float32 and without the rounding of activations."""
    if weight_bytes(pair.grown) > WIDEST:
        return result.with_notes("too large to be compared in float32 besides")
    try:
        models = unrounded(pair.source), unrounded(pair.grown)
    except Unsupported as problem:
        return result.with_notes(f"not compared without the rounding of activations: {problem}")
    with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder:

        def starter(model: ir.Model, name: str) -> Start:
            def start() -> Started:
                save_wide(model, Path(folder) / name, ir.DataType.FLOAT)
                runner = Runner(Path(folder) / name, pair.device, isolated=True, weights=2 * weight_bytes(model))
                return Started(lambda fed: runner.run(inputs.in_float32(fed)), runner.provider)

            return start

        ran = compare_runs(pair, starter(models[0], "source.onnx"), starter(models[1], "grown.onnx"))
    tolerance, _ = tolerance_of(pair.dimensions, pair.plan, result.tensors, ir.DataType.FLOAT)
    return replace(
        result,
        wide=ran.outputs,
        wide_tolerance=tolerance,
        cases=result.cases or ran.cases,
        provider=result.provider or ran.by[0],
    )


# -- first layers -----------------------------------------------------------------------------------------


def _with_first_layers(result: Validation, pair: Pair, plan: Plan, folder: Path) -> Validation:
    """The same, with a value in the first layers of both models compared, as the outputs of whole models are."""
    budget = max(FEWEST, (free_memory() or 0) // 2)
    cut = find_cut(pair.dimensions, pair.grown, plan, budget)
    if cut is None:
        return result.with_notes(f"no layer was run: its weights would take more than {budget / 1e9:.1f} GB")
    with tempfile.TemporaryDirectory(prefix=".first-layers.", dir=folder) as scratch:

        def starter(model: ir.Model, name: str) -> Start:
            def start() -> Started:
                writer.save(cut_off(model, cut.name), Path(scratch) / name, external=True)
                runner = Runner(Path(scratch) / name, pair.device, isolated=True, weights=weight_bytes(model))
                return Started(runner.run, runner.provider)

            return start

        ran: Ran = compare_runs(pair, starter(pair.source, "source.onnx"), starter(pair.grown, "grown.onnx"), cut)
    scope = (
        f"{result.scope}. Compared: every tensor; that the graph is what the plan makes of the source's; and "
        f"{cut.name!r}, which the first {cut.nodes} of {len(pair.source.graph)} nodes make. The nodes behind it were "
        "not run"
    )
    return replace(result, mode="first layers", scope=scope, outputs=ran.outputs, cases=ran.cases, provider=ran.by[-1])


# -- float64 ----------------------------------------------------------------------------------------------


def validate_double(
    dimensions: Dimensions, grown: ir.Model, plan: Plan, folder: Path, seed: int = 0
) -> tuple[tuple[OutputReport, ...], str]:
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

    def starter(model: ir.Model, name: str) -> Start:
        def start() -> Started:
            run, by = double_runner(to_double(model), folder / name)
            return Started(in_float64(run), by)

        return start

    pair = Pair(dimensions, grown, plan, seed=seed)
    ran = compare_runs(pair, starter(dimensions.model.clone(), "source.onnx"), starter(grown, "grown.onnx"))
    return ran.outputs, ", ".join(dict.fromkeys(ran.by))
