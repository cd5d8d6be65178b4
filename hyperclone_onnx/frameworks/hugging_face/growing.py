"""Grow a Hugging Face checkpoint by the plan that grew its ONNX file.

`grow_checkpoint` runs the stages one after the other: it reads, matches, configures, measures, writes and validates.
"""

from __future__ import annotations

import gc
import itertools
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, BadRequest, CannotWrite, ModelsDiffer, Refused
from hyperclone_onnx.frameworks.checkpoints import read_weights
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import values
from hyperclone_onnx.frameworks.depth import source_places
from hyperclone_onnx.frameworks.hugging_face import sources
from hyperclone_onnx.frameworks.hugging_face.assembly import Assembly, Chooser, Given, zero
from hyperclone_onnx.frameworks.hugging_face.checking import (
    Error,
    Feeding,
    FileRunner,
    compare_with_source,
    feeding,
    outputs,
    torch_feeds,
)
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, read_checkpoint, weights_of
from hyperclone_onnx.frameworks.hugging_face.configuration import Change, Search, built_shapes
from hyperclone_onnx.frameworks.hugging_face.deeper import deeper
from hyperclone_onnx.frameworks.hugging_face.layout import squeezed, squeezed_shape
from hyperclone_onnx.frameworks.hugging_face.matching import Matches, match
from hyperclone_onnx.frameworks.hugging_face.measuring import Compared, DoesNotRun, Runs, effective, expected, measured
from hyperclone_onnx.frameworks.hugging_face.mixtures import grow_mixture
from hyperclone_onnx.frameworks.hugging_face.report import Report
from hyperclone_onnx.frameworks.hugging_face.scales import Compensation
from hyperclone_onnx.frameworks.hugging_face.shortening import for_all_layers, shortened
from hyperclone_onnx.frameworks.hugging_face.sources import Grown, Source, grown_from, read_grown, small_initializers
from hyperclone_onnx.frameworks.hugging_face.streaming import TooLarge, need_memory, open_model
from hyperclone_onnx.frameworks.hugging_face.verifying import (
    WrongTensors,
    check_loads,
    check_tensors,
    first_wrong_layer,
)
from hyperclone_onnx.frameworks.hugging_face.writing import Writer
from hyperclone_onnx.planning.experts import mixtures
from hyperclone_onnx.progress import Notify, Progress, ignore_stage
from hyperclone_onnx.validation.inputs.given import Inputs
from hyperclone_onnx.writing.safetensors_files import LARGEST_FILE

Array = npt.NDArray[Any]

COPIES = 4
"""The number of copies of the largest tensor, in float32, that are in memory at a time."""

IN_MEMORY = Path("model.onnx")
"""The name of a grown model that is no file."""


