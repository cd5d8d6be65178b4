"""Growing a model file: plan, rewrite, stream, validate, publish. Each stage is usable by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Dim
from hyperclone_onnx.analysis.analysing import Analysis, analyse, count_parameters, is_code
from hyperclone_onnx.analysis.roles import explain
from hyperclone_onnx.errors import BadRequest, ModelsDiffer, Refused
from hyperclone_onnx.plan.maps import SourceMap
from hyperclone_onnx.plan.plans import Plan, TransformStep
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.planning.making import make_plan
from hyperclone_onnx.planning.provenance import provenance
from hyperclone_onnx.planning.request import Growth, size
from hyperclone_onnx.progress import Notify, Progress, tell_nobody
from hyperclone_onnx.publishing.publication import check_output, data_name, publication, write_text
from hyperclone_onnx.reading import loading
from hyperclone_onnx.rewriting.rewriting import rewrite
from hyperclone_onnx.tensors.assembled import assemble
from hyperclone_onnx.validation.not_finite import not_finite
from hyperclone_onnx.validation.outputs import NOTHING_COMPARED
from hyperclone_onnx.validation.sessions import Device
from hyperclone_onnx.validation.validating import Mode, Validation, validate, validate_double
from hyperclone_onnx.writing import onnx_files as writer
from hyperclone_onnx.writing.onnx_files import needs_data_file

Precision = Literal["stored", "float64"]


@dataclass(frozen=True)
class Kept:
    """A dimension that was not asked to grow, or may not."""

    name: str
    role: str
    size: int
    reason: str


@dataclass(frozen=True)
class Expansion:
    """The report of an expansion."""

    source: str
    output: str | None
    """None where nothing was to be written."""
    plan: Plan
    kept: list[Kept]
    parameters_before: int
    parameters_after: int
    separated: dict[str, list[str]] = field(default_factory=dict)
    """Tensors that the source stores once and the grown model more than once."""
    quantised: int = 0
    """Weights whose codes are repeated; their scales take the division, so that they get no noise."""
    validation: Validation | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, the plan's tensors left out."""
        return {
            "source": self.source,
            "output": self.output,
            "strategy": self.plan.strategy.to_json(),
            "interface": "keep" if self.plan.keep_interface else "grow",
            "grown": {
                name: {"role": dim.role, "from": dim.map.size, "to": dim.map.grown}
                for name, dim in self.plan.dims.items()
            },
            "kept": [asdict(each) for each in self.kept],
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "separated": self.separated,
            "quantised": self.quantised,
            "validation": None if self.validation is None else self.validation.to_json(),
            "seconds": self.seconds,
        }


def plan_expansion(
    analysis: Analysis,
    factor: int = 1,
    requests: Mapping[str, int] | None = None,
    maps: Mapping[str, SourceMap] | None = None,
    strategy: Strategy | None = None,
    *,
    untie: bool = False,
    keep_interface: bool = False,
) -> Plan:
    """Plan the growth of an analysed model; see `sizing.size` and `planning.make_plan`.

    Raises:
        BadRequest: the request does not fit the model.
        Refused: the request cannot be fulfilled.
    """
    return _plan(analysis, _Request(factor, requests, maps, strategy, untie, keep_interface))[1]


@dataclass(frozen=True)
class _Request:
    """What is asked of a growth; see `expand`."""

    factor: int
    requests: Mapping[str, int] | None
    maps: Mapping[str, SourceMap] | None
    strategy: Strategy | None
    untie: bool
    keep_interface: bool
    transforms: Sequence[TransformStep] = ()
    allow_change: bool = False

    def __post_init__(self) -> None:
        law = None if self.strategy is None else self.strategy.law
        if law is not None and not law.preserves and not self.allow_change:
            raise BadRequest(
                f"the strategy {law.name!r} changes what the model computes: allow_change=True says that you want that"
            )

    def to_json(self) -> dict[str, Any]:
        """The request as plain data, but for the strategy: that is the plan's."""
        return {
            "factor": self.factor,
            "requests": dict(self.requests or {}),
            "maps": {name: {"size": each.size, **each.to_json()} for name, each in (self.maps or {}).items()},
            "untie": self.untie,
            "keep_interface": self.keep_interface,
        }


def _plan(analysis: Analysis, request: _Request) -> tuple[Growth, Plan]:
    growth = size(analysis.dimensions, request.factor, request.requests, request.maps)
    plan = make_plan(growth, request.strategy, untie=request.untie, keep_interface=request.keep_interface)
    options = {**request.to_json(), "strategy": plan.strategy.to_json()}
    return growth, replace(plan, source=provenance(analysis.model, options), transforms=analysis.transforms)


