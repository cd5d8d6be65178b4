"""From a Hugging Face checkpoint to a grown one: export, grow, validate, hand back.

In: a folder with config.json and safetensors. Out: a folder that transformers loads, with the ONNX files in its folder
`onnx` if they are to be kept.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest, CannotWrite, in_bytes
from hyperclone_onnx.expansion.expanding import expand, plan_file, planned_model
from hyperclone_onnx.expansion.making import Planned
from hyperclone_onnx.expansion.report import Expansion
from hyperclone_onnx.expansion.request import GrowthOptions
from hyperclone_onnx.folders import check_fit
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import dtype_named
from hyperclone_onnx.frameworks.exports import HandedOver
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, read_checkpoint
from hyperclone_onnx.frameworks.hugging_face.exporting import Exported, export_model, has_cache
from hyperclone_onnx.frameworks.hugging_face.growing import grow_checkpoint
from hyperclone_onnx.frameworks.hugging_face.streaming import open_model
from hyperclone_onnx.planning.experts import Experts
from hyperclone_onnx.planning.training_recipe import RECIPE
from hyperclone_onnx.progress import Notify, ignore_stage
from hyperclone_onnx.publishing.publication import publication_folder, write_text
from hyperclone_onnx.summaries import Summarised, Summary
from hyperclone_onnx.system.patterns import is_excluded

MODEL, WITH_CACHE = "model.onnx", "model_with_past.onnx"
"""The names of the exported files. The second takes and gives the keys and values of earlier tokens."""

FOR_BOTH = ("strategy", "allow_change", "device", "check", "precision", "workers", "inputs", "dims")
"""The options of `expansion.expand` that also hold where experts are made in a second growth."""

FOLDER = "onnx"
"""The folder within the grown checkpoint in which the grown ONNX files are kept."""


@dataclass(frozen=True, repr=False)
class CheckpointExpansion(Summarised):
    """What growing a checkpoint did."""

    source: str
    output: str
    models: dict[str, Expansion]
    """For each ONNX file its expansion, by the file's name."""
    handover: HandedOver
    kept: list[str] = field(default_factory=list)
    """The ONNX files that are kept, by their paths within the output."""

    def summary(self) -> Summary:
        """The fields of the configuration that grew."""
        changed = self.handover.hugging_face["config"]
        line = f"{self.source} -> {self.output}, {self.handover.parameters:,} parameters, validated"
        return Summary(line, ("config.json", "from", "to"), [(name, *values) for name, values in changed.items()])

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "source": self.source,
            "output": self.output,
            "models": {name: expansion.to_json() for name, expansion in self.models.items()},
            "handover": self.handover.to_json(),
            "onnx": self.kept,
        }


@dataclass(frozen=True)
class CheckpointExport:
    """What exporting a checkpoint wrote."""

    source: str
    output: str
    files: list[Exported]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def export_checkpoint(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    cache: bool = False,
    notify: Notify | None = None,
) -> CheckpointExport:
    """Export a checkpoint as ONNX files in float32 into a new folder, with its tokenizer and configuration.

    Args:
        folder: the checkpoint.
        output: the folder to make; it must not exist, or be empty.
        cache: whether a second file is written that takes and gives the keys and values of earlier tokens.
        notify: called with the name of each stage when it begins.

    Raises:
        BadModel: the checkpoint cannot be read.
        BadRequest: the output exists.
        Refused: transformers does not have the model's class, or PyTorch cannot export it.
        CannotWrite: the folder cannot be written.
        MissingExtra: torch or transformers is not installed.
    """
    say = notify or ignore_stage
    with publication_folder(Path(output)) as partial:
        say("reading")
        checkpoint = read_checkpoint(Path(folder))
        files = _exported(checkpoint, partial, cache, say)
        checkpoint.copy_files(partial)
        shutil.copyfile(checkpoint.folder / "config.json", partial / "config.json")
    return CheckpointExport(os.fspath(folder), os.fspath(output), files)


def _exported(checkpoint: Checkpoint, folder: Path, cache: bool, say: Notify) -> list[Exported]:
    """Load a checkpoint's model and export it, without a cache and, if asked for, also with one."""
    opened = open_model(checkpoint)
    say("exporting")
    files = [export_model(checkpoint, opened, folder / MODEL)]
    if cache:
        say("exporting with a cache")
        files.append(export_model(checkpoint, opened, folder / WITH_CACHE, cache=True))
    del opened
    gc.collect()
    return files


