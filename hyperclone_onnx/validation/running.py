"""Runs the source and then the grown model on the same inputs, and compares their outputs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.graphs import weight_bytes
from hyperclone_onnx.plan.maps import Maps
from hyperclone_onnx.plan.plans import Interface, Plan
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.transforms.interface import original_names
from hyperclone_onnx.validation.chance import shared_draws
from hyperclone_onnx.validation.first_blocks import Cut, repeated
from hyperclone_onnx.validation.inputs.cases import Feeds, grown, in_float32
from hyperclone_onnx.validation.inputs.search import Accepted, Wishes, find_inputs
from hyperclone_onnx.validation.outputs import OutputReport, compare, joined_by_name, logits_outputs, tile_to
from hyperclone_onnx.validation.sessions import Device, Runner
from hyperclone_onnx.validation.wide import save_wide
from hyperclone_onnx.writing import onnx_files as writer

Array = npt.NDArray[Any]
Outputs = dict[str, Array]
Run = Callable[[Mapping[str, Array]], Outputs]


@dataclass(frozen=True)
class Started:
    """A model that is ready to run, and the provider that runs it."""

    run: Run
    by: str


Start = Callable[[], Started]

MOST_INSIDE = 1 << 30
"""The most bytes of weights inside a model that is started from memory."""


def start_file(path: str | os.PathLike[str], device: Device, model: ir.Model) -> Start:
    """Start a model file as it is; `model` is the graph in it."""

    def start() -> Started:
        runner = Runner(path, device, isolated=True, overrides=True, model=model)
        return Started(runner.run, runner.provider)

    return start


def as_transformed(start: Start, transformed: ir.Model) -> Start:
    """Starts a model as it was before its transforms, with the names of inputs and outputs from after them.

    Inputs that the transforms added are left out, and outputs that they added are missing in what it gives.
    """
    inputs, outputs = (original_names(side) for side in (transformed.graph.inputs, transformed.graph.outputs))

    def started() -> Started:
        model = start()

        def run(feeds: Mapping[str, Array]) -> Outputs:
            got = model.run({str(old): feeds[new] for new, old in inputs.items() if old is not None and new in feeds})
            return {new: got[old] for new, old in outputs.items() if old is not None and old in got}

        return Started(run, model.by)

    return started


def start_in_memory(model: ir.Model, device: Device) -> Start | None:
    """Start a model from memory, with its data in its own folder. None if that is several folders, or too large."""
    stored = [value.const_value for value in model.graph.initializers.values()]
    folders = {Path(tensor.base_dir).resolve() for tensor in stored if isinstance(tensor, ir.ExternalTensor)}
    inside = sum(t.nbytes for t in stored if t is not None and not isinstance(t, ir.ExternalTensor))
    if len(folders) > 1 or inside > MOST_INSIDE:
        return None

    def start() -> Started:
        message = ir.to_proto(model).SerializeToString()
        place = next(iter(folders), Path.cwd()) / "model.onnx"
        runner = Runner(place, device, graph=message, isolated=True, overrides=True, model=model)
        return Started(runner.run, runner.provider)

    return start


def start_copy(model: ir.Model, path: Path, device: Device, wide: bool = False) -> Start:
    """Start a model that is first written to a temporary file; with narrower floats in float32 if `wide`."""

    def start() -> Started:
        if wide:
            save_wide(model, path, ir.DataType.FLOAT)
        else:
            writer.save(model, path, external=True)
        runner = Runner(path, device, isolated=True, overrides=True, model=model)
        return Started((lambda fed: runner.run(in_float32(fed))) if wide else runner.run, runner.provider)

    return start


@dataclass(frozen=True)
class Pair:
    """A source and its grown model, and how to run the two."""

    dimensions: Dimensions
    """The dimensions of the source."""
    grown: ir.Model
    plan: Plan | None
    device: Device = "auto"
    wishes: Wishes = field(default_factory=Wishes)
    untransformed: ir.Model | None = None
    """The source before its transforms, normalised; None if there were none."""

    @property
    def source(self) -> ir.Model:
        """The source."""
        return self.dimensions.model

    @property
    def in_file(self) -> ir.Model:
        """The source as its file has it, normalised. It may have other inputs and outputs (see `as_transformed`)."""
        return self.source if self.untransformed is None else self.untransformed

    def as_transformed(self, start: Start) -> Start:
        """Starts the source as its file has it, with the names of inputs and outputs that the grown model has."""
        return start if self.untransformed is None else as_transformed(start, self.source)

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weights of both models."""
        return weight_bytes(self.source) + weight_bytes(self.grown)

    @property
    def maps(self) -> Maps:
        """The source maps of the dimensions. Empty without a plan."""
        return self.plan.maps if self.plan is not None else {}

    @functools.cached_property
    def draws(self) -> dict[str, ir.DataType]:
        """The random numbers that both models are given instead of drawing them, and their types.

        A transform may repeat or rename the nodes that draw, so with one none are given.
        """
        return {} if self.untransformed is not None else shared_draws(self.source, self.grown)

    def interfaces(self) -> tuple[tuple[Interface, ...], tuple[Interface, ...]]:
        """The inputs and the outputs that grew."""
        if self.plan is None or self.plan.keep_interface:
            return (), ()
        return self.plan.inputs, self.plan.outputs

    def feeds_of_grown(self, feeds: Feeds) -> Feeds:
        """The source's inputs, grown for the grown model. Without a plan, its declared shapes decide."""
        fed = grown(feeds, self.interfaces()[0], self.maps)
        if self.plan is not None:
            return fed
        shapes = {value.name or "": value.shape for value in self.grown.graph.inputs}
        return {name: tile_to(array, shapes.get(name)) for name, array in fed.items()}

    def outputs_of_grown(self, outputs: Mapping[str, Array], cut: Cut | None = None) -> Outputs:
        """The expected outputs of the grown model, from those of the source."""
        if cut is not None:
            return {name: repeated(array, cut.axes, self.maps) for name, array in outputs.items()}
        return grown(outputs, self.interfaces()[1], self.maps)


