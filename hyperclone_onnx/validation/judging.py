"""Judges the outputs of a grown model: first as they are, then, if they differ, by the noise of the source."""

from __future__ import annotations

import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import eps_of, weight_bytes
from hyperclone_onnx.reading.defaults import put_defaults_back
from hyperclone_onnx.validation.chance import take_draws_as_inputs
from hyperclone_onnx.validation.decisions import (
    Decision,
    Watched,
    axes_in_grown,
    decisions_of,
    explains,
    watch,
)
from hyperclone_onnx.validation.first_blocks import repeated
from hyperclone_onnx.validation.inputs.cases import Case
from hyperclone_onnx.validation.inputs.search import Accepted
from hyperclone_onnx.validation.noise import TRIALS, allowance, measurable, perturbed, perturbed_feeds, with_noise
from hyperclone_onnx.validation.outputs import NOT_IDENTICAL, OutputReport, compare, joined_by_name, tile_to
from hyperclone_onnx.validation.running import (
    Answer,
    Expected,
    Outputs,
    Pair,
    Start,
    run_again,
    run_grown,
    start_copy,
    start_in_memory,
)
from hyperclone_onnx.validation.sessions import Device
from hyperclone_onnx.validation.tolerance import computed_type
from hyperclone_onnx.validation.unrounded import unrounded

Array = npt.NDArray[Any]

WIDEST = 4 << 30
"""The most bytes of weights of a model that is copied for a second comparison."""


@dataclass(frozen=True)
class Precision:
    """The types in which copies of models run."""

    wide: bool

    def copy(self, model: ir.Model, draws: Mapping[str, ir.DataType] | None = None) -> ir.Model:
        """A copy of a model that runs in these types.

        Raises:
            Unsupported: the model has a quantised operator that we cannot write in float32.
        """
        copy = model.clone()
        put_defaults_back(copy)
        take_draws_as_inputs(copy, draws or {})
        return unrounded(copy) if self.wide else copy

    def start(self, copy: ir.Model, path: Path, device: Device) -> Start:
        """Start such a copy."""
        in_memory = None if self.wide else start_in_memory(copy, device)
        return in_memory or start_copy(copy, path, device, self.wide)


AS_STORED, FLOAT32 = Precision(wide=False), Precision(wide=True)


