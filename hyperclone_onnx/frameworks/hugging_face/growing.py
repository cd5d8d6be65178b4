"""Grow a Hugging Face checkpoint by the plan that grew its ONNX file."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.errors import BadModel, BadRequest, ModelsDiffer, Refused
from hyperclone_onnx.frameworks.hugging_face import sources
from hyperclone_onnx.frameworks.hugging_face.checkpoint import (
    Checkpoint,
    Loaded,
    first_line,
    load,
    quiet,
    read_checkpoint,
    stored_tensors,
    to_numpy,
    torch,
)
from hyperclone_onnx.frameworks.hugging_face.checking import (
    Error,
    Feeding,
    FileRunner,
    Outputs,
    compare_with_source,
    feeding,
    outputs,
    torch_feeds,
)
from hyperclone_onnx.frameworks.hugging_face.configuration import Change, Search, changed_config, written_config
from hyperclone_onnx.frameworks.hugging_face.layout import Layout, grown_shape, laid_out, squeezed
from hyperclone_onnx.frameworks.hugging_face.matching import Matches, match
from hyperclone_onnx.frameworks.hugging_face.reading import MANIFEST, manifest
from hyperclone_onnx.frameworks.hugging_face.recording import Step, record
from hyperclone_onnx.frameworks.hugging_face.scales import Compensation, compensations
from hyperclone_onnx.frameworks.hugging_face.sources import Grown, Source, read_grown
from hyperclone_onnx.frameworks.hugging_face.writing import Entry, write_weights
from hyperclone_onnx.maps import Indices

Array = npt.NDArray[Any]
Notify = Callable[[str], None]

CASES = 3
"""Input sets that are compared."""


@dataclass
class Report:
    """What the handoff did."""

    model: str
    matched: dict[str, str] = field(default_factory=dict)
    """How each checkpoint tensor is made from the file's initializers."""
    repeated: dict[str, str] = field(default_factory=dict)
    """Tensors that are not in the file, and so were repeated without noise."""
    unchanged: dict[str, str] = field(default_factory=dict)
    """Tensors taken over as they are, and why."""
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """The configuration's fields that changed: from, to."""
    compensations: dict[str, str] = field(default_factory=dict)
    """What was folded into stored tensors for constants that the model derives from its sizes."""
    copied: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    trained: bool = False
    """Whether the file's weights are others than growth made: only the file itself is then a reference."""
    cases: list[str] = field(default_factory=list)
    error_to_source: float | None = None
    error_to_file: float = 0.0
    tolerance: float = 0.0
    tolerance_reason: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def grow_checkpoint(
    big: Path, like: Path, folder: Path, *, source: Path | None = None, notify: Notify | None = None
) -> Report:
    """Write the checkpoint that is to `like` what the grown file is to its source.

    Args:
        big: the grown ONNX file, fresh or trained.
        like: the checkpoint that the source was exported from.
        folder: an empty folder to write into. Its contents are right only if this returns.
        source: the ONNX file that `big` was grown from; needed where `big` has been trained.
        notify: told of each stage begun.

    Raises:
        BadModel: a file cannot be read, or `like` is another model than the file's source.
        BadRequest: the file carries no plan, or has been trained and no source is given.
        Refused: the configuration cannot say the new sizes, or the model derives constants from them.
        ModelsDiffer: the result does not compute what the source, or the file, computes.
        CannotWrite: the folder cannot be written.
        MissingExtra: transformers is not installed.
    """
    big, like, folder = Path(big), Path(like), Path(folder)
    say = notify or (lambda _: None)
    say("reading")
    grown, checkpoint = read_grown(big), read_checkpoint(like)
    given = _Given.read(checkpoint)
    say("matching")
    stored, trained = _sources(grown, source)
    matches = match(stored, given.floating, grown.order, grown.shared)
    _check_matches(checkpoint, grown, stored, given, matches)
    say("configuring")
    chooser = _Chooser(grown, given, matches)
    search = Search(checkpoint, grown.plan, chooser.certain(), given.shapes)
    changes = search.run()
    say("measuring")
    fed = feeding(big, given.model)
    runs = _Runs.of(given, fed, checkpoint)
    pruned = _effective(checkpoint, search, changes, runs, given)
    given.release()
    last: Refused | None = None
    for attempt in pruned:
        assembly = chooser.assembled(search.shapes(attempt) or {})
        try:
            folded = _measured(checkpoint, attempt, assembly, stored, runs, grown)
        except Refused as problem:
            last = problem if last is None or isinstance(last, _DoesNotRun) else last
            continue
        break
    else:
        assert last is not None
        raise last
    say("writing")
    report = Report(str(big), trained=trained)
    _write(folder, checkpoint, attempt, assembly, folded, report)
    say("validating")
    _check(folder, checkpoint, fed, runs, assembly, report)
    return report


