"""Writes, validates and publishes a planned model."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import Analysis, stored_bytes, untransformed
from hyperclone_onnx.errors import BadRequest, CannotWrite, ModelsDiffer, Refused, in_bytes
from hyperclone_onnx.expansion.report import Expansion
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.progress import Notify, Progress
from hyperclone_onnx.publishing.journal import data_files
from hyperclone_onnx.publishing.publication import publication
from hyperclone_onnx.reading import loading
from hyperclone_onnx.rewriting.rewriting import rewrite
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


@dataclass(frozen=True)
class Planned:
    """A model that was read, and the plan of its growth."""

    analysis: Analysis
    plan: Plan
    big: ir.Model
    """The grown model. Its tensors are computed when they are written."""
    result: Expansion


def make(planned: Planned, out: Path, run: Run, clock: Clock) -> Expansion:
    """Write, validate and publish a planned model.

    Raises:
        CannotWrite: an output file cannot be written.
        ModelsDiffer: the written model differs from the plan or from its source. No file is published.
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
        untransformed(analysis),
    )
    prepared = None
    if run.mode is not None:
        say("running the source")
        prepared = prepare(analysis.path, pair, run.mode)
        clock.lap("validate")
    external = needs_data_file(big) or len(analysis.files) > 1 or run.max_shard_size is not None
    texts = {} if run.plan_out is None else {Path(run.plan_out): text_of(plan)}
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
            validation = _with_not_finite(validation, analysis, check.finite)
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


def _with_not_finite(validation: Validation, analysis: Analysis, finite: frozenset[str]) -> Validation:
    """The validation, with a note of the weights that are infinite or not a number; some are known to be `finite`."""
    named = named_not_finite(analysis.model, finite=finite)
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


def text_of(plan: Plan) -> str:
    """The text of the file of a plan."""
    return plan.dumps(indent=1) + "\n"
