"""``handoff BIG --to TARGET -o DIR``: the weights of a grown model as a trainer's own checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks.checkpoints.manifest import Manifest, entries
from hyperclone_onnx.frameworks.compiled_model import PathLike, compile_model
from hyperclone_onnx.frameworks.listing import little_trained
from hyperclone_onnx.frameworks.optimizer.growing import Kind, write_optimizer
from hyperclone_onnx.frameworks.targets import Target
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.training_recipe import RECIPE, TrainingRecipe
from hyperclone_onnx.progress import Notify, tell_nobody
from hyperclone_onnx.publishing.publication import publication_folder
from hyperclone_onnx.writing.safetensors_files import write_safetensors

CHECKPOINT = "checkpoint"
"""The folder of a checkpoint that is one, within the folder of the handoff."""

LARGEST_FILE = 5_000_000_000
"""Bytes of weights in one safetensors file, unless told otherwise."""

Tensors = Mapping[str, ir.TensorProtocol]


@dataclass(frozen=True)
class HandedOver:
    """What a handoff wrote."""

    target: Target
    folder: str
    tensors: int
    parameters: int
    """Elements of all tensors, frozen ones too."""
    optimizer: dict[str, Any] | None = None
    validated_by: str | None = None
    """The framework that ONNX Runtime was compared with, on what was written."""
    hugging_face: dict[str, Any] = field(default_factory=dict)
    """How the checkpoint's tensors were found in the model, and what changed in its configuration."""
    training: TrainingRecipe | None = None
    """How to train it on, if it was grown."""
    warning: str | None = None
    """That little of the model is trained, where that is so."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def hand_over(
    model: PathLike,
    target: Target,
    output: PathLike,
    *,
    like: PathLike | None = None,
    source: PathLike | None = None,
    optimizer: PathLike | None = None,
    freeze: Sequence[str] = (),
    train: Sequence[str] = (),
    largest_file: int = LARGEST_FILE,
    check: bool = True,
    notify: Notify | None = None,
) -> HandedOver:
    """Write a model's weights into a folder, which appears only when all of it is right.

    Args:
        model: the (grown) ONNX file.
        target: ``pytorch`` (torch.distributed.checkpoint), ``jax`` (Orbax), ``safetensors``, or ``hf`` (a Hugging Face
            checkpoint).
        output: the folder to make.
        like: for ``hf``, the checkpoint that the small model was exported from.
        source: the small ONNX file; only needed where tensors or names cannot be recovered from the grown one.
        optimizer: the small model's AdamW state, to be grown beside the weights.
        freeze: globs of initializer names that are not to be trained.
        train: globs of initializer names that are to be trained.
        largest_file: bytes of one safetensors file; more are spread over several, with an index.
        check: whether to compare ONNX Runtime with the framework on what was written.
        notify: told of each stage begun.

    Raises:
        BadModel, BadRequest, Refused, CannotWrite, ModelsDiffer: see `errors`.
        MissingExtra: the target's extra is not installed.
    """
    if (target == "hf") != (like is not None):
        raise BadRequest("--like names the checkpoint that --to hf grows: give both or neither")
    say = notify or tell_nobody
    with publication_folder(Path(output)) as folder:
        if target == "hf":
            assert like is not None
            given = _given(freeze=freeze, train=train, optimizer=optimizer)
            if given:
                raise BadRequest(f"--to hf takes no {given}: a Hugging Face checkpoint holds all weights, and no more")
            return _to_hugging_face(Path(model), Path(like), source, folder, output, say)
        say("reading")
        _require(target)
        compiled = compile_model(model, freeze=freeze, train=train)
        parameters = entries(compiled.program, compiled.plan)
        if not parameters:
            raise BadRequest(f"{model}: it has no floating tensor that a trainer would hold")
        tensors = {each.path: compiled.tensors[each.initializer] for each in parameters}
        state: dict[str, Any] | None = None
        if optimizer is not None:
            say("growing the optimizer's state")
            kind = OPTIMIZER_KINDS.get(target, "safetensors")
            written = write_optimizer(model, optimizer, folder, kind, source=source, compiled=compiled)
            state = {**asdict(written), "file": Path(written.file).name}
        say("writing")
        weights = WRITERS[target](tensors, folder, largest_file)
        warning = little_trained(compiled.program.weights)
        growth = None if compiled.plan is None else _growth(compiled.plan)
        state_file = None if state is None else str(state["file"])
        training = None if compiled.plan is None else RECIPE
        advice = None if training is None else training.to_json()
        Manifest(Path(model).name, target, weights, state_file, growth, parameters, advice).write(folder)
        by = _checked(model, folder, say) if check else None
    size = sum(math.prod(each.shape) for each in parameters)
    return HandedOver(target, os.fspath(output), len(parameters), size, state, by, training=training, warning=warning)


def _given(**options: Any) -> str:
    return ", ".join(f"--{name}" for name, value in options.items() if value)


def _require(target: Target) -> None:
    """Say at once that a trainer is not installed: its module does."""
    name = {"pytorch": "torch", "jax": "jax"}.get(target)
    if name is not None:
        import_module(f"hyperclone_onnx.frameworks.{name}")


def _growth(plan: Plan) -> dict[str, Any]:
    """How the model was grown; the recipes stay in the model."""
    dims = {name: {"role": each.role, "from": each.map.size, "to": each.map.grown} for name, each in plan.dims.items()}
    return {"strategy": plan.strategy.to_json(), "dims": dims}


def _checked(model: PathLike, folder: Path, say: Notify) -> str:
    """Compare what was written with the model, as ONNX Runtime runs it."""
    from hyperclone_onnx.frameworks.checkpoints import read_weights
    from hyperclone_onnx.frameworks.checkpoints.matching import match
    from hyperclone_onnx.frameworks.parity import check_parity

    say("validating")
    paths = [each.path for each in Manifest.read(folder).tensors]
    arrays = read_weights(folder)
    found = match(arrays, {path: path for path in paths}, str(folder))
    return check_parity(Path(model), {path: arrays[name] for name, path in found.items()})


def _to_hugging_face(
    model: Path, like: Path, source: PathLike | None, folder: Path, output: PathLike, say: Notify
) -> HandedOver:
    from hyperclone_onnx.frameworks.checkpoints import read_weights
    from hyperclone_onnx.frameworks.hugging_face import grow_checkpoint

    report = grow_checkpoint(model, like, folder, source=None if source is None else Path(source), notify=say)
    written = read_weights(folder)
    size = sum(math.prod(each.shape) for each in written.values())
    return HandedOver("hf", os.fspath(output), len(written), size, hugging_face=report.to_json(), training=RECIPE)


def _write_pytorch(tensors: Tensors, folder: Path, _: int) -> str:
    from hyperclone_onnx.frameworks.exports.pytorch import write_checkpoint

    write_checkpoint(tensors, folder / CHECKPOINT)
    return CHECKPOINT


def _write_jax(tensors: Tensors, folder: Path, _: int) -> str:
    from hyperclone_onnx.frameworks.exports.jax import write_checkpoint

    write_checkpoint(tensors, folder / CHECKPOINT)
    return CHECKPOINT


def _write_safetensors(tensors: Tensors, folder: Path, largest_file: int) -> str:
    return write_safetensors(tensors, folder, largest_file, metadata={"format": "pt"})[-1].name


WRITERS: Mapping[Target, Callable[[Tensors, Path, int], str]] = {
    "pytorch": _write_pytorch,
    "jax": _write_jax,
    "safetensors": _write_safetensors,
}
"""(tensors, folder, bytes in one file) -> the name of the file or folder, within the folder, that holds the weights.

There is none for ``hf``: there a checkpoint of the small model is grown.
"""

OPTIMIZER_KINDS: Mapping[Target, Kind] = {"pytorch": "pytorch", "jax": "jax"}
"""The optimizer's state for a target; a safetensors file for any other target."""