# -- what is given ----------------------------------------------------------------------------------------------


@dataclass
class _Given:
    """The source's model and its tensors."""

    loaded: Loaded
    floating: dict[str, Array]
    others: dict[str, Array]
    """Tensors that are no floating ones: they are taken over."""
    types: dict[str, str]
    names: list[str]

    @staticmethod
    def read(checkpoint: Checkpoint) -> _Given:
        loaded = checkpoint.load()
        tensors = loaded.tensors()
        types = {name: str(each.dtype).removeprefix("torch.") for name, each in tensors.items()}
        floating = {name: to_numpy(each) for name, each in tensors.items() if each.is_floating_point()}
        others = {name: each.numpy() for name, each in tensors.items() if not each.is_floating_point()}
        for name in loaded.missing:
            _zero(loaded.model, name)
        return _Given(loaded, floating, others, types, list(tensors))

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every stored tensor of the model, those that the checkpoint lacks too."""
        return {name: tuple(each.shape) for name, each in stored_tensors(self.model).items()}

    def release(self) -> None:
        """Let go of the model: its tensors stay."""
        self.loaded = Loaded(None, self.loaded.missing)
        gc.collect()


def _zero(model: Any, name: str) -> None:
    """What a checkpoint lacks is drawn at random each time: zeros are the same in source and grown model."""
    found = stored_tensors(model).get(name)
    if found is not None:
        with torch.no_grad():
            found.zero_()


def _sources(grown: Grown, source: Path | None) -> tuple[dict[str, Source], bool]:
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
        not np.array_equal(grown.remade(name, each.array), grown.tensors[name].numpy(), equal_nan=True)
        for name, each in stored.items()
        if each.array.size > 1
    )
    return stored, trained


def _check_matches(
    checkpoint: Checkpoint, grown: Grown, stored: Mapping[str, Source], given: _Given, matches: Matches
) -> None:
    """Raise where a tensor of the checkpoint looks like an initializer that it should be, and is not.

    Raises:
        BadModel: the checkpoint is not what the file was exported from.
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
            theirs = stored[initializer].array
            if array.size > 1 and sorted(sources.squeezed_shape(theirs)) == shape:
                counts = (_differing(theirs, array), array.size)
                raise BadModel(f"{hint}: {counts[0]} of the {counts[1]} elements of {name} differ from {initializer!r} "
                    "(another checkpoint, or the exporter merged other tensors into it)")


def _differing(theirs: Array, ours: Array) -> int:
    a, b = squeezed(theirs), squeezed(ours)
    counts = [int((each != b).sum()) for each in (a, a.T) if each.shape == b.shape]
    return min(counts, default=b.size)


# -- what is to be made -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Repeated:
    """A tensor that is not in the file: the source's own, repeated along its axes."""

    array: Array
    orders: tuple[Indices | None, ...]

    def made(self, factor: float = 1.0, offset: float = 0.0) -> Array:
        array = self.array
        for axis, order in enumerate(self.orders):
            array = array if order is None else np.take(array, order, axis=axis)
        return array if factor == 1.0 else ((array + offset) * factor - offset).astype(array.dtype)

    @property
    def grows(self) -> bool:
        return any(order is not None for order in self.orders)


