"""Validates a grown model with two independent checks. Each check explains its tolerance.

*Tensors* (`tensor_check.py`): the repeats of each grown tensor are added up and compared with the source tensor.
*Outputs*: both models run on random inputs in ONNX Runtime. Every output is compared with that of the source, repeated
where it grew. If the model computes in float16, or rounds activations to 8 bits, both models are compared again in
float32 and without that rounding, because the rounding could hide a mistake.

The mode says how much is done. `full` does both checks. `algebraic` runs nothing: it checks the tensors, and compares
the grown graph with the one that the plan makes from the source, and the plan with one that is made anew. That proves
the weights and the file, in bounded memory. Only a run shows that planning itself is right: that it forgets no edit,
and that the rules are right. `auto` is `full` if both models fit in free memory. Otherwise it is `algebraic`, and runs
the first layers (`first_blocks.py`).
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

from hyperclone_onnx.errors import BadRequest, Refused, in_bytes
from hyperclone_onnx.graphs import weight_bytes
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.completeness import missing_edits
from hyperclone_onnx.summaries import Summarised, Summary
from hyperclone_onnx.system.memory import free_memory
from hyperclone_onnx.transforms.interface import name_in_file
from hyperclone_onnx.transforms.registry import changing
from hyperclone_onnx.validation.chance import beyond_comparison, draws_of, with_draws_fed, with_draws_shown
from hyperclone_onnx.validation.first_blocks import Cut, cut_off, find_cut
from hyperclone_onnx.validation.graph_check import MOST, check_graph
from hyperclone_onnx.validation.inputs.search import WAYS_OUT
from hyperclone_onnx.validation.judging import AS_STORED, FLOAT32, WIDEST, Judge, Precision
from hyperclone_onnx.validation.not_finite import named_not_finite
from hyperclone_onnx.validation.outputs import NOT_IDENTICAL, NOTHING_COMPARED, OutputReport
from hyperclone_onnx.validation.running import (
    Expected,
    Pair,
    Start,
    Started,
    as_transformed,
    in_float64,
    run_again,
    run_grown,
    run_source,
    start_file,
)
from hyperclone_onnx.validation.sessions import Runner
from hyperclone_onnx.validation.tensor_check import TensorReport, check_tensors
from hyperclone_onnx.validation.tolerance import DOUBLE_TOLERANCE, HALVES, computed_type, tolerance_of
from hyperclone_onnx.validation.unrounded import Unsupported, rounds

Mode = Literal["auto", "full", "algebraic"]

ALGEBRAIC = "every tensor, and the graph with the one that the plan makes; nothing was run"
"""A text for the report: what an algebraic validation compares."""

FEWEST = 1 << 30
"""First layers may have at least this many bytes of weights, even if less memory is free."""


class NoNumbers(Refused):
    """Raised if no output of the source contains a finite number."""


@dataclass(frozen=True, repr=False)
class Validation(Summarised):
    """The result of a validation."""

    provider: str
    cases: tuple[str, ...]
    outputs: tuple[OutputReport, ...]
    tensors: TensorReport | None
    tolerance: float
    tolerance_reason: str
    wide: tuple[OutputReport, ...] | None = None
    """The outputs in float32, without the rounding of activations, if the model itself is less precise."""
    wide_tolerance: float = 0.0
    rounds: bool = False
    """Whether the model rounds activations to few bits. Then a last bit may move an output by whole steps."""
    double: tuple[OutputReport, ...] | None = None
    double_by: str = ""
    notes: tuple[str, ...] = ()
    mode: str = "full"
    """The mode: "full", "algebraic", or "first layers", which is algebraic and also runs the first layers."""
    scope: str = ""
    """The reason for the mode, and what the mode covers."""
    graph: tuple[str, ...] = ()
    """Differences between the grown graph and the one that the plan makes from the source, one line for each."""
    before: tuple[OutputReport, ...] = ()
    """Reports of the values before outputs that a saturating function squeezes."""
    preserves: bool = True
    """Whether the growth should preserve the function. If not, differences of outputs are only reported."""
    adds_up: bool = True
    """Whether the repeats of every tensor should add up to the source. If not, differences of tensors are only reported
    too."""

    @property
    def problems(self) -> list[str]:
        """The problems, one line for each. If there are none, the grown model may be published."""
        if self.preserves:
            return self.differences
        reports = (*self.outputs, *self.before, *(self.wide or ()), *(self.double or ()))
        broken = [f"output {report.name}: {report.problem}" for report in reports if report.problem]
        wrong = self.tensors.wrong if self.tensors and self.adds_up else ()
        return [*(f"tensor {text}" for text in wrong), *(f"graph: {text}" for text in self.graph), *broken]

    @property
    def differences(self) -> list[str]:
        """The differences, one line for each. Empty if the models are equal."""
        steps = self.rounds and self.wide is not None
        return [
            *(f"tensor {text}" for text in (self.tensors.wrong if self.tensors else ())),
            *(f"graph: {text}" for text in self.graph),
            *_problems((*self.outputs, *self.before), math.inf if steps else self.tolerance, ""),
            *_problems(self.wide or (), self.wide_tolerance, " in float32"),
            *_problems(self.double or (), DOUBLE_TOLERANCE, " in float64"),
        ]

    @property
    def equal(self) -> bool:
        """Whether the models are equal."""
        return not self.differences

    @property
    def verdict(self) -> str:
        """The result in a few words."""
        if not self.preserves:
            return f"outputs moved by up to {self.largest_change:.1e} (relative)"
        if not self.equal:
            return f"NOT EQUAL: {self.differences[0]}"
        return "equal" if self.mode == "full" else "equal in what was compared"

    def summary(self) -> Summary:
        """The verdict, and the errors of each output."""
        outputs = self.outputs if self.wide is None else self.wide
        rows = [(output.name, f"{output.max_absolute:.1e}", f"{output.max_relative:.1e}") for output in outputs]
        tolerance = self.tolerance if self.wide is None else self.wide_tolerance
        line = f"{self.verdict} (validation: {self.mode}, tolerance {tolerance:.1e})"
        return Summary(line, ("output", "max abs", "max rel"), rows)

    @property
    def largest_change(self) -> float:
        """The largest relative error of an output."""
        return max((report.max_relative for report in self.outputs), default=0.0)

    def with_notes(self, *notes: str) -> Validation:
        """This result with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def to_json(self) -> dict[str, Any]:
        """The result as plain data."""
        data = asdict(self)
        for side in ("outputs", "before", "wide", "double"):
            if data[side] is not None:
                data[side] = [report.to_json() for report in getattr(self, side)]
        if not self.before:
            del data["before"]
        del data["adds_up"]
        if self.preserves:
            del data["preserves"]
        return {"equal": self.equal, "problems": self.problems, **data}