def expand_checkpoint(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    factor: int = 1,
    requests: Mapping[str, int] | None = None,
    *,
    keep_onnx: bool = False,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    plan_out: str | os.PathLike[str] | None = None,
    notify: Notify | None = None,
    experts: Experts | None = None,
    exclude: Sequence[str] = (),
    **options: Any,
) -> CheckpointExpansion:
    """Grow a checkpoint into a new folder. The folder appears only after all checks have passed.

    With experts, the widths and layers grow first, if they are to. The experts are made of that checkpoint, and the
    folder has the class of a mixture (see `mixtures`).

    Args:
        folder: the checkpoint.
        output: the folder to make; it must not exist, or be empty.
        factor: as for `expansion.expand`.
        requests: as for `expansion.expand`.
        keep_onnx: whether the grown ONNX files stay, in the folder `onnx` of the output. A decoder of text then has a
            file with a cache beside the one without.
        dtype: the type of the weights; by default each keeps its type.
        max_shard_size: the most bytes of weights in one file; by default as in the source.
        plan_out: a file to which the plan is written too, as JSON.
        notify: called with the name of each stage when it begins.
        experts: the experts to make of each feed-forward block.
        exclude: patterns of files that are not copied, as they are called within the folder (``onnx/*``).
        options: passed on to `expansion.expand`.

    Raises:
        BadModel, BadRequest, Refused, ModelsDiffer, CannotWrite, MissingExtra: see `export_checkpoint`,
            `expansion.expand` and `growing.grow_checkpoint`.
    """
    source, out, say = Path(folder), Path(output), notify or ignore_stage
    if out.resolve() == source.resolve() or out.resolve().is_relative_to(source.resolve()):
        raise BadRequest(f"{out}: lies in the source folder; choose another output")
    with publication_folder(out) as partial:
        say("reading")
        checkpoint = read_checkpoint(source)
        with _work_beside(partial) as work:
            before: dict[str, Expansion] = {}
            if experts is not None:
                from hyperclone_onnx.frameworks.hugging_face.mixtures import mixture_class

                mixture_class(checkpoint, shared=experts.shared)
                if factor != 1 or requests or any(options.get(name) for name in ("sizes", "like", "layers")):
                    if plan_out is not None:
                        raise BadRequest(
                            "--plan-out is for one growth, and experts beside other sizes are made in a second one: "
                            "leave out --plan-out, or grow the checkpoint first and make experts of the result"
                        )
                    first = expand_checkpoint(
                        source, work / "dense", factor, requests, notify=notify, dtype="float32", **options
                    )
                    before = {f"{name}, before the experts": one for name, one in first.models.items()}
                    source, factor, requests = work / "dense", 1, None
                    options = {name: value for name, value in options.items() if name in FOR_BOTH}
                    dtype = dtype or checkpoint.main_type.name
                    checkpoint = read_checkpoint(source)
                options["experts"] = experts
            small, big = work / "small", work / FOLDER
            small.mkdir()
            big.mkdir()
            cache = keep_onnx and _keeps_cache(checkpoint)
            names = [file.file for file in _exported(checkpoint, small, cache, say)]
            models: dict[str, Expansion] = before
            grown: Path | ir.Model = big / MODEL
            if keep_onnx or _needs_files(options):
                for name in names:
                    made = expand(
                        small / name, big / name, factor, requests, notify=_named(say, name, names), **options
                    )
                    shown = str(out / FOLDER / name) if keep_onnx else None
                    models[name] = replace(made, source=os.fspath(folder), output=shown)
                check_fit(small, big, [Path(name) for name in names])
            else:
                growth: Any = {name: value for name, value in options.items() if name in GrowthOptions.__annotations__}
                planned = planned_model(small / MODEL, factor, requests, notify=say, **growth)
                _check_room(out, checkpoint, planned, dtype)
                models[MODEL] = replace(planned.result, source=os.fspath(folder), output=None)
                grown = planned.big
            report = grow_checkpoint(
                grown,
                source,
                partial,
                source=small / MODEL,
                trained=False,
                dtype=dtype,
                largest_file=max_shard_size,
                inputs=options.get("inputs"),
                dims=options.get("dims"),
                notify=say,
                progress=options.get("progress"),
            )
            for name in [name for name in report.copied if is_excluded(Path(name), exclude)]:
                _remove(partial / name, partial)
                report.copied.remove(name)
            report.model = str(out / FOLDER / MODEL) if keep_onnx else f"the ONNX file exported from {source}"
            kept: list[str] = []
            if keep_onnx:
                big.rename(partial / FOLDER)
                kept = [f"{FOLDER}/{name}" for name in names]
            if plan_out is not None:
                write_text(Path(plan_out), models[MODEL].plan.dumps() + "\n")
    handover = HandedOver("hf", os.fspath(output), *report.parameters, hugging_face=report.to_json(), training=RECIPE)
    return CheckpointExpansion(os.fspath(folder), os.fspath(output), models, handover, kept)


