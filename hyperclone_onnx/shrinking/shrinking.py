"""Makes a small model file out of a large one: reads, computes, writes, compares, publishes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from hyperclone_onnx import in_memory
from hyperclone_onnx.analysis.analysing import Analysis, analyse, count_parameters
from hyperclone_onnx.analysis.quantities import quantities
from hyperclone_onnx.errors import BadRequest, ModelsDiffer, Refused
from hyperclone_onnx.expansion.making import Clock, Run, check_room, make, sizes_of_files
from hyperclone_onnx.expansion.report import Kept, SizeChange
from hyperclone_onnx.plan.plans import Plan, plan_of
from hyperclone_onnx.planning.asked import whole_numbers
from hyperclone_onnx.planning.picking import Select
from hyperclone_onnx.planning.request import whole_or_fraction
from hyperclone_onnx.progress import Notify, Progress, ignore_stage
from hyperclone_onnx.publishing.publication import check_output, publication, write_text
from hyperclone_onnx.reading import loading
from hyperclone_onnx.reading.in_memory import GivenModel
from hyperclone_onnx.rewriting.source_record import steps_undone
from hyperclone_onnx.shrinking.collapse import Collapsed, collapse, expert_residues, record_of
from hyperclone_onnx.shrinking.residue import Residue, overall, residues, together
from hyperclone_onnx.shrinking.selection import Wish, lost_inputs, plan_selection, read_chosen
from hyperclone_onnx.shrinking.text import inputs_from_text, is_text
from hyperclone_onnx.summaries import Summarised, Summary
from hyperclone_onnx.transforms.interface import places_of
from hyperclone_onnx.transforms.layers import LayersRequest, deepened
from hyperclone_onnx.transforms.registry import changing
from hyperclone_onnx.transforms.source import source_of
from hyperclone_onnx.validation.inputs.given import Inputs, wishes_of
from hyperclone_onnx.validation.outputs import OutputReport
from hyperclone_onnx.validation.running import Pair, run_grown, start_file
from hyperclone_onnx.validation.sessions import Device
from hyperclone_onnx.validation.validating import Mode, Validation, prepare
from hyperclone_onnx.validation.validating import validate as validate_pair
from hyperclone_onnx.writing import onnx_files as writer
from hyperclone_onnx.writing.onnx_files import needs_data_file

Method = Literal["collapse", "selection", "importance"]
METHODS: tuple[Method, ...] = ("collapse", "selection", "importance")


@dataclass(frozen=True, repr=False)
class Shrinkage(Summarised):
    """The report of a model that was made smaller."""

    method: Method
    source: str
    output: str | None
    parameters_before: int
    parameters_after: int
    plan: Plan
    """The plan of the growth that was undone, or of the selection."""
    sizes: tuple[SizeChange, ...] = ()
    """Every size that people have a name for, in the large and in the small model."""
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """The number of layers before and after, for each stack that became less deep."""
    residues: tuple[Residue, ...] = ()
    """How far the clones of each tensor have parted, for a growth that was undone."""
    apart: tuple[str, ...] = ()
    """Tensors that were one in the source of the growth, and that training made different: they stay several."""
    moved: tuple[OutputReport, ...] = ()
    """How far each output moved on the inputs that both models ran on."""
    cases: tuple[str, ...] = ()
    """The inputs that both models ran on."""
    validation: Validation | None = None
    """The comparison with the large model, where the small one must compute the same: its clones are tied."""
    kept: tuple[Kept, ...] = ()
    """The dimensions of which nothing was left out, and why, for a selection."""
    files: Mapping[str, int] = field(default_factory=dict)
    """The names of the written files, the model first and then its data files, with their sizes in bytes."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    model: Any = None
    """The small model, where `shrink` got no output path."""

    @property
    def residue(self) -> float:
        """The root mean square of all residues, each tensor counted by its elements."""
        return overall(self.residues)

    @property
    def is_tied(self) -> bool:
        """Whether all clones of the grown model are still as growth made them."""
        return all(residue.is_tied for residue in self.residues) and not self.apart

    @property
    def verdict(self) -> str:
        """The result in a few words."""
        if self.validation is not None:
            return f"the clones are tied, and the outputs are {self.validation.verdict}"
        if not self.moved:
            return "the outputs were not compared"
        return f"outputs moved by up to {max(report.max_relative for report in self.moved):.1e} (relative)"

    def summary(self) -> Summary:
        """The sizes, and how far the outputs moved."""
        where = self.output or ("in memory" if self.model is not None else "not written")
        line = (
            f"{self.source} -> {where} by {self.method}, {self.parameters_before:,} -> {self.parameters_after:,} "
            f"parameters, {self.verdict}"
        )
        rows = [(change.name, change.before, change.after) for change in self.sizes if change.before != change.after]
        return Summary(line, ("dimension", "from", "to"), rows)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, without the recipes of the tensors."""
        return {
            "method": self.method,
            "source": self.source,
            "output": self.output,
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "sizes": [
                {"role": size.role, "name": size.name, "from": size.before, "to": size.after} for size in self.sizes
            ],
            **({"layers": dict(self.layers)} if self.layers else {}),
            **(
                {
                    "tied": self.is_tied,
                    "residue": self.residue,
                    "residues": [asdict(residue) for residue in self.residues],
                    "apart": list(self.apart),
                }
                if self.method == "collapse"
                else {}
            ),
            "moved": [report.to_json() for report in self.moved],
            "cases": list(self.cases),
            "validation": None if self.validation is None else self.validation.to_json(),
            "files": dict(self.files),
            "seconds": dict(self.seconds),
            **({"notes": list(self.notes)} if self.notes else {}),
        }


def shrink(
    model: GivenModel,
    output: str | os.PathLike[str] | None = None,
    *,
    method: Method | None = None,
    factor: float | None = None,
    sizes: Mapping[str, float] | None = None,
    like: str | os.PathLike[str] | None = None,
    layers: LayersRequest | None = None,
    select: Select | str | os.PathLike[str] | Mapping[str, Sequence[int]] = "even",
    data: Inputs | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    scores: str | os.PathLike[str] | None = None,
    plan: str | os.PathLike[str] | Plan | None = None,
    source: str | os.PathLike[str] | None = None,
    check: bool | Mode = True,
    device: Device = "auto",
    max_shard_size: int | None = None,
    workers: int | None = None,
    plan_out: str | os.PathLike[str] | None = None,
    inputs: Inputs | None = None,
    dims: Mapping[str, int] | None = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Shrinkage:
    """Make a model smaller. The new file appears only when it is complete.

    Args:
        model: the path of the large model, an ``onnx.ModelProto`` or an ``onnx_ir.Model``. It is not changed.
        output: the file to write. Without it, the report has the small model as ``report.model``.
        method: how: "collapse" undoes a growth, "selection" keeps some of the rows, columns and layers, and
            "importance" those with the largest activations. By default it is "selection" if sizes are asked for, else
            "collapse".
        factor: for a selection, the factor of hidden, ffn, heads and other widths, below 1. It gives the nearest whole
            sizes.
        sizes: for a selection, a size by role or by dimension, e.g. ``{"ffn": 1024}``. It replaces the factor.
        like: for a selection, a Hugging Face folder, its config.json, or an ONNX file: the sizes are those of that
            model.
        layers: for a selection, the number of layers, or one for each stack. The first layers stay.
        select: which indices a selection keeps: "even" (evenly spaced), "first", or lists of indices by dimension, role
            or ``"layers"``: as a mapping, or as the path of a JSON file.
        data: inputs on which parts are scored and norms are measured (the forms of `inputs`, or the path of a
            text); by default random ones.
        tokenizer: for a text, a ``tokenizer.json``, or a folder that has one; by default the folder of the model.
        scores: for "importance", a file to which the scores are written, as JSON.
        plan: for "collapse", the plan of the growth if the model does not carry it: a plan, or the file that
            ``expand --plan-out`` wrote.
        source: for "collapse", a file with the graph of the small model if the grown one does not carry it. Its weights
            are not used.
        check: how the result of "collapse" is validated while the clones are tied: "full", "algebraic", "auto" (or
            True). False compares nothing.
        device: the device on which both models run.
        max_shard_size: the most bytes of one data file. Larger models get several data files.
        workers: the number of processes that compute and write. The written files do not depend on it.
        plan_out: for a selection, a file to which the plan is written too, as JSON.
        inputs: inputs on which both models run: a path (see `validation.inputs.given`), or arrays by input. By default
            they are random.
        dims: numbers for the symbolic sizes of random inputs, by name.
        progress: called after each written tensor, with the number of written tensors and the number of all tensors.
        notify: called with the name of each stage when it begins.

    Returns:
        The report.

    Raises:
        BadModel: a file is not a readable, complete ONNX model, or was changed meanwhile.
        BadRequest: an argument is wrong, or does not fit the model.
        Refused: the model cannot be made smaller in this way.
        CannotWrite: an output file cannot be written.
        ModelsDiffer: the clones are tied, and the small model does not compute the same. No file is published.
    """
    in_memory.check_output(output)
    wish = _wish(factor, sizes, like, layers, select)
    chosen_method = _method(method, wish, plan, source)
    if chosen_method != "importance" and scores is not None:
        raise BadRequest(f"scores are what the method importance finds, and the method is {chosen_method}")
    if chosen_method == "collapse" and data is not None:
        raise BadRequest("calibration data belong to the methods selection and importance, and not to collapse")
    wish = replace(wish, by_importance=chosen_method == "importance", data=data)
    run = Run(
        None if check is False else "auto" if check is True else check,
        "stored",
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
        if chosen_method == "collapse":
            given = plan if plan is None or isinstance(plan, Plan) else Path(plan)
            result = _collapsed(files.source, files.output, given, None if source is None else Path(source), run)
        else:
            words = None if tokenizer is None else Path(tokenizer)
            result = _selected(files.source, files.output, wish, run, scores, words)
        if output is None:
            result = replace(result, output=None, files={}, model=files.grown())
        return replace(result, source=files.source_name)


def _wish(
    factor: float | None,
    sizes: Mapping[str, float] | None,
    like: str | os.PathLike[str] | None,
    layers: LayersRequest | None,
    select: Select | str | os.PathLike[str] | Mapping[str, Sequence[int]],
) -> Wish:
    """The wish that is meant by arguments as people write them."""
    rule: Select = "even"
    chosen: Mapping[str, Sequence[int]] = {}
    if isinstance(select, Mapping):
        chosen = select
    elif select in ("even", "first"):
        rule = "first" if select == "first" else "even"
    else:
        chosen = read_chosen(Path(select))
    return Wish(
        Fraction(1 if factor is None else whole_or_fraction(factor)),
        whole_numbers(sizes, "sizes", "size"),
        layers,
        rule,
        chosen,
        None if like is None else Path(like),
    )


def _method(method: Method | None, wish: Wish, plan: object, source: object) -> Method:
    """The method, and a check that the other arguments belong to it.

    Raises:
        BadRequest: they do not.
    """
    if method is not None and method not in METHODS:
        raise BadRequest(f"no method {method!r}: it is one of {', '.join(METHODS)}")
    chosen: Method = method or ("collapse" if wish.is_empty else "selection")
    if chosen == "collapse" and not wish.is_empty:
        raise BadRequest("collapse gives the sizes of the source back: leave out sizes, or choose the method selection")
    if chosen != "collapse" and wish.is_empty:
        raise BadRequest("say how small: factor=0.5, sizes={'ffn': 1024}, like=TARGET, layers=6, or lists of indices")
    if chosen != "collapse" and (plan is not None or source is not None):
        raise BadRequest(f"a plan and a source belong to the method collapse, and not to {chosen}")
    return chosen


def _selected(
    model: Path, out: Path, wish: Wish, run: Run, scores: str | os.PathLike[str] | None, tokenizer: Path | None
) -> Shrinkage:
    """Keep some of the rows, columns and layers of a file."""
    clock = Clock()
    if scores is not None:
        check_output(Path(scores), {model.resolve(), out.resolve()})
    if is_text(wish.data):
        run.say("reading the text")
        text = Path(wish.data)  # type: ignore[arg-type]
        wish = replace(wish, data=inputs_from_text(analyse(model), text, tokenizer, run.device, run.dims))
    planned, measured = plan_selection(model, out, wish, run, clock)
    notes = list(planned.result.notes)
    if planned.analysis.transforms and run.mode is not None:
        lost = lost_inputs(planned.analysis, source_of(model).model)
        if lost:
            run = replace(run, mode=None)
            notes.append(
                f"the outputs were not compared: the layers that were left out have inputs such as {lost[0]!r}"
            )
    if run.inputs is None and wish.data is not None and run.mode is not None:
        run = replace(run, inputs=wish.data)
    made = make(planned, out, run, clock)
    if scores is not None:
        write_text(Path(scores), json.dumps(measured.to_json(), indent=1) + "\n")
    validation = made.validation
    if validation is not None and not validation.outputs:
        notes.append(f"the outputs were not compared: {validation.scope}")
    return Shrinkage(
        "importance" if wish.by_importance else "selection",
        str(model),
        str(out),
        made.parameters_before,
        made.parameters_after,
        made.plan,
        sizes=made.sizes,
        layers=deepened(made.plan.transforms),
        moved=() if validation is None else validation.outputs,
        cases=() if validation is None else validation.cases,
        kept=tuple(made.kept),
        files=made.files,
        seconds=made.seconds,
        notes=tuple(notes),
    )


def _collapsed(model: Path, out: Path, given: Path | Plan | None, source: Path | None, run: Run) -> Shrinkage:
    """Undo the growth of a file."""
    clock = Clock()
    run.say("reading")
    grown = loading.load(model)
    stamps = loading.stamps(loading.source_files(model, grown))
    plan = plan_of(
        model,
        grown.metadata_props,
        given,
        lack="there is no growth to undo",
        otherwise=", or choose another --method",
    )
    record = record_of(model, grown, plan, source)
    check_output(out, set(stamps))
    small = collapse(model, grown, plan, record)
    check_room(out, grown, small.model)
    clock.lap("plan")
    with publication(out) as written:
        run.say("writing")
        writer.save(
            small.model,
            written,
            external=needs_data_file(small.model) or len(stamps) > 1 or run.max_shard_size is not None,
            max_shard_size=run.max_shard_size,
            workers=run.workers,
            progress=run.progress,
        )
        clock.lap("write")
        run.say("comparing the clones")
        result = Shrinkage(
            "collapse",
            str(model),
            str(out),
            count_parameters(grown),
            count_parameters(small.model),
            plan,
            layers={name: (after, before) for name, (before, after) in deepened(plan.transforms).items()},
            residues=together([*residues(grown, plan, run.workers), *expert_residues(small.model)]),
            apart=small.apart,
        )
        clock.lap("residue")
        try:
            analysis = analyse(written, steps_undone(plan.transforms))
            result = replace(result, sizes=_sizes(analysis, plan))
            if run.mode is not None:
                run.say("running both models")
                result = _compared(result, model, grown, small, analysis, run)
        except Refused as problem:  # it names the file by its temporary place
            raise Refused(str(problem).replace(str(written), str(out))) from problem
        clock.lap("compare")
        loading.check_unchanged(stamps)
        files = sizes_of_files(written)
        run.say("publishing")
    return replace(result, files=files, seconds=clock.seconds)


def _sizes(analysis: Analysis, plan: Plan) -> tuple[SizeChange, ...]:
    """Every size that people have a name for, in the grown model and in the small one."""
    named = analysis.named
    names = {dimension.dim: dimension.name for dimension in named}
    grown = {dim: plan.dims[name].map.grown for dim, name in names.items() if name in plan.dims}
    return tuple(
        SizeChange(
            quantity.role,
            quantity.name,
            quantity.size_with(grown),
            quantity.size,
            dims=tuple(names[dim] for dim in quantity.dims),
        )
        for quantity in quantities(analysis.dimensions, named)
    )


def _compared(
    result: Shrinkage, big: Path, grown: ir.Model, small: Collapsed, analysis: Analysis, run: Run
) -> Shrinkage:
    """The result with a comparison of the outputs. Tied clones must give an equal model, others are measured.

    Raises:
        ModelsDiffer: the clones are tied, and the outputs differ.
    """
    plan, mode = result.plan, run.mode or "auto"
    untransformed = source_of(analysis.path).model if analysis.transforms else None
    wishes = wishes_of(analysis.model, run.inputs, run.dims)
    pair = Pair(analysis.dimensions, grown, plan, run.device, wishes, untransformed)
    must_be_equal = result.is_tied and plan.preserves and not changing(plan.transforms)
    prepared = prepare(analysis.path, pair, mode if must_be_equal else "auto")
    if must_be_equal:
        validation = validate_pair(prepared, pair, big, run.workers)
        trained = _trained_layers(validation, analysis)
        if not validation.problems:
            return replace(result, validation=validation)
        if not trained:
            raise ModelsDiffer(
                f"{result.output} was not written: the clones of {big} are tied, and the small model differs from it: "
                f"{validation.problems[0]}"
            )
        result = replace(result, notes=(*result.notes, "the new layers were trained: without them the outputs move"))
    if prepared.expected is None or prepared.mode != "full":
        why = f"the outputs were not compared: {prepared.scope}"
        return replace(result, notes=(*result.notes, why))
    ran = run_grown(pair, prepared.expected, start_file(big, run.device, grown))
    broken = next((report for report in ran.outputs if report.problem), None)
    if broken is not None and broken.problem.startswith("the grown model does not run"):
        raise Refused(f"{big}: {broken.problem}")
    return replace(result, moved=ran.outputs, cases=prepared.expected.labels)


def _trained_layers(validation: Validation, analysis: Analysis) -> bool:
    """Whether only tensors of layers that growth added differ from what growth made of them."""
    wrong = () if validation.tensors is None else validation.tensors.wrong
    new = [name for name, placed in places_of(analysis.model.graph).items() if placed.is_new]
    return bool(wrong) and all(any(text.startswith(f"{name}: ") for name in new) for text in wrong)
