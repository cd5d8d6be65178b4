"""Grow a Hugging Face checkpoint by the plan that grew its ONNX file.

`grow_checkpoint` runs the stages one after the other: it reads, matches, configures, measures, writes and validates.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.errors import BadModel, BadRequest, CannotWrite, ModelsDiffer, Refused
from hyperclone_onnx.frameworks.hugging_face import sources
from hyperclone_onnx.frameworks.hugging_face.assembly import Assembly, Chooser, Given, zero
from hyperclone_onnx.frameworks.hugging_face.checking import (
    Error,
    Feeding,
    FileRunner,
    compare_with_source,
    feeding,
    outputs,
)
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, load, read_checkpoint
from hyperclone_onnx.frameworks.hugging_face.configuration import Change, Search, written_config
from hyperclone_onnx.frameworks.hugging_face.layout import LaidOut, Layout, squeezed
from hyperclone_onnx.frameworks.hugging_face.matching import Matches, match
from hyperclone_onnx.frameworks.hugging_face.measuring import DoesNotRun, Runs, effective, measured
from hyperclone_onnx.frameworks.hugging_face.reading import MANIFEST, manifest
from hyperclone_onnx.frameworks.hugging_face.report import Report
from hyperclone_onnx.frameworks.hugging_face.scales import Compensation
from hyperclone_onnx.frameworks.hugging_face.sources import Grown, Source, read_grown
from hyperclone_onnx.progress import Notify, tell_nobody
from hyperclone_onnx.validation.inputs.given import Inputs
from hyperclone_onnx.writing.safetensors_files import write_safetensors

Array = npt.NDArray[Any]

LARGEST_FILE = 5_000_000_000
"""The most bytes of one safetensors file. This was the default of transformers for a long time."""


def grow_checkpoint(
    big: Path,
    like: Path,
    folder: Path,
    *,
    source: Path | None = None,
    inputs: Inputs | None = None,
    dims: Mapping[str, int] | None = None,
    notify: Notify | None = None,
) -> Report:
    """Grow the checkpoint `like` by the plan that grew the ONNX file `big`, and write it into `folder`.

    Args:
        big: the grown ONNX file. Its weights may have been trained since.
        like: the checkpoint from which the source ONNX file was exported.
        folder: an empty folder to write into. Its contents are correct only if this function returns.
        source: the ONNX file from which `big` was grown. Needed only if `big` has been trained.
        inputs: inputs to compare on, the file's or its source's (see `validation.inputs.given`); random by default.
        dims: numbers for symbolic sizes of random inputs, by name.
        notify: called with the name of each stage when the stage begins.

    Raises:
        BadModel: a file cannot be read, or `like` is not the checkpoint of the file's source.
        BadRequest: the file carries no plan, or it has been trained and no source is given.
        Refused: no configuration has the new sizes, or the model derives constants from its sizes that cannot be
            compensated.
        ModelsDiffer: the result does not compute what the source or the file computes.
        CannotWrite: the folder cannot be written.
        MissingExtra: transformers is not installed.
    """
    big, like, folder = Path(big), Path(like), Path(folder)
    say = notify or tell_nobody
    say("reading")
    grown, checkpoint = read_grown(big), read_checkpoint(like)
    given = Given.read(checkpoint)
    say("matching")
    stored, trained = _sources(grown, source)
    matches = match(stored, given.floating, grown.order, grown.shared)
    _check_matches(checkpoint, grown, stored, given, matches)
    say("configuring")
    chooser = Chooser(grown, given, matches)
    search = Search(checkpoint, grown.plan, chooser.certain(), given.shapes)
    changes = search.run()
    say("measuring")
    fed = feeding(big, given.model, inputs, dims)
    runs = Runs.of(given, fed, checkpoint, chooser.doubtful)
    pruned = effective(checkpoint, search, changes, runs, given)
    given.release()
    refusal: Refused | None = None
    for attempt in pruned:
        assembly = chooser.assembled(search.shapes(attempt) or {})
        try:
            folded = measured(checkpoint, attempt, assembly, stored, runs, grown)
        except Refused as problem:
            refusal = problem if refusal is None or isinstance(refusal, DoesNotRun) else refusal
            continue
        break
    else:
        assert refusal is not None
        raise refusal
    say("writing")
    report = Report(str(big), trained=trained)
    try:
        _write(folder, checkpoint, attempt, assembly, folded, report)
    except OSError as problem:
        raise CannotWrite(f"{folder}: cannot be written ({problem.strerror or problem})") from problem
    say("validating")
    _check(folder, checkpoint, fed, runs, assembly, report)
    return report


def _sources(grown: Grown, source: Path | None) -> tuple[dict[str, Source], bool]:
    """The source's initializers, and whether the grown file has been trained."""
    if source is None:
        stored, torn = sources.added_up(grown)
        if torn:
            raise BadRequest(
                f"{grown.path}: has been trained (the repeats of {torn[0]!r} differ): "
                "name the ONNX file that it was grown from with --source"
            )
        return stored, False
    stored = sources.from_file(grown, source)
    trained = any(
        not np.array_equal(grown.remade(name, tensor.array), grown.tensors[name].numpy(), equal_nan=True)
        for name, tensor in stored.items()
        if tensor.array.size > 1
    )
    return stored, trained


