"""Grows a model file: reads, plans, rewrites, writes, validates, publishes. Each stage can also be used by itself."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from hyperclone_onnx import in_memory
from hyperclone_onnx.algebra.dims import Dim
from hyperclone_onnx.analysis.analysing import Analysis, analyse, count_parameters, is_code, stored_bytes
from hyperclone_onnx.analysis.quantities import quantities
from hyperclone_onnx.analysis.roles import explain
from hyperclone_onnx.analysis.trainable import merged
from hyperclone_onnx.errors import BadRequest, CannotWrite, ModelsDiffer, Refused, in_bytes
from hyperclone_onnx.plan.maps import SourceMap
from hyperclone_onnx.plan.plans import Plan, TransformStep
from hyperclone_onnx.plan.strategies import Strategy, StrategyRule
from hyperclone_onnx.planning.asked import rules_of, strategy_of, whole_numbers
from hyperclone_onnx.planning.drawing import with_drawn_tensors
from hyperclone_onnx.planning.experts import Experts, mixtures, more_experts_step
from hyperclone_onnx.planning.making import make_plan
from hyperclone_onnx.planning.next_layers import with_next_layers
from hyperclone_onnx.planning.provenance import provenance
from hyperclone_onnx.planning.request import Growth, size, whole_or_fraction
from hyperclone_onnx.planning.strategy_rules import with_rules
from hyperclone_onnx.planning.target import Compared, Likeness, layers_like, layers_of, read_target
from hyperclone_onnx.planning.target import like as like_target
from hyperclone_onnx.progress import Notify, Progress, ignore_stage
from hyperclone_onnx.publishing.journal import data_files
from hyperclone_onnx.publishing.publication import check_output, data_name, publication, write_text
from hyperclone_onnx.reading import loading
from hyperclone_onnx.reading.in_memory import GivenModel
from hyperclone_onnx.rewriting.rewriting import rewrite
from hyperclone_onnx.rewriting.source_record import METADATA_KEY as SOURCE_KEY
from hyperclone_onnx.rewriting.source_record import record_source, steps_kept
from hyperclone_onnx.summaries import Summarised, Summary
from hyperclone_onnx.tensors.assembled import assemble
from hyperclone_onnx.transforms.interface import notes_of
from hyperclone_onnx.transforms.layers import Depth, LayersAt, LayersRequest, deepened, step_for
from hyperclone_onnx.transforms.registry import changing
from hyperclone_onnx.transforms.source import source_of
from hyperclone_onnx.validation.inputs.given import Inputs, wishes_of
from hyperclone_onnx.validation.not_finite import named_not_finite
from hyperclone_onnx.validation.running import Pair
from hyperclone_onnx.validation.sessions import Device
from hyperclone_onnx.validation.tensor_check import CheckOfWritten
from hyperclone_onnx.validation.validating import Mode, Validation, prepare, validate_double
from hyperclone_onnx.validation.validating import validate as validate_pair
from hyperclone_onnx.writing import onnx_files as writer
from hyperclone_onnx.writing.onnx_files import needs_data_file

Precision = Literal["stored", "float64"]


@dataclass(frozen=True)
class Kept:
    """A dimension that keeps its size: its growth was not requested, or is not possible."""

    name: str
    role: str
    size: int
    reason: str


@dataclass(frozen=True)
class SizeChange:
    """A size as people call it, before and after: hidden, ffn, query heads, key/value heads, the size of a head."""

    role: str
    name: str
    before: int
    after: int
    wanted: float | None = None
    """The size that a fraction as the factor gives, where that is no size which the graph can have."""
    dims: tuple[str, ...] = ()
    """The names of its dimensions."""


@dataclass(frozen=True, repr=False)
class Expansion(Summarised):
    """The report of an expansion."""

    source: str
    output: str | None
    """None if no file was to be written."""
    plan: Plan
    kept: list[Kept]
    parameters_before: int
    parameters_after: int
    separated: dict[str, list[str]] = field(default_factory=dict)
    """For tensors that the source stores once and the grown model several times: the further names."""
    quantised: int = 0
    """The number of quantised weights. Their codes are repeated and their scales divided, so that they get no noise."""
    validation: Validation | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    sizes: tuple[SizeChange, ...] = ()
    """Every size that people have a name for."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The name for people of each dimension that has another one."""
    files: Mapping[str, int] = field(default_factory=dict)
    """The names of the written files, the model first and then its data files, with their sizes in bytes."""
    likeness: Likeness | None = None
    """The target whose sizes were requested, if one was."""
    notes: tuple[str, ...] = ()
    """What the transforms of the source say about their result."""
    model: Any = None
    """The grown model, where `expand` got no output path: an ``onnx_ir.Model`` if the source was one, else an
    ``onnx.ModelProto``."""

    @property
    def compared(self) -> list[Compared]:
        """The sizes of source, target and result side by side; empty without a target."""
        if self.likeness is None:
            return []
        before: dict[str, set[int]] = {}
        after: dict[str, set[int]] = {}
        for change in self.sizes:
            before.setdefault(change.role, set()).add(change.before)
            after.setdefault(change.role, set()).add(change.after)
        tables = {dimension.size for dimension in self.kept if dimension.role == "vocab"}
        sides = (
            {role: next(iter(sizes)) for role, sizes in {**side, "vocab": tables}.items() if len(sizes) == 1}
            for side in (before, after)
        )
        return self.likeness.compared(*sides)

    def summary(self) -> Summary:
        """What grew, and whether the result is equal to its source."""
        grown = [change for change in self.sizes if change.after != change.before]
        rows = [(change.name, change.before, change.after) for change in grown] + [
            (dimension.name, dimension.size, dimension.reason) for dimension in self.kept
        ]
        where = self.output or ("in memory" if self.model is not None else "not written")
        verdict = "not validated" if self.validation is None else self.validation.verdict
        line = (
            f"{self.source} -> {where}, {self.parameters_before:,} -> {self.parameters_after:,} parameters, {verdict}"
        )
        return Summary(line, ("dimension", "from", "to, or why not"), rows)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, without the recipes of the tensors."""
        return {
            "source": self.source,
            "output": self.output,
            "strategy": self.plan.strategy.to_json(),
            "interface": "keep" if self.plan.keep_interface else "grow",
            "grown": {
                name: {"role": dim.role, "from": dim.map.size, "to": dim.map.grown}
                for name, dim in self.plan.dims.items()
            },
            **({"layers": layers} if (layers := deepened(self.plan.transforms)) else {}),
            **({"experts": experts} if (experts := mixtures(self.plan.transforms)) else {}),
            "kept": [asdict(dimension) for dimension in self.kept],
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "separated": self.separated,
            "quantised": self.quantised,
            **({"weighed_norms": list(weighed)} if (weighed := self.plan.weighed) else {}),
            "validation": None if self.validation is None else self.validation.to_json(),
            "seconds": self.seconds,
            "sizes": [
                {"role": size.role, "name": size.name, "from": size.before, "to": size.after}
                | ({} if size.wanted is None else {"wanted": size.wanted})
                for size in self.sizes
            ],
            "files": dict(self.files),
            **({"notes": list(self.notes)} if self.notes else {}),
            **(
                {}
                if self.likeness is None
                else {
                    "like": self.likeness.path,
                    "compared": [asdict(row) for row in self.compared],
                    "differences": list(self.likeness.differences),
                }
            ),
        }


def plan_expansion(
    analysis: Analysis,
    factor: float | None = None,
    requests: Mapping[str, float] | None = None,
    maps: Mapping[str, SourceMap] | None = None,
    strategy: Strategy | str | None = None,
    *,
    sizes: Mapping[str, float] | None = None,
    like: str | os.PathLike[str] | None = None,
    strategies: Sequence[StrategyRule] = (),
    untie: bool = False,
    keep_interface: bool = False,
    allow_change: bool = False,
) -> Plan:
    """Plan the growth of an analysed model. The arguments after the first are those of `expand`.

    Raises:
        BadRequest: the request does not fit the model (see `planning.request.size`).
        Refused: the model cannot grow in this way (see `planning.request.size` and `planning.making.make_plan`).
    """
    request = _Request.of(
        factor,
        requests,
        maps,
        strategy,
        untie=untie,
        keep_interface=keep_interface,
        allow_change=allow_change,
        sizes=sizes,
        like=like,
        strategies=strategies,
    )
    return _plan(analysis, _with_target(analysis, request)[0])[1]


_CHANGES = {
    "layers": "copies of layers that are not identity blocks change",
    "experts": "experts that part from the beginning (--expert-noise, --drop-upcycle) change",
}
"""The beginning of a message about a transform that changes what a model computes."""


@dataclass(frozen=True)
class _Request:
    """The request of a growth. Its fields are arguments of `expand`."""

    factor: float
    requests: Mapping[str, int]
    maps: Mapping[str, SourceMap] | None
    strategy: Strategy | None
    untie: bool
    keep_interface: bool
    transforms: Sequence[TransformStep] = ()
    allow_change: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    like: str | os.PathLike[str] | None = None
    strategies: Sequence[StrategyRule] = ()
    recipe: Mapping[str, Any] | None = None
    """The recipe file of the request, to be recorded in the plan."""
    layers: LayersRequest | None = None
    depth: Depth = "identity"
    layers_at: LayersAt = "even"
    experts: Experts | None = None
    more_experts: int | None = None
    separate: bool = False

    @staticmethod
    def of(
        factor: float | None,
        requests: Mapping[str, float] | None,
        maps: Mapping[str, SourceMap] | None,
        strategy: Strategy | str | None,
        *,
        sizes: Mapping[str, float] | None,
        strategies: Sequence[StrategyRule],
        **others: Any,
    ) -> _Request:
        """The request that is meant by arguments as people write them.

        Raises:
            BadRequest: an argument is wrong, or all are missing that say how much to grow.
        """
        parts = (requests, maps, sizes, *map(others.get, ("like", "layers", "experts", "more_experts", "transforms")))
        if factor is None and not any(part is not None and part != () for part in parts):
            raise BadRequest(
                'say how much to grow: factor=2, requests={"ffn": 2}, sizes={"hidden": 960}, like=TARGET, layers=32 or '
                "experts=Experts(8, 2)"
            )
        return _Request(
            1 if factor is None else factor,
            whole_numbers(requests, "requests", "factor"),
            maps,
            strategy_of(strategy),
            sizes=whole_numbers(sizes, "sizes", "size"),
            strategies=rules_of(strategies),
            **others,
        )

    def __post_init__(self) -> None:
        default = self.strategy or Strategy()
        try:
            laws = [strategy.law for strategy in (default, *(rule.strategy(default) for rule in self.strategies))]
        except ValueError as problem:
            raise BadRequest(str(problem)) from problem
        for law in laws:
            if not law.preserves and not self.allow_change:
                raise BadRequest(
                    f"the strategy {law.name!r} changes what the model computes: --allow-change, or allow_change=True "
                    "in Python, says that you want that"
                )
        changed = changing(self.transforms)
        if changed and not self.allow_change:
            what = _CHANGES.get(changed[0], f"the transform {changed[0]!r} changes")
            raise BadRequest(
                f"{what} what the model computes: --allow-change, or allow_change=True in Python, says that you want "
                "that"
            )

    def to_json(self) -> dict[str, Any]:
        """The request as plain data, without the strategy, which the plan has."""
        factor = whole_or_fraction(self.factor)
        data: dict[str, Any] = {
            "factor": factor if isinstance(factor, int) else float(factor),
            "requests": dict(self.requests),
            "maps": {
                name: {"size": source_map.size, **source_map.to_json()}
                for name, source_map in (self.maps or {}).items()
            },
            "untie": self.untie,
            "keep_interface": self.keep_interface,
        }
        if self.sizes:  # the digest of a request without sizes is what it was before there were sizes
            data["sizes"] = dict(self.sizes)
        if self.strategies:
            data["strategies"] = [rule.to_json() for rule in self.strategies]
        return data


def _with_target(analysis: Analysis, request: _Request) -> tuple[_Request, Likeness | None]:
    """The request with the sizes of the model that it names, if it names one. Its own sizes replace these."""
    if request.like is None:
        return request, None
    if whole_or_fraction(request.factor) != 1:
        raise BadRequest("a factor and a target contradict each other: leave one of the two out")
    target = read_target(request.like)
    likeness = like_target(analysis, target)
    return replace(request, sizes={**likeness.sizes, **request.sizes}), likeness


def _plan(analysis: Analysis, request: _Request) -> tuple[Growth, Plan]:
    growth = size(analysis.dimensions, request.factor, request.requests, request.maps, request.sizes)
    plan = make_plan(growth, request.strategy, untie=request.untie, keep_interface=request.keep_interface)
    plan = with_drawn_tensors(analysis.model, plan, request.strategies)
    plan = with_next_layers(analysis.model, with_rules(growth, plan, request.strategies))
    plan = replace(plan, recipe=dict(request.recipe or {}))
    options = {**request.to_json(), "strategy": plan.strategy.to_json()}
    return growth, replace(plan, source=provenance(analysis.model, options), transforms=analysis.transforms)


def _with_transforms(model: GivenModel, request: _Request) -> tuple[_Request, int | None]:
    """The request with its transforms made, and the layers of the source if the request has a target."""
    if request.separate:
        request = replace(request, transforms=_with_separate(model, request), separate=False)
    layers_before: int | None = None
    if request.like is not None:
        source = source_of(model, request.transforms).model
        layers_before = layers_of(source)
        if request.layers is None:
            request = replace(request, layers=layers_like(source, read_target(request.like)))
    if request.layers is not None:
        request = replace(request, transforms=_with_layers(model, request), layers=None)
    if request.experts is not None:
        request = replace(request, transforms=_with_experts(model, request), experts=None)
    if request.more_experts is not None:
        request = replace(request, transforms=_with_more_experts(model, request), more_experts=None)
    return request, layers_before


def _with_layers(model: GivenModel, request: _Request) -> tuple[TransformStep, ...]:
    """The transforms, and the one that makes the layers that were asked for."""
    assert request.layers is not None
    source = source_of(model, request.transforms)
    try:
        step = step_for(source.model, request.layers, request.depth, request.layers_at)
    except BadRequest as problem:
        raise BadRequest(f"{source.path}: {problem}") from problem
    return (*request.transforms, *([] if step is None else [step]))


def _with_experts(model: GivenModel, request: _Request) -> tuple[TransformStep, ...]:
    """The transforms, and the one that makes the experts that were asked for."""
    assert request.experts is not None
    analysis = analyse(model, request.transforms)
    try:
        return (*request.transforms, request.experts.step(analysis))
    except (BadRequest, Refused) as problem:
        raise type(problem)(f"{analysis.path}: {problem}") from problem


def _with_more_experts(model: GivenModel, request: _Request) -> tuple[TransformStep, ...]:
    """The transforms, and the one that multiplies the experts of mixtures."""
    assert request.more_experts is not None
    analysis = analyse(model, request.transforms)
    try:
        step = more_experts_step(analysis, request.more_experts)
    except (BadRequest, Refused) as problem:
        raise type(problem)(f"{analysis.path}: {problem}") from problem
    return (*request.transforms, *([] if step is None else [step]))


def _with_separate(model: GivenModel, request: _Request) -> tuple[TransformStep, ...]:
    """The transforms, and the one that gives each use of a merged tensor its own."""
    names = merged(source_of(model, request.transforms).model)
    return (*request.transforms, *([TransformStep("separate", {"tensors": names})] if names else []))


@dataclass(frozen=True)
class Planned:
    """A model that was read, and the plan of its growth."""

    analysis: Analysis
    plan: Plan
    big: ir.Model
    """The grown model. Its tensors are computed when they are written."""
    result: Expansion


def _planned(
    model: str | os.PathLike[str],
    out: Path | None,
    request: _Request,
    plan_out: str | os.PathLike[str] | None,
    say: Notify,
    clock: Clock,
) -> Planned:
    """Read a model, check the paths of the result and of the plan, and make the plan."""
    say("reading")
    request, layers_before = _with_transforms(model, request)
    analysis = analyse(model, request.transforms)
    used_files = set(analysis.files)
    if out is not None:
        check_output(out, used_files)
        used_files |= {out.resolve(), out.with_name(data_name(out)).resolve()}
    if plan_out is not None:
        check_output(Path(plan_out), used_files)
    say("planning")
    request, likeness = _with_target(analysis, request)
    if likeness is not None and likeness.layers is not None and layers_before is not None:
        likeness = replace(likeness, layers=(layers_before, likeness.layers[1]))
    growth, plan = _plan(analysis, request)
    big = rewrite(analysis.model, plan)
    _record_source(analysis, plan, big)
    result = replace(report_of(analysis, out, growth, plan, big), likeness=likeness)
    clock.lap("plan")
    return Planned(analysis, plan, big, replace(result, seconds=clock.seconds))


def _record_source(analysis: Analysis, plan: Plan, big: ir.Model) -> None:
    """Let a grown model carry the graph of its source, from which `shrink` makes the small model again."""
    kept = steps_kept(analysis.transforms)
    base = analysis.model if kept == analysis.transforms else source_of(analysis.path, kept).model
    record = record_source(base, analysis.model, plan, big)
    if record is not None:
        big.metadata_props[SOURCE_KEY] = record.dumps()


def expand(
    model: GivenModel,
    output: str | os.PathLike[str] | None = None,
    factor: float | None = None,
    requests: Mapping[str, float] | None = None,
    *,
    sizes: Mapping[str, float] | None = None,
    like: str | os.PathLike[str] | None = None,
    maps: Mapping[str, SourceMap] | None = None,
    strategy: Strategy | str | None = None,
    strategies: Sequence[StrategyRule] = (),
    untie: bool = False,
    separate: bool = False,
    keep_interface: bool = False,
    transforms: Sequence[TransformStep] = (),
    layers: LayersRequest | None = None,
    depth: Depth = "identity",
    layers_at: LayersAt = "even",
    experts: Experts | None = None,
    more_experts: int | None = None,
    allow_change: bool = False,
    device: Device = "auto",
    check: bool | Mode = True,
    precision: Precision = "stored",
    max_shard_size: int | None = None,
    workers: int | None = None,
    plan_out: str | os.PathLike[str] | None = None,
    inputs: Inputs | None = None,
    dims: Mapping[str, int] | None = None,
    recipe: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Expansion:
    """Grow a model into a larger one. The new file appears only after it has been validated.

    Args:
        model: the path of the source, an ``onnx.ModelProto`` or an ``onnx_ir.Model``. It is not changed.
        output: the file to write. Weights that are too large for one protobuf are written to `output` + ".data".
            Without it, the report has the grown model as ``report.model``, with all its weights in memory.
        factor: the factor of hidden, ffn, heads and other widths. A fraction gives the nearest whole sizes.
        requests: a factor by role or by dimension, e.g. ``{"head_dim": 2, "heads": 1}``.
        sizes: a size by role or by dimension, e.g. ``{"hidden": 960, "heads": 15}``. It replaces both factors.
        like: a Hugging Face folder, its config.json, or an ONNX file: the sizes are those of that model.
        maps: a source map by dimension, for growth by other than whole factors.
        strategy: how repeats share weights, by default noisy-diagonal with 10 dB.
        strategies: rules that give some tensors another strategy. Of several that fit, the first decides.
        separate: give each use of a tensor that holds one value everywhere its own tensor (see `transforms.separate`).
            Exporters merge gains of ones; as one tensor they are not trained.
        untie: give each use its own tensor if a tensor is stored once but only one of its uses must be divided.
        keep_interface: the model's inputs and outputs keep the shapes of the source.
        transforms: steps that change the source graph before it grows (see `transforms`).
        layers: the number of layers of the grown model, or one for each stack, e.g. ``{"encoder": 8, "decoder": 12}``.
        depth: how new layers are made: "identity" blocks, which add nothing at first; "stack" or "interpose", which
            change what the model computes (see `transforms.layers`).
        layers_at: where identity blocks stand: "even", "end", or the layers behind which there is a new one.
        experts: makes a mixture of experts of each feed-forward block (see `planning.experts`).
        more_experts: multiplies the experts of mixtures, and how many of them are chosen, by this number.
        allow_change: allow a strategy that changes what the model computes. The differences of outputs are reported.
        device: the device on which both models run for validation.
        check: how to validate: "full", "algebraic", "auto" (or True), or False for no validation (see `validation`).
        precision: "float64" also compares both models in double precision.
        max_shard_size: the most bytes of one data file. Larger models get several data files.
        workers: the number of processes that compute, write and compare. The written files do not depend on it.
        plan_out: a file to which the plan is written too, as JSON.
        inputs: inputs of the source on which both models are compared: a path (see `validation.inputs.given`), or
            arrays by input. By default they are random.
        dims: numbers for the symbolic sizes of random inputs, by name.
        recipe: a recipe file as plain data. The plan records it; it changes nothing else.
        progress: called after each written tensor, with the bytes of all written tensors and those of all tensors.
        notify: called with the name of each stage when it begins.

    Returns:
        The report of the expansion.

    Raises:
        BadModel: the source is not a readable, complete ONNX model, or was changed during the expansion.
        BadRequest: an argument is wrong, or does not fit the model.
        Refused: the model cannot grow in this way.
        CannotWrite: an output file cannot be written.
        ModelsDiffer: the grown model does not compute the same. No file is published.
    """
    in_memory.check_output(output)
    request = _Request.of(
        factor,
        requests,
        maps,
        strategy,
        untie=untie,
        keep_interface=keep_interface,
        transforms=transforms,
        allow_change=allow_change,
        sizes=sizes,
        like=like,
        strategies=strategies,
        recipe=recipe,
        layers=layers,
        depth=depth,
        layers_at=layers_at,
        experts=experts,
        more_experts=more_experts,
        separate=separate,
    )
    run = Run(
        _mode(check, precision),
        precision,
        device,
        max_shard_size,
        workers,
        plan_out,
        inputs,
        dims,
        progress,
        notify or ignore_stage,
    )
    with in_memory.files(model, output) as files:
        result = _expanded(files.source, files.output, request, run)
        if output is None:
            result = replace(result, output=None, files={}, model=files.grown())
        return replace(result, source=files.source_name)


@dataclass(frozen=True)
class Run:
    """How a growth is written and validated. The fields are arguments of `expand`."""

    mode: Mode | None
    precision: Precision
    device: Device
    max_shard_size: int | None
    workers: int | None
    plan_out: str | os.PathLike[str] | None
    inputs: Inputs | None
    dims: Mapping[str, int] | None
    progress: Progress | None
    say: Notify


def _expanded(model: Path, out: Path, request: _Request, run: Run) -> Expansion:
    """Grow a model file into another file."""
    clock = Clock()
    return make(_planned(model, out, request, run.plan_out, run.say, clock), out, run, clock)


def make(planned: Planned, out: Path, run: Run, clock: Clock) -> Expansion:
    """Write, validate and publish a planned model.

    Raises:
        CannotWrite: an output file cannot be written.
        ModelsDiffer: the written model is not what was planned. No file is published.
    """
    say = run.say
    analysis, plan, big = planned.analysis, planned.plan, planned.big
    check_room(out, analysis.model, big)
    validation: Validation | None = None
    pair = Pair(
        analysis.dimensions,
        big,
        plan,
        run.device,
        wishes_of(analysis.model, run.inputs, run.dims),
        _untransformed(analysis),
    )
    prepared = None
    if run.mode is not None:
        say("running the source")
        prepared = prepare(analysis.path, pair, run.mode)
        clock.lap("validate")
    external = needs_data_file(big) or len(analysis.files) > 1 or run.max_shard_size is not None
    texts = {} if run.plan_out is None else {Path(run.plan_out): _text(plan)}
    with publication(out, beside=texts) as written:
        say("writing")
        check = None if prepared is None else CheckOfWritten(analysis.model, plan, written)
        answers = writer.save(
            big,
            written,
            external=external,
            max_shard_size=run.max_shard_size,
            workers=run.workers,
            progress=run.progress,
            keep=prepared is not None and prepared.stays_cached,
            check=None if check is None else check.begin,
        )
        clock.lap("write")
        if prepared is not None and check is not None:
            say("validating")
            pair = replace(pair, grown=check.grown)
            try:
                validation = validate_pair(prepared, pair, written, run.workers, check.report(answers))
            except Refused as problem:  # it names the file by its temporary place
                raise Refused(str(problem).replace(str(written), str(out))) from problem
            if run.precision == "float64":
                say("validating in float64")
                validation = _with_float64(validation, pair, analysis.model, written.parent)
            validation = _with_not_finite(validation, analysis)
            clock.lap("validate")
            if validation.problems:
                raise ModelsDiffer(_differs(out, validation))
        loading.check_unchanged(analysis.stamps)
        files = sizes_of_files(written)
        say("publishing")
    return replace(planned.result, validation=validation, seconds=clock.seconds, files=files)


MOST_TIMES, FREE_OF_LIMIT = 100, 10**9
"""A result that is larger than its source by more than this is a mistake of the user, unless it is small (bytes)."""


def check_room(out: Path, source: ir.Model, grown: ir.Model) -> None:
    """Check the size of the result before anything is written.

    Raises:
        CannotWrite: it is larger than the free space of its disk.
        BadRequest: it is more than `MOST_TIMES` as large as its source.
    """
    before, after = stored_bytes(source), stored_bytes(grown)
    if after > MOST_TIMES * before and after > FREE_OF_LIMIT:
        raise BadRequest(
            f"{out} would have {in_bytes(after)}, {after / max(before, 1):,.0f} times its source "
            f"({in_bytes(before)}): if you want that, grow in several steps"
        )
    free = shutil.disk_usage(out.resolve().parent).free
    if after > free:
        raise CannotWrite(f"{out} would have {in_bytes(after)}, and its disk has {in_bytes(free)} free")


def sizes_of_files(written: Path) -> dict[str, int]:
    """The files of a written model, the model itself first."""
    names = data_files(written.name)
    data = sorted(path for path in written.parent.iterdir() if names.fullmatch(path.name))
    return {path.name: path.stat().st_size for path in (written, *data)}


def plan_file(
    model: str | os.PathLike[str],
    factor: float | None = None,
    requests: Mapping[str, float] | None = None,
    *,
    sizes: Mapping[str, float] | None = None,
    like: str | os.PathLike[str] | None = None,
    maps: Mapping[str, SourceMap] | None = None,
    strategy: Strategy | str | None = None,
    strategies: Sequence[StrategyRule] = (),
    untie: bool = False,
    separate: bool = False,
    keep_interface: bool = False,
    layers: LayersRequest | None = None,
    depth: Depth = "identity",
    layers_at: LayersAt = "even",
    experts: Experts | None = None,
    more_experts: int | None = None,
    allow_change: bool = False,
    plan_out: str | os.PathLike[str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    notify: Notify | None = None,
) -> Expansion:
    """Plan the growth of a model file and report what it would do. No model is written.

    The arguments and errors are those of `expand`. The plan is written to `plan_out` if that is given.
    """
    request = _Request.of(
        factor,
        requests,
        maps,
        strategy,
        untie=untie,
        keep_interface=keep_interface,
        allow_change=allow_change,
        sizes=sizes,
        like=like,
        strategies=strategies,
        recipe=recipe,
        layers=layers,
        depth=depth,
        layers_at=layers_at,
        experts=experts,
        more_experts=more_experts,
        separate=separate,
    )
    planned = _planned(model, None, request, plan_out, notify or ignore_stage, Clock())
    if plan_out is not None:
        write_text(Path(plan_out), _text(planned.plan))
    return planned.result


def grown_model(
    model: GivenModel,
    factor: float | None = None,
    requests: Mapping[str, float] | None = None,
    *,
    sizes: Mapping[str, float] | None = None,
    like: str | os.PathLike[str] | None = None,
    maps: Mapping[str, SourceMap] | None = None,
    strategy: Strategy | str | None = None,
    strategies: Sequence[StrategyRule] = (),
    untie: bool = False,
    separate: bool = False,
    keep_interface: bool = False,
    layers: LayersRequest | None = None,
    depth: Depth = "identity",
    layers_at: LayersAt = "even",
    allow_change: bool = False,
) -> tuple[Plan, ir.Model]:
    """Grow a model without writing or validating it. Each grown tensor is computed when it is read.

    The arguments and errors are those of `expand`.

    Returns:
        The plan, and the grown model, which contains the plan.
    """
    request = _Request.of(
        factor,
        requests,
        maps,
        strategy,
        untie=untie,
        keep_interface=keep_interface,
        allow_change=allow_change,
        sizes=sizes,
        like=like,
        strategies=strategies,
        layers=layers,
        depth=depth,
        layers_at=layers_at,
        separate=separate,
    )
    request, _ = _with_transforms(model, request)
    analysis = analyse(model, request.transforms)
    _, plan = _plan(analysis, _with_target(analysis, request)[0])
    return plan, rewrite(analysis.model, plan)


def _untransformed(analysis: Analysis) -> ir.Model | None:
    """The source as its file has it, normalised; None if it was not transformed."""
    return source_of(analysis.path).model if analysis.transforms else None


def _text(plan: Plan) -> str:
    """The text of a plan's file."""
    return plan.dumps(indent=1) + "\n"