def _problems(outputs: Sequence[OutputReport], tolerance: float, where: str) -> list[str]:
    problems = ((report.name, report.problem_beyond(tolerance)) for report in outputs)
    return [f"output {name}{where}: {problem}" for name, problem in problems if problem]


@dataclass(frozen=True)
class Prepared:
    """The mode and the outputs of the source: all that is known before the grown file is written."""

    source: str | os.PathLike[str]
    """The source's file."""
    mode: Literal["full", "algebraic", "first layers"]
    scope: str
    """The reason for the mode, and what the mode covers."""
    expected: Expected | None = None
    """The outputs of the source. None if it is not run, or only in float32."""
    wide: Expected | None = None
    """The outputs of the source in float32, if it does not run in its own type."""
    cut: Cut | None = None
    """The value at which the first layers end."""
    notes: tuple[str, ...] = ()
    stays_cached: bool = False
    """Whether the grown file stays in the page cache until it is run: both models are run whole, and fit in memory."""


def prepare(source: str | os.PathLike[str], pair: Pair, mode: Mode = "auto") -> Prepared:
    """Choose the mode, and run the source if the mode needs it.

    Args:
        source: the source's file.
        pair: both models; the tensors of the grown one are not read.
        mode: the requested mode.

    Raises:
        Refused: the source cannot be loaded, runs on no inputs that we can make, or gives no finite number.
        BadRequest: the device is not available, or the mode is algebraic and there is no plan.
    """
    if pair.plan is None and mode == "algebraic":
        raise BadRequest("the grown model carries no plan, without which only outputs can be compared: --validate full")
    fits, figures = _fits(pair)
    try:
        if pair.plan is None or mode == "full" or (mode == "auto" and fits):
            prepared = _prepare_full(source, pair, "as asked" if mode == "full" else figures)
            return replace(prepared, stays_cached=fits)
        if mode == "algebraic":
            return Prepared(source, "algebraic", ALGEBRAIC)
        return _prepare_first_layers(source, pair, pair.plan, figures)
    except NoNumbers as problem:
        unreal = named_not_finite(pair.source)
        why = f": the weights of {unreal} are infinite or not a number" if unreal else ""
        raise Refused(f"{source}: {problem}{why}; {WAYS_OUT}") from problem
    except Refused as problem:
        raise Refused(f"{source}: the source itself does not run: {problem}") from problem