def _check_matches(
    checkpoint: Checkpoint, grown: Grown, stored: Mapping[str, Source], given: Given, matches: Matches
) -> None:
    """Reject a checkpoint from which the file was not exported.

    Raises:
        BadModel: no matrix of the checkpoint is in the file; or an unmatched tensor has the shape of an unmatched
            initializer, so that the two should be equal and are not.
    """
    hint = f"{checkpoint.folder} is not the checkpoint that {grown.path} comes from"
    weights = [name for name, array in given.floating.items() if array.ndim > 1]
    if not any(name in matches.layouts for name in weights):
        raise BadModel(f"{hint}: none of its {len(weights)} matrices is in the file (if it was trained: --source)")
    for name, array in given.floating.items():
        if name in matches.layouts:
            continue
        shape = sorted(sources.squeezed_shape(array))
        for initializer in matches.unused:
            candidate = stored[initializer].array
            if array.size > 1 and sorted(sources.squeezed_shape(candidate)) == shape:
                counts = (_differing(stored[initializer], array), array.size)
                raise BadModel(
                    f"{hint}: {counts[0]} of the {counts[1]} elements of {name} differ from {initializer!r} "
                    "(this is another checkpoint, or the exporter merged other tensors into this one)"
                )


def _differing(theirs: Source, ours: Array) -> int:
    """The number of elements that differ beyond rounding, as the tensors are or transposed."""
    a, b = squeezed(theirs.array), squeezed(ours)
    counts = [int((np.abs(view - b) > theirs.tolerance).sum()) for view in (a, a.T) if view.shape == b.shape]
    return min(counts, default=b.size)


# -- writing ----------------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    changes: Sequence[Change],
    assembly: Assembly,
    folded: Mapping[str, Compensation],
    report: Report,
) -> None:
    """Write weights, configuration, manifest and the files that are copied, and fill the report.

    A tensor that is not in the file gets the type that most tensors of the file have.
    """
    grown, given = assembly.grown, assembly.given
    types = Counter(
        grown.tensors[piece.initializer].dtype.numpy()
        for layout in assembly.layouts.values()
        for piece in layout.pieces
    )
    main = types.most_common(1)[0][0]
    entries: dict[str, Any] = {}
    layouts: dict[str, Layout] = {}
    for name in given.names:
        fold = folded.get(name, Compensation(1.0))
        if name in assembly.layouts:
            layout = assembly.layouts[name]
            layout = layout.scaled(fold.factor, fold.offset) if name in folded else layout
            layouts[name] = layout
            kind = grown.tensors[layout.pieces[0].initializer].dtype.numpy()
            entries[name] = LaidOut(layout, lambda initializer: grown.tensors[initializer].numpy(), grown.axis, kind)
            report.matched[name] = layout.described()
            if all(grown.recipe(piece.initializer) is None for piece in layout.pieces):
                report.unchanged[name] = "no axis of it grows"
        elif name in assembly.repeated:
            repeated = assembly.repeated[name]
            enlarged = repeated.made(fold.factor, fold.offset)
            entries[name] = enlarged.astype(main)
            if repeated.grows:
                report.repeated[name] = f"{list(repeated.array.shape)} -> {list(enlarged.shape)}"
            else:
                report.unchanged[name] = "it is not in the file, and keeps its size"
        else:
            array = given.others[name]
            entries[name] = array
            report.unchanged[name] = "whole numbers"
        if name in folded:
            plus = f" of it plus {fold.offset:g}" if fold.offset else ""
            report.compensations[name] = f"times {fold.factor:.8g}{plus}"
    files = write_safetensors(entries, folder, LARGEST_FILE, metadata={"format": "pt"})
    report.weights = [file.name for file in files]
    fields = written_config(checkpoint, changes)
    report.config = {change.name: (change.before, change.after) for change in changes}
    for key in ("dtype", "torch_dtype"):
        if key in fields and fields[key] != main.name:
            report.config[key] = (fields[key], main.name)
            fields[key] = main.name
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    report.copied = checkpoint.copy_files(folder)
    also = {}
    for initializer, (name, layout) in assembly.also.items():
        fold = folded.get(name, Compensation(1.0))
        also[initializer] = name, layout.scaled(fold.factor, fold.offset) if name in folded else layout
    elsewhere = {name: np.asarray(entries[name]) for name in assembly.repeated}
    text = json.dumps(manifest(grown, layouts, also, elsewhere), separators=(",", ":"))
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    _note_sizes(folder, report)
    report.notes += [
        f"{name} was left out: its weights do not belong to the model" for name in checkpoint.other_weights
    ]