@dataclass(frozen=True)
class Judged:
    """Reports of the outputs and of the values before squeezed outputs, and the provider that ran the grown model."""

    outputs: tuple[OutputReport, ...]
    before: tuple[OutputReport, ...]
    by: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judge:
    """Compares a grown model with its source in one precision."""

    pair: Pair
    precision: Precision
    tolerance: float
    residue: float
    """The rounding residue of the shared weights."""

    def compare(self, expected: Expected, start: Start) -> Judged:
        """Run the grown model on the inputs of the source, and compare."""
        with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder:
            if self.pair.draws:
                copy = self.precision.copy(self.pair.grown, self.pair.draws)
                start = self.precision.start(copy, Path(folder) / "grown.onnx", self.pair.device)
            ran = run_grown(self.pair, expected, start)
        if weight_bytes(self.pair.grown) > WIDEST or len(ran.answers) < len(expected.sets):
            return Judged(ran.outputs, (), ran.by)
        squeezed = self._decisions("squeezes")
        inside = self._watched(squeezed, expected)
        if inside is None:
            squeezed, inside = (), [Answer({}, {}) for _ in ran.answers]
        labels = [_key(decision) for decision in squeezed]
        before = joined_by_name(
            compare(label, answer.wanted[label], answer.got.get(label)) for answer in inside for label in labels
        )
        judged = Judged(ran.outputs, before, ran.by)
        if not self._doubtful((*judged.outputs, *judged.before)):
            return judged
        answers = [
            Answer({**outer.wanted, **inner.wanted}, {**outer.got, **inner.got})
            for outer, inner in zip(ran.answers, inside, strict=True)
        ]
        return self._look_again(judged, expected, answers, squeezed)

    def _doubtful(self, reports: Sequence[OutputReport]) -> set[str]:
        return {report.name for report in reports if report.problem_beyond(self.tolerance)}

    # -- values before the outputs ------------------------------------------------------------------------

    def _decisions(self, *kinds: str, of: Container[str] | None = None) -> tuple[Decision, ...]:
        """The decisions of some kinds. None without a plan, which says how values inside the grown model compare."""
        if self.pair.plan is None:
            return ()
        return tuple(
            decision
            for decision in decisions_of(self.pair.dimensions)
            if decision.kind in kinds and (of is None or decision.output in of)
        )

    def _watched(self, decisions: Sequence[Decision], expected: Expected) -> list[Answer] | None:
        """The inputs and outputs of decisions in both models, for each input set. None if a model does not run so."""
        source = watch(self.precision.copy(self.pair.source, self.pair.draws), decisions) if decisions else None
        grown = watch(self.precision.copy(self.pair.grown, self.pair.draws), decisions) if decisions else None
        if source is None or grown is None:
            return None
        with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder:
            try:
                begun = self.precision.start(source.model, Path(folder) / "source.onnx", self.pair.device)
                wanted = run_again(expected, begun)
                model = self.precision.start(grown.model, Path(folder) / "grown.onnx", self.pair.device)()
                got = [model.run(self.pair.feeds_of_grown(accepted.case.feeds)) for accepted in expected.sets]
            except (Refused, RuntimeError):
                return None
        return [
            Answer(self._inside(decisions, source, accepted.outputs), _keyed(decisions, grown, outputs))
            for accepted, outputs in zip(wanted.sets, got, strict=True)
        ]

    def _inside(self, decisions: Sequence[Decision], watched: Watched, outputs: Outputs) -> Outputs:
        """The inputs and outputs of the source's decisions, repeated as inside the grown model."""
        axes = axes_in_grown(self.pair.dimensions, self.pair.plan)
        grown = {
            name: repeated(array, axes[name], self.pair.maps) if name in axes else array
            for name, array in outputs.items()
        }
        return _keyed(decisions, watched, grown)

    # -- a second look ------------------------------------------------------------------------------------

    def _look_again(
        self, judged: Judged, expected: Expected, answers: Sequence[Answer], squeezed: Sequence[Decision]
    ) -> Judged:
        """Judge differences again: by the noise of the source, and integers by the values that decided them."""
        judged = replace(judged, outputs=self._decided(judged.outputs, expected))
        doubtful = self._doubtful((*judged.outputs, *judged.before))
        moved = self._moved(expected, squeezed) if doubtful and measurable(self.residue) else None
        if moved is None:
            return judged

        def again(report: OutputReport) -> OutputReport:
            name = report.name
            if name not in doubtful or any(name not in answer.got for answer in answers):
                return report
            if any(name not in outputs for trial in moved for outputs in trial):
                return report  # a value inside, where the source as its file has it was measured
            want, *trials = (
                [self._as_wide_as(answer.got[name], one[name]) for one, answer in zip(outputs, answers, strict=True)]
                for outputs in ([answer.wanted for answer in answers], *moved)
            )
            return with_noise(report, want, [answer.got[name] for answer in answers], trials, self.tolerance)

        return replace(judged, outputs=tuple(map(again, judged.outputs)), before=tuple(map(again, judged.before)))

    def _as_wide_as(self, got: Array, want: Array) -> Array:
        return tile_to(want, got.shape) if self.pair.plan is None else want

    def _moved(self, expected: Expected, squeezed: Sequence[Decision]) -> list[list[Outputs]] | None:
        """The expected outputs if the source is rounded differently, for each trial and set. None if it cannot run."""
        computed = ir.DataType.FLOAT if self.precision.wide else computed_type(self.pair.dimensions)
        relative = max(self.residue, eps_of(computed))
        trials: list[list[Outputs]] = []
        if self.pair.untransformed is not None:
            squeezed = ()  # the file may not have the nodes that decide in the transformed source
        for trial in range(TRIALS):
            # The noise is that of the file: a transform that is wrong must not be excused by its own change.
            source = perturbed(self.pair.in_file, relative, trial, self.precision.wide)
            watched = watch(self.precision.copy(source, self.pair.draws), squeezed)
            if watched is None:
                return None
            cases = [Case(one.case.label, perturbed_feeds(one.case.feeds, trial)) for one in expected.sets]
            with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as folder:
                begun = self.precision.start(watched.model, Path(folder) / "moved.onnx", self.pair.device)
                begun = self.pair.as_transformed(begun)
                try:
                    ran = run_again(Expected(tuple(Accepted(case, {}) for case in cases), ""), begun)
                except (Refused, RuntimeError):
                    return None
            trials.append(
                [
                    {
                        **self.pair.outputs_of_grown(accepted.outputs),
                        **self._inside(squeezed, watched, accepted.outputs),
                    }
                    for accepted in ran.sets
                ]
            )
        return trials

    def _decided(self, reports: Sequence[OutputReport], expected: Expected) -> tuple[OutputReport, ...]:
        """Excuse integers that differ only where the values that decided them are equal up to rounding."""
        doubtful = {report.name for report in reports if report.problem == NOT_IDENTICAL}
        decisions = self._decisions("chooses", "rounds", "compares", of=doubtful)
        seen = self._watched(decisions, expected)
        if seen is None:
            return tuple(reports)
        excused = {
            decision.output: f"integers differ where {decision.op_type} decides between values that are equal within "
            "the tolerance"
            for decision in decisions
            if all(self._explained(decision, answer) for answer in seen)
        }
        return tuple(
            replace(report, problem="", note=excused[report.name]) if report.name in excused else report
            for report in reports
        )

    def _explained(self, decision: Decision, answer: Answer) -> bool:
        keys = [_key(decision, place) for place in range(decision.operands + 1)]
        if any(key not in answer.wanted or key not in answer.got for key in keys):
            return False
        want, got = ([np.asarray(side[key]) for key in keys] for side in (answer.wanted, answer.got))
        return explains(decision, want, got, allowance(want[0], (), self.tolerance).allowed)


def _key(decision: Decision, place: int = 0) -> str:
    """The name of an input or output of a decision. The first input has the label of the decision."""
    return f"{decision.label} ({place})" if place else decision.label


def _keyed(decisions: Sequence[Decision], watched: Watched, outputs: Mapping[str, Array]) -> Outputs:
    """The inputs and outputs of decisions by key, without constants."""
    return {
        _key(decision, place): outputs[name]
        for decision, names in zip(decisions, watched.names, strict=True)
        for place, name in enumerate(names)
        if name in outputs
    }