@dataclass(frozen=True)
class _Planned:
    """A model that was read, and what is to become of it."""

    analysis: Analysis
    plan: Plan
    big: ir.Model
    """The grown model; its tensors are computed when they are written."""
    result: Expansion


def _planned(
    model: str | os.PathLike[str],
    out: Path | None,
    request: _Request,
    plan_out: str | os.PathLike[str] | None,
    say: Notify,
    clock: _Clock,
) -> _Planned:
    """Read a model, check where the result and the plan are to go, and plan."""
    say("reading")
    analysis = analyse(model, request.transforms)
    taken = set(analysis.files)
    if out is not None:
        check_output(out, taken)
        taken |= {out.resolve(), out.with_name(data_name(out)).resolve()}
    if plan_out is not None:
        check_output(Path(plan_out), taken)
    say("planning")
    growth, plan = _plan(analysis, request)
    big = rewrite(analysis.model, plan)
    result = _report(analysis, out, growth, plan, big)
    clock.lap("plan")
    return _Planned(analysis, plan, big, replace(result, seconds=clock.seconds))


def expand(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    factor: int = 1,
    requests: Mapping[str, int] | None = None,
    *,
    maps: Mapping[str, SourceMap] | None = None,
    strategy: Strategy | None = None,
    untie: bool = False,
    keep_interface: bool = False,
    transforms: Sequence[TransformStep] = (),
    allow_change: bool = False,
    device: Device = "auto",
    check: bool | Mode = True,
    precision: Precision = "stored",
    max_shard_size: int | None = None,
    workers: int | None = None,
    plan_out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Expansion:
    """Grow a model file into another, which appears only when it has been validated.

    Args:
        model: the source.
        output: the file to write; weights too large for one protobuf go to `output` + ".data".
        factor: grows hidden, ffn, heads and other widths.
        requests: a factor by role or by dimension, e.g. ``{"head_dim": 2, "heads": 1}``.
        maps: a source map by dimension, for anything but whole factors.
        strategy: how repeats share weights; noisy-diagonal at 10 dB by default.
        untie: split tensors that are stored once but divided in one use only.
        keep_interface: inputs and outputs keep the source's shapes.
        transforms: steps that change the source graph before it grows (see `transforms`).
        allow_change: allow a strategy that does not preserve the function; how far outputs moved is then reported.
        device: where to validate.
        check: how much to validate: "full", "algebraic", "auto" (or True), False for nothing; see `validation`.
        precision: "float64" proves the graph in double precision besides.
        max_shard_size: bytes in one data file; more are spread over several.
        workers: processes that compute, write and compare. What is written does not depend on it.
        plan_out: also write the plan there, as JSON.
        progress: told of each tensor written.
        notify: told of each stage begun.

    Raises:
        BadModel, BadRequest, Refused, CannotWrite: see `errors`.
        ModelsDiffer: the grown model is not equal; nothing is published.
    """
    say = notify or tell_nobody
    out, mode, clock = Path(output), _mode(check, precision), _Clock()
    request = _Request(factor, requests, maps, strategy, untie, keep_interface, transforms, allow_change)
    planned = _planned(model, out, request, plan_out, say, clock)
    analysis, plan, big = planned.analysis, planned.plan, planned.big
    validation: Validation | None = None
    external = needs_data_file(big) or len(analysis.files) > 1 or max_shard_size is not None
    texts = {} if plan_out is None else {Path(plan_out): _text(plan)}
    with publication(out, beside=texts) as written:
        say("writing")
        writer.save(big, written, external=external, max_shard_size=max_shard_size, workers=workers, progress=progress)
        clock.lap("write")
        if mode is not None:
            say("validating")
            grown = loading.load(written)
            validation = validate(
                analysis.path, written, analysis.dimensions, grown, plan, device=device, mode=mode, workers=workers
            )
            if precision == "float64":
                say("validating in float64")
                validation = _with_float64(validation, analysis, plan, written.parent)
            validation = _with_not_finite(validation, analysis)
            clock.lap("validate")
            if validation.problems:
                raise ModelsDiffer(_differs(out, validation))
        loading.check_unchanged(analysis.stamps)
        say("publishing")
    return replace(planned.result, validation=validation, seconds=clock.seconds)


def plan_file(
    model: str | os.PathLike[str],
    factor: int = 1,
    requests: Mapping[str, int] | None = None,
    *,
    maps: Mapping[str, SourceMap] | None = None,
    strategy: Strategy | None = None,
    untie: bool = False,
    keep_interface: bool = False,
    plan_out: str | os.PathLike[str] | None = None,
    notify: Notify | None = None,
) -> Expansion:
    """Plan the growth of a model file and report what it would do; nothing is written but the plan, where asked.

    Arguments and errors are those of `expand`.
    """
    request = _Request(factor, requests, maps, strategy, untie, keep_interface)
    planned = _planned(model, None, request, plan_out, notify or tell_nobody, _Clock())
    if plan_out is not None:
        write_text(Path(plan_out), _text(planned.plan))
    return planned.result


def _text(plan: Plan) -> str:
    """A plan as its file holds it."""
    return plan.dumps(indent=1) + "\n"


def _mode(check: bool | Mode, precision: Precision) -> Mode | None:
    if check is False:
        return None
    if check == "algebraic" and precision == "float64":
        raise BadRequest("an algebraic validation runs nothing, in no precision: leave out one of the two")
    return "auto" if check is True else check


def _with_not_finite(validation: Validation, analysis: Analysis) -> Validation:
    """The same, with a note of the weights that are no numbers.

    Raises:
        Refused: for that reason no output is one, so that there is nothing to compare.
    """
    unreal = not_finite(analysis.model)
    if not unreal:
        return validation
    first, *rest = [f"{name} ({count} elements)" for name, count in unreal.items()]
    named = f"{first}{f' and {len(rest)} more tensors' if rest else ''}"
    silent = [output.problem.startswith(NOTHING_COMPARED) for output in validation.outputs]
    if validation.problems and silent and all(silent):
        raise Refused(
            f"{analysis.path}: no output is a number, so that nothing can be compared: the weights of {named} are "
            "infinite or not a number; --no-validate grows them as they are"
        )
    return validation.with_notes(f"weights that are infinite or not a number grow as they are: {named}")


def _with_float64(validation: Validation, analysis: Analysis, plan: Plan, folder: Path) -> Validation:
    """The same, with both models compared in float64."""
    scratch = folder / "float64"
    scratch.mkdir()
    wide = rewrite(analysis.model, plan, ir.DataType.DOUBLE)
    outputs, by = validate_double(analysis.dimensions, wide, plan, scratch)
    return replace(validation, double=outputs, double_by=by)


def _differs(out: Path, validation: Validation) -> str:
    first, *rest = validation.problems
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{out} was not written: the grown model differs from its source: {first}{more}"


def _report(analysis: Analysis, out: Path | None, growth: Growth, plan: Plan, big: ir.Model) -> Expansion:
    kept = [
        Kept(named.name, named.role, named.size, _why_kept(growth, named.dim))
        for named in growth.named
        if named.name not in plan.dims and named.role != "other"
    ]
    variants: dict[str, list[str]] = {}
    quantised = 0
    for name, recipe in plan.tensors.items():
        tensor = assemble(recipe.origin, analysis.model)
        if isinstance(recipe.origin, str) and name != recipe.origin and tensor.size > 1:
            variants.setdefault(recipe.origin, []).append(name)
        quantised += recipe.grows and is_code(tensor.dtype)
    return Expansion(
        str(analysis.path),
        None if out is None else str(out),
        plan,
        kept,
        count_parameters(analysis.model),
        count_parameters(big),
        variants,
        quantised,
    )


def _why_kept(growth: Growth, dim: Dim) -> str:
    if dim in growth.beside:
        return "another factor of the same width grows"
    return explain(growth.dimensions, dim) if dim.pin is not None else "not asked to grow"


class _Clock:
    """The seconds that each stage took."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Note the end of a stage."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self.last, 3)
        self.last = now


def validate_files(
    small: str | os.PathLike[str],
    big: str | os.PathLike[str],
    device: Device = "auto",
    seed: int = 0,
    mode: Mode = "auto",
    workers: int | None = None,
) -> Validation:
    """Compare a grown model file with its source, on the weights as they are stored.

    Raises:
        BadModel: one of the files cannot be read.
        Refused, BadRequest: see `validation.validate`.
    """
    grown = loading.load(big)
    plan = Plan.carried_by(grown.metadata_props)
    analysis = analyse(small, () if plan is None else plan.transforms)
    result = validate(
        analysis.path, big, analysis.dimensions, grown, plan, device=device, seed=seed, mode=mode, workers=workers
    )
    if plan is None:
        return result.with_notes("the grown model carries no plan: its tensors were not compared, only its outputs")
    if plan.source:
        own = provenance(analysis.model, {})
        other = [part for part in ("graph", "weights") if plan.source.get(part) != own[part]]
        if other:
            return result.with_notes(
                f"the plan was made from another source: its {' and '.join(other)} had other digests"
            )
    return result