def grow_checkpoint(
    big: Path | ir.Model,
    like: Path,
    folder: Path,
    *,
    source: Path | None = None,
    trained: bool | None = None,
    dtype: str | None = None,
    largest_file: int | None = None,
    inputs: Inputs | None = None,
    dims: Mapping[str, int] | None = None,
    notify: Notify | None = None,
    progress: Progress | None = None,
) -> Report:
    """Grow the checkpoint `like` by the plan that grew the ONNX file `big`, and write it into `folder`.

    Args:
        big: the grown ONNX file, whose weights may have been trained since; or the grown model, whose tensors are
            computed when they are read. Such a model is no file, so the result is compared with the source only.
        like: the checkpoint from which the source ONNX file was exported.
        folder: an empty folder to write into. Its contents are correct only if this function returns.
        source: the ONNX file from which `big` was grown. Needed only if `big` has been trained or has more layers.
        trained: whether `big` has been trained; by default we find out.
        dtype: the type of the floating tensors that are written, one of `targets.DTYPES`. By default each tensor keeps
            the type that it has in `like`.
        largest_file: the most bytes of weights in one file. By default the size of the largest file of `like`, or
            `LARGEST_FILE` if one file has all its weights.
        inputs: inputs to compare on, the file's or its source's (see `validation.inputs.given`); random by default.
        dims: numbers for symbolic sizes of random inputs, by name.
        notify: called with the name of each stage when the stage begins.
        progress: called after each written tensor, with the bytes of all written tensors and those of all tensors.

    Raises:
        BadModel: a file cannot be read, or `like` is not the checkpoint of the file's source.
        BadRequest: the file carries no plan; or it has been trained or has more layers, and no source is given.
        Refused: no configuration has the new sizes, or the model derives constants from its sizes that cannot be
            compensated.
        ModelsDiffer: the result does not compute what the source or the file computes.
        CannotWrite: the folder cannot be written.
        MissingExtra: transformers is not installed.
    """
    like, folder = Path(like), Path(folder)
    say = notify or ignore_stage
    say("reading")
    grown = grown_from(big, IN_MEMORY) if isinstance(big, ir.Model) else read_grown(Path(big))
    checkpoint = read_checkpoint(like)
    if grown.plan.strategy.law.draws_the_rest:
        raise Refused(
            f"{grown.path}: the strategy {grown.plan.strategy.name!r} drew most of its numbers, so the tensors of the "
            "checkpoint cannot be found in it. Hand the file to PyTorch, JAX or safetensors instead"
        )
    if mixtures(grown.plan.transforms):
        how: dict[str, Any] = {"dtype": dtype, "largest_file": largest_file, "inputs": inputs, "dims": dims}
        return grow_mixture(grown, checkpoint, folder, source, **how, say=say)
    as_given, given = checkpoint, Given.read(checkpoint)
    say("matching")
    places = source_places(grown.path, grown.plan, source)
    stored, trained = _sources(grown, source, folder.parent, trained)
    fed = feeding(big, given.model, inputs, dims)
    more_layers: Sequence[Change] = ()
    if places:
        assert source is not None
        small, order = small_initializers(source)
        now = {placed.source: name for name, placed in places.items() if not placed.is_new}
        matches = match(small, given.floating, order, lambda name: grown.shared(now.get(name, name)))
        _check_matches(checkpoint, grown, small, given, matches)
        say("adding layers")
        made = deeper(checkpoint, given, matches, grown.plan, places, stored, fed)
        checkpoint, given, matches, more_layers = made.checkpoint, made.given, made.matches, made.changes
    else:
        matches = match(stored, given.floating, grown.order, grown.shared)
        _check_matches(checkpoint, grown, stored, given, matches)
    say("configuring")
    chooser = Chooser(grown, given, matches)
    search = Search(checkpoint, grown.plan, chooser.certain(), given.shapes)
    changes = search.run()
    say("measuring")
    compared = expected(given, fed, checkpoint)
    # New layers that add nothing are full of zeros, which have every scale.
    short = None if more_layers else shortened(checkpoint, given.shapes)
    given.release()
    work = _Work(
        folder,
        checkpoint,
        grown,
        given,
        stored,
        chooser,
        search,
        changes,
        fed,
        compared,
        trained,
        more_layers,
        as_given,
        not isinstance(big, ir.Model),
    )
    parts = [checkpoint] if short is None else [short, checkpoint]
    before: Refused | ModelsDiffer | None = None
    for part in parts:
        try:
            settled = work.settled(part)
            if settled is None:
                continue
            say("writing")
            writer, report = work.write(settled, dtype, largest_file, progress)
            say("validating")
            work.check(writer, report)
        except WrongTensors:
            raise
        except TooLarge as problem:
            if before is None:
                raise
            raise type(before)(f"{before} ({problem})") from problem
        except (Refused, ModelsDiffer) as problem:
            if part is parts[-1]:
                raise
            before = problem
            say("measuring all layers")
            _empty(folder)
            continue
        return report
    raise AssertionError("the whole model is measured last, and that gives a report or an error")


@dataclass(frozen=True)
class _Settled:
    """The changed fields of the configuration, how the tensors are made, and the factors that they get."""

    changes: Sequence[Change]
    assembly: Assembly
    folded: Mapping[str, Compensation]