@dataclass(frozen=True)
class Expected:
    """The outputs of the source on some input sets, and the provider that ran it."""

    sets: tuple[Accepted, ...]
    by: str

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the input sets."""
        return tuple(accepted.case.label for accepted in self.sets)


def run_source(pair: Pair, start: Start) -> Expected:
    """Find inputs on which the source runs.

    Raises:
        Refused: the source cannot be loaded, or runs on no inputs.
    """
    source = start()
    return Expected(find_inputs(pair.dimensions, source.run, pair.wishes), source.by)


def run_again(expected: Expected, start: Start) -> Expected:
    """Run the source, or a copy of it, on the same inputs.

    Raises:
        Refused: the model cannot be loaded.
        RuntimeError: the model does not run on these inputs.
    """
    source = start()
    sets = tuple(Accepted(accepted.case, source.run(accepted.case.feeds)) for accepted in expected.sets)
    return Expected(sets, source.by)


@dataclass(frozen=True)
class Answer:
    """The expected outputs of the grown model on one input set, and its own."""

    wanted: Outputs
    got: Outputs


@dataclass(frozen=True)
class Ran:
    """The reports of the outputs of a grown model, and the provider that ran it."""

    outputs: tuple[OutputReport, ...]
    answers: tuple[Answer, ...]
    by: str


def run_grown(pair: Pair, expected: Expected, start: Start, cut: Cut | None = None) -> Ran:
    """Run the grown model on the inputs of the source. The two models are never in memory together."""
    model = start()
    logits = logits_outputs(pair.dimensions)
    reports: list[OutputReport] = []
    answers: list[Answer] = []
    for accepted in expected.sets:
        wanted = pair.outputs_of_grown(accepted.outputs, cut)
        try:
            got = model.run(pair.feeds_of_grown(accepted.case.feeds))
        except RuntimeError as problem:
            reports += [OutputReport(name, problem=f"the grown model does not run: {problem}") for name in wanted]
            break
        answers.append(Answer(wanted, got))
        reports += compare_answer(pair, answers[-1], logits)
        reports += [OutputReport(name, problem="the new output has no finite number") for name in unreal(pair, got)]
    return Ran(joined_by_name(reports), tuple(answers), model.by)


def unreal(pair: Pair, got: Mapping[str, Array]) -> list[str]:
    """The outputs that a transform added and that hold a number which is not finite. The file has none to compare."""
    added = [name for name, old in original_names(pair.source.graph.outputs).items() if old is None]
    return [name for name in added if name in got and got[name].dtype.kind == "f" and not np.isfinite(got[name]).all()]


def compare_answer(pair: Pair, answer: Answer, logits: Sequence[str] | set[str] = ()) -> list[OutputReport]:
    """Compare the outputs of the grown model on one input set with the expected ones."""
    return [
        compare(name, want, answer.got.get(name), logits=name in logits, tile=pair.plan is None)
        for name, want in answer.wanted.items()
    ]


def in_float64(run: Run) -> Run:
    """The same run, with its floating-point inputs in float64."""
    return lambda fed: run({name: a.astype(np.float64) if a.dtype.kind == "f" else a for name, a in fed.items()})
