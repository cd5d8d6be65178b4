"""Running the source and then the grown model on the same inputs, and comparing what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import weight_bytes
from hyperclone_onnx.plan.maps import Maps
from hyperclone_onnx.plan.plans import Interface, Plan
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.validation import feeds as inputs
from hyperclone_onnx.validation.first_blocks import Cut, repeated
from hyperclone_onnx.validation.outputs import OutputReport, compare, joined_by_name, logits_outputs, tile_to
from hyperclone_onnx.validation.sessions import Device

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], dict[str, Array]]

MOST_CASES = 3
"""The source is not run on more input sets than these."""


@dataclass(frozen=True)
class Started:
    """A model that is ready to run, and what runs it."""

    run: Run
    by: str


Start = Callable[[], Started]


@dataclass(frozen=True)
class Pair:
    """A source and what grew from it, and how the two are to be run."""

    dimensions: Dimensions
    """What inference knows of the source."""
    grown: ir.Model
    plan: Plan | None
    device: Device = "auto"
    seed: int = 0

    @property
    def source(self) -> ir.Model:
        """The source."""
        return self.dimensions.model

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weights of both models."""
        return weight_bytes(self.source) + weight_bytes(self.grown)

    @property
    def maps(self) -> Maps:
        """How each dimension grew; empty without a plan."""
        return self.plan.maps if self.plan is not None else {}

    def interfaces(self) -> tuple[tuple[Interface, ...], tuple[Interface, ...]]:
        """The inputs and the outputs that grew."""
        if self.plan is None or self.plan.keep_interface:
            return (), ()
        return self.plan.inputs, self.plan.outputs

    def feeds_of_grown(self, feeds: inputs.Feeds) -> inputs.Feeds:
        """The source's inputs as the grown model takes them; without a plan its declared shapes tell how."""
        fed = inputs.grown(feeds, self.interfaces()[0], self.maps)
        if self.plan is not None:
            return fed
        shapes = {value.name or "": value.shape for value in self.grown.graph.inputs}
        return {name: tile_to(array, shapes.get(name)) for name, array in fed.items()}

    def outputs_of_grown(self, outputs: Mapping[str, Array], cut: Cut | None) -> dict[str, Array]:
        """The source's outputs as the grown model should give them."""
        if cut is not None:
            return {name: repeated(array, cut, self.maps) for name, array in outputs.items()}
        return inputs.grown(dict(outputs), self.interfaces()[1], self.maps)


@dataclass(frozen=True)
class Ran:
    """Both models were run: how their outputs compare, on which input sets, and what ran the source and the other."""

    outputs: tuple[OutputReport, ...]
    cases: tuple[str, ...]
    by: tuple[str, ...]


def compare_runs(pair: Pair, start_source: Start, start_grown: Start, cut: Cut | None = None) -> Ran:
    """Run the source on some input sets, then the grown model; both are never in memory at once.

    Raises:
        Refused: the source runs on none of the inputs.
    """
    by, ran = _run_source(pair, start_source)
    grown = start_grown()
    logits = logits_outputs(pair.dimensions)
    reports: list[OutputReport] = []
    for case, expected in ran:
        wanted = pair.outputs_of_grown(expected, cut)
        try:
            got = grown.run(pair.feeds_of_grown(case.feeds))
        except RuntimeError as problem:
            reports += [OutputReport(name, problem=f"the grown model does not run: {problem}") for name in expected]
            break
        reports += [
            compare(name, want, got.get(name), logits=name in logits, tile=pair.plan is None)
            for name, want in wanted.items()
        ]
    return Ran(joined_by_name(reports), tuple(case.label for case, _ in ran), (by, grown.by))


def _run_source(pair: Pair, start: Start) -> tuple[str, list[tuple[inputs.Case, dict[str, Array]]]]:
    """What the source gives on the input sets on which it runs."""
    source = start()
    ran: list[tuple[inputs.Case, dict[str, Array]]] = []
    refusal = "no inputs could be made"
    for case in inputs.cases(pair.dimensions, pair.seed):
        try:
            ran.append((case, source.run(case.feeds)))
        except RuntimeError as problem:
            refusal = f"{case.label}: {problem}"
        if len(ran) == MOST_CASES:
            break
    if not ran:
        raise Refused(f"the source runs on none of the inputs made for it ({refusal}); --no-validate skips this")
    return source.by, ran


def in_float64(run: Run) -> Run:
    """A run that takes its floating-point inputs in float64."""
    return lambda fed: run({name: a.astype(np.float64) if a.dtype.kind == "f" else a for name, a in fed.items()})