@dataclass(frozen=True)
class _Assembly:
    """How every tensor of the grown checkpoint is made."""

    grown: Grown
    given: _Given
    layouts: dict[str, Layout]
    repeated: dict[str, _Repeated]
    also: dict[str, tuple[str, Layout]]
    """Initializers that no tensor is made from, and the tensor and layout that they can be read back from."""
    orders: dict[tuple[int, int], Indices]

    def fresh(self, stored: Mapping[str, Source]) -> dict[str, Callable[[], Array]]:
        """Each tensor as growth alone makes it, in float32."""

        def remade(initializer: str) -> Array:
            return self.grown.remade(initializer, stored[initializer].array)

        return {
            **{
                name: lambda layout=layout: laid_out(layout, remade, self.grown.axis)  # type: ignore[misc]
                for name, layout in self.layouts.items()
            },
            **{name: each.made for name, each in self.repeated.items()},
            **{name: lambda array=array: array for name, array in self.given.others.items()},  # type: ignore[misc]
        }


class _Chooser:
    """Chooses, for each checkpoint tensor, one of the layouts that fit its content."""

    def __init__(self, grown: Grown, given: _Given, matches: Matches) -> None:
        self.grown = grown
        self.given = given
        self.matches = matches
        self.orders = _orders(grown, matches)

    def certain(self) -> dict[str, tuple[int, ...]]:
        """The grown shapes of the tensors for which all layouts agree on it."""
        found = {}
        for name, layouts in self.matches.layouts.items():
            shapes = {grown_shape(each, self.grown.axis) for each in layouts}
            if len(shapes) == 1:
                found[name] = next(iter(shapes))
        return found

    def assembled(self, shapes: Mapping[str, tuple[int, ...]]) -> _Assembly:
        """Everything, with the shapes that the configuration asks for.

        Raises:
            Refused: a tensor that is not in the file would have to grow in a way that nothing tells.
        """
        layouts: dict[str, Layout] = {}
        repeated: dict[str, _Repeated] = {}
        for name, array in self.given.floating.items():
            wanted = shapes[name]
            fitting = [
                each for each in self.matches.layouts.get(name, ()) if grown_shape(each, self.grown.axis) == wanted
            ]
            if fitting:
                layouts[name] = fitting[0]
            else:
                repeated[name] = _Repeated(array, self._orders_of(name, array.shape, wanted))
        return _Assembly(self.grown, self.given, layouts, repeated, self._also(layouts), self.orders)

    def _orders_of(
        self, name: str, before: Sequence[int], after: Sequence[int]
    ) -> tuple[Indices | None, ...]:
        found = []
        for old, new in zip(before, after, strict=True):
            order = self.orders.get((old, new))
            if old != new and order is None:
                raise Refused(f"{name} is not in {self.grown.path}, and nothing tells how its {old} become {new}")
            found.append(order if old != new else None)
        return tuple(found)

    def _also(self, layouts: Mapping[str, Layout]) -> dict[str, tuple[str, Layout]]:
        used = {piece.initializer for each in layouts.values() for piece in each.pieces}
        found: dict[str, tuple[str, Layout]] = {}
        for name, candidates in self.matches.layouts.items():
            for each in candidates:
                initializer = each.pieces[0].initializer
                if len(each.pieces) == 1 and name in layouts and initializer not in used | found.keys():
                    shares = self.grown.shared(initializer) / self.grown.shared(layouts[name].pieces[0].initializer)
                    found[initializer] = name, each.scaled(shares)
        return found


def _orders(grown: Grown, matches: Matches) -> dict[tuple[int, int], Indices]:
    """For sizes before and after, the order of repeats that most axes of such sizes have."""
    seen: dict[tuple[int, int], Counter[bytes]] = {}
    kept: dict[bytes, Indices] = {}
    for layouts in matches.layouts.values():
        for piece in layouts[0].pieces:
            for axis in grown.axes(piece.initializer):
                if axis.grown != axis.source_size:
                    key = axis.source.tobytes()
                    kept[key] = axis.source
                    seen.setdefault((axis.source_size, axis.grown), Counter())[key] += 1
    return {sizes: kept[counter.most_common(1)[0][0]] for sizes, counter in seen.items()}


class _DoesNotRun(Refused):
    """A model cannot run with the sizes that its configuration then has."""


# -- measuring --------------------------------------------------------------------------------------------------