@dataclass(frozen=True)
class _Work:
    """What the stages after the search for a configuration need."""

    folder: Path
    checkpoint: Checkpoint
    grown: Grown
    given: Given
    stored: Mapping[str, Source]
    chooser: Chooser
    search: Search
    changes: list[Change]
    fed: Feeding
    compared: Compared
    trained: bool
    more_layers: Sequence[Change]
    """The changes of the configuration that say more layers."""
    source_checkpoint: Checkpoint
    """The checkpoint as it was given, without the layers that growth adds."""
    has_file: bool
    """Whether there is a grown file, with which the result is compared too."""

    def settled(self, part: Checkpoint) -> _Settled | None:
        """Measure the whole model or some of its layers. None if these layers do not say what the others need.

        Raises:
            Refused: no factors make the models equal, under no changes of the configuration.
        """
        self._check_memory(part)
        runs = Runs.of(part, self.compared[0][0], self.given, self.chooser.doubtful)
        refusal: Refused | None = None
        for attempt in self._attempts(part, runs):
            assembly = self.chooser.assembled(self.search.shapes(attempt) or {})
            try:
                folded = measured(part, attempt, assembly, self.stored, runs, self.grown)
            except Refused as problem:
                refusal = problem if refusal is None or isinstance(refusal, DoesNotRun) else refusal
                continue
            factors = for_all_layers(folded, runs.names, self.given.names)
            return None if factors is None else _Settled(attempt, assembly, factors)
        assert refusal is not None
        raise refusal

    def _attempts(self, part: Checkpoint, runs: Runs) -> Iterator[list[Change]]:
        """Sets of changes to try, the likeliest first. The search goes on only if those before were refused."""
        tried: set[frozenset[Change]] = set()
        for changes in itertools.chain([self.changes], self.search.others(self.changes)):
            for attempt in effective(part, self.search, changes, runs, self.given):
                if frozenset(attempt) not in tried:
                    tried.add(frozenset(attempt))
                    yield attempt

    def _check_memory(self, part: Checkpoint) -> None:
        """Check that what is measured fits in free memory, before the long work.

        Raises:
            TooLarge: it does not fit.
        """
        before, after = built_shapes(part, ()) or {}, built_shapes(part, self.changes) or {}
        largest = max(map(math.prod, after.values()), default=0)
        layers = "all layers" if part is self.checkpoint else "its first layers"
        size = 4 * (sum(map(math.prod, (*before.values(), *after.values()))) + COPIES * largest)
        need_memory(self.checkpoint, f"the constants of {layers} must be measured", size)

    def write(
        self, settled: _Settled, dtype: str | None, largest_file: int | None, progress: Progress | None
    ) -> tuple[Writer, Report]:
        """Write the checkpoint.

        Raises:
            CannotWrite: the folder cannot be written.
        """
        report = Report(str(self.grown.path), trained=self.trained)
        writer = Writer(
            self.checkpoint, settled.assembly, self.stored, settled.folded, self.trained, dtype, self.more_layers
        )
        try:
            most = largest_file or self.checkpoint.largest_file or LARGEST_FILE
            writer.write(self.folder, settled.changes, most, report, progress)
        except OSError as problem:
            raise CannotWrite(f"{self.folder}: cannot be written ({problem.strerror or problem})") from problem
        return writer, report

    def check(self, writer: Writer, report: Report) -> None:
        """Check the written checkpoint: its tensors, and its outputs against the source's and the file's.

        Raises:
            ModelsDiffer: the outputs differ by more than the tolerance, or a tensor is wrong or missing.
            Refused: the file runs on none of the inputs.
        """
        assembly, rounding = writer.assembly, writer.rounding()
        report.tolerance, report.tolerance_reason = self.fed.tolerance(rounding.source)
        report.file_tolerance = self.fed.tolerance(rounding.file)[0] if self.has_file else None
        model = self._loaded(writer, report)
        computed = [outputs(model, case) for case, _ in self.compared]
        if not report.trained:
            pairs = zip(computed, self.compared, strict=True)
            worst = Error.worst(
                [error for got, (_, want) in pairs for error in compare_with_source(got, want, assembly.orders)]
            )
            report.error_to_source = worst.relative
            if not worst.relative <= report.tolerance:
                _demand(worst, report.tolerance, "its source's", self._where(model, assembly, report.tolerance))
        del model
        gc.collect()
        if not self.has_file:
            report.cases = [case.label for case, _ in self.compared]
            return
        file = FileRunner(assembly.grown.path, assembly.grown.plan)
        to_file: list[Error] = []
        for got, (case, _) in zip(computed, self.compared, strict=True):
            try:
                to_file += file.compare(case, got)
            except RuntimeError:
                continue
            report.cases.append(case.label)
        if not to_file:
            raise Refused(f"{assembly.grown.path}: ONNX Runtime does not run it on any of the inputs that we tried")
        worst = Error.worst(to_file)
        report.error_to_file = worst.relative
        apart = [name for name, (_, layout) in assembly.also.items() if report.trained and len(layout.shape) > 1]
        hint = (
            f" (the file stores {apart[0]!r} separately from a tensor that is one with it in the checkpoint)"
            if apart
            else ""
        )
        assert report.file_tolerance is not None
        _demand(worst, report.file_tolerance, "the file's in ONNX Runtime", hint)

    def _loaded(self, writer: Writer, report: Report) -> Any:
        """The model of the written checkpoint, whose tensors have been checked."""
        loaded = open_model(read_checkpoint(self.folder))
        extra = loaded.missing - self.given.loaded.missing
        if extra:
            raise WrongTensors(f"the grown checkpoint lacks {sorted(extra)[0]}")
        check_loads(self.checkpoint, self.folder, loaded)
        tensors = check_tensors(loaded.stored or read_weights(weights_of(self.folder)), writer)
        report.tensors_checked = tensors.checked
        if tensors.wrong:
            more = f" (and {len(tensors.wrong) - 1} more)" if len(tensors.wrong) > 1 else ""
            raise WrongTensors(f"the grown checkpoint is wrong: {tensors.wrong[0]}{more}")
        if loaded.stored is None:
            for name in loaded.missing:
                zero(loaded.model, name)
        return loaded.model.float()

    def _where(self, model: Any, assembly: Assembly, tolerance: float) -> str:
        """In which layer the outputs of the written checkpoint begin to differ from the source's, for a message."""
        if self.more_layers:  # the layers have other numbers than in the source
            return ""
        source = open_model(self.source_checkpoint).model
        name = first_wrong_layer(model, source, torch_feeds(self.compared[0][0], source), assembly.orders, tolerance)
        return "; no layer of its own differs" if name is None else f"; the first layer that differs is {name}"