def _fits(pair: Pair) -> tuple[bool, str]:
    """Whether both models fit in free memory, and the figures."""
    free, needed = free_memory(), pair.weight_bytes
    if free is None:
        return True, f"{in_bytes(needed)} of weights; this system does not say how much memory is free"
    fits = needed <= free
    how = "fit" if fits else "do not fit"
    return fits, f"both models {how} in free memory: {in_bytes(needed)} of {in_bytes(free)}"


def _prepare_full(source: str | os.PathLike[str], pair: Pair, scope: str) -> Prepared:
    try:
        start = pair.as_transformed(start_file(source, pair.device, pair.source))
        expected = _with_draws(run_source(pair, start), pair, AS_STORED, pair.source)
        return Prepared(source, "full", scope, _with_numbers(expected))
    except Refused as problem:
        if computed_type(pair.dimensions) not in HALVES or weight_bytes(pair.grown) > WIDEST:
            raise
        note = f"compared in float32 only: {problem}"
    with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder:
        start = FLOAT32.start(FLOAT32.copy(pair.source), Path(folder) / "source.onnx", pair.device)
        expected = _with_draws(run_source(pair, start), pair, FLOAT32, pair.source)
        return Prepared(source, "full", scope, wide=_with_numbers(expected), notes=(note,))


def _with_draws(expected: Expected, pair: Pair, precision: Precision, model: ir.Model) -> Expected:
    """The same for a model that draws random numbers: its draws are inputs, and what depends on others is left out.

    Raises:
        Refused: all outputs depend on draws that cannot be inputs.
    """
    if pair.draws:
        with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder:
            copy = precision.copy(with_draws_shown(model, pair.draws))
            shown = run_again(expected, precision.start(copy, Path(folder) / "draws.onnx", pair.device))
        expected = Expected(with_draws_fed(expected.sets, shown.sets), expected.by)
    left_out = beyond_comparison(model, pair.draws)
    if not left_out:
        return expected
    sets = tuple(
        replace(one, outputs={name: array for name, array in one.outputs.items() if name not in left_out})
        for one in expected.sets
    )
    if not any(accepted.outputs for accepted in sets):
        reason = next(iter(left_out.values()))
        raise Refused(
            f"all outputs are random, so that nothing can be compared: {reason} draws the numbers; --validate "
            "algebraic checks the tensors and the graph without running them"
        )
    return Expected(sets, expected.by)


def _about_draws(pair: Pair) -> list[str]:
    """What the report says of random numbers."""
    kinds = sorted({node.op_type for name, node in draws_of(pair.source).items() if name in pair.draws})
    same = [f"{', '.join(kinds)}: both models were given the same random numbers"] if kinds else []
    left_out = beyond_comparison(pair.source, pair.draws)
    return same + [f"output {name} is random and was not compared: {by} draws it" for name, by in left_out.items()]