@dataclass
class _Runs:
    """The source's recording on one case, and its outputs on all."""

    steps: list[Step]
    feeds: dict[str, Any]
    outputs: list[tuple[Any, Outputs]]

    @staticmethod
    def of(given: _Given, fed: Feeding, checkpoint: Checkpoint) -> _Runs:
        model = given.model.float()
        found: list[tuple[Any, Outputs]] = []
        problem: Exception | None = None
        for case in fed.cases:
            try:
                found.append((case, outputs(model, case)))
            except (RuntimeError, ValueError, IndexError) as failure:
                problem = failure
            if len(found) == CASES:
                break
        if not found:
            raise Refused(f"{checkpoint.folder}: its model runs on none of the inputs made for it ({problem})")
        feeds = torch_feeds(found[0][0], model)
        steps, _ = record(model, feeds)
        return _Runs(steps, feeds, found)


def _effective(
    checkpoint: Checkpoint, search: Search, changes: list[Change], runs: _Runs, given: _Given
) -> list[list[Change]]:
    """The changes that matter, then without each of those that only show in activations."""
    kept: list[Change] = []
    unseen: list[Change] = []
    for change in changes:
        rest = [each for each in changes if each is not change]
        if search.wrong(rest):
            kept.append(change)
        elif _shows(checkpoint, change, runs, given):
            unseen.append(change)
    attempts = [[*kept, *unseen]]
    attempts += [[*kept, *(each for each in unseen if each is not left)] for left in unseen]
    if len(unseen) > 1:
        attempts.append(kept)
    return [each for each in attempts if search.wrong(each) == 0]


def _shows(checkpoint: Checkpoint, change: Change, runs: _Runs, given: _Given) -> bool:
    """Whether a field, changed alone, changes the shapes of what the source's model computes."""
    try:
        with quiet():
            model = checkpoint.model_class(changed_config(checkpoint, [change])).float().eval()
        _fill(model, {name: lambda a=a: a for name, a in {**given.floating, **given.others}.items()})  # type: ignore[misc]
        steps, _ = record(model, runs.feeds)
    except Exception:  # a model whose sizes do not fit one another raises whatever it likes: the field matters
        return True
    return [(s.name, s.shapes) for s in steps] != [(s.name, s.shapes) for s in runs.steps]


def _fill(model: Any, tensors: Mapping[str, Callable[[], Array]]) -> None:
    with torch.no_grad():
        for name, each in stored_tensors(model).items():
            if name in tensors:
                each.copy_(torch.from_numpy(np.array(_float32(tensors[name]()))))
            elif each.is_floating_point() and name in dict(model.named_parameters()):
                each.zero_()


def _float32(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _measured(
    checkpoint: Checkpoint,
    changes: Sequence[Change],
    assembly: _Assembly,
    stored: Mapping[str, Source],
    runs: _Runs,
    grown: Grown,
) -> dict[str, Compensation]:
    """What must be folded into the grown checkpoint's tensors."""
    with quiet():
        model = checkpoint.model_class(changed_config(checkpoint, changes)).float().eval()
    _fill(model, assembly.fresh(stored))
    names = {id(each): name for name, each in stored_tensors(model).items() if each.is_floating_point()}
    ratios = {
        index // size
        for index, size in ((each.grown, each.size) for each in grown.plan.maps.values())
        if index % size == 0
    }
    try:
        found = compensations(model, runs.feeds, runs.steps, names, ratios)
    except (RuntimeError, ValueError, IndexError, TypeError) as problem:
        shown = ", ".join(f"{each.name}={each.after}" for each in changes)
        raise _DoesNotRun(f"{checkpoint.folder}: its model does not run with {shown} ({first_line(problem)})") from problem
    finally:
        del model
        gc.collect()
    absent = next((name for name in found if name not in assembly.layouts and name not in assembly.repeated), None)
    if absent is not None:
        raise Refused(f"{checkpoint.folder}: {absent}, which the checkpoint does not have, would have to be scaled")
    return found


# -- writing ----------------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    changes: Sequence[Change],
    assembly: _Assembly,
    folded: Mapping[str, Compensation],
    report: Report,
) -> None:
    grown, given = assembly.grown, assembly.given
    dtype = Counter(grown.tensors[piece.initializer].dtype.numpy().name for each in assembly.layouts.values() for piece in each.pieces)
    main = dtype.most_common(1)[0][0]
    entries: dict[str, Entry] = {}
    layouts: dict[str, Layout] = {}
    for name in given.names:
        fold = folded.get(name, Compensation(1.0))
        if name in assembly.layouts:
            layout = assembly.layouts[name]
            layout = layout.scaled(fold.factor, fold.offset) if name in folded else layout
            layouts[name] = layout
            kind = grown.tensors[layout.pieces[0].initializer].dtype.numpy().name
            entries[name] = Entry(grown_shape(layout, grown.axis), kind, _reader(grown, layout))
            report.matched[name] = layout.described()
            if all(grown.recipe(piece.initializer) is None for piece in layout.pieces):
                report.unchanged[name] = "no axis of it grows"
        elif name in assembly.repeated:
            each = assembly.repeated[name]
            made = each.made(fold.factor, fold.offset)
            entries[name] = Entry(made.shape, main, lambda made=made: _as(made, main))  # type: ignore[misc]
            if each.grows:
                report.repeated[name] = f"{list(each.array.shape)} -> {list(made.shape)}"
            else:
                report.unchanged[name] = "it is not in the file, and keeps its size"
        else:
            array = given.others[name]
            entries[name] = Entry(array.shape, array.dtype.name, lambda array=array: array)  # type: ignore[misc]
            report.unchanged[name] = "whole numbers"
        if name in folded:
            plus = f" of it plus {fold.offset:g}" if fold.offset else ""
            report.compensations[name] = f"times {fold.factor:.8g}{plus}"
    report.weights = write_weights(folder, entries)
    fields = written_config(checkpoint, changes)
    report.config = {each.name: (each.before, each.after) for each in changes}
    for key in ("dtype", "torch_dtype"):
        if key in fields and fields[key] != main:
            report.config[key] = (fields[key], main)
            fields[key] = main
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    report.copied = checkpoint.copy_files(folder)
    also = {}
    for initializer, (name, layout) in assembly.also.items():
        fold = folded.get(name, Compensation(1.0))
        also[initializer] = name, layout.scaled(fold.factor, fold.offset) if name in folded else layout
    text = json.dumps(manifest(grown, layouts, also), separators=(",", ":"))
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    _note_sizes(folder, report)