def _mode(check: bool | Mode, precision: Precision) -> Mode | None:
    if check is False:
        return None
    if check == "algebraic" and precision == "float64":
        raise BadRequest("an algebraic validation runs nothing, in no precision: leave out one of the two")
    return "auto" if check is True else check


def _with_not_finite(validation: Validation, analysis: Analysis) -> Validation:
    """The validation, with a note of the weights that are infinite or not a number."""
    named = named_not_finite(analysis.model)
    if not named:
        return validation
    return validation.with_notes(f"weights that are infinite or not a number grow as they are: {named}")


def _with_float64(validation: Validation, pair: Pair, source: ir.Model, folder: Path) -> Validation:
    """The validation, with a comparison of both models in float64."""
    assert pair.plan is not None
    scratch = folder / "float64"
    scratch.mkdir()
    wide = rewrite(source, pair.plan, ir.DataType.DOUBLE)
    outputs, by = validate_double(replace(pair, grown=wide), scratch)
    return replace(validation, double=outputs, double_by=by)


def _differs(out: Path, validation: Validation) -> str:
    first, *rest = validation.problems
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{out} was not written: the grown model differs from its source: {first}{more}"


def report_of(analysis: Analysis, out: Path | None, growth: Growth, plan: Plan, big: ir.Model) -> Expansion:
    """The report of what a plan does to a model, before anything is written."""
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
        count_parameters(_untransformed(analysis) or analysis.model),
        count_parameters(big),
        variants,
        quantised,
        sizes=_size_changes(growth),
        labels={named.name: named.label for named in growth.named if named.label},
        notes=notes_of(analysis.model.graph),
    )