def _needs_files(options: Mapping[str, Any]) -> bool:
    """Whether the grown ONNX file is written and validated, although it is not kept.

    Otherwise the grown checkpoint is checked without it: every tensor, and all outputs. That shows whatever the file
    would show. It is written if experts are made, if outputs may change, or if a validation of the file is asked for.
    """
    asked = options.get("check", True) not in (True, False, "auto") or options.get("precision", "stored") != "stored"
    return bool(
        asked or options.get("experts") or options.get("allow_change") or options.get("device", "auto") == "cuda"
    )


def _check_room(out: Path, checkpoint: Checkpoint, planned: Planned, dtype: str | None) -> None:
    """Check that the disk has room for the grown checkpoint, before the long work.

    Raises:
        CannotWrite: it has not.
    """
    kind = checkpoint.main_type if dtype is None else dtype_named(dtype)
    needed = planned.result.parameters_after * kind.itemsize
    free = shutil.disk_usage(out.resolve().parent).free
    if needed > free:
        raise CannotWrite(
            f"{out} would have {in_bytes(needed)}, and its disk has {in_bytes(free)} free beside the exported model"
        )


def plan_checkpoint(
    folder: str | os.PathLike[str],
    factor: int = 1,
    requests: Mapping[str, int] | None = None,
    *,
    notify: Notify | None = None,
    **options: Any,
) -> Expansion:
    """Plan the growth of a checkpoint, and write nothing. The arguments are those of `expansion.plan_file`."""
    with exported_file(folder, notify) as file:
        planned = plan_file(file, factor, requests, notify=notify or ignore_stage, **options)
    return replace(planned, source=str(folder))


@contextmanager
def exported_file(folder: str | os.PathLike[str], notify: Notify | None = None) -> Iterator[Path]:
    """The ONNX file of a checkpoint, in a temporary folder that is removed at the end of the with-statement.

    Args:
        folder: the checkpoint.
        notify: called with the name of each stage when it begins.

    Raises:
        BadModel, Refused, MissingExtra: see `export_checkpoint`.
    """
    say = notify or ignore_stage
    say("reading")
    checkpoint = read_checkpoint(Path(folder))
    with tempfile.TemporaryDirectory(prefix="hyperclone-onnx.") as work:
        _exported(checkpoint, Path(work), False, say)
        yield Path(work) / MODEL


def _remove(file: Path, top: Path) -> None:
    """Remove a file, and the folders below `top` that are empty then."""
    file.unlink()
    for folder in file.parents:
        if folder == top or any(folder.iterdir()):
            return
        folder.rmdir()


def _keeps_cache(checkpoint: Checkpoint) -> bool:
    """Whether the model of a checkpoint has a cache. The model is built without weights to see it."""
    import torch

    from hyperclone_onnx.frameworks.hugging_face.configuration import built

    with torch.device("meta"):
        return has_cache(built(checkpoint, ()))


def _named(say: Notify, name: str, names: list[str]) -> Notify:
    return (lambda stage: say(f"{name}: {stage}")) if len(names) > 1 else say


@contextmanager
def _work_beside(partial: Path) -> Iterator[Path]:
    """A folder for the ONNX files, on the disk of the output. It is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="work.", dir=partial.parent) as work:
        yield Path(work)