def _reader(grown: Grown, layout: Layout) -> Callable[[], Array]:
    return lambda: laid_out(layout, lambda name: grown.tensors[name].numpy(), grown.axis)


def _as(array: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    return array.astype(dtype)


def _note_sizes(folder: Path, report: Report) -> None:
    """Files beside the model may speak of its sizes too (a pooling layer's width): say so."""
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
                report.notes.append(f"{name} is copied as it is: its {key} is {value}, {changed[value]} in the grown model")


# -- checking ---------------------------------------------------------------------------------------------------


def _check(
    folder: Path, checkpoint: Checkpoint, fed: Feeding, runs: _Runs, assembly: _Assembly, report: Report
) -> None:
    """Load what was written and compare it.

    Raises:
        ModelsDiffer: it does not compute what the source, or the file, computes.
    """
    loaded = load(folder, checkpoint.model_class)
    extra = loaded.missing - assembly.given.loaded.missing
    if extra:
        raise ModelsDiffer(f"the grown checkpoint lacks {sorted(extra)[0]}")
    for name in loaded.missing:
        _zero(loaded.model, name)
    model = loaded.model.float()
    report.tolerance, report.tolerance_reason = fed.tolerance
    file = FileRunner(assembly.grown.path, assembly.grown.plan)
    to_source: list[Error] = []
    to_file: list[Error] = []
    for case, want in runs.outputs:
        got = outputs(model, case)
        if not report.trained:
            to_source += compare_with_source(got, want, assembly.orders)
        try:
            to_file += file.compare(case, got)
        except RuntimeError:
            continue
        report.cases.append(case.label)
    if not to_file:
        raise Refused(f"{assembly.grown.path}: ONNX Runtime runs it on none of the inputs made for it")
    if to_source:
        worst = Error.worst(to_source)
        report.error_to_source = worst.relative
        _demand(worst, report, "its source's")
    worst = Error.worst(to_file)
    report.error_to_file = worst.relative
    _demand(worst, report, "the file's in ONNX Runtime")


def _demand(worst: Error, report: Report, whose: str) -> None:
    if not worst.relative <= report.tolerance:
        shown = "its shape" if math.isinf(worst.relative) else f"relative error {worst.relative:.1e} > {report.tolerance:.1e}"
        raise ModelsDiffer(f"the grown checkpoint's output {worst.name} differs from {whose}: {shown}")