def _note_sizes(folder: Path, report: Report) -> None:
    """Note in the report which copied JSON files still state a size that has grown (a pooling layer's width)."""
    changed = {before: after for before, after in report.config.values() if isinstance(before, int)}
    for name in report.copied:
        path = folder / name
        if path.suffix != ".json" or path.stat().st_size > 1 << 16:
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        for key, value in data.items() if isinstance(data, dict) else ():
            if type(value) is int and value in changed and "dim" in key:
                report.notes.append(
                    f"{name} is copied as it is: its {key} is {value}, {changed[value]} in the grown model"
                )


# -- checking ---------------------------------------------------------------------------------------------------


def _check(folder: Path, checkpoint: Checkpoint, fed: Feeding, runs: Runs, assembly: Assembly, report: Report) -> None:
    """Load the written checkpoint and compare its outputs with the source's and the file's.

    Raises:
        ModelsDiffer: the outputs differ by more than the tolerance, or a tensor is missing.
        Refused: the file runs on none of the inputs.
    """
    loaded = load(folder, checkpoint.model_class)
    extra = loaded.missing - assembly.given.loaded.missing
    if extra:
        raise ModelsDiffer(f"the grown checkpoint lacks {sorted(extra)[0]}")
    for name in loaded.missing:
        zero(loaded.model, name)
    model = loaded.model.float()
    report.tolerance, report.tolerance_reason = fed.tolerance
    file = FileRunner(assembly.grown.path, assembly.grown.plan)
    to_source: list[Error] = []
    to_file: list[Error] = []
    for case, expected in runs.outputs:
        computed = outputs(model, case)
        if not report.trained:
            to_source += compare_with_source(computed, expected, assembly.orders)
        try:
            to_file += file.compare(case, computed)
        except RuntimeError:
            continue
        report.cases.append(case.label)
    if not to_file:
        raise Refused(f"{assembly.grown.path}: ONNX Runtime does not run it on any of the inputs that we tried")
    if to_source:
        worst = Error.worst(to_source)
        report.error_to_source = worst.relative
        _demand(worst, report, "its source's")
    worst = Error.worst(to_file)
    report.error_to_file = worst.relative
    apart = [name for name, (_, layout) in assembly.also.items() if report.trained and len(layout.shape) > 1]
    hint = (
        f" (the file stores {apart[0]!r} separately from a tensor that is one with it in the checkpoint)"
        if apart
        else ""
    )
    _demand(worst, report, "the file's in ONNX Runtime", hint)


def _demand(worst: Error, report: Report, whose: str, hint: str = "") -> None:
    """Raise `ModelsDiffer` where the worst error is larger than the tolerance, or not a number."""
    if not worst.relative <= report.tolerance:
        shown = (
            "its shape"
            if math.isinf(worst.relative)
            else f"relative error {worst.relative:.1e} > {report.tolerance:.1e}"
        )
        raise ModelsDiffer(f"the grown checkpoint's output {worst.name} differs from {whose}: {shown}{hint}")