def _with_numbers(expected: Expected) -> Expected:
    """The same outputs, if one of them has a finite number.

    Raises:
        NoNumbers: none has.
    """
    if not any(accepted.has_numbers for accepted in expected.sets):
        raise NoNumbers(f"no output is a number, so that nothing can be compared (on {'; '.join(expected.labels)})")
    return expected


def _prepare_first_layers(source: str | os.PathLike[str], pair: Pair, plan: Plan, figures: str) -> Prepared:
    budget = max(FEWEST, (free_memory() or 0) // 2)
    in_file = _values_in_file(pair, plan)
    cut = None if in_file is None else find_cut(pair.dimensions, pair.grown, plan, budget, in_file)
    layers_of_file = cut is not None
    cut = cut or find_cut(pair.dimensions, pair.grown, plan, budget)
    if cut is None:
        note = f"no layer was run: its weights would take more than {budget / 1e9:.1f} GB"
        return Prepared(source, "algebraic", figures, notes=(note,))
    scope = (
        f"{figures}. Compared: every tensor; the graph with the one that the plan makes; and "
        f"{cut.name!r}, which the first {cut.nodes} of {len(pair.source.graph)} nodes make. The nodes after it were "
        "not run"
    )
    prepared = Prepared(source, "first layers", scope, cut=cut)
    layers = cut_off(pair.source, cut.name)
    with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder:

        def start(precision: Precision) -> Start:
            path = Path(folder) / "source.onnx"
            if not layers_of_file:
                return precision.start(precision.copy(layers), path, pair.device)
            name = name_in_file(layers.graph.outputs[0])
            begun = precision.start(precision.copy(cut_off(pair.in_file, str(name))), path, pair.device)
            return as_transformed(begun, layers)

        try:
            expected = run_source(pair, start(AS_STORED))
            return replace(prepared, expected=_with_numbers(_with_draws(expected, pair, AS_STORED, layers)))
        except Refused as problem:
            if computed_type(pair.dimensions) not in HALVES:
                raise
            note = f"compared in float32 only: {problem}"
        expected = run_source(pair, start(FLOAT32))
        expected = _with_draws(expected, pair, FLOAT32, layers)
    return replace(prepared, wide=_with_numbers(expected), notes=(note,))


def _values_in_file(pair: Pair, plan: Plan) -> set[str] | None:
    """The values that the source's file computes, if the source was transformed into one that computes the same.

    A transform that changes the function changes the values in the layers, too. Then the source is what comes after it.
    """
    if pair.untransformed is None or changing(plan.transforms):
        return None
    return {value.name for node in pair.untransformed.graph for value in node.outputs if value.name}


def validate(
    prepared: Prepared,
    pair: Pair,
    big: str | os.PathLike[str],
    workers: int | None = None,
    tensors: TensorReport | None = None,
) -> Validation:
    """Compare a grown model, as it is stored, with its source.

    Args:
        prepared: the result of `prepare` for the same pair.
        pair: both models, the grown one as read from `big`.
        big: the grown model's file.
        workers: processes that compare tensors; see `parallel.workers_for`.
        tensors: the report of the tensors, if they were compared while they were written.

    Raises:
        Refused: ONNX Runtime cannot run the grown model, or nothing could be compared.
    """
    plan, source = pair.plan, pair.source
    if tensors is None and plan is not None:
        tensors = check_tensors(source, pair.grown, plan, workers, forget=not prepared.stays_cached)
    tolerance, reason = tolerance_of(pair.dimensions, plan, tensors)
    result = Validation(
        "",
        (),
        (),
        tensors,
        tolerance,
        reason,
        rounds=rounds(source),
        notes=(*prepared.notes, *(_about_draws(pair) if prepared.mode != "algebraic" else ())),
        mode=prepared.mode,
        scope=prepared.scope,
        preserves=plan is None or (plan.preserves and not changing(plan.transforms)),
        adds_up=plan is None or plan.adds_up,
    )
    if prepared.mode == "full" or plan is None:
        if plan is not None and beyond_comparison(source, pair.draws):
            result = replace(result, graph=tuple(check_graph(source, pair.grown, plan)))
        return _with_whole_models(result, prepared, pair, big)
    lacking = missing_edits(pair.dimensions, plan)[:MOST]
    texts = (f"the plan lacks {type(edit).__name__} of {edit.node!r}" for edit in lacking)
    result = replace(result, graph=(*check_graph(source, pair.grown, plan), *texts))
    result = _with_loading(result, prepared, pair, big)
    if prepared.mode == "algebraic":
        return result
    if result.problems:
        return replace(result, mode="algebraic")
    return _with_first_layers(result, prepared, pair, Path(big).parent)


# -- whole models -----------------------------------------------------------------------------------------


def _with_whole_models(result: Validation, prepared: Prepared, pair: Pair, big: str | os.PathLike[str]) -> Validation:
    """Compare the outputs of both files. If they compute in a less precise type, compare in float32 too."""
    if prepared.expected is not None:
        judge = Judge(pair, AS_STORED, result.tolerance, _residue(result))
        judged = judge.compare(prepared.expected, start_file(big, pair.device, pair.grown))
        result = replace(
            result,
            outputs=judged.outputs,
            before=judged.before,
            cases=prepared.expected.labels,
            provider=judged.by,
        ).with_notes(*judged.notes, *_not_compared(judged.outputs))
    off = any(
        report.problem_beyond(result.tolerance) or not report.max_relative <= result.tolerance
        for report in (*result.outputs, *result.before)
    )
    if computed_type(pair.dimensions) in HALVES or (result.rounds and off):
        result = _with_float32(result, prepared, pair)
    if result.wide is None and prepared.expected is None:
        raise Refused("; ".join(result.notes))
    return _excused(result)


def _not_compared(outputs: Sequence[OutputReport]) -> list[str]:
    return [
        f"output {report.name}: {NOTHING_COMPARED} on any of the inputs" for report in outputs if report.not_compared
    ]


def _residue(result: Validation) -> float:
    return 0.0 if result.tensors is None else result.tensors.residue


def _with_float32(result: Validation, prepared: Prepared, pair: Pair) -> Validation:
    """Compare both models in float32 and without the rounding of activations."""
    if weight_bytes(pair.grown) > WIDEST:
        return result.with_notes("too large to be compared in float32 besides")
    try:
        source, grown = (FLOAT32.copy(model, pair.draws) for model in (pair.in_file, pair.grown))
    except Unsupported as problem:
        return result.with_notes(f"not compared without the rounding of activations: {problem}")
    tolerance, _ = tolerance_of(pair.dimensions, pair.plan, result.tensors, ir.DataType.FLOAT)
    with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder:
        expected = prepared.wide
        if expected is None:
            start = pair.as_transformed(FLOAT32.start(source, Path(folder) / "source.onnx", pair.device))
            assert prepared.expected is not None
            expected = _again(prepared.expected, pair, start)
        judge = Judge(pair, FLOAT32, tolerance, _residue(result))
        judged = judge.compare(expected, FLOAT32.start(grown, Path(folder) / "grown.onnx", pair.device))
    return replace(
        result,
        wide=(*judged.outputs, *judged.before),
        wide_tolerance=tolerance,
        cases=result.cases or expected.labels,
        provider=result.provider or judged.by,
    ).with_notes(*judged.notes)


def _again(expected: Expected, pair: Pair, start: Start) -> Expected:
    """Run the source in another type on the same inputs, or on others if it does not run on these."""
    try:
        return run_again(expected, start)
    except RuntimeError:
        return run_source(pair, start)


def _excused(result: Validation) -> Validation:
    """Excuse differences that less precise types or the rounding of activations explain, if float32 shows none."""
    if result.wide is None:
        return result
    right = {report.name for report in result.wide if not report.problem_beyond(result.wide_tolerance)}
    note = "the integers differ in the model's own types, and are right in float32"
    outputs = tuple(
        replace(report, problem="", note=note) if report.problem == NOT_IDENTICAL and report.name in right else report
        for report in result.outputs
    )
    result = replace(result, outputs=outputs)
    if result.rounds and any(not report.max_relative <= result.tolerance for report in outputs):
        note = "activations are rounded to few bits, so that a last bit may move an output by whole steps"
        return result.with_notes(note)
    return result


# -- nothing run ------------------------------------------------------------------------------------------


def _with_loading(result: Validation, prepared: Prepared, pair: Pair, big: str | os.PathLike[str]) -> Validation:
    """Report a problem if ONNX Runtime loads the source, but not the grown model.

    Data files are mapped into memory and hardly read, so this needs little memory.
    """
    try:
        Runner(big, "cpu", isolated=True, model=pair.grown)
    except Refused as problem:
        try:
            Runner(prepared.source, "cpu", isolated=True, model=pair.source)
        except Refused as own:
            return result.with_notes(f"ONNX Runtime loads neither model, so that loading is not checked: {own}")
        if any(word in str(problem) for word in _SHORT_OF_MEMORY):
            return result.with_notes(f"loading is not checked, because memory is short: {problem}")
        return replace(result, graph=(*result.graph, str(problem)))
    return result


_SHORT_OF_MEMORY = ("SIGKILL", "bad_alloc", "Failed to allocate memory")


# -- first layers -----------------------------------------------------------------------------------------


def _with_first_layers(result: Validation, prepared: Prepared, pair: Pair, folder: Path) -> Validation:
    """Compare a value in the first layers of both models, like the outputs of whole models."""
    expected = prepared.expected or prepared.wide
    assert prepared.cut is not None and expected is not None
    precision = AS_STORED if prepared.expected is not None else FLOAT32
    with tempfile.TemporaryDirectory(prefix=".first-layers.", dir=folder) as scratch:
        copy = precision.copy(cut_off(pair.grown, prepared.cut.name), pair.draws)
        start = precision.start(copy, Path(scratch) / "grown.onnx", pair.device)
        ran = run_grown(pair, expected, start, prepared.cut)
    result = replace(result, cases=expected.labels, provider=ran.by)
    if prepared.expected is not None:
        return replace(result, outputs=ran.outputs)
    tolerance, _ = tolerance_of(pair.dimensions, pair.plan, result.tensors, ir.DataType.FLOAT)
    return replace(result, wide=ran.outputs, wide_tolerance=tolerance)


# -- float64 ----------------------------------------------------------------------------------------------


def validate_double(pair: Pair, folder: Path) -> tuple[tuple[OutputReport, ...], str]:
    """Run both models in float64 and compare. The tensors of the grown model are built in float64.

    Args:
        pair: both models, the grown one with its tensors computed in float64.
        folder: a folder for the two temporary models.

    Returns:
        The reports of the outputs, and the runtime that ran the models.
    """
    from hyperclone_onnx.validation.wide import double_runner, to_double

    def starter(model: ir.Model, name: str) -> Start:
        def start() -> Started:
            run, by = double_runner(to_double(model), folder / name)
            return Started(in_float64(run), by)

        return start

    source = AS_STORED.copy(pair.in_file)
    expected = run_source(pair, pair.as_transformed(starter(source, "source.onnx")))
    if pair.draws:
        shown = starter(AS_STORED.copy(with_draws_shown(pair.source, pair.draws)), "draws.onnx")
        expected = Expected(with_draws_fed(expected.sets, run_again(expected, shown).sets), expected.by)
    grown = AS_STORED.copy(pair.grown, pair.draws) if pair.draws else pair.grown
    ran = run_grown(pair, expected, starter(grown, "grown.onnx"))
    return ran.outputs, ", ".join(dict.fromkeys((expected.by, ran.by)))
