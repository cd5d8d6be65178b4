"""Grows a model: reads, plans, rewrites, writes, validates, publishes. Each stage can also be used by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import onnx_ir as ir

from hyperclone_onnx import in_memory
from hyperclone_onnx.analysis.analysing import Analysis, analyse
from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.expansion.making import Clock, Planned, Precision, Run, make, text_of
from hyperclone_onnx.expansion.report import Expansion, report_of
from hyperclone_onnx.expansion.request import (
    GrowthOptions,
    GrowthRequest,
    growth_and_plan,
    with_target,
    with_transforms,
)
from hyperclone_onnx.plan.maps import SourceMap
from hyperclone_onnx.plan.plans import Plan, TransformStep
from hyperclone_onnx.plan.strategies import Strategy, StrategyRule
from hyperclone_onnx.planning.experts import Experts
from hyperclone_onnx.progress import Notify, Progress, ignore_stage
from hyperclone_onnx.publishing.publication import check_output, data_name, write_text
from hyperclone_onnx.reading.in_memory import GivenModel
from hyperclone_onnx.rewriting.rewriting import rewrite
from hyperclone_onnx.rewriting.source_record import METADATA_KEY as SOURCE_KEY
from hyperclone_onnx.rewriting.source_record import record_source, steps_kept
from hyperclone_onnx.transforms.layers import Depth, LayersAt, LayersRequest
from hyperclone_onnx.transforms.source import source_of
from hyperclone_onnx.validation.inputs.given import Inputs
from hyperclone_onnx.validation.sessions import Device
from hyperclone_onnx.validation.validating import Mode


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
    request = GrowthRequest.of(
        factor,
        requests,
        maps=maps,
        strategy=strategy,
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


def _expanded(model: Path, out: Path, request: GrowthRequest, run: Run) -> Expansion:
    """Grow a model file into another file."""
    clock = Clock()
    return make(_planned(model, out, request, run.plan_out, run.say, clock), out, run, clock)


def plan_file(
    model: str | os.PathLike[str],
    factor: float | None = None,
    requests: Mapping[str, float] | None = None,
    *,
    plan_out: str | os.PathLike[str] | None = None,
    notify: Notify | None = None,
    **options: Unpack[GrowthOptions],
) -> Expansion:
    """Plan the growth of a model file, and report the plan. No model is written.

    The arguments and errors are those of `expand`. The plan is written to `plan_out` if that is given.
    """
    planned = planned_model(model, factor, requests, plan_out=plan_out, notify=notify, **options)
    if plan_out is not None:
        write_text(Path(plan_out), text_of(planned.plan))
    return planned.result


def planned_model(
    model: str | os.PathLike[str],
    factor: float | None = None,
    requests: Mapping[str, float] | None = None,
    *,
    plan_out: str | os.PathLike[str] | None = None,
    notify: Notify | None = None,
    **options: Unpack[GrowthOptions],
) -> Planned:
    """Plan the growth of a model file. Nothing is written: each tensor of the result is computed when it is read.

    The arguments and errors are those of `expand`. `plan_out` is only checked.
    """
    request = GrowthRequest.of(factor, requests, **options)
    return _planned(model, None, request, plan_out, notify or ignore_stage, Clock())


def grown_model(
    model: GivenModel,
    factor: float | None = None,
    requests: Mapping[str, float] | None = None,
    **options: Unpack[GrowthOptions],
) -> tuple[Plan, ir.Model]:
    """Grow a model without writing or validating it. Each grown tensor is computed when it is read.

    The arguments and errors are those of `expand`.

    Returns:
        The plan, and the grown model, which contains the plan.
    """
    request = GrowthRequest.of(factor, requests, **options)
    request, _ = with_transforms(model, request)
    analysis = analyse(model, request.transforms)
    _, plan = growth_and_plan(analysis, with_target(analysis, request)[0])
    return plan, rewrite(analysis.model, plan)


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
    request = GrowthRequest.of(
        factor,
        requests,
        maps=maps,
        strategy=strategy,
        untie=untie,
        keep_interface=keep_interface,
        allow_change=allow_change,
        sizes=sizes,
        like=like,
        strategies=strategies,
    )
    return growth_and_plan(analysis, with_target(analysis, request)[0])[1]


def _planned(
    model: str | os.PathLike[str],
    out: Path | None,
    request: GrowthRequest,
    plan_out: str | os.PathLike[str] | None,
    say: Notify,
    clock: Clock,
) -> Planned:
    """Read a model, check the paths of the result and of the plan, and make the plan."""
    say("reading")
    request, layers_before = with_transforms(model, request)
    analysis = analyse(model, request.transforms)
    used_files = set(analysis.files)
    if out is not None:
        check_output(out, used_files)
        used_files |= {out.resolve(), out.with_name(data_name(out)).resolve()}
    if plan_out is not None:
        check_output(Path(plan_out), used_files)
    say("planning")
    request, likeness = with_target(analysis, request)
    if likeness is not None and likeness.layers is not None and layers_before is not None:
        likeness = replace(likeness, layers=(layers_before, likeness.layers[1]))
    growth, plan = growth_and_plan(analysis, request)
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


def _mode(check: bool | Mode, precision: Precision) -> Mode | None:
    if check is False:
        return None
    if check == "algebraic" and precision == "float64":
        raise BadRequest("an algebraic validation runs nothing, in no precision: leave out one of the two")
    return "auto" if check is True else check