def _size_changes(growth: Growth) -> tuple[SizeChange, ...]:
    """Every size that people have a name for, in the order of the graph's dimensions."""
    names = {named.dim: named.name for named in growth.named}
    after = {dim: source_map.grown for dim, (_, source_map) in growth.maps.items()}
    wanted = {dim: growth.rounded[name] for dim, name in names.items() if name in growth.rounded}
    exact = {dim: Fraction(grown) for dim, grown in after.items()} | wanted
    changes = [
        SizeChange(
            quantity.role,
            quantity.name,
            quantity.size,
            quantity.size_with(after),
            float(quantity.exact_size_with(exact)) if not wanted.keys().isdisjoint(quantity.dims) else None,
            tuple(names[dim] for dim in quantity.dims),
        )
        for quantity in quantities(growth.dimensions, growth.named)
    ]
    order = {named.name: number for number, named in enumerate(growth.named)}
    return tuple(sorted(changes, key=lambda change: min(order[name] for name in change.dims)))


def _why_kept(growth: Growth, dim: Dim) -> str:
    if dim in growth.beside:
        return "another factor of the same width grows"
    return explain(growth.dimensions, dim) if dim.pin is not None else "not asked to grow"


class Clock:
    """The seconds that each stage took."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Record the end of a stage, or of a part of it."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self.last, 3)
        self.last = now


def validate(
    small: GivenModel,
    big: GivenModel,
    device: Device = "auto",
    seed: int = 0,
    mode: Mode = "auto",
    workers: int | None = None,
    *,
    inputs: Inputs | None = None,
    dims: Mapping[str, int] | None = None,
) -> Validation:
    """Compare a grown model with its source, with the weights as they are stored.

    Args:
        small: the source: a path, an ``onnx.ModelProto`` or an ``onnx_ir.Model``.
        big: what was grown from it, in one of these forms.
        device: the device on which both models run.
        seed: the seed of the random inputs.
        mode: how to validate: "full", "algebraic" or "auto" (see `validation`).
        workers: the number of processes that compare tensors.
        inputs: the source's inputs: a path (see `validation.inputs.given`), or arrays by input.
        dims: numbers for the symbolic sizes of the source's inputs, by name.

    Returns:
        The validation, with notes if the grown model has no plan, or the plan of another source.

    Raises:
        BadModel: one of the models cannot be read.
        Refused, BadRequest: see `validation.validating.prepare`.
    """
    with in_memory.pair_of_files(small, big) as (source, grown):
        return _validated(source, grown, device, seed, mode, workers, inputs, dims)


validate_files = validate
"""The name of `validate` when it took only files."""


def _validated(
    small: Path,
    big: Path,
    device: Device,
    seed: int,
    mode: Mode,
    workers: int | None,
    inputs: Inputs | None,
    dims: Mapping[str, int] | None,
) -> Validation:
    """Compare a grown model file with its source."""
    grown = loading.load(big)
    plan = Plan.carried_by(grown.metadata_props)
    analysis = analyse(small, () if plan is None else plan.transforms)
    if plan is None:
        _check_order(small, big)
    wishes = wishes_of(analysis.model, inputs, dims, seed)
    pair = Pair(analysis.dimensions, grown, plan, device, wishes, _untransformed(analysis))
    result = validate_pair(prepare(analysis.path, pair, mode), pair, big, workers)
    if plan is None:
        return result.with_notes("the grown model carries no plan: its tensors were not compared, only its outputs")
    if plan.source:
        digests = provenance(analysis.model, {})
        differing = [part for part in ("graph", "weights") if plan.source.get(part) != digests[part]]
        if differing:
            return result.with_notes(
                f"the plan was made from another source: its {' and '.join(differing)} had other digests"
            )
    return result


def _check_order(small: Path, big: Path) -> None:
    """Refuse arguments that are swapped: the model given as the source carries a plan, made from the other one.

    Raises:
        BadRequest: they are.
    """
    plan = Plan.carried_by(loading.load(small).metadata_props)
    if plan is None:
        return
    own = provenance(source_of(big, plan.transforms).model, {})
    if all(plan.source.get(part) == own[part] for part in ("graph", "weights")):
        raise BadRequest(f"{small} was grown from {big}: the source comes first, as in: validate SOURCE GROWN")