def _empty(folder: Path) -> None:
    """Remove everything in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sources(
    grown: Grown, source: Path | None, work: Path, known: bool | None = None
) -> tuple[dict[str, Source], bool]:
    """The source's initializers, and whether the grown file has been trained. `work` is a folder for large arrays."""
    if source is None:
        stored, torn = sources.added_up(grown, work)
        if torn:
            raise BadRequest(
                f"{grown.path}: has been trained (the repeats of {torn[0]!r} differ): "
                "name the ONNX file that it was grown from with --source"
            )
        return stored, False
    stored = sources.from_file(grown, source)
    if known is not None:
        return stored, known
    trained = any(
        not np.array_equal(
            grown.remade(name, tensor.array, grown.tensors[name].dtype), grown.tensors[name].numpy(), equal_nan=True
        )
        for name, tensor in stored.items()
        if tensor.size > 1
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
        shape = sorted(squeezed_shape(array))
        for initializer in matches.unused:
            candidate = stored[initializer].stored
            if array.size > 1 and sorted(squeezed_shape(candidate)) == shape:
                counts = (_differing(stored[initializer], values(array)), array.size)
                raise BadModel(
                    f"{hint}: {counts[0]} of the {counts[1]} elements of {name} differ from {initializer!r} "
                    "(this is another checkpoint, or the exporter merged other tensors into this one)"
                )


def _differing(theirs: Source, ours: Array) -> int:
    """The number of elements that differ beyond rounding, as the tensors are or transposed."""
    a, b = squeezed(theirs.array), squeezed(ours)
    counts = [int((np.abs(view - b) > theirs.tolerance).sum()) for view in (a, a.T) if view.shape == b.shape]
    return min(counts, default=b.size)


def _demand(worst: Error, tolerance: float, whose: str, hint: str = "") -> None:
    """Raise `ModelsDiffer` where the worst error is larger than the tolerance, or not a number."""
    if not worst.relative <= tolerance:
        shown = "its shape" if math.isinf(worst.relative) else f"relative error {worst.relative:.1e} > {tolerance:.1e}"
        raise ModelsDiffer(f"the grown checkpoint's output {worst.name} differs from {whose}: {shown}{hint}")
